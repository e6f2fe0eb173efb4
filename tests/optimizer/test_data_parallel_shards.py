"""A file for each data-parallel rank, as Megatron-LM 23.04 saved the distributed optimizer's state."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from anyckpt.errors import MappingError
from anyckpt.operations.convert import convert
from anyckpt.operations.steps.joining import open_checkpoint
from anyckpt.optimizer.data_parallel_shards import join_shards
from anyckpt.optimizer.rank_parameters import Parameter
from anyckpt.tensor import LazyTensor, from_array
from tests.formats.megatron_lm_files import FILE, change_rank, copy_fixture, write_torch
from tests.operations.test_open import hub_spelling
from tests.optimizer.test_old_buffers import FIXTURE, SLOTS, open_layout_state
from tests.support import assert_tensors_equal_expected, expected_of

RANKS = 3
Slots = Mapping[str, Mapping[str, Any]]


def of_each_rank(parameters: Sequence[Parameter], slots: Slots, ranks: int, *, in_fp32: bool) -> list[dict[str, Any]]:
    """What every data-parallel rank saves: elements are labelled with their owners and dealt out one by one."""
    kinds = dict.fromkeys("all" if in_fp32 else p.weight.dtype.name for p in parameters)
    owned: list[dict[int, np.ndarray[Any, Any]]] = [{} for _ in range(ranks)]
    for kind in kinds:
        own = [n for n, p in enumerate(parameters) if in_fp32 or p.weight.dtype.name == kind]
        labels = np.concatenate([np.full(parameters[n].weight.size, n) for n in reversed(own)])
        places = np.concatenate([np.arange(parameters[n].weight.size) for n in reversed(own)])
        width = -(-labels.size // ranks)
        for rank in range(ranks):
            part = slice(rank * width, (rank + 1) * width)
            for number in own:
                found = places[part][labels[part] == number]
                if found.size:
                    owned[rank][number] = found
    return [saved(parameters, slots, own) for own in owned]


def saved(parameters: Sequence[Parameter], slots: Slots, owned: Mapping[int, Any]) -> dict[str, Any]:
    state: dict[int, Any] = {}
    groups: list[dict[str, Any]] = []
    masters: list[list[LazyTensor]] = []
    for decay in (True, False):
        mine = [n for n in owned if parameters[n].decays == decay]
        whole = [n for n in mine if parameters[n].weight.dtype.name == "float32"]
        halves = [n for n in mine if n not in whole]
        if not mine:
            continue  # empty groups are squeezed out
        first = len(state)
        for number in [*whole, *halves]:
            name, elements = parameters[number].name, owned[number]
            state[len(state)] = {
                slot: from_array(np.ascontiguousarray(slots[slot][name].reshape(-1)[elements]))
                for slot in ("exp_avg", "exp_avg_sq")
            }
        master = [
            from_array(np.ascontiguousarray(slots["master"][parameters[n].name].reshape(-1)[owned[n]])) for n in halves
        ]
        masters.append(master)
        groups.append({"wd_mult": 1.0 if decay else 0.0, "step": 7, "lr": 0.001, "params": [*range(first, len(state))]})
    return {"optimizer": {"state": state, "param_groups": groups}, "shard_fp32_from_float16_groups": masters}


def rewritten(tmp_path: Path) -> Path:
    """The fixture's ranks, with folders for data-parallel ranks."""
    root = copy_fixture(FIXTURE, tmp_path)
    for folder, (parameters, slots) in open_layout_state(root).items():
        values = {slot: {name: tensor.numpy() for name, tensor in own.items()} for slot, own in slots.items()}
        path = next(root.glob(f"iter_*/{folder}/{FILE}"))
        (path.parent / "distrib_optim.pt").unlink()

        def changed(contents: dict[Any, Any]) -> None:
            contents.pop("optimizer")
            contents["args"].state.update(data_parallel_size=RANKS, accumulate_allreduce_grads_in_fp32=True)

        change_rank(path, changed)
        path.rename(path.with_name("model_rng.pt"))
        for number, state in enumerate(of_each_rank(parameters, values, RANKS, in_fp32=True)):
            part = path.parent.with_name(f"{folder}_{number:03d}")
            part.mkdir()
            write_torch(part / "optim.pt", {"optimizer": state, "opt_param_scheduler": {"num_steps": 7}})
    return root


