"""Megatron-LM checkpoints of one file per rank, written by Megatron-Core 0.16 and, for older versions, by hand."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest
from tests.formats.megatron_lm_files import FILE, change_rank, copy_fixture, open_layout, root_of, write_torch
from tests.support import expected_of, fixture_path, sha256_of

from anyckpt.checkpoint import ParallelLayout
from anyckpt.dtypes import BY_NAME
from anyckpt.formats import registry
from anyckpt.models.dialects.rank_names import part_norms
from anyckpt.storage.read_count import bytes_read
from anyckpt.tensor import Constant

MCORE = (
    "gpt_tp2_pp2", "gpt_tp2_pp2_vpp2", "gpt_tp1_pp1_release", "gpt_pp3_uneven", "gpt_pp2_account_emb_loss",
    "gpt_pp2_vpp2_layout", "moe_tp2_ep2", "moe_pp2_ep2_etp1", "distopt_tp2_dp2", "gpt_fp32_optim_tp2",
)  # fmt: skip


@pytest.mark.parametrize("name", MCORE)
def test_ranks_hold_what_is_stored(name: str) -> None:
    root = fixture_path(f"legacy/megatron_{name}")
    checkpoint = open_layout(root)
    config = expected_of(f"legacy/megatron_{name}")["config"]
    sizes = ParallelLayout(config["tp"], config["pp"], config["vp"] or 1, config["ep"])
    assert checkpoint.layout == sizes
    assert len(checkpoint.ranks) == config["tp"] * config["pp"] * (config["vp"] or 1) * config["ep"]
    for shard in checkpoint.ranks:
        stored = root_of(Path(shard.source))
        chunk = stored[f"model{shard.virtual_rank}" if config["vp"] else "model"]
        weights = {key: value for key, value in chunk.items() if value is not None}
        ours = part_norms(shard.tensors)  # the fixtures' layers are Megatron-Core's local ones
        assert list(ours) == list(weights)
        for key, tensor in weights.items():
            assert (ours[key].dtype, ours[key].shape, sha256_of(ours[key])) == (
                tensor.dtype,
                tensor.shape,
                sha256_of(tensor),
            )


@pytest.mark.parametrize("name", MCORE)
def test_norms_are_spelled_as_the_hub_does(name: str) -> None:
    for shard in open_layout(fixture_path(f"legacy/megatron_{name}")).ranks:
        names = set(shard.tensors)
        assert not any("input_layernorm" in key for key in names)
        moe = any(".experts." in key for key in names)
        assert any("pre_mlp_layernorm" in key for key in names) == moe
        assert any("linear_fc1.layer_norm_weight" in key for key in names) != moe


def test_stored_names_say_which_rank() -> None:
    checkpoint = open_layout(fixture_path("legacy/megatron_gpt_tp2_pp2"))
    name = "mp_rank_01_001/model.decoder.layers.1.mlp.linear_fc2.weight"
    assert checkpoint.tensors[name].shape == (8, 6)
    assert "mp_rank_00_000/optimizer.optimizer.state.3.exp_avg" in checkpoint.tensors
    assert "mp_rank_00_000/optimizer.fp32_from_fp16_params.1.0" in checkpoint.tensors
    assert all("/model." in key for key in checkpoint.weights())
    chunks = open_layout(fixture_path("legacy/megatron_gpt_tp2_pp2_vpp2"))
    assert "mp_rank_00_001/model1.output_layer.weight" in chunks.tensors
    distributed = open_layout(fixture_path("legacy/megatron_distopt_tp2_dp2"))
    assert "mp_rank_01/distrib_optim.0.(torch.bfloat16, torch.float32).exp_avg" in distributed.tensors
    assert not any("distrib_optim" in key for key in distributed.weights())


def test_training_state_and_configuration() -> None:
    checkpoint = open_layout(fixture_path("legacy/megatron_gpt_tp2_pp2"))
    training = checkpoint.training
    assert (training.step, training.consumed_samples) == (7, 56)
    assert training.has_optimizer and training.has_scheduler and training.has_rng
    assert checkpoint.config_kind == "megatron-args"
    assert checkpoint.config["num_query_groups"] == 2
    assert checkpoint.config["params_dtype"] == "torch.bfloat16"
    assert checkpoint.format_version == "checkpoint_version 3"
    assert checkpoint.objects["opt_param_scheduler"]["num_steps"] == 56
    assert "mp_rank_01_001/rng_state" in checkpoint.objects
    assert checkpoint.ignored["decoder.layers.0.mlp.linear_fc1._extra_state"]
    assert not checkpoint.warnings
    assert open_layout(fixture_path("legacy/megatron_gpt_pp2_vpp2_layout")).config[
        "pipeline_model_parallel_layout"
    ] == "Et|tt|t|tL"  # fmt: skip


@pytest.mark.parametrize("version", [0, 1, 2, 3])
def test_rows_of_projections_are_in_todays_order_whatever_the_version(version: int) -> None:
    """A rank's rows are those of its heads in the merged projection, which all four fixtures share."""
    checkpoint = open_layout(fixture_path(f"legacy/megatron_oldnames_v{version}"))
    reference = open_layout(fixture_path("legacy/megatron_oldnames_v3"))
    assert checkpoint.format_version == f"checkpoint_version {version}"
    for shard, other in zip(checkpoint.ranks, reference.ranks, strict=True):
        assert {name: sha256_of(tensor) for name, tensor in shard.tensors.items()} == {
            name: sha256_of(tensor) for name, tensor in other.tensors.items()
        }
    expected = expected_of(f"legacy/megatron_oldnames_v{version}")["global_tensors_mcore_names"]
    name = "decoder.layers.1.self_attention.linear_qkv.weight"
    halves = [shard.tensors[name].numpy() for shard in checkpoint.ranks]
    digest = hashlib.sha256(np.concatenate(halves).tobytes()).hexdigest()
    assert digest == expected[name]["sha256"]


