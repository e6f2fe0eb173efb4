"""The distributed optimizer's file before Megatron-Core 0.7: a trained state, laid out as older releases did."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from anyckpt.checkpoint import Checkpoint
from anyckpt.errors import MappingError
from anyckpt.formats import registry
from anyckpt.operations.steps.joining import open_checkpoint
from anyckpt.optimizer.buffers import place_in_buckets
from anyckpt.optimizer.rank_parameters import Parameter, parameters_of
from anyckpt.pickling import Global
from anyckpt.tensor import Constant, LazyTensor, from_array
from tests.formats.megatron_lm_files import FILE, change_rank, copy_fixture
from tests.operations.test_open import hub_spelling
from tests.optimizer.old_buffers import RELEASES, filled
from tests.support import assert_tensors_equal_expected, expected_of

FIXTURE = "megatron_distopt_tp2_dp2"
SLOTS = {"master": "param", "exp_avg": "exp_avg", "exp_avg_sq": "exp_avg_sq"}
REPLICAS = 5  # so that buckets have padding


def laid_out(name: str, parameters: list[Parameter], slots: dict[str, dict[str, LazyTensor]]) -> dict[Any, Any]:
    """One rank's file, of a release."""
    release = RELEASES[name]
    buckets, padded, unpadded = filled([p.weight.size for p in parameters], release, 300, REPLICAS)
    contents: dict[str, Any] = {}
    for slot, key in SLOTS.items():
        tensors = []
        for numbers, size in zip(buckets, padded, strict=True):
            flat = np.full(size, 7, np.float32)  # padding is whatever was in memory
            own = [slots[slot][parameters[number].name].numpy().reshape(-1) for number in numbers]
            flat[: sum(part.size for part in own)] = np.concatenate(own)
            tensors.append(from_array(flat))
        contents[key] = tensors if release.buckets else tensors[0]
    kind: Any = Global("torch", "bfloat16")
    kinds = (kind, kind) if release.shared_alone else kind
    state: dict[Any, Any] = {0: {kinds: contents}}
    if release.buckets:
        state["per_bucket_numel"] = [{kinds: padded}]
    if release.says_unpadded:
        state["per_bucket_numel_unpadded"] = [{kinds: unpadded}]
    return state


def rewritten(tmp_path: Path, name: str) -> Path:
    """The fixture, with the file of each rank in a release's form."""
    root = copy_fixture(FIXTURE, tmp_path)
    for path in root.glob(f"iter_*/*/{FILE}"):
        change_rank(path, lambda contents: contents["args"].state.update(data_parallel_size=REPLICAS))
    read = open_layout_state(root)
    for folder, (parameters, slots) in read.items():
        path = next(root.glob(f"iter_*/{folder}/distrib_optim.pt"))
        change_rank(path, lambda old, p=parameters, s=slots: replace_all(old, laid_out(name, p, s)))  # type: ignore[misc]
    return root


def replace_all(old: dict[Any, Any], new: dict[Any, Any]) -> None:
    old.clear()
    old.update(new)


def open_layout_state(root: Path) -> dict[str, Any]:
    """Each rank's parameters and slots, by folder."""
    checkpoint: Checkpoint = registry.read(str(root))
    assert checkpoint.optimizer is not None
    state = checkpoint.optimizer()
    found = {}
    for number, shard in enumerate(checkpoint.ranks):
        slots = {slot: state.ranks[slot][number].tensors for slot in SLOTS}
        found[Path(shard.source).parent.name] = (parameters_of([shard]), slots)
    return found


@pytest.mark.parametrize("name", RELEASES)
def test_every_release_gives_what_was_trained(name: str, tmp_path: Path) -> None:
    expected = expected_of(f"legacy/{FIXTURE}")
    found = open_checkpoint(rewritten(tmp_path, name)).optimizer
    assert found is not None
    state = found()
    for slot in SLOTS:
        facts = {key: own[slot] for key, own in expected["optimizer"].items()}
        assert_tensors_equal_expected(state.slots[slot], hub_spelling(facts))
    assert state.step == expected["optimizer_step"]


