"""What strangers give: files of one tensor, tensors that overlap, names and numbers that are none."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
from tests.support import fixture_path

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.peer

import anyckpt.torch  # noqa: E402
from anyckpt.errors import AnyckptError, MappingError, OutputError, UsageError  # noqa: E402


def test_a_file_of_one_tensor(tmp_path: Path) -> None:
    torch.save(torch.arange(3.0), tmp_path / "tensor.pt")
    (value,) = anyckpt.torch.load(tmp_path / "tensor.pt").values()
    assert torch.equal(value, torch.arange(3.0))


@pytest.mark.parametrize("path", sorted(fixture_path("legacy/malicious").glob("*.p*")), ids=lambda path: path.name)
def test_hostile_files_are_loaded_as_data_or_refused(path: Path) -> None:
    try:
        anyckpt.torch.load(path)
    except AnyckptError as error:
        assert str(error)


def test_a_tensor_of_overlapping_elements_is_not_filled(tmp_path: Path) -> None:
    anyckpt.torch.save({"w": torch.arange(12.0).reshape(3, 4)}, tmp_path / "out")
    with pytest.raises(UsageError, match=r"tensor .w.: cannot be filled.*one in memory"):
        anyckpt.torch.load({"w": torch.zeros(1, 4).expand(3, 4)}, tmp_path / "out")


@pytest.mark.parametrize("name", [".s{step}", "a/{step}", "../{step}", "/tmp/{step}", "{step.foo}", "{step"])
def test_a_name_that_latest_would_not_find(name: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is no name for checkpoints"):
        anyckpt.torch.Saver(tmp_path / "run", name=name)


@pytest.mark.parametrize("arguments", [{"step": "x"}, {"step": None}, {"step": 1, "metric": "low"}])
def test_numbers_that_are_none(arguments: dict[str, Any], tmp_path: Path) -> None:
    with anyckpt.torch.Saver(tmp_path / "run") as saver, pytest.raises(UsageError, match="number"):
        saver.save({"w": torch.ones(1)}, **arguments)


def test_numbers_of_torch_are_numbers(tmp_path: Path) -> None:
    keep = anyckpt.torch.Retention(last=1, best=1)
    with anyckpt.torch.Saver(tmp_path / "run", keep=keep) as saver:
        for step, loss in enumerate((2.0, 1.0, 3.0, 4.0)):
            saver.save({"w": torch.ones(1)}, torch.tensor(step), metric=torch.tensor(loss))
    assert sorted(path.name for path in (tmp_path / "run").glob("step-*")) == ["step-1", "step-3"]


def test_tuples_of_tensors_stay_tuples_in_a_torch_file(tmp_path: Path) -> None:
    def state(value: float) -> dict[str, Any]:
        return {
            "pair": (torch.full((2,), value), 3),
            "list": [torch.full((1,), value), (torch.full((2,), value), "x")],
            "in": {"deep": ({"a": torch.full((2,), value)}, (torch.full((), value),)), "plain": (1, 2)},
        }

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: plain(inner) for key, inner in value.items()}
        if isinstance(value, (list, tuple)):
            return type(value)(map(plain, value))
        return value.tolist() if isinstance(value, torch.Tensor) else value

    torch.save(state(1), tmp_path / "theirs.pt")
    anyckpt.torch.save(state(1), tmp_path / "ours.pt", format="torch")
    for name in ("theirs.pt", "ours.pt"):
        assert plain(anyckpt.torch.load(tmp_path / name)) == plain(state(1))
        filled = state(0)
        report = anyckpt.torch.load(filled, tmp_path / name)
        assert plain(filled) == plain(state(1))
        assert report.missing == ()


class Held:
    """An object that holds a tensor."""

    def __init__(self) -> None:
        self.tensor = torch.ones(2)


def test_an_object_that_holds_a_tensor_comes_back_where_its_class_is_trusted(tmp_path: Path) -> None:
    anyckpt.torch.save({"held": Held(), "w": torch.ones(1)}, tmp_path / "x.pt", format="torch")
    state = {"held": None, "w": torch.zeros(1)}
    anyckpt.torch.load(state, tmp_path / "x.pt", classes=[Held])
    assert isinstance(state["held"], Held)
    assert state["held"].tensor.tolist() == [1, 1]


def nested() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])


def jagged() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=torch.jagged)


@pytest.mark.parametrize(
    ("make", "remedy"),
    [
        (nested, r"nested.*unbind\(\)"),
        (jagged, r"nested.*unbind\(\)"),
        (lambda: torch.nn.parameter.UninitializedParameter(), "no shape yet.*call the module once"),
        (lambda: torch.eye(3).to_sparse(), r"sparse_coo.*to_dense\(\)"),
        (lambda: torch.empty(2, device="meta"), r"meta device.*to_empty"),
    ],
)
@pytest.mark.parametrize("inside", [lambda value: value, lambda value: (value, 1)], ids=["alone", "in a tuple"])
def test_tensors_that_are_more_than_elements_say_what_to_give(
    make: Any, remedy: str, inside: Any, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=f"tensor 'w': .*{remedy}"):
        anyckpt.torch.save({"w": inside(make())}, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_lazy_conjugates_are_saved_as_they_are_then_and_not_filled(tmp_path: Path) -> None:
    numbers = torch.tensor([1 + 2j, 3 - 1j])
    conjugate, negative = numbers.conj(), numbers.conj().imag
    with anyckpt.torch.Saver(tmp_path / "run") as saver:
        for step in (1, 2):
            saver.save({"c": conjugate, "n": negative, "t": (conjugate, negative)}, step)
            saver.wait()
            found = anyckpt.torch.load(tmp_path / "run" / f"step-{step}")
            assert found["c"].tolist() == [1 * step - 2j * step, 3 * step + 1j * step]
            assert found["n"].tolist() == [-2 * step, 1 * step]
            assert found["t"][0].tolist() == found["c"].tolist() and found["t"][1].tolist() == found["n"].tolist()
            numbers.mul_(2)
    for state in ({"c": conjugate}, {"n": negative}):
        with pytest.raises(UsageError, match=r"lazy conjugate or negative.*resolve_conj"):
            anyckpt.torch.load(state, tmp_path / "run" / "step-2")


def test_one_element_of_a_larger_step_is_contiguous(tmp_path: Path) -> None:
    with anyckpt.torch.Saver(tmp_path / "run") as saver:
        path = saver.save({"w": torch.arange(5.0, 9.0)[::2][:1]}, 1)
        saver.wait()
    target = torch.zeros(4)[::2][:1]
    anyckpt.torch.load({"w": target}, path)
    assert target.tolist() == [5]


def test_what_is_replaced_is_a_checkpoint_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.mkdir()
    (path / "thesis.tex").write_text("years of work")
    with pytest.raises(OutputError, match="something else than a checkpoint"):
        anyckpt.torch.save({"w": torch.ones(1)}, path, overwrite=True)
    assert (path / "thesis.tex").read_text() == "years of work"
    anyckpt.torch.save({"w": torch.ones(1)}, tmp_path / "y")
    (tmp_path / "y" / "logs").mkdir()
    (tmp_path / "y" / "logs" / "loss.csv").write_text("1")
    with pytest.raises(OutputError, match=r"files beside the checkpoint.*logs/loss\.csv.*move them"):
        anyckpt.torch.save({"w": torch.zeros(1)}, tmp_path / "y", overwrite=True)
    assert anyckpt.torch.load(tmp_path / "y")["w"].tolist() == [1]
    (tmp_path / "y" / "logs" / "loss.csv").unlink()
    anyckpt.torch.save({"w": torch.zeros(1)}, tmp_path / "y", overwrite=True)
    assert anyckpt.torch.load(tmp_path / "y")["w"].tolist() == [0]


@pytest.mark.parametrize("place", ["hf://org/model", "https://host/step-1", "nowhere://step-1"])
def test_places_where_ranks_cannot_write_together_are_refused(place: str) -> None:
    with pytest.raises(UsageError, match="no place to which ranks write together.*a disk, or s3://"):
        anyckpt.torch.save({"w": torch.ones(1)}, place)


@pytest.mark.parametrize("key", ["", 0, None, (1, 2), "a.b", "../x", "new\nline", "x" * 300])
@pytest.mark.parametrize("form", ["dcp", "torch", "megatron-core", "safetensors"])
def test_keys_of_any_kind_find_their_tensors_again(key: Any, form: str, tmp_path: Path) -> None:
    anyckpt.torch.save(
        {"in": {key: torch.ones(2), "other": torch.zeros(3)}, key: torch.ones(3)}, tmp_path / "x", format=form
    )
    state = {"in": {key: torch.zeros(2)}, key: torch.zeros(3)}
    anyckpt.torch.load(state, tmp_path / "x")
    assert state["in"][key].tolist() == [1, 1] and state[key].tolist() == [1, 1, 1]


def test_a_name_that_is_no_directory_is_refused_where_names_are_directories(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot be the name of a zarr array's directory"):
        anyckpt.torch.save({"": torch.ones(2)}, tmp_path / "x", format="megatron-core-zarr")


def test_a_list_that_holds_itself(tmp_path: Path) -> None:
    endless: list[Any] = []
    endless.append(endless)
    with pytest.raises(UsageError, match="hold themselves"):
        anyckpt.torch.save({"f": endless}, tmp_path / "x")


def test_a_tensor_where_the_other_side_has_an_object_is_called_so(tmp_path: Path) -> None:
    anyckpt.torch.save({"w": torch.ones(2), "n": 1}, tmp_path / "x")
    with pytest.raises(MappingError, match="'n' is an object there and a tensor in the state"):
        anyckpt.torch.load({"n": torch.zeros(1)}, tmp_path / "x")
    with pytest.raises(MappingError, match="'w' is a tensor there and none in the state"):
        anyckpt.torch.load({"w": 5}, tmp_path / "x")
