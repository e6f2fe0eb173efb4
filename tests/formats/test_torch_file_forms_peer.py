"""Our copy of a torch file is the same objects to torch: kinds, strides, gradients asked for, sharing, structure."""

from __future__ import annotations

import collections
import warnings
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.peer

import anyckpt  # noqa: E402

X = torch.arange(8.0)
B = torch.arange(8, dtype=torch.uint8)
BIG = torch.zeros(1000)


def _with_attribute(tensor: Any) -> Any:
    tensor.sequence_parallel = True
    return tensor


def _state_dict() -> Any:
    state = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.BatchNorm1d(3)).state_dict()
    assert state._metadata
    return state


SHARED = {"w": torch.ones(2)}
CASES: dict[str, Any] = {
    "attribute of a tensor": {"w": _with_attribute(torch.ones(2))},
    "attribute of a parameter": {"w": _with_attribute(torch.nn.Parameter(torch.ones(2)))},
    "overlapping views": {"x": X, "even": X[::2], "odd": X[1::2]},
    "flat buffer and its slices": {"flat": X, "a": X[:4].view(2, 2), "b": X[4:]},
    "same storage, other shape": {"a": BIG, "b": BIG.view(10, 100)},
    "bare storage": {"s": torch.arange(3.0).untyped_storage(), "w": torch.ones(1)},
    "bytes in a tensor and a bare storage": dict(zip("ws", [B, B.untyped_storage()], strict=True)),
    "requires_grad": {"w": torch.ones(2, requires_grad=True)},
    "parameter": {"w": torch.nn.Parameter(torch.ones(2)), "f": torch.nn.Parameter(torch.ones(2), requires_grad=False)},
    "channels last": {"w": torch.arange(16.0).view(1, 2, 2, 4).to(memory_format=torch.channels_last)},
    "transposed": {"w": torch.arange(6.0).view(2, 3).T, "b": torch.ones(3, dtype=torch.bfloat16)},
    "expanded": {"w": torch.arange(3.0).expand(4, 3)},
    "unsigned": {"w": torch.nn.Parameter(torch.arange(4).to(torch.uint16), requires_grad=False)},
    "tuple and list": {"t": (torch.ones(1), torch.zeros(1)), "l": [torch.ones(1), (torch.ones(2),)]},
    "other things in a tuple": {"t": (torch.ones(1), {1, 2}, "word")},
    "ordered": collections.OrderedDict(b=torch.ones(1), a=torch.zeros(1)),
    "state dict": _state_dict(),
    "one dictionary in two places": {"a": SHARED, "b": SHARED},
    "one tensor in two places": {"a": X, "b": X},
    "an empty tensor": {"w": torch.empty(0, 3), "v": torch.ones(2)},
}


NOT_IN_STREAMS = ("bare storage", "bytes in a tensor and a bare storage", "unsigned")


def alike(a: Any, b: Any, pairs: dict[int, int]) -> None:
    """Fails where one object is not as the other; what is one object on one side is one on the other."""
    assert type(a) is type(b)
    assert pairs.setdefault(id(a), id(b)) == id(b) or isinstance(a, (int, float, str, bool, type(None)))
    if isinstance(a, torch.Tensor):
        assert (a.shape, a.dtype, a.requires_grad, a.stride()) == (b.shape, b.dtype, b.requires_grad, b.stride())
        assert torch.equal(a, b)
        assert a.__dict__ == b.__dict__
        assert (a.storage_offset(), a.untyped_storage().nbytes()) == (b.storage_offset(), b.untyped_storage().nbytes())
        places = (a.untyped_storage().data_ptr(), b.untyped_storage().data_ptr())
        assert not places[0] or pairs.setdefault(places[0], places[1]) == places[1]
    elif isinstance(a, (torch.UntypedStorage, torch.TypedStorage)):
        assert a.tolist() == b.tolist()
        assert pairs.setdefault(a.data_ptr(), b.data_ptr()) == b.data_ptr()
    elif isinstance(a, dict):
        assert list(a) == list(b)
        assert getattr(a, "__dict__", None) == getattr(b, "__dict__", None)
        for key in a:
            alike(a[key], b[key], pairs)
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b)
        for one, other in zip(a, b, strict=True):
            alike(one, other, pairs)
    else:
        assert a == b


@pytest.mark.parametrize(
    ("name", "legacy"),
    [(name, old) for name in CASES for old in (False, True) if not old or name not in NOT_IN_STREAMS],
)
def test_the_same_objects(tmp_path: Path, name: str, legacy: bool) -> None:
    source, copy = tmp_path / "source.pt", tmp_path / "copy.pt"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.save(CASES[name], source, _use_new_zipfile_serialization=not legacy)
        done = anyckpt.convert(source, copy, to="torch")
        assert (done.ignored, done.notes) == ({}, ())
        alike(torch.load(source, weights_only=True), torch.load(copy, weights_only=True), {})
    assert not anyckpt.diff(source, copy, raw=True)


def test_what_is_not_given_back_is_told(tmp_path: Path) -> None:
    source, copy = tmp_path / "source.pt", tmp_path / "copy.pt"
    torch.save({"c": torch.ones(2, dtype=torch.complex64).conj(), "s": torch.zeros(4000)[::8]}, source)
    done = anyckpt.convert(source, copy, to="torch")
    assert any("c: a lazy conjugate or negative is resolved" in note for note in done.notes)
    assert any("s: its strides change" in note for note in done.notes)
    assert any("bytes that no tensor shows" in note for note in done.notes)
    found = anyckpt.diff(source, copy, raw=True)
    assert [setting.name for setting in found.state] == ["form of s"]