@pytest.mark.parametrize("name", RELEASES)
def test_state_of_another_model_is_refused_with_the_numbers(name: str, tmp_path: Path) -> None:
    root = rewritten(tmp_path, name)

    def shorter(contents: dict[Any, Any]) -> None:
        own = next(iter(contents[0].values()))
        for key in SLOTS.values():
            tensors = own[key] if isinstance(own[key], list) else [own[key]]
            cut = [*tensors[:-1], tensors[-1].narrow(0, 0, tensors[-1].size - 2 * REPLICAS)]
            own[key] = cut if isinstance(own[key], list) else cut[0]
        for table in contents.get("per_bucket_numel_unpadded", []):
            for sizes in table.values():
                sizes[-1] -= 2 * REPLICAS

    for path in root.glob("iter_*/*/distrib_optim.pt"):
        change_rank(path, shorter)
    found = open_checkpoint(root).optimizer
    assert found is not None
    with pytest.raises(MappingError, match=r"do not fit the model's parameters .*elements.*found.*--optimizer drop"):
        found()


def test_buckets_that_contradict_their_table(tmp_path: Path) -> None:
    root = rewritten(tmp_path, "0.5")

    def lost(contents: dict[Any, Any]) -> None:
        next(iter(contents["per_bucket_numel_unpadded"][0].values())).pop()

    for path in root.glob("iter_*/*/distrib_optim.pt"):
        change_rank(path, lost)
    found = open_checkpoint(root).optimizer
    assert found is not None
    with pytest.raises(MappingError, match="are not as long as it says.*--optimizer drop"):
        found()


def test_padding_needs_the_number_of_ranks(tmp_path: Path) -> None:
    """Without ``data_parallel_size`` nothing says how much of a bucket is padding."""
    root = rewritten(tmp_path, "0.4")
    for path in root.glob(f"iter_*/*/{FILE}"):
        change_rank(path, lambda contents: contents["args"].state.pop("data_parallel_size", None))
    found = open_checkpoint(root).optimizer
    assert found is not None
    with pytest.raises(MappingError, match="multiples of the data-parallel ranks.*found.*--optimizer drop"):
        found()


# -- any model -------------------------------------------------------------------------------------------------

SIZES = st.lists(st.integers(1, 80), min_size=1, max_size=12)


def named(sizes: list[int]) -> list[Parameter]:
    kind = from_array(np.zeros(1, np.float32)).dtype
    return [Parameter(0, f"p{number}", Constant(kind, (size,))) for number, size in enumerate(sizes)]


@given(SIZES, st.sampled_from(sorted(RELEASES)), st.sampled_from([None, 30, 100]), st.integers(1, 4), st.data())
def test_parameters_lie_where_a_release_put_them(
    sizes: list[int], name: str, bucket_size: int | None, replicas: int, data: st.DataObject
) -> None:
    """Or there are several ways to read the file, which is refused; never is another place found."""
    release = RELEASES[name]
    shared = data.draw(st.lists(st.booleans(), min_size=len(sizes), max_size=len(sizes)))
    buckets, padded, unpadded = filled(sizes, release, bucket_size, replicas, shared)
    parameters = named(sizes)
    try:
        found = place_in_buckets(parameters, padded, unpadded if release.says_unpadded else None, [replicas], "file")
    except MappingError as error:
        assert "in several ways" in str(error) and not release.says_unpadded and replicas > 1
        return
    expected = {}
    for number, bucket in enumerate(buckets):
        first = 0
        for own in bucket:
            expected[parameters[own]] = (number, first)
            first += sizes[own]
    assert found == expected


@given(SIZES, st.sampled_from(sorted(RELEASES)), st.integers(1, 4), st.integers(1, 300))
def test_a_parameter_too_many_is_refused(sizes: list[int], name: str, replicas: int, other: int) -> None:
    release = RELEASES[name]
    _, padded, unpadded = filled(sizes, release, 100, replicas)
    with pytest.raises(MappingError, match="--optimizer drop"):
        place_in_buckets(
            named([*sizes, other + replicas]), padded, unpadded if release.says_unpadded else None, [replicas], "file"
        )
