"""``anyckpt verify`` of checkpoints that cannot be opened for what is missing or cut, and of state with NaN in it."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from tests.cli.runner import Runner
from tests.operations.test_diff_state import BY_PARAMETER, state_of
from tests.support import fixture_path

import anyckpt as api
from anyckpt.operations.steps.joining import open_checkpoint

FILES = [
    "families/llama/hf/model.safetensors",
    "nemo/nemo1_basic_v3_0_0/toy.nemo",
    "legacy/ptl_adamw/model--val_loss=0.5-epoch=3.ckpt",
    "legacy/zoo_kinds/zip.pt",
]


@pytest.mark.parametrize("kept", [0, 3, 0.5, 0.8])
@pytest.mark.parametrize("relative", FILES)
def test_a_cut_file_is_damage(relative: str, kept: float, anyckpt: Runner, tmp_path: Path) -> None:
    source = fixture_path(relative)
    data = source.read_bytes()
    path = tmp_path / source.name
    path.write_bytes(data[: kept if isinstance(kept, int) else int(len(data) * kept)])
    found = anyckpt("verify", path, "--json")
    assert found.code == 1, found.err
    assert found.json["sound"] is False
    assert found.json["problems"]
    assert found.json["opened"] is False
    assert "damaged (1 problem)" in anyckpt("verify", path).out


@pytest.mark.parametrize(
    ("relative", "removed"),
    [
        ("legacy/megatron_gpt_tp2_pp2", "iter_0000007/mp_rank_01_001"),
        ("legacy/megatron_gpt_tp2_pp2", "iter_0000007/mp_rank_00_000/model_optim_rng.pt"),
        ("legacy/megatron_distopt_tp2_dp2", "iter_0000007/mp_rank_01"),
        ("legacy/megatron_moe_tp2_ep2", "iter_0000007/mp_rank_01_001"),
        ("mcore/gpt_opt_plain/ckpt", "__0_0.distcp"),
        ("mcore/gpt_opt_plain/ckpt", ".metadata"),
        ("mcore/zarr_v012_w2_flat/ckpt", "col.weight/1.0"),
        ("mcore/dcp_fsdp_w2/ckpt", "__1_0.distcp"),
        ("deepspeed/zero2", "*/bf16_zero_pp_rank_1_mp_rank_00_optim_states.pt"),
        ("nemo/lightning_fsdp2/m-step=2.ckpt", "__0_0.distcp"),
        ("families/llama_sharded/hf", "model-00002-of-*.safetensors"),
    ],
)
def test_a_missing_shard_or_rank_is_damage(relative: str, removed: str, anyckpt: Runner, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    if "sharded" in relative:
        api.convert(fixture_path("families/llama/hf"), copy, to="hf", max_shard_size=100_000)
        (copy / ".anyckpt-manifest.json").unlink()
    else:
        shutil.copytree(fixture_path(relative), copy)
    assert anyckpt("verify", copy).code == 0
    (gone,) = copy.glob(removed)
    shutil.rmtree(gone) if gone.is_dir() else gone.unlink()
    found = anyckpt("verify", copy)
    assert found.code == 1, (found.out, found.err)
    assert "damaged" in found.out


def test_what_is_no_checkpoint_is_exit_code_2(anyckpt: Runner, tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("a model")
    assert "not a checkpoint" in anyckpt("verify", tmp_path / "README.md").error
    assert "not a checkpoint" in anyckpt("verify", tmp_path).error
    (tmp_path / "model.pt").write_text("a model")
    assert anyckpt("verify", tmp_path / "model.pt").code == 1


def test_a_manifest_tells_which_file_is_gone_though_nothing_opens(anyckpt: Runner, tmp_path: Path) -> None:
    out = tmp_path / "out"
    api.convert(fixture_path("families/llama/hf"), out, to="hf", max_shard_size=100_000)
    next(out.glob("model-00002*")).unlink()
    found = anyckpt("verify", out, "--json").json
    assert not found["opened"]
    assert any("model-00002" in problem["problem"] for problem in found["problems"] if problem["where"] != str(out))


@pytest.mark.parametrize("relative", BY_PARAMETER)
def test_deep_sees_nan_in_the_state_of_optimizers(relative: str, anyckpt: Runner, tmp_path: Path) -> None:
    source = fixture_path(relative)
    slots = state_of(open_checkpoint(source)).slots
    own = next(tensors for slot, tensors in slots.items() if slot != "master")
    tensor = next(t for name, t in own.items() if t.size > 8 and "embedding" not in name)
    assert tensor.dtype.name == "float32"
    copy = tmp_path / source.name
    (shutil.copytree if source.is_dir() else shutil.copyfile)(source, copy)
    piece = list(tensor.pieces())[-1]
    where, offset = piece.source.locate()
    assert where is not None
    file = copy / Path(where).relative_to(source) if source.is_dir() else copy
    data = bytearray(file.read_bytes())
    start = offset + piece.offset
    data[start : start + 4] = b"\x00\x00\xc0\x7f"
    file.write_bytes(data)
    before = {problem.problem for problem in api.verify(source, deep=True).problems}
    found = [problem for problem in api.verify(copy, deep=True).problems if problem.problem not in before]
    assert any("NaN of" in problem.problem and "training state" in problem.problem for problem in found), found
    assert anyckpt("verify", copy, "--deep").code == 1
