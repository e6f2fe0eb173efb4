"""Optimizer state into NeMo 2, and into zarr, and back: the same bytes as by way of torch_dist."""

from __future__ import annotations

from pathlib import Path

import pytest

import anyckpt
from anyckpt.errors import UsageError
from anyckpt.operations.convert import convert
from anyckpt.optimizer.read import with_optimizer
from tests.support import fixture_path, sha256_of

SOURCE = fixture_path("legacy/megatron_distopt_tp2_dp2")


def state_of(path: Path) -> dict[str, dict[str, str]]:
    checkpoint = with_optimizer(anyckpt.open(path))
    assert checkpoint.optimizer is not None
    state = checkpoint.optimizer()
    assert state.step == 7
    return {slot: {name: sha256_of(tensor) for name, tensor in own.items()} for slot, own in state.slots.items()}


@pytest.fixture(scope="module")
def usual(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("usual") / "core"
    convert(SOURCE, out, to="megatron-core", optimizer="keep")
    return out


@pytest.mark.parametrize(
    ("to", "options"),
    [("nemo2", {}), ("nemo2", {"backend": "zarr"}), ("megatron-core-zarr", {})],
)
def test_there_and_back(to: str, options: dict[str, str], usual: Path, tmp_path: Path) -> None:
    there, back = tmp_path / "there", tmp_path / "back"
    convert(SOURCE, there, to=to, optimizer="keep", **options)
    convert(there, back, to="megatron-core", optimizer="keep")
    found = anyckpt.diff(usual, back, raw=True)
    assert found.compared == 36 and not found.different and not found.only_in_a and not found.only_in_b
    assert state_of(back) == state_of(usual)
    kinds = [item.name for item in found.state if "sharding_type" in item.name]
    assert kinds == [], "the target's own form"


def test_the_common_state_of_nemo2(tmp_path: Path) -> None:
    """A list of optimizers, and loops that stand where the run stood."""
    out = tmp_path / "out"
    done = convert(SOURCE, out, to="nemo2", optimizer="keep")
    assert any("56 samples" in note for note in done.notes)
    checkpoint = anyckpt.open(out)
    assert checkpoint.training.step == 7 and checkpoint.training.has_optimizer
    optimizers = checkpoint.objects["optimizer"]
    assert len(optimizers) == 1 and optimizers[0]["optimizer"]["param_groups"][0]["step"] == 7
    loop = checkpoint.objects["loops"]["fit_loop"]
    steps = loop["epoch_loop.automatic_optimization.optim_progress"]["optimizer"]["step"]
    assert steps["total"]["completed"] == 7 == checkpoint.objects["global_step"]
    assert checkpoint.objects["content_metadata"]["distrib_optim_sharding_type"] == "fully_reshardable"
    names = {name for name in checkpoint.tensors if name.startswith("optimizer.")}
    assert "optimizer.state.exp_avg.module.decoder.layers.mlp.linear_fc1.weight" in names and len(names) == 27


def test_zarr_is_as_megatron_core_0_15_reads_it(tmp_path: Path) -> None:
    out = tmp_path / "out"
    convert(SOURCE, out, to="megatron-core-zarr", optimizer="keep")
    assert (out / "optimizer.state.fp32_param.decoder.final_layernorm.weight" / ".zarray").is_file()
    checkpoint = anyckpt.open(out)
    assert checkpoint.objects["optimizer"]["param_state_sharding_type"] == "fully_sharded_model_space"


def test_a_backend_that_is_none() -> None:
    with pytest.raises(UsageError, match=r"nemo2 has no such backend .*torch_dist, zarr"):
        convert(SOURCE, "out", to="nemo2", backend="tensorstore", dry_run=True)
    with pytest.raises(UsageError, match="there is no choice"):
        convert(SOURCE, "out", to="dcp", backend="zarr", dry_run=True)
