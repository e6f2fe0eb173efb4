"""Optimizers other than Adam: what they keep travels by its own name, and is refused by name where no rule leads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import anyckpt
from anyckpt.checkpoint import Checkpoint, OptimizerForm, OptimizerState
from anyckpt.containers.torch_file import zip_parts
from anyckpt.engine.plan import OutputFile
from anyckpt.errors import MappingError
from anyckpt.operations.convert import convert
from anyckpt.optimizer.read import with_optimizer
from anyckpt.optimizer.state import renamed, with_masters
from anyckpt.optimizer.write import laid_out
from anyckpt.tensor import LazyTensor, from_array
from tests.support import file_bytes, sha256_of

SHAPES = {"a.weight": (4, 3), "a.bias": (4,), "b.weight": (2, 4)}


def numbers(*shape: int) -> LazyTensor:
    return from_array(np.arange(int(np.prod(shape)), dtype=np.float32).reshape(shape))


def save(path: Path, contents: dict[str, Any]) -> None:
    path.write_bytes(file_bytes(OutputFile("", zip_parts(contents))))


def lightning(path: Path, state: dict[int, dict[str, Any]], **group: Any) -> Path:
    """A Lightning checkpoint of three parameters with this state by number."""
    groups = [{"lr": 0.1, **group, "params": [0, 1, 2]}]
    contents = {
        "epoch": 0, "global_step": 2, "pytorch-lightning_version": "2.4.0", "loops": {},
        "state_dict": {name: numbers(*shape) for name, shape in SHAPES.items()},
        "optimizer_states": [{"state": state, "param_groups": groups}], "lr_schedulers": [],
    }  # fmt: skip
    save(path, contents)
    return path


def by_slot(path: Path, name: str = "") -> dict[str, dict[str, Any]]:
    state = with_optimizer(anyckpt.open(path)).optimizer()  # type: ignore[misc]
    shown: dict[str, dict[str, Any]] = {
        "step": {"": state.step},
        "groups": dict(enumerate(state.groups)),
        "of": dict(state.group_of),
    }
    for slot, own in (*state.slots.items(), *state.others.items()):
        if slot != "master":
            shown[slot] = {n: (sha256_of(v), v.shape) if isinstance(v, LazyTensor) else v for n, v in own.items()}
    return shown


KINDS: dict[str, dict[int, dict[str, Any]]] = {
    "none": {},
    "momentum": {n: {"momentum_buffer": numbers(*shape)} for n, shape in enumerate(SHAPES.values())},
    "momentum not used yet": {n: {"momentum_buffer": None} for n in range(3)},
    "a parameter without gradient": {2: {"momentum_buffer": numbers(2, 4)}},
    "rows and columns": {
        0: {"step": numbers(), "row_var": numbers(4, 1), "col_var": numbers(1, 3)},
        1: {"step": numbers(), "variance": numbers(4)},
        2: {"step": numbers(), "row_var": numbers(2, 1), "col_var": numbers(1, 4)},
    },
    "rows and columns of transformers": {
        0: {"step": 3, "exp_avg_sq_row": numbers(4), "exp_avg_sq_col": numbers(3), "RMS": 0.5},
        1: {"step": 3, "exp_avg_sq": numbers(4), "RMS": 0.25},
        2: {"step": 3, "exp_avg_sq_row": numbers(2), "exp_avg_sq_col": numbers(4), "RMS": 1},
    },
    "steps that differ": {
        n: {"step": from_array(np.float32(n)), "sum": numbers(*shape)} for n, shape in enumerate(SHAPES.values())
    },
    "scalars": {
        n: {"ax": numbers(*shape), "eta": numbers(), "mu": numbers()} for n, shape in enumerate(SHAPES.values())
    },
}


@pytest.mark.parametrize("kind", KINDS)
def test_to_a_distributed_checkpoint_and_back(kind: str, tmp_path: Path) -> None:
    source = lightning(tmp_path / "a.ckpt", KINDS[kind], momentum=0.9)
    first = convert(source, tmp_path / "dcp", to="dcp", optimizer="keep")
    again = convert(tmp_path / "dcp", tmp_path / "b.ckpt", to="lightning", optimizer="keep")
    assert not [name for name in (*first.ignored, *again.ignored) if "optim" in name]
    assert by_slot(tmp_path / "dcp") == by_slot(source)
    assert by_slot(tmp_path / "b.ckpt") == by_slot(source)


def test_state_within_state_is_refused_by_name(tmp_path: Path) -> None:
    source = lightning(tmp_path / "a.ckpt", {0: {"old_dirs": [numbers(24)]}})
    with pytest.raises(MappingError, match=r"'optimizer_states.0.state.0.old_dirs.0'.*--optimizer drop"):
        convert(source, tmp_path / "dcp", to="dcp", optimizer="keep")


def test_two_optimizers_that_become_one_are_told(tmp_path: Path) -> None:
    state = {0: {"momentum_buffer": numbers(4, 3)}, 1: {"momentum_buffer": numbers(4)}}
    optimizers = [
        {"state": state, "param_groups": [{"params": [0, 1]}]},
        {"state": {}, "param_groups": [{"params": [0]}]},
    ]
    weights = {name: numbers(*shape) for name, shape in SHAPES.items()}
    save(tmp_path / "a.ckpt", {
        "pytorch-lightning_version": "2.4.0", "global_step": 1, "state_dict": weights, "optimizer_states": optimizers,
    })  # fmt: skip
    done = convert(tmp_path / "a.ckpt", tmp_path / "dcp", to="dcp", optimizer="keep")
    assert "2 optimizers become one with the parameter groups of all" in done.notes


def test_what_has_the_weights_shape_goes_through_its_rules_and_the_rest_is_refused() -> None:
    weights: dict[str, LazyTensor] = {name: numbers(*shape) for name, shape in SHAPES.items()}
    buffers = OptimizerState(slots={"momentum_buffer": {"a.weight": numbers(4, 3)}})
    factors = OptimizerState(others={"row_var": {"a.weight": numbers(4, 1)}, "step": {"b.weight": 3}})

    def halved(tensors: dict[str, LazyTensor]) -> dict[str, LazyTensor]:
        return {f"x.{name}": tensor.narrow(0, 0, tensor.shape[0] // 2) for name, tensor in tensors.items()}

    moved = renamed(with_masters(buffers, weights), halved)
    assert moved.slots["momentum_buffer"]["x.a.weight"].shape == (2, 3)
    with pytest.raises(MappingError, match="'a.weight'.*row_var has not the weight's shape.*--optimizer drop"):
        renamed(with_masters(factors, weights), halved)
    kept = renamed(with_masters(factors, weights), dict)
    assert kept.others == factors.others
    with pytest.raises(MappingError, match="is not Adam.*found master, row_var, step"):
        laid_out(
            Checkpoint("x", "torch", weights, optimizer=lambda: kept),
            OptimizerForm("x", lambda *both: both[0], True),
            "megatron-core",
        )


@settings(max_examples=15, deadline=None)
@given(
    st.dictionaries(
        st.integers(0, 2),
        st.dictionaries(
            st.from_regex(r"[a-z_]{1,8}", fullmatch=True).filter(lambda slot: slot not in ("param", "step")),
            st.sampled_from(["weight", "scalar", "other", 3, 0.5, None, True, "text"]),
            max_size=3,
        ),
        max_size=3,
    )
)
def test_any_state_of_tensors_and_scalars_comes_back(
    tmp_path_factory: pytest.TempPathFactory, drawn: dict[int, dict[str, Any]]
) -> None:
    shapes = list(SHAPES.values())

    def made(number: int, kind: Any) -> Any:
        return {"weight": numbers(*shapes[number]), "scalar": numbers(), "other": numbers(5)}.get(kind, kind)

    state = {n: {slot: made(n, kind) for slot, kind in own.items()} for n, own in drawn.items()}
    folder = tmp_path_factory.mktemp("any")
    source = lightning(folder / "a.ckpt", state)
    try:
        convert(source, folder / "dcp", to="dcp", optimizer="keep")
    except MappingError as error:
        assert "master" in str(error) or "exp_avg" in str(error)
        return
    convert(folder / "dcp", folder / "b.ckpt", to="lightning", optimizer="keep")
    assert by_slot(folder / "b.ckpt") == by_slot(source)


def test_an_average_that_the_optimizer_keeps_is_told(tmp_path: Path) -> None:
    weights = {name: numbers(*shape) for name, shape in SHAPES.items()}
    optimizer = {
        "opt": {"state": {}, "param_groups": [{"params": [0, 1, 2]}]}, "ema": list(weights.values()), "decay": 0.9,
    }  # fmt: skip
    save(tmp_path / "a.ckpt", {
        "pytorch-lightning_version": "2.4.0", "global_step": 1, "state_dict": weights, "optimizer_states": [optimizer],
    })  # fmt: skip
    done = convert(tmp_path / "a.ckpt", tmp_path / "dcp", to="dcp", optimizer="keep")
    (note,) = [note for note in done.notes if "left out" in note]
    assert note.startswith("optimizer_states.0.ema.0, optimizer_states.0.ema.1, optimizer_states.0.ema.2 and 1 more")