def test_a_cast_keeps_what_the_tensor_is(tmp_path: Path) -> None:
    source, copy = tmp_path / "source.pt", tmp_path / "copy.pt"
    weight = torch.arange(16.0).view(1, 2, 2, 4).to(memory_format=torch.channels_last)
    torch.save({"model": {"w": torch.nn.Parameter(weight)}, "epoch": 3}, source)
    anyckpt.convert(source, copy, to="torch", dtype="bf16")
    found = torch.load(copy, weights_only=True)["w"]
    assert (type(found), found.dtype, found.stride()) == (torch.nn.Parameter, torch.bfloat16, weight.stride())
    assert torch.equal(found, weight.bfloat16())


def test_classes_of_their_own(tmp_path: Path) -> None:
    from torch.testing._internal.two_tensor import TwoTensor

    two = TwoTensor(torch.ones(2), torch.zeros(2))
    for value in ({"w": two}, {"m": torch.max(torch.eye(2), 0)}):
        source, copy = tmp_path / "source.pt", tmp_path / "copy.pt"
        torch.save(value, source)
        assert anyckpt.convert(source, copy, to="torch", overwrite=True).ignored == {}
        found, expected = torch.load(copy, weights_only=False), torch.load(source, weights_only=False)
        (one,), (other,) = found.values(), expected.values()
        assert type(one) is type(other)
        parts = [(one.a, other.a), (one.b, other.b)] if isinstance(one, TwoTensor) else zip(one, other, strict=True)
        assert all(torch.equal(x, y) for x, y in parts)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("wrapped", [False, True])
def test_a_quantized_model_takes_its_state_dict_from_our_copy(tmp_path: Path, wrapped: bool) -> None:
    def model() -> Any:
        plain = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.ReLU(), torch.nn.Linear(4, 2))
        return torch.ao.quantization.quantize_dynamic(plain, dtype=torch.qint8)

    one, other = model(), model()
    state = one.state_dict()
    torch.save({"state_dict": state, "epoch": 3, "run.name": "a"} if wrapped else state, tmp_path / "source.pt")
    done = anyckpt.convert(tmp_path / "source.pt", tmp_path / "copy.pt", to="torch")
    assert sorted(done.ignored) == (["epoch", "run.name"] if wrapped else [])
    other.load_state_dict(torch.load(tmp_path / "copy.pt", weights_only=False))
    x = torch.rand(3, 4)
    assert torch.equal(one(x), other(x))


@pytest.mark.parametrize("state", ["keep", "drop"])
@pytest.mark.parametrize("name", CASES)
def test_the_same_objects_in_a_lightning_checkpoint(tmp_path: Path, name: str, state: str) -> None:
    source, copy = tmp_path / "source.ckpt", tmp_path / "copy.ckpt"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        moments = {
            "state": {0: {"step": torch.ones(()), "kept": (torch.ones(1), X)}},
            "param_groups": [{"params": [0]}],
        }
        root = {
            "epoch": 1, "global_step": 2, "pytorch-lightning_version": "2.6.0", "state_dict": CASES[name],
            "optimizer_states": [moments], "lr_schedulers": [], "loops": {}, "callbacks": {},
            "hyper_parameters": {"betas": (0.9, 0.99)},
        }  # fmt: skip
        torch.save(root, source)
        done = anyckpt.convert(source, copy, to="lightning", optimizer=state)
        one, other = torch.load(source, weights_only=True), torch.load(copy, weights_only=True)
        if state == "drop":
            one["optimizer_states"] = []
        alike({key: one[key] for key in sorted(one)}, {key: other[key] for key in sorted(other)}, {})
    assert not done.notes
    left = {"optimizer_states", "lr_schedulers", "callbacks"} if state == "drop" else set()
    assert {name.partition(".")[0] for name in done.ignored} == left


FLAT_CASES = [name for name in CASES if name not in ("tuple and list", "other things in a tuple", "bare storage",
    "bytes in a tensor and a bare storage", "one dictionary in two places")]  # fmt: skip


@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize("name", FLAT_CASES)
def test_the_same_tensors_become_a_lightning_state_dict(tmp_path: Path, name: str, wrapped: bool) -> None:
    source, copy = tmp_path / "source.pt", tmp_path / "copy.ckpt"
    torch.save({"epoch": 3, "model": CASES[name]} if wrapped else CASES[name], source)
    done = anyckpt.convert(source, copy, to="lightning")
    expected, found = torch.load(source, weights_only=True), torch.load(copy, weights_only=True)["state_dict"]
    expected = expected["model"] if wrapped else expected
    alike(collections.OrderedDict(expected) if type(expected) is dict else expected, found, {})
    assert not done.notes


def test_objects_beside_sharded_weights_stay_of_their_kinds(tmp_path: Path) -> None:
    root = {
        "epoch": 1, "global_step": 2, "pytorch-lightning_version": "2.6.0", "state_dict": {"w": torch.ones(2)},
        "optimizer_states": [], "lr_schedulers": [], "loops": {}, "callbacks": {"best": (torch.ones(1), X, 3)},
    }  # fmt: skip
    torch.save(root, tmp_path / "a.ckpt")
    anyckpt.convert(tmp_path / "a.ckpt", tmp_path / "b.ckpt", to="lightning", sharded=True, optimizer="keep")
    anyckpt.convert(tmp_path / "b.ckpt", tmp_path / "c.ckpt", to="lightning", optimizer="keep")
    for found in (
        torch.load(tmp_path / "b.ckpt" / "meta.pt", weights_only=True),
        torch.load(tmp_path / "c.ckpt", weights_only=True),
    ):
        alike(root["callbacks"], found["callbacks"], {})
