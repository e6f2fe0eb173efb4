"""``io.json`` is what Fiddle itself loads, with stand-ins for NeMo's classes that only keep their arguments."""

from __future__ import annotations

import importlib.machinery
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.support import fixture_path

import anyckpt

pytest.importorskip("fiddle")
pytestmark = pytest.mark.peer

import fiddle  # noqa: E402
from fiddle._src.experimental import serialization  # noqa: E402


class Stand:
    """In place of a module of NeMo: every name in it is a class that keeps what it is given."""

    def __init__(self, **arguments: Any) -> None:
        self.arguments = arguments


class Module(types.ModuleType):
    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        # NeMo-Run's are children of Fiddle's of the same names.
        base = getattr(fiddle, name) if self.__name__ == "nemo_run.config" else Stand
        made = type(name, (base,), {"__module__": self.__name__})
        setattr(self, name, made)
        return made


class Finder:
    """Gives stand-ins for modules of NeMo, which is not installed."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name.partition(".")[0] not in ("nemo", "nemo_run"):
            return None
        return importlib.machinery.ModuleSpec(name, self, is_package=True)

    def create_module(self, spec: Any) -> Module:
        module = Module(spec.name)
        module.__path__ = []
        return module

    def exec_module(self, module: Module) -> None:
        pass


@pytest.fixture
def stands() -> Iterator[None]:
    finder: Any = Finder()
    sys.meta_path.insert(0, finder)
    yield
    sys.meta_path.remove(finder)
    for name in [name for name, module in sys.modules.items() if isinstance(module, Module)]:
        del sys.modules[name]


@pytest.mark.parametrize("source", ["nemo/nemo1_dist_tp1/model.nemo", "families/mixtral/hf", "families/nemotron/hf"])
def test_fiddle_reads_our_io_json(source: str, tmp_path: Path, stands: None) -> None:
    out = tmp_path / "out"
    anyckpt.convert(fixture_path(source), out, to="nemo2")
    found = serialization.load_json((out / "context" / "io.json").read_text())
    config = found.model.config
    written = anyckpt.open(out).config
    assert fiddle.get_callable(config).__name__ == written["config"]["_target_"].rpartition(".")[2]
    passed = fiddle.ordered_arguments(config)
    assert passed["num_layers"] == written["config"]["num_layers"] and len(passed) > 10
    for name, value in passed.items():
        if isinstance(value, (int, float, str, bool)) or value is None:
            assert written["config"][name] == value, name
    assert fiddle.get_callable(found.model).__name__ == written["_target_"].rpartition(".")[2]
    built = fiddle.build(found.model.config)
    assert built.arguments["num_layers"] == passed["num_layers"]