def test_raw_rows_of_old_versions_differ() -> None:
    """The test above can fail: what is stored is in another order."""
    checkpoint = open_layout(fixture_path("legacy/megatron_oldnames_v0"))
    stored = checkpoint.tensors["mp_rank_00/model.language_model.transformer.layers.1.attention.query_key_value.weight"]
    ours = checkpoint.ranks[0].tensors["decoder.layers.1.self_attention.linear_qkv.weight"]
    assert sha256_of(stored) != sha256_of(ours)


def test_an_iteration_folder_opens_like_its_root() -> None:
    root = fixture_path("legacy/megatron_gpt_pp3_uneven")
    assert list(open_layout(root / "iter_0000007").tensors) == list(open_layout(root).tensors)
    release = open_layout(fixture_path("legacy/megatron_gpt_tp1_pp1_release"))
    assert release.details["tracker"] == "release"
    assert release.details["iteration_folder"].endswith("/release")


def test_the_registry_finds_it() -> None:
    checkpoint = registry.read(fixture_path("legacy/megatron_moe_tp2_ep2"))
    assert checkpoint.format == "megatron-lm"


def test_the_second_number_of_a_folder_is_what_the_args_say() -> None:
    """``mp_rank_00_001`` is pipeline stage 1 of one fixture and expert rank 1 of another."""
    pipeline = open_layout(fixture_path("legacy/megatron_gpt_pp3_uneven"))
    assert [(s.pipeline_rank, s.expert_rank) for s in pipeline.ranks] == [(0, 0), (1, 0), (2, 0)]
    expert = open_layout(fixture_path("legacy/megatron_moe_tp2_ep2"))
    assert [(s.tensor_rank, s.pipeline_rank, s.expert_rank) for s in expert.ranks] == [
        (0, 0, 0), (0, 0, 1), (1, 0, 0), (1, 0, 1),
    ]  # fmt: skip


def test_only_the_ranks_that_megatron_writes_are_needed(tmp_path: Path) -> None:
    """With fewer ranks per expert than per layer, some pairs of tensor and expert rank do not exist."""
    root = copy_fixture("megatron_moe_tp2_ep2", tmp_path)

    def one_rank_per_expert(contents: dict[object, object]) -> None:
        contents["args"].fields()["expert_tensor_parallel_size"] = 1  # type: ignore[attr-defined]

    for path in root.glob(f"iter_*/*/{FILE}"):
        change_rank(path, one_rank_per_expert)
    for name in ("mp_rank_00_001", "mp_rank_01_000"):
        (root / "iter_0000007" / name / FILE).unlink()
        (root / "iter_0000007" / name).rmdir()
    places = [(shard.tensor_rank, shard.expert_rank) for shard in open_layout(root).ranks]
    assert places == [(0, 0), (1, 1)]


def test_without_args_the_folders_tell_the_layout(tmp_path: Path) -> None:
    root = copy_fixture("megatron_gpt_pp3_uneven", tmp_path)
    for path in root.glob(f"iter_*/*/{FILE}"):
        change_rank(path, lambda contents: contents.pop("args"))
    checkpoint = open_layout(root)
    assert checkpoint.layout == ParallelLayout(1, 3, 1, 1)
    assert checkpoint.config_kind is None
    assert any("no args" in warning for warning in checkpoint.warnings)


def test_a_wrapped_model_loses_its_wrappers(tmp_path: Path) -> None:
    root = copy_fixture("megatron_gpt_tp1_pp1_release", tmp_path)
    path = root / "release" / "mp_rank_00" / FILE
    plain = list(open_layout(root).ranks[0].tensors)

    def wrap(contents: dict[object, object]) -> None:
        contents["model"] = {f"module.module.{key}": value for key, value in contents["model"].items()}  # type: ignore[attr-defined]

    change_rank(path, wrap)
    assert list(open_layout(root).ranks[0].tensors) == plain


def test_data_parallel_optimizer_folders_of_2023_are_passed_over(tmp_path: Path) -> None:
    root = copy_fixture("megatron_gpt_fp32_optim_tp2", tmp_path)
    for rank in ("mp_rank_00", "mp_rank_01"):
        folder = root / "iter_0000007" / rank
        (folder / FILE).rename(folder / "model_rng.pt")
        other = root / "iter_0000007" / f"{rank}_000"
        other.mkdir()
        (other / "optim.pt").write_bytes(b"never opened")
    checkpoint = open_layout(root)
    assert checkpoint.layout == ParallelLayout(2, 1, 1, 1)
    assert any("optim.pt" in warning for warning in checkpoint.warnings)


def test_opening_reads_no_tensor(tmp_path: Path) -> None:
    root = copy_fixture("megatron_gpt_tp1_pp1_release", tmp_path)
    path = root / "release" / "mp_rank_00" / FILE
    contents = root_of(path)
    contents["model"]["embedding.word_embeddings.weight"] = Constant(BY_NAME["float16"], (1 << 16, 64))
    write_torch(path, contents)
    size = path.stat().st_size
    before = bytes_read()
    open_layout(root)
    assert size > 8 << 20
    assert bytes_read() - before < 1 << 17
