"""Modules pickled whole, and TorchScript archives: named as ``state_dict()`` names them, and never built."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tests.formats.torch_archives import archive, tensor
from tests.support import fixture_path, sha256_of

import anyckpt
from anyckpt.checkpoint import Checkpoint
from anyckpt.errors import UnsafeError
from anyckpt.formats import registry
from anyckpt.pickling import Global, Record


def opened(name: str) -> Checkpoint:
    return registry.read(fixture_path(f"legacy/modules/{name}"))


def digests(checkpoint: Checkpoint) -> dict[str, str]:
    return {name: sha256_of(tensor) for name, tensor in checkpoint.weights().items()}


def module(name: str = "Net", **fields: Any) -> Record:
    state = {"training": True, "_parameters": {}, "_buffers": {}, "_modules": {}, "_forward_hooks": {}, **fields}
    return Record(Global("networks", name), (), True, state=state)


def saved(root: Any, tmp_path: Path) -> Checkpoint:
    path = tmp_path / "whole.pt"
    path.write_bytes(archive(root))
    return registry.read(path)


@pytest.mark.parametrize("name", ["whole_module.pt", "whole_module_in_dict.pt"])
def test_a_whole_module_is_its_state_dict(name: str) -> None:
    checkpoint = opened(name)
    assert digests(checkpoint) == digests(opened("state_dict.pt"))
    told = [warning for warning in checkpoint.warnings if "pickled module" in warning]
    assert len(told) == 1 and "__main__.Net" in told[0]


def test_only_parameters_and_persistent_buffers_are_weights(tmp_path: Path) -> None:
    child = module("Child", _parameters={"weight": tensor(), "bias": None}, note=tensor(), size=7)
    root = module(
        _buffers={"mean": tensor(), "cache": tensor()},
        _non_persistent_buffers_set={"cache"},
        _modules={"layer": child, "again": child, "none": None},
        history=[tensor()],
    )
    checkpoint = saved({"net": root, "epoch": 4}, tmp_path)
    assert list(checkpoint.weights()) == ["mean", "layer.weight", "again.weight"]
    assert set(checkpoint.tensors) - {f"net.{name}" for name in checkpoint.weights()} == {
        "net.cache", "net.layer.note", "net.again.note", "net.history.0",
    }  # fmt: skip
    assert checkpoint.training.epoch == 4 and checkpoint.model_prefix == "net."
    assert list(checkpoint.objects) == ["epoch"]


def test_a_module_of_a_graph_is_pickled_as_a_call(tmp_path: Path) -> None:
    fields = {"_parameters": {"weight": tensor()}, "_buffers": {}, "_modules": {}, "_code": "def forward(self): ..."}
    root = Record(Global("torch.fx.graph_module", "reduce_graph_module"), (fields, "import torch"))
    assert list(saved(root, tmp_path).weights()) == ["weight"]


def test_modules_that_share_without_end_are_refused(tmp_path: Path) -> None:
    root = module(_parameters={"weight": tensor()})
    for _ in range(40):
        root = module(_modules={"a": root, "b": root})
    with pytest.raises(UnsafeError, match="repeat a few others"):
        saved(root, tmp_path)


def test_a_whole_module_is_written_as_a_flat_state_dict(tmp_path: Path) -> None:
    source = fixture_path("legacy/modules/whole_module_in_dict.pt")
    done = anyckpt.convert(source, tmp_path / "out.pt", to="torch")
    assert any("settings and hooks are left out" in note for note in done.notes)
    assert digests(registry.read(tmp_path / "out.pt")) == digests(opened("state_dict.pt"))


@pytest.mark.parametrize("kind", ["scripted", "traced"])
def test_a_torchscript_archive_is_its_state_dict(kind: str) -> None:
    checkpoint = opened(f"torchscript_{kind}.pt")
    assert digests(checkpoint) == digests(opened("state_dict.pt"))
    assert any("TorchScript module of class Net" in warning for warning in checkpoint.warnings)


def test_a_frozen_module_has_its_weights_among_the_programs_constants() -> None:
    frozen, whole = opened("torchscript_frozen.pt"), digests(opened("state_dict.pt"))
    names = ["conv1.0.weight", "conv1.0.bias", "head.weight", "head.bias"]
    assert digests(frozen) == {f"CONSTANTS.c{number}": whole[name] for number, name in enumerate(names)}


def test_a_quantized_module_has_its_packed_weights() -> None:
    eager, program = opened("quantized_dynamic_state_dict.pt"), opened("torchscript_quantized.pt")
    assert set(program.weights()) == {name for name in eager.weights() if not name.endswith(("scale", "zero_point"))}
    assert digests(program).items() <= digests(eager).items()
    assert {name for name in program.objects if "_packed_params" in name} <= set(eager.objects)


def test_declarations_are_read_as_text_and_need_not_be_there(tmp_path: Path) -> None:
    root = Record(Global("__torch__.a", "Net"), (), True, state={"w": tensor(), "b": tensor(), "x": tensor(), "n": 3})
    program = 'class Other(Module):\n  __parameters__ = ["x", ]\nclass Net(Module):\n'
    cases = {
        "": ["w", "b", "x"],
        f'{program}  __parameters__ = ["w", ]\n': ["w", "b", "x"],  # torch 1.4 declares no buffers
        f'{program}  __parameters__ = ["w", ]\n  __buffers__ = ["b", ]\n': ["w", "b"],
        f"{program}  pass\nclass Last(Module):\n  __parameters__ = []\n  __buffers__ = []\n": ["w", "b", "x"],
        "class Net(" * 1000: ["w", "b", "x"],
    }
    for code, expected in cases.items():
        path = tmp_path / "program.pt"
        records = {"constants.pkl": b"\x80\x02).", "code/__torch__/a.py": code.encode()}
        path.write_bytes(archive(root, records))
        assert list(registry.read(path).weights()) == expected


def test_a_program_in_circles_is_read(tmp_path: Path) -> None:
    root = Record(Global("__torch__", "Net"), (), True, state={"w": tensor(), "list": []})
    root.state["list"].append(root)
    path = tmp_path / "program.pt"
    path.write_bytes(archive(root, {"constants.pkl": b"\x80\x02)."}))
    assert list(registry.read(path).weights()) == ["w"]
