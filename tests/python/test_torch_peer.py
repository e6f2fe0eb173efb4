"""Tensors of the real torch from checkpoints, and checkpoints from them that real libraries load."""

from __future__ import annotations

import json
import shutil
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.peer

from safetensors.torch import load_file, save_file  # noqa: E402
from tests.support import fixture_path  # noqa: E402

import anyckpt  # noqa: E402
from anyckpt.dtypes import BY_NAME  # noqa: E402
from anyckpt.operations.steps.live import Live, _DeviceSource  # noqa: E402
from anyckpt.storage.read_count import bytes_read  # noqa: E402
from anyckpt.storage.source import MemorySource  # noqa: E402
from anyckpt.tensor import Stored  # noqa: E402

LLAMA = "families/llama/hf"


def same(a: Any, b: Any) -> bool:
    """Whether two tensors have one type, shape and bits."""

    def flat(t: Any) -> Any:
        return t.detach().resolve_conj().resolve_neg().contiguous().reshape(-1).view(torch.uint8)

    return bool(a.dtype == b.dtype and a.shape == b.shape and (not a.numel() or torch.equal(flat(a), flat(b))))


def test_tensors_are_those_of_safetensors_and_nothing_is_read(tmp_path: Path) -> None:
    state = {"w": torch.arange(6, dtype=torch.bfloat16).reshape(2, 3), "f8": torch.ones(4).to(torch.float8_e4m3fn),
             "scale": torch.ones(4).to(torch.float8_e8m0fnu), "z": torch.zeros(()), "e": torch.empty(0, 3)}  # fmt: skip
    save_file(state, tmp_path / "m.safetensors")
    checkpoint = anyckpt.open(tmp_path / "m.safetensors")
    before = bytes_read()
    assert all(same(checkpoint[name].torch(), value) for name, value in state.items())
    assert bytes_read() == before
    assert checkpoint["w"].dtype == torch.bfloat16
    assert torch.bfloat16 == checkpoint["w"].dtype
    assert checkpoint["w"].dtype != torch.float16
    assert same(checkpoint["w"].cast(torch.float32).torch(), state["w"].float())
    for take in (torch.as_tensor, torch.asarray, torch.from_dlpack):
        assert same(take(checkpoint["w"]), state["w"])
    assert same(checkpoint["w"][:, 1].torch(), state["w"][:, 1])
    assert same(checkpoint["w"].permute((1, 0)).torch(), state["w"].t())


def test_what_is_written_to_a_mapping_stays_in_the_process(tmp_path: Path) -> None:
    save_file({"w": torch.ones(3)}, tmp_path / "m.safetensors")
    whole = (tmp_path / "m.safetensors").read_bytes()
    tensor = anyckpt.open(tmp_path / "m.safetensors")["w"]
    changed = tensor.torch(copy=False)
    changed.add_(1)
    assert changed.tolist() == [2, 2, 2]
    assert tensor.torch().tolist() == tensor.torch(copy=True).tolist() == [1, 1, 1]
    assert (tmp_path / "m.safetensors").read_bytes() == whole
    with pytest.raises(anyckpt.UsageError, match="without a copy"):
        tensor.cast("float16").torch(copy=False)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", BY_NAME)
