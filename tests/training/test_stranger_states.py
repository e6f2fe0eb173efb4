"""What strangers give: files of one tensor, tensors that overlap, names and numbers that are none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tests.support import fixture_path

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.peer

import anyckpt.torch  # noqa: E402
from anyckpt.errors import AnyckptError, UsageError  # noqa: E402


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
