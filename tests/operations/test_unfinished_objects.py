"""Whatever a writer to an object store dies in, no reader takes what it left for a checkpoint."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from tests.engine.memory_objects import DeadError, MemoryObjects, Store
from tests.places import MemoryPlace, registered
from tests.support import file_bytes, fixture_path

import anyckpt
from anyckpt.engine import claim, execute, object_notes
from anyckpt.engine.object_destination import ObjectDestination
from anyckpt.engine.plan import Plan
from anyckpt.errors import AnyckptError, UnfinishedError
from anyckpt.formats import registry

LLAMA = "families/llama/hf"
TWO = anyckpt.LayoutRequest(tensor_parallel=2)
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "hf": (LLAMA, {"max_shard_size": 40_000}),
    "hf of one file": (LLAMA, {}),
    "meta": (LLAMA, {}),
    "trtllm": (LLAMA, {"layout": TWO, "dtype": "bf16"}),
    "megatron-core": (LLAMA, {"max_shard_size": 40_000}),
    "megatron-core-zarr": (LLAMA, {}),
    "megatron-lm": (LLAMA, {"layout": TWO}),
    "megatron-bridge": (LLAMA, {}),
    "nemo": (LLAMA, {}),
    "nemo2": (LLAMA, {}),
    "dcp": (LLAMA, {}),
    "torch": (LLAMA, {}),
    "safetensors": (LLAMA, {}),
    "npz": (LLAMA, {}),
    "gguf": (LLAMA, {}),
    "peft": ("families/lora_llama/hf_adapter", {}),
    "whisper": ("whisper/tiny.pt", {}),
    "lightning": ("nemo/nemo1_basic_v2_5_3/toy.nemo", {"sharded": True}),
}


class _PlannedError(Exception):
    def __init__(self, plan: Plan) -> None:
        self.plan = plan


def planned(monkeypatch: pytest.MonkeyPatch, name: str) -> Plan:
    source, options = CASES[name]

    def stop(plan: Plan, *_: Any) -> Any:
        raise _PlannedError(plan)

    with monkeypatch.context() as patch, pytest.raises(_PlannedError) as found:
        patch.setattr(execute, "fingerprint", stop)
        anyckpt.convert(fixture_path(source), "/nowhere/out", to=name.partition(" ")[0], **options)
    return found.value.plan


def test_every_format_that_is_written_is_here() -> None:
    written = {name for name, format in registry.built_in().items() if format.plan is not None}
    assert written - {name.partition(" ")[0] for name in CASES} <= {"diffusers"}


@pytest.mark.parametrize("name", CASES)
def test_what_a_dead_writer_left_is_no_checkpoint(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = planned(monkeypatch, name)
    monkeypatch.setattr(claim, "_lives_here", lambda claim: False)
    monkeypatch.setattr(claim, "RENEWED_EVERY", 3600.0)
    monkeypatch.setattr(object_notes, "_WRITTEN_EVERY", 0.0)
    whole = _requests(plan)
    step = max(1, whole // 25)
    for number in sorted({*range(0, whole, step), *range(max(0, whole - 12), whole)}):
        store = Store()
        with pytest.raises(DeadError):
            _write(plan, MemoryObjects(store, dies_at=number))
        _assert_no_checkpoint(store, plan)


def _write(plan: Plan, objects: MemoryObjects) -> None:
    execute.execute(plan, ObjectDestination(objects, "a/out"), workers=1)


def _requests(plan: Plan) -> int:
    objects = MemoryObjects(Store())
    _write(plan, objects)
    return len(objects.requests)


def _assert_no_checkpoint(store: Store, plan: Plan) -> None:
    files = {f"out/{name}": data for name, data in store.below("a/out").items()}
    if "a/out" in store.objects:
        files["out"] = store.objects["a/out"][0]
    wanted = {f"out/{file.path}" if file.path else "out": file_bytes(file) for file in plan.files}
    read: Callable[[str], Any] = registry.read
    with registered("mem", MemoryPlace("mem://bucket", files)):
        try:
            read("mem://bucket/out")
        except UnfinishedError:
            return
        except AnyckptError:
            assert not files, sorted(files)
            return
    assert wanted.items() <= files.items(), "a half checkpoint was opened"