def test_every_element_type(name: str) -> None:
    kind = BY_NAME[name]
    data = bytes(range(1, 17)) if name != "bool" else bytes([0, 1] * 8)
    tensor = Stored(MemorySource(data), 0, kind, (16 // kind.itemsize,))
    if not kind.in_torch:
        with pytest.raises(anyckpt.UsageError, match=f"no element type {name}"):
            tensor.torch()
        return
    made = tensor.torch()
    codes = {"quint8": torch.uint8, "qint8": torch.int8, "qint32": torch.int32}
    packed = name.startswith("quint") and name not in codes
    assert made.dtype == (torch.uint8 if packed else codes.get(name, getattr(torch, name)))
    assert bytes(made.view(torch.uint8).numpy()) == data
    if kind.kind != "quantized" or name == "float4_e2m1fn_x2":
        again = Live().tensor(made)
        assert again is not None
        assert (again.dtype, again.numpy().tobytes()) == (kind, data)


def test_a_state_dict_loads_into_its_model_and_ties_share_memory(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    path = fixture_path(LLAMA)
    checkpoint = anyckpt.open(path)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig.from_pretrained(path))
    model.load_state_dict(checkpoint.state_dict("torch"), assign=True)
    state = load_file(path / "model.safetensors")
    assert all(same(value, state[name]) for name, value in model.state_dict().items())
    table = torch.arange(3000.0)
    torch.save({"a": table, "b": table, "c": table.reshape(30, 100).t()}, tmp_path / "tied.pt")
    found = anyckpt.open(tmp_path / "tied.pt").state_dict("torch")
    assert found["a"].data_ptr() == found["b"].data_ptr() == found["c"].data_ptr()
    assert same(found["c"], table.reshape(30, 100).t())


def strange() -> dict[str, Any]:
    base = torch.arange(12.0).reshape(3, 4)
    return {
        "t": base.t(), "step": base[:, ::2], "repeated": base.expand(2, 3, 4), "one": base, "other": base,
        "conj": torch.randn(3, dtype=torch.complex64).conj(), "neg": torch.randn(3, dtype=torch.complex64).conj().imag,
        "f8": torch.ones(3).to(torch.float8_e5m2), "bf": torch.ones(2, 2, dtype=torch.bfloat16).t(),
        "empty": torch.empty(0, 3), "scalar": torch.tensor(3), "bool": torch.tensor([True, False]),
        "parameter": torch.nn.Parameter(base + 1), "tail": torch.arange(9, dtype=torch.int16)[5:],
    }  # fmt: skip


def test_torch_and_safetensors_load_what_is_saved(tmp_path: Path) -> None:
    state = strange()
    anyckpt.save(state, tmp_path / "x.pt", to="torch")
    loaded = torch.load(tmp_path / "x.pt", weights_only=True)
    assert all(same(loaded[name], value) for name, value in state.items())
    assert loaded["one"].data_ptr() == loaded["other"].data_ptr()
    anyckpt.save(state, tmp_path / "x.safetensors", to="safetensors")
    plain = {name: value.detach().resolve_neg().resolve_conj().contiguous().clone() for name, value in state.items()}
    save_file(plain, tmp_path / "theirs.safetensors", metadata={"format": "pt"})
    assert (tmp_path / "x.safetensors").read_bytes() == (tmp_path / "theirs.safetensors").read_bytes()


def trained() -> dict[str, Any]:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 5), torch.nn.ReLU(), torch.nn.Linear(5, 2))
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.randn(3, 4)).sum().backward()
    optimizer.step()
    return {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "epoch": 3}


@pytest.mark.parametrize("to", ["torch", "dcp", "lightning", "safetensors"])
def test_a_trainers_state_is_as_if_torch_had_saved_it(to: str, tmp_path: Path) -> None:
    state = trained()
    torch.save(state, tmp_path / "theirs.pt")
    optimizer = "keep" if to in ("torch", "safetensors") else "drop"  # nothing says which weights its numbers are of
    saved = anyckpt.save(state, tmp_path / "saved", to=to, optimizer=optimizer)
    made = anyckpt.convert(tmp_path / "theirs.pt", tmp_path / "made", to=to, optimizer=optimizer)
    assert (saved.ignored, saved.notes) == (made.ignored, made.notes)
    assert not anyckpt.diff(tmp_path / "saved", tmp_path / "made", raw=True)
    if to == "torch":
        assert (tmp_path / "saved").read_bytes() == (tmp_path / "made").read_bytes()
        loaded = torch.load(tmp_path / "saved", weights_only=True)
        assert loaded["model"]._metadata == state["model"]._metadata
        again = torch.optim.AdamW([torch.nn.Parameter(w) for w in loaded["model"].values()])
        again.load_state_dict(loaded["optimizer"])


