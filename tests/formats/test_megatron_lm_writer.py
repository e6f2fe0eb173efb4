"""What is written for the fixtures' own ranks is what Megatron-Core wrote for them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tests.formats.megatron_lm_files import FILE, open_layout, root_of
from tests.formats.test_megatron_lm_reader import MCORE
from tests.support import fixture_path, sha256_of, write_plan

from anyckpt.checkpoint import Checkpoint, ParallelLayout, RankShard, Tokenizer, TrainingState
from anyckpt.dtypes import BY_NAME
from anyckpt.engine.plan import Plan
from anyckpt.errors import UsageError
from anyckpt.formats.format import WriteOptions
from anyckpt.formats.megatron_lm import FORMAT
from anyckpt.models.dialects.registration import registered_order, with_extra_states
from anyckpt.pickling import Global
from anyckpt.pickling.plain import to_plain
from anyckpt.storage.source import MemorySource
from anyckpt.tensor import Constant


def written(checkpoint: Checkpoint, path: Path) -> Path:
    return write_plan(planned(checkpoint), path)


def planned(checkpoint: Checkpoint) -> Plan:
    assert FORMAT.plan is not None
    return FORMAT.plan(checkpoint, WriteOptions())


def facts(chunk: dict[str, Any]) -> list[tuple[Any, ...]]:
    """Names in order, shapes, types and bytes of a chunk of a model."""
    return [
        (name, None) if value is None else (name, value.dtype, value.shape, sha256_of(value))
        for name, value in chunk.items()
    ]


@pytest.mark.parametrize("name", MCORE)
def test_rank_files_are_those_of_megatron(name: str, tmp_path: Path) -> None:
    """Tensor for tensor, ``_extra_state`` keys and the order of ``state_dict`` included."""
    source = fixture_path(f"legacy/megatron_{name}")
    output = written(open_layout(source), tmp_path / "out")
    theirs = sorted(path.relative_to(source) for path in source.glob(f"*/*/{FILE}"))
    ours = sorted(path.relative_to(output) for path in output.glob("*/*/*"))
    assert ours == theirs
    for mine, other in zip(ours, theirs, strict=True):
        new, old = root_of(output / mine), root_of(source / other)
        models = [key for key in old if key.startswith("model")]
        assert [key for key in new if key.startswith("model")] == models
        for key in models:
            assert facts(new[key]) == facts(old[key])
        assert new["checkpoint_version"] == 3.0
        before, after = to_plain(old["args"].fields()), to_plain(new["args"].fields())
        before.pop("rank")
        if "release" in other.parts:
            before["iteration"] = 0
        assert after == before
        assert new["iteration"] == (0 if "release" in other.parts else old["iteration"])
        for key in ("opt_param_scheduler", "num_floating_point_operations_so_far"):
            assert to_plain(new.get(key)) == to_plain(old.get(key))
        assert ("rng_state" in new) == ("rng_state" in old)


def test_tracker_and_folder_follow_the_step(tmp_path: Path) -> None:
    checkpoint = open_layout(fixture_path("legacy/megatron_gpt_pp3_uneven"))
    output = written(checkpoint, tmp_path / "steps")
    assert (output / "latest_checkpointed_iteration.txt").read_text() == "7"
    assert (output / "iter_0000007" / "mp_rank_00_002" / FILE).exists()
    late = replace(checkpoint, training=TrainingState(step=12_345_678))
    assert (written(late, tmp_path / "late") / "iter_12345678").is_dir()
    fresh = written(replace(checkpoint, training=TrainingState()), tmp_path / "fresh")
    assert (fresh / "latest_checkpointed_iteration.txt").read_text() == "release"
    assert (fresh / "release" / "mp_rank_00_000" / FILE).exists()
    assert root_of(fresh / "release" / "mp_rank_00_000" / FILE)["iteration"] == 0


def test_the_tracker_is_written_last() -> None:
    plan = planned(open_layout(fixture_path("legacy/megatron_gpt_pp3_uneven")))
    last = [file.path for file in plan.files if file.stage == 2]
    assert last == ["latest_checkpointed_iteration.txt"]
    assert all(file.stage == 0 for file in plan.files if file.path not in last)


def test_old_checkpoints_become_new_ones(tmp_path: Path) -> None:
    """Names and rows of version 0 are those of Megatron-Core afterwards."""
    checkpoint = open_layout(fixture_path("legacy/megatron_oldnames_v0"))
    output = written(checkpoint, tmp_path / "out")
    again = open_layout(output)
    assert again.format_version == "checkpoint_version 3"
    for new, old in zip(again.ranks, checkpoint.ranks, strict=True):
        assert {k: sha256_of(v) for k, v in new.tensors.items()} == {k: sha256_of(v) for k, v in old.tensors.items()}
    model = root_of(output / "iter_0000100" / "mp_rank_01" / FILE)["model"]
    assert "decoder.layers.0.self_attention.linear_qkv.layer_norm_bias" in model
    arguments = root_of(output / "iter_0000100" / "mp_rank_01" / FILE)["args"].fields()
    assert arguments["tensor_model_parallel_size"] == 2
    assert "model_parallel_size" not in arguments


def test_spelling_follows_the_configuration(tmp_path: Path) -> None:
    checkpoint = open_layout(fixture_path("legacy/megatron_gpt_tp1_pp1_release"))
    checkpoint.config["transformer_impl"] = "transformer_engine"
    model = root_of(written(checkpoint, tmp_path / "out") / "release" / "mp_rank_00" / FILE)["model"]
    assert "decoder.layers.0.mlp.linear_fc1.layer_norm_weight" in model
    assert not any("input_layernorm" in name for name in model)
    arguments = root_of(tmp_path / "out" / "release" / "mp_rank_00" / FILE)["args"]
    assert arguments.fields()["transformer_impl"] == "transformer_engine"


def whole_model() -> Checkpoint:
    tensors = {
        "output_layer.weight": Constant(BY_NAME["bfloat16"], (16, 4)),
        "decoder.layers.0.mlp.linear_fc1.weight": Constant(BY_NAME["bfloat16"], (8, 4)),
        "embedding.word_embeddings.weight": Constant(BY_NAME["bfloat16"], (16, 4)),
        "decoder.final_layernorm.weight": Constant(BY_NAME["bfloat16"], (4,)),
    }
    config = {"num_layers": 1, "params_dtype": "torch.bfloat16", "position_embedding_type": "rope", "world_size": 1}
    return Checkpoint("x", "hf", tensors, config=config, config_kind="megatron-args")


def test_a_whole_model_is_one_rank(tmp_path: Path) -> None:
    checkpoint = replace(
        whole_model(), tokenizer=Tokenizer("huggingface", {"tokenizer.json": MemorySource(json.dumps({}).encode())})
    )
    output = written(checkpoint, tmp_path / "out")
    root = root_of(output / "release" / "mp_rank_00" / FILE)
    assert list(root["model"]) == [
        "embedding.word_embeddings.weight",
        "decoder.layers.0.mlp.linear_fc1.weight",
        "decoder.layers.0.mlp.linear_fc1._extra_state",
        "decoder.final_layernorm.weight",
        "output_layer.weight",
        "output_layer._extra_state",
    ]
    arguments = root["args"].fields()
    assert arguments["params_dtype"] == Global("torch", "bfloat16")
    assert arguments["padded_vocab_size"] == 16
    assert arguments["add_position_embedding"] is False
    assert arguments["tokenizer_type"] == "HuggingFaceTokenizer"
    assert open_layout(output).layout == ParallelLayout()


def test_empty_chunks_are_left_out(tmp_path: Path) -> None:
    tensors = whole_model().tensors
    shards = (
        RankShard(0, 0, 0, 0, tensors, "a"), RankShard(0, 0, 1, 0, {}, "a"),
        RankShard(0, 1, 0, 0, {}, "b"), RankShard(0, 1, 1, 0, tensors, "b"),
    )  # fmt: skip
    checkpoint = replace(whole_model(), ranks=shards, layout=ParallelLayout(1, 2, 2, 1))
    output = written(checkpoint, tmp_path / "out")
    assert "model1" not in root_of(output / "release" / "mp_rank_00_000" / FILE)
    assert "model0" not in root_of(output / "release" / "mp_rank_00_001" / FILE)
    again = open_layout(output)
    assert [len(shard.tensors) for shard in again.ranks] == [4, 0, 0, 4]


def test_random_states_are_kept_in_the_same_layout_only(tmp_path: Path) -> None:
    checkpoint = open_layout(fixture_path("legacy/megatron_gpt_tp2_pp2"))
    plan = planned(checkpoint)
    assert "mp_rank_00_000/rng_state" not in plan.ignored
    assert not plan.notes
    bare = replace(checkpoint, optimizer=None)
    assert "mp_rank_00_000/optimizer" in planned(bare).ignored
    assert any("--no-load-optim" in note and "--no-load-rng" not in note for note in planned(bare).notes)
    half = tuple(shard for shard in checkpoint.ranks if shard.pipeline_rank == 0)
    fewer = planned(replace(bare, ranks=half, layout=ParallelLayout(2)))
    assert "mp_rank_00_000/rng_state" in fewer.ignored
    assert any("--no-load-rng" in note for note in fewer.notes)


def test_ranks_outside_the_layout_are_refused() -> None:
    checkpoint = open_layout(fixture_path("legacy/megatron_gpt_tp2_pp2"))
    with pytest.raises(UsageError, match="outside the layout"):
        planned(replace(checkpoint, layout=ParallelLayout(2)))
    with pytest.raises(UsageError, match="there twice"):
        planned(replace(checkpoint, ranks=(*checkpoint.ranks, checkpoint.ranks[0])))


def test_order_of_parameters() -> None:
    names = [
        "decoder.layers.10.mlp.experts.linear_fc1.weight0", "decoder.layers.2.mlp.experts.linear_fc1.weight10",
        "decoder.layers.2.mlp.experts.linear_fc1.weight9", "decoder.layers.2.mlp.shared_experts.linear_fc1.weight",
        "decoder.layers.2.mlp.router.weight", "decoder.layers.2.self_attention.linear_qkv.bias",
        "decoder.layers.2.self_attention.linear_qkv.weight",
        "decoder.layers.2.self_attention.linear_qkv.layer_norm_weight",
        "decoder.layers.2.self_attention.linear_proj.weight", "output_layer.weight", "decoder.final_layernorm.weight",
        "embedding.position_embeddings.weight", "embedding.word_embeddings.weight",
    ]  # fmt: skip
    assert registered_order(names) == [
        "embedding.word_embeddings.weight", "embedding.position_embeddings.weight",
        "decoder.layers.2.self_attention.linear_proj.weight",
        "decoder.layers.2.self_attention.linear_qkv.layer_norm_weight",
        "decoder.layers.2.self_attention.linear_qkv.weight", "decoder.layers.2.self_attention.linear_qkv.bias",
        "decoder.layers.2.mlp.router.weight", "decoder.layers.2.mlp.experts.linear_fc1.weight9",
        "decoder.layers.2.mlp.experts.linear_fc1.weight10", "decoder.layers.2.mlp.shared_experts.linear_fc1.weight",
        "decoder.layers.10.mlp.experts.linear_fc1.weight0", "decoder.final_layernorm.weight", "output_layer.weight",
    ]  # fmt: skip


def test_extra_states_of_heads() -> None:
    bert = ["encoder.final_layernorm.weight", "lm_head.dense.weight", "binary_head.weight"]
    assert [name for name, _ in with_extra_states(dict.fromkeys(bert))] == [
        "encoder.final_layernorm.weight", "lm_head.dense.weight", "output_layer._extra_state", "binary_head.weight",
    ]  # fmt: skip
    t5 = ["decoder.final_layernorm.weight", "lm_head.output_layer.bias"]
    assert [name for name, _ in with_extra_states(dict.fromkeys(t5))] == [
        "decoder.final_layernorm.weight", "lm_head.output_layer.bias", "lm_head.output_layer._extra_state",
        "output_layer.bias", "output_layer._extra_state",
    ]  # fmt: skip
