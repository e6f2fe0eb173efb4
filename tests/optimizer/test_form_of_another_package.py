"""A format of another package that holds an optimizer's state, in a form of its own."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import anyckpt
from anyckpt.checkpoint import Checkpoint, OptimizerForm, OptimizerState
from anyckpt.containers.safetensors import read_safetensors, safetensors_parts
from anyckpt.engine.plan import Literal, OutputFile, Plan
from anyckpt.errors import UsageError
from anyckpt.formats import registry
from anyckpt.formats.format import Format, WriteOptions
from anyckpt.operations.steps.carried_state import carry_optimizer
from anyckpt.optimizer.read import with_optimizer
from anyckpt.storage.location import Location
from anyckpt.tensor import LazyTensor
from tests.support import fixture_path

_STATE = "state."


def _detect(location: Location) -> bool:
    return "boxed.json" in location.names


def _read(location: Location) -> Checkpoint:
    tensors, _ = read_safetensors(location.open("boxed.safetensors"))
    about = json.loads(location.open("boxed.json").read(0, location.open("boxed.json").size))
    found = Checkpoint(location.path, "boxed", tensors, state_prefixes=(_STATE,))
    if about:
        found = replace(
            found, optimizer=lambda: _state(tensors, about), training=replace(found.training, has_optimizer=True)
        )
    return found


def _state(tensors: dict[str, LazyTensor], about: dict[str, Any]) -> OptimizerState:
    slots: dict[str, dict[str, LazyTensor]] = {}
    for name, tensor in tensors.items():
        if name.startswith(_STATE):
            _, slot, weight = name.split(".", 2)
            slots.setdefault(slot, {})[weight] = tensor
    return OptimizerState(slots, step=about["step"], groups=tuple(about["groups"]), group_of=about["group_of"])


def _write(checkpoint: Checkpoint, state: OptimizerState) -> Checkpoint:
    own = {f"{_STATE}{slot}.{name}": tensor for slot, held in state.slots.items() for name, tensor in held.items()}
    about = {"step": state.step, "groups": list(state.groups), "group_of": dict(state.group_of)}
    return replace(
        checkpoint, tensors={**checkpoint.tensors, **own}, state_prefixes=(_STATE,), objects={"boxed": about}
    )


def _plan(checkpoint: Checkpoint, options: WriteOptions) -> Plan:
    about = json.dumps(checkpoint.objects.get("boxed"), default=str).encode()
    ignored = {name: "has no place" for name in checkpoint.objects if name != "boxed"}
    files = (
        OutputFile("boxed.safetensors", tuple(safetensors_parts(checkpoint.tensors))),
        OutputFile("boxed.json", (Literal(about),), stage=1),
    )
    return Plan("boxed", files, ignored=ignored)


BOXED = Format("boxed", "a box", _detect, _read, _plan, optimizer=OptimizerForm("boxed", _write))


class EntryPoint:
    name, group, value, dist = "boxed", "anyckpt.formats", "tests:BOXED", None

    def load(self) -> Format:
        return BOXED


@pytest.fixture
def boxed(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(registry, "registered", lambda group: {"boxed": EntryPoint()})
    registry._registered.cache_clear()
    yield
    registry._registered.cache_clear()
    registry._loaded.pop("boxed", None)


def _values(path: Path) -> tuple[Any, ...]:
    found = with_optimizer(anyckpt.open(path)).optimizer
    assert found is not None
    state = found()
    slots = {slot: {name: t.numpy() for name, t in own.items()} for slot, own in state.slots.items()}
    return slots, state.step, [group["lr"] for group in state.groups]


@pytest.mark.parametrize("source", ["mcore/gpt_opt_plain/ckpt", "mcore/gpt_moe_opt_chained_ep2/ckpt"])
@pytest.mark.usefixtures("boxed")
def test_state_goes_there_and_on(source: str, tmp_path: Path) -> None:
    path = fixture_path(source)
    anyckpt.convert(path, tmp_path / "boxed", to="boxed", optimizer="keep")
    before, there = _values(path), _values(tmp_path / "boxed")
    for slot in ("exp_avg", "exp_avg_sq"):
        for name, value in there[0][slot].items():
            assert np.array_equal(value, before[0][slot][name]), (slot, name)
    assert there[1:] == before[1:]
    anyckpt.convert(tmp_path / "boxed", tmp_path / "dcp", to="dcp", optimizer="keep")
    again = _values(tmp_path / "dcp")
    assert again[0]["exp_avg"].keys() == there[0]["exp_avg"].keys()
    assert again[1:] == there[1:]


@pytest.mark.usefixtures("boxed")
def test_a_format_without_a_form_refuses_state_and_names_those_that_have_one() -> None:
    bare = Format("bare", "nothing", _detect, _read, _plan, dialect=lambda options: "hub")
    source = registry.read(fixture_path("mcore/gpt_opt_plain/ckpt"))
    with pytest.raises(UsageError, match="bare has no place for optimizer state.*lightning.*boxed"):
        carry_optimizer(source, source, bare, dict)