def test_a_distributed_checkpoint_loads_in_torch(tmp_path: Path) -> None:
    from torch.distributed.checkpoint.state_dict_loader import _load_state_dict_from_keys

    state = {name: value for name, value in strange().items() if name not in ("conj", "neg")}
    anyckpt.save({"model": state}, tmp_path / "dcp", to="dcp")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loaded = _load_state_dict_from_keys(checkpoint_id=str(tmp_path / "dcp"))
    loaded = loaded.get("model", loaded)
    assert all(same(loaded[name], value) for name, value in state.items())


def test_transformers_loads_what_is_saved_of_its_model(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    model = transformers.LlamaForCausalLM.from_pretrained(fixture_path(LLAMA), dtype=torch.bfloat16)
    anyckpt.save(model.state_dict(), tmp_path / "hf", to="hf", config=model.config.to_dict(), max_shard_size="50kB")
    assert len(list((tmp_path / "hf").glob("*.safetensors"))) > 1
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype="auto")
    assert all(same(value, model.state_dict()[name]) for name, value in again.state_dict().items())
    for to in ("nemo", "nemo2", "megatron-core"):
        anyckpt.save(model.state_dict(), tmp_path / to, to=to, config=model.config.to_dict())
        anyckpt.convert(tmp_path / to, tmp_path / f"{to}-back", to="hf")
        found = load_file(tmp_path / f"{to}-back" / "model.safetensors")
        assert all(same(value, model.state_dict()[name]) for name, value in found.items())
        shutil.rmtree(tmp_path / f"{to}-back")


def test_a_folder_may_be_the_configuration(tmp_path: Path) -> None:
    state = load_file(fixture_path(LLAMA) / "model.safetensors")
    anyckpt.save(state, tmp_path / "hf", to="hf", config=fixture_path(LLAMA))
    theirs = json.loads((fixture_path(LLAMA) / "config.json").read_text())
    ours = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert ours["num_hidden_layers"] == theirs["num_hidden_layers"]
    assert not anyckpt.diff(tmp_path / "hf", fixture_path(LLAMA), weights_only=True)


@pytest.mark.filterwarnings("ignore")
def test_tensors_without_plain_elements_are_refused_by_name(tmp_path: Path) -> None:
    from torch.distributed.tensor import DTensor

    class Wrapped(torch.Tensor):
        @classmethod
        def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            raise AssertionError("not to be called")

    assert DTensor.__torch_dispatch__ is not torch.Tensor.__torch_dispatch__
    ones = torch.ones(2, 2)
    for value, problem in (
        (ones.to("meta"), "meta device"), (ones.to_sparse(), "torch.sparse_coo"), (ones.to_sparse_csr(), "sparse_csr"),
        (torch.quantize_per_tensor(ones, 1.0, 0, torch.quint8), "is quantized"),
        (torch.nested.nested_tensor([ones, ones[:1]]), "is a nested tensor"),
        (ones.as_subclass(Wrapped), "is a Wrapped"),
    ):  # fmt: skip
        with pytest.raises(anyckpt.UsageError, match=problem) as caught:
            anyckpt.save({"model": {"w": value}}, tmp_path / "x", to="torch")
        assert caught.value.tensor == "model.w"


def test_another_devices_memory_is_copied_as_it_is_read() -> None:
    source = _DeviceSource(torch, torch.arange(100, dtype=torch.uint8))
    assert source.read(3, 5) == bytes([3, 4, 5, 6, 7])
    assert source.identity() is None


def test_old_torch_without_a_type_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch, "float8_e8m0fnu")
    tensor = Stored(MemorySource(b"\1"), 0, BY_NAME["float8_e8m0fnu"], (1,))
    with pytest.raises(anyckpt.UsageError, match=f"torch {torch.__version__.split('+')[0]}.* has no element type"):
        tensor.torch()


def test_numpy_and_torch_agree() -> None:
    for tensor in anyckpt.open(fixture_path(LLAMA)).values():
        assert np.array_equal(tensor.torch().numpy(), np.asarray(tensor))
    assert "torch" in sys.modules
