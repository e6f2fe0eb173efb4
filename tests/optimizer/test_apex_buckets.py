"""Apex's buckets, as its own code gathered them, against the whole tensors that the same code gave."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from anyckpt.containers.torch_file import read_torch, zip_parts
from anyckpt.engine.plan import OutputFile
from anyckpt.errors import FormatError, MappingError
from anyckpt.formats import registry
from anyckpt.optimizer.apex_buckets import REMAINDER, has_buckets, whole_states, with_remainder
from anyckpt.optimizer.read import with_optimizer
from anyckpt.pickling import Global, Record
from anyckpt.storage.local_file import LocalFile
from anyckpt.tensor import LazyTensor, from_array
from tests.support import expected_of, file_bytes, fixture_path

FIXTURE = "legacy/apex_distributed_adam"
CASES = ("gathered", "gathered_remainders")


def root_of(name: str) -> Any:
    return read_torch(LocalFile(fixture_path(f"{FIXTURE}/{name}.pt"))).root


def digest(tensor: LazyTensor) -> str:
    return hashlib.sha256(np.ascontiguousarray(tensor.numpy()).tobytes()).hexdigest()


@pytest.mark.parametrize("case", CASES)
def test_buckets_of_all_ranks_are_the_whole_state(case: str) -> None:
    expected = expected_of(FIXTURE)["cases"][case]
    root = root_of(case)
    assert has_buckets(root)
    whole = whole_states(root, "x")
    assert whole["state"]["step"] == expected["step"]
    assert [group["params"] for group in whole["param_groups"]] == expected["params"]
    weights = [t for t in root_of("weights").values() if t.ndim > 1]
    weights += [t for t in root_of("weights").values() if t.ndim == 1]
    for index, slots in expected["state"].items():
        own = whole["state"][int(index)]
        if REMAINDER in own:
            own["param"] = with_remainder(weights[int(index)].reshape((-1,)), own[REMAINDER])
        assert {slot: digest(own[slot]) for slot in slots} == {slot: facts["sha256"] for slot, facts in slots.items()}


@pytest.mark.parametrize("case", CASES)
def test_buckets_in_a_lightning_file(case: str, tmp_path: Path) -> None:
    """Names are those of the weights, groups by the rule that the counts prove."""
    weights = root_of("weights")
    contents = {
        "pytorch-lightning_version": "2.0.0", "global_step": 3, "state_dict": weights,
        "optimizer_states": [root_of(case)],
    }  # fmt: skip
    path = tmp_path / "x.ckpt"
    path.write_bytes(file_bytes(OutputFile("", zip_parts(contents))))
    found = with_optimizer(registry.read(str(path))).optimizer
    assert found is not None
    state = found()
    expected = expected_of(FIXTURE)["cases"][case]["state"]
    order = [n for n, t in weights.items() if t.ndim > 1] + [n for n, t in weights.items() if t.ndim == 1]
    for index, name in enumerate(order):
        for slot, key in (("master", "param"), ("exp_avg", "exp_avg"), ("exp_avg_sq", "exp_avg_sq")):
            assert digest(state.slots[slot][name]) == expected[str(index)][key]["sha256"]
    assert state.step == 3 and [state.group_of[name] for name in order] == [0, 0, 1, 1]


def bucket(**fields: Any) -> Record:
    shard = from_array(np.arange(8, dtype=np.float32))
    state = {"bucket_size": 8, "params_shard": shard, "exp_avg_shard": shard, "exp_avg_sq_shard": shard, **fields}
    return Record(Global("apex", "DistributedFusedAdam.StateBucket"), (), True, state=state)


def fragment(**fields: Any) -> Record:
    state = {"bucket_id": 0, "param_range": (0, 8), "bucket_range": (0, 8), **fields}
    return Record(Global("apex", "DistributedFusedAdam.ParameterFragment"), (), True, state=state)


def state(buckets: Any, *fragments: Any) -> dict[str, Any]:
    return {"state": {0: {"fragments": list(fragments)}, "buckets": buckets, "step": 1}, "param_groups": []}


def test_empty_fragments_of_other_buckets_say_nothing() -> None:
    empty = fragment(bucket_id=1, param_range=(8, 8), bucket_range=(8, 8))
    other = bucket(params_shard=None)
    found = whole_states(state([bucket(), other], fragment(), empty), "x")["state"][0]
    assert found["param"].numpy().tolist() == list(range(8))


BAD: dict[str, tuple[Any, str]] = {
    "bytes that are none": ({"gathered_states": [3]}, "no tensor of bytes"),
    "no list": ({"gathered_states": 3}, "gathered_states is not a list"),
    "no state": ({"state": {"buckets": []}}, "buckets is not a list"),
    "a bucket of another class": (state([3], fragment()), "is not one of Apex's StateBucket"),
    "a fragment of another class": (state([bucket()], bucket()), "is not one of Apex's ParameterFragment"),
    "no moment": (state([bucket(exp_avg_shard=None)], fragment()), "bucket 0 has no exp_avg_shard"),
    "no bucket": (state([bucket()], fragment(bucket_id=3)), "a fragment is of no bucket"),
    "no range": (state([bucket()], fragment(param_range=None)), "a fragment has no range"),
    "a range backwards": (state([bucket()], fragment(param_range=(8, 0))), "a fragment has no range"),
    "outside": (state([bucket()], fragment(bucket_range=(4, 12))), "lies outside its bucket"),
    "a gap": (
        state([bucket()], fragment(param_range=(0, 2), bucket_range=(0, 2)), fragment(param_range=(4, 8),
              bucket_range=(2, 6))),
        "do not cover it",
    ),
    "one rank of two": (state([bucket(bucket_size=16)], fragment()), "is not whole.*expected 16.*found 8 of 1 ranks"),
    "empty fragments": (state([bucket()], fragment(param_range=(8, 8), bucket_range=(8, 8))), "0 has no fragments"),
    "no fragments": (state([bucket()]), "fragments of 0 is not a list"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_what_is_damaged_is_named(case: str) -> None:
    root, words = BAD[case]
    with pytest.raises((FormatError, MappingError), match=words):
        whole_states(root, "x")
