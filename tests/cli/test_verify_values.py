"""``verify --deep``: numbers that a model cannot have, and those that only look so."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from tests.cli.runner import Runner
from tests.cli.test_diff import written
from tests.formats.torch_archives import small_file
from tests.support import file_bytes, fixture_path

from anyckpt import verify
from anyckpt.checkpoint import Checkpoint
from anyckpt.containers.torch_file import zip_parts
from anyckpt.engine.plan import OutputFile
from anyckpt.tensor import from_array

CAUSAL = np.where(np.tri(8, dtype=bool), 0, -np.inf).astype(np.float32)


def torch_file(path: Path, root: object) -> Path:
    path.write_bytes(file_bytes(OutputFile("", zip_parts(root))))
    return path


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("attention.bias", CAUSAL),
        ("layers.0.attn_mask", CAUSAL + np.arange(8, dtype=np.float32)),
        ("text.causal_mask", CAUSAL.astype(np.float16)[None, None]),
        ("observer.min_val", np.array(np.inf, dtype=np.float32)),
        ("observer.max_vals", np.full(3, -np.inf, dtype=np.float32)),
        ("best_model_score", np.array(np.inf, dtype=np.float32)),
    ],
)
def test_infinity_that_is_meant_is_no_damage(anyckpt: Runner, tmp_path: Path, name: str, values: np.ndarray) -> None:
    found = anyckpt("verify", written(tmp_path / "x.safetensors", **{name: values}), "--deep")
    assert (found.code, found.err) == (0, "")


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("weight", np.array([[0, 1], [2, -np.inf]], dtype=np.float32)),
        ("weight", np.array([[0, 0], [0, np.inf]], dtype=np.float32)),
        ("attn_mask", np.where(np.tri(8), 0, np.inf).astype(np.float32)),
        ("attn_mask", np.array([[0, np.nan]], dtype=np.float32)),
        ("norm.weight", np.full(3, -np.inf, dtype=np.float32)),
        ("best.weight", np.full(3, np.inf, dtype=np.float32)),
    ],
)
def test_other_infinity_is_damage(anyckpt: Runner, tmp_path: Path, name: str, values: np.ndarray) -> None:
    found = anyckpt("verify", written(tmp_path / "x.safetensors", **{name: values}), "--deep")
    assert found.code == 1
    assert f"{name}: " in found.out


def test_small_numbers_of_float16_are_ordinary(anyckpt: Runner, tmp_path: Path) -> None:
    weights = (np.random.default_rng(1).standard_normal((64, 64)) * 0.002).astype(np.float16)
    assert np.any((weights != 0) & (np.abs(weights) < np.finfo(np.float16).smallest_normal))
    path = written(tmp_path / "x.safetensors", **{f"layer.{i}.weight": weights for i in range(20)})
    found = anyckpt("verify", path, "--deep")
    assert (found.code, found.err) == (0, "")


def test_a_tensor_too_small_for_float16_is_told(anyckpt: Runner, tmp_path: Path) -> None:
    weights = (np.random.default_rng(1).standard_normal((64, 64)) * 1e-6).astype(np.float16)
    found = anyckpt("verify", written(tmp_path / "x.safetensors", a=weights, b=np.ones(3, np.float16)), "--deep")
    assert found.code == 0
    assert "too small for float16" in found.err


def test_stray_writes_are_told_in_one_line(anyckpt: Runner, tmp_path: Path) -> None:
    odd = np.array([1, 1e-40, 2], dtype=np.float32)
    path = written(tmp_path / "x.safetensors", **{f"layer.{i}.weight": odd for i in range(20)})
    found = anyckpt("verify", path, "--deep", "--json").json
    (warning,) = found["warnings"]
    assert "(1 of 3) and 17 more" in warning


def test_training_state_is_looked_at_too(anyckpt: Runner, tmp_path: Path) -> None:
    moments = np.array([0.5, np.nan, 1], dtype=np.float32)
    root = {
        "state_dict": {"a.weight": from_array(np.ones(3, dtype=np.float32))},
        "optimizer": {"state": {0: {"exp_avg": from_array(moments)}}, "param_groups": [{"params": [0], "lr": 1.0}]},
        "callbacks": {"best": from_array(np.array(np.inf, dtype=np.float32))},
    }
    found = anyckpt("verify", torch_file(tmp_path / "x.pt", root), "--deep", "--json").json
    (problem,) = found["problems"]
    assert "exp_avg" in problem["where"]
    assert "1 NaN of 3 elements" in problem["problem"]


@pytest.mark.parametrize("kind", ["<f4", ">f8", "<c8", "<f2"])
def test_arrays_of_numpy_are_looked_at_too(kind: str) -> None:
    weights = {"w": from_array(np.ones(3, np.float32))}
    for bad in (False, True):
        values = np.array([0.5, np.nan if bad else 2, 1]).astype(kind)
        state = {"state": {0: {"exp_avg": values}}, "names": np.array(["a"]), "steps": np.arange(3)}
        found = verify(Checkpoint("", "torch", weights, objects={"optimizer": state}), deep=True)
        assert [problem.problem for problem in found.problems] == ["training state: 1 NaN of 3 elements"] * bad


def test_a_callback_that_has_no_score_yet_is_no_damage(anyckpt: Runner) -> None:
    found = anyckpt("verify", fixture_path("nemo/lightning_fsdp2/m-step=2.ckpt"), "--deep")
    assert (found.code, found.err) == (0, "")


def test_a_whole_file_is_sound(anyckpt: Runner, tmp_path: Path) -> None:
    (tmp_path / "x.pt").write_bytes(small_file())
    assert "the values of 2 tensors" in anyckpt("verify", tmp_path / "x.pt", "--deep").out


@pytest.mark.parametrize("number", [float("nan"), float("inf"), from_array(np.array(np.nan, dtype=np.float32))])
@pytest.mark.parametrize(
    ("state", "name"),
    [
        (
            lambda number: {"optimizer": {"param_groups": [{"lr": number, "params": [0]}]}},
            "optimizer.param_groups.0.lr",
        ),
        (
            lambda number: {"optimizer": {"param_groups": [{"betas": (0.9, number)}]}},
            "optimizer.param_groups.0.betas.1",
        ),
        (lambda number: {"scheduler": {"_last_lr": [number]}}, "scheduler._last_lr.0"),
        (lambda number: {"scaler": {"scale": number, "growth_factor": 2.0}}, "scaler.scale"),
    ],
)
def test_numbers_that_the_next_step_is_computed_with_are_finite(
    anyckpt: Runner, tmp_path: Path, state: Callable[[object], dict[str, object]], name: str, number: object
) -> None:
    """Whether they are numbers of Python or tensors."""
    weights = {"model": {"w": from_array(np.ones(3, np.float32))}}
    assert anyckpt("verify", torch_file(tmp_path / "good.pt", {**weights, **state(1.0)}), "--deep").code == 0
    bad = torch_file(tmp_path / "bad.pt", {**weights, **state(number)})
    assert anyckpt("verify", bad).code == 0
    found = anyckpt("verify", bad, "--deep")
    assert found.code == 1 and f"{name}: training state: " in found.out


def test_other_numbers_of_training_state_may_be_nan(anyckpt: Runner, tmp_path: Path) -> None:
    weights = {"model": {"w": from_array(np.ones(3, np.float32))}}
    state = {"callback": {"best": float("inf"), "val_loss": float("nan")}, "max_norm": float("inf")}
    found = anyckpt("verify", torch_file(tmp_path / "x.pt", {**weights, **state}), "--deep")
    assert found.code == 0 and "callback.val_loss: training state: NaN" in found.err
    assert "best" not in found.err and "max_norm" not in found.err