def test_all_ranks_parts_are_what_was_trained(tmp_path: Path) -> None:
    expected = expected_of(f"legacy/{FIXTURE}")
    checkpoint = open_checkpoint(rewritten(tmp_path))
    assert checkpoint.training.has_optimizer and checkpoint.optimizer is not None
    state = checkpoint.optimizer()
    for slot in SLOTS:
        facts = {key: own[slot] for key, own in expected["optimizer"].items()}
        assert_tensors_equal_expected(state.slots[slot], hub_spelling(facts))
    assert state.step == 7
    assert [group["wd_mult"] for group in state.groups] == [1.0, 0.0]


Change = Callable[[dict[str, Any]], Any]
BAD: dict[str, tuple[Change, str]] = {
    "no state": (lambda root: root.pop("optimizer"), "of data-parallel rank 1 is of a layout that is not understood"),
    "a group too many": (
        lambda root: root["optimizer"]["shard_fp32_from_float16_groups"].append([]), "is of a layout that is not"
    ),
    "a parameter too few": (
        lambda root: root["optimizer"]["optimizer"]["param_groups"][0]["params"].pop(),
        "parameter group 0 of the optimizer does not fit the model.*expected.*found",
    ),
    "a master too few": (
        lambda root: root["optimizer"]["shard_fp32_from_float16_groups"][0].pop(),
        "fp32 weights of data-parallel rank 1 do not fit the model.*expected.*found",
    ),
    "a part of another size": (
        lambda root: root["optimizer"]["optimizer"]["state"][0].update(exp_avg=from_array(np.zeros(3, np.float32))),
        "exp_avg of data-parallel rank 1 does not fit its parameter.*elements of float32.*found float32",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_parts_that_do_not_fit_are_refused(case: str, tmp_path: Path) -> None:
    change, words = BAD[case]
    root = rewritten(tmp_path)
    change_rank(next(root.glob("iter_*/mp_rank_00_001/optim.pt")), change)
    with pytest.raises(MappingError, match=words) as error:
        convert(root, tmp_path / "out", to="dcp", optimizer="keep")
    assert "--optimizer drop" in str(error.value) and not (tmp_path / "out").exists()


def test_a_missing_part_is_named(tmp_path: Path) -> None:
    root = rewritten(tmp_path)
    folder = next(root.glob("iter_*/mp_rank_01_002"))
    (folder / "optim.pt").unlink()
    folder.rmdir()
    with pytest.raises(MappingError, match=r"are not those of the run .expected 3 folders mp_rank_01_NNN"):
        convert(root, tmp_path / "out", to="dcp", optimizer="keep")


SIZES = st.lists(st.tuples(st.integers(0, 40), st.sampled_from(["float32", "bfloat16"]), st.booleans()), min_size=1)


@given(SIZES, st.integers(1, 5), st.booleans())
def test_any_parameters_over_any_ranks(parts: list[tuple[int, str, bool]], ranks: int, in_fp32: bool) -> None:
    rng = np.random.default_rng(0)
    parameters, slots = [], {slot: {} for slot in SLOTS}  # type: ignore[var-annotated]
    for number, (size, kind, matrix) in enumerate(parts):
        values = rng.standard_normal((size, 1) if matrix else (size,)).astype(np.float32)
        name = f"decoder.layers.{number}.weight"
        parameters.append(Parameter(0, name, from_array(values).cast(kind)))
        for slot in SLOTS:
            slots[slot][name] = values if slot == "master" else values + len(slot)
    states = of_each_rank(parameters, slots, ranks, in_fp32=in_fp32)
    found = join_shards(parameters, states, {"accumulate_allreduce_grads_in_fp32": in_fp32}, "file")
    for parameter in parameters:
        for slot in SLOTS:
            np.testing.assert_array_equal(found[parameter][slot].numpy(), slots[slot][parameter.name])
