"""Rank files that Megatron-Core 0.16 wrote: joined they are the model, cut again they are the files.

The fixtures are of the local implementation, whose norms have names of their own; those are joined and cut as they are.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from anyckpt.checkpoint import RankShard
from anyckpt.containers.torch_file import read_torch
from anyckpt.layout import Geometry, Parallelism, cut, join
from anyckpt.layout.experts import parse
from anyckpt.storage.local_file import LocalFile
from anyckpt.tensor import LazyTensor, concatenate
from tests.layout.sample import assert_equal, rank_of
from tests.support import assert_tensors_equal_expected, expected_of, fixture_path, sha256_of

CASES = [
    "megatron_distopt_tp2_dp2",
    "megatron_gpt_fp32_optim_tp2",
    "megatron_gpt_pp2_account_emb_loss",
    "megatron_gpt_pp2_vpp2_layout",
    "megatron_gpt_pp3_uneven",
    "megatron_gpt_tp1_pp1_release",
    "megatron_gpt_tp2_pp2",
    "megatron_gpt_tp2_pp2_vpp2",
    "megatron_moe_pp2_ep2_etp1",
    "megatron_moe_tp2_ep2",
]


def described(case: str) -> tuple[Parallelism, Geometry]:
    """The layout and the model, as the fixture's description has them."""
    facts = expected_of(f"legacy/{case}")
    config = facts["config"]
    parallelism = Parallelism(
        tensor_parallel=config["tp"],
        pipeline_parallel=config["pp"],
        virtual_pipeline=config["vp"] or 1,
        expert_parallel=config["ep"],
        expert_tensor_parallel=config["etp"],
        num_layers_in_first_pipeline_stage=config["first"],
        num_layers_in_last_pipeline_stage=config["last"],
        account_for_embedding=config["acc_emb"],
        account_for_loss=config["acc_loss"],
        pipeline_layout=config["layout"],
    )
    geometry = Geometry(
        num_layers=config["num_layers"],
        num_attention_heads=config["num_attention_heads"],
        num_query_groups=config["num_query_groups"],
        kv_channels=config["kv_channels"],
        gated_linear_unit=config["swiglu"],
        num_experts=config["experts"],
        share_embeddings_and_output_weights=config["tied"],
        padded_vocab_size=facts["padded_vocab_size"],
        make_vocab_size_divisible_by=config["div"],
    )
    return parallelism, geometry


def stored(case: str, parallelism: Parallelism) -> list[RankShard]:
    """What the rank files hold."""
    shards = []
    for file in sorted(fixture_path(f"legacy/{case}").rglob("model_optim_rng.pt")):
        tensor_rank, *numbers = (int(digits) for digits in file.parent.name.split("_")[2:])
        pipeline_rank = numbers.pop(0) if parallelism.pipeline_parallel > 1 else 0
        expert_rank = numbers.pop(0) if numbers else 0
        root = read_torch(LocalFile(str(file))).root
        for key in root:
            if key.startswith("model"):
                tensors = {name: value for name, value in root[key].items() if isinstance(value, LazyTensor)}
                where = f"{file.parent.name}/{key}"
                shards.append(RankShard(tensor_rank, pipeline_rank, int(key[5:] or 0), expert_rank, tensors, where))
    return shards


def in_hub_spelling(expected: Mapping[str, Any]) -> dict[str, Any]:
    return {
        f"{found.base}{found.number}" if (found := parse(name)) else name: facts for name, facts in expected.items()
    }


@pytest.mark.parametrize("case", CASES)
def test_joined_files_are_the_model(case: str) -> None:
    parallelism, geometry = described(case)
    joined = join(stored(case, parallelism), parallelism, geometry, verify_replicas=True)
    assert not joined.warnings
    assert_tensors_equal_expected(joined.tensors, in_hub_spelling(expected_of(f"legacy/{case}")["global_tensors"]))


@pytest.mark.parametrize("case", CASES)
def test_the_model_cut_again_is_the_files(case: str) -> None:
    parallelism, geometry = described(case)
    files = {rank_of(shard): shard for shard in stored(case, parallelism)}
    joined = join(files.values(), parallelism, geometry)
    shards = {rank_of(shard): shard for shard in cut(joined.tensors, parallelism, geometry, spelling="sequential")}
    assert sorted(shards) == sorted(files)
    for rank, file in files.items():
        assert list(shards[rank].tensors) == list(file.tensors)
        assert_equal(shards[rank].tensors, file.tensors)
        assert [t.dtype for t in shards[rank].tensors.values()] == [t.dtype for t in file.tensors.values()]


@pytest.mark.parametrize("case", CASES)
def test_the_true_vocabulary_is_trimmed_exactly(case: str) -> None:
    parallelism, geometry = described(case)
    facts = expected_of(f"legacy/{case}")
    trimmed = replace(geometry, vocab_size=facts["true_vocab_size"])
    joined = join(stored(case, parallelism), parallelism, trimmed)
    name = "embedding.word_embeddings.weight"
    assert joined.tensors[name].shape[0] == 61
    assert sha256_of(joined.tensors[name]) == facts["global_tensors"][name]["sha256_trimmed_to_true_vocab"]


def test_concatenating_a_gated_projection_is_wrong() -> None:
    """NeMo's own converter does this for ``linear_fc1``; only the halves joined separately are the model's."""
    case, name = "megatron_gpt_tp2_pp2", "decoder.layers.0.mlp.linear_fc1.weight"
    parallelism, geometry = described(case)
    shards = stored(case, parallelism)
    parts = [s.tensors[name] for s in shards if s.pipeline_rank == 0]
    true = expected_of(f"legacy/{case}")["global_tensors"][name]["sha256"]
    assert sha256_of(concatenate(parts, 0)) != true
    assert sha256_of(join(shards, parallelism, geometry).tensors[name]) == true


def test_layers_of_the_stages_are_where_the_description_says() -> None:
    for case in CASES:
        parallelism, geometry = described(case)
        joined = join(stored(case, parallelism), parallelism, geometry)
        shards = cut(joined.tensors, parallelism, geometry)
        rank_layers = expected_of(f"legacy/{case}")["rank_layers"]
        for shard in shards:
            key = f"tp{shard.tensor_rank}_pp{shard.pipeline_rank}_ep{shard.expert_rank}"
            due = rank_layers[key][shard.virtual_rank]
            for local, layer in enumerate(due):
                name = "self_attention.linear_proj.weight"
                whole = joined.tensors[f"decoder.layers.{layer}.{name}"]
                columns = whole.shape[1] // parallelism.tensor_parallel
                expected = whole.narrow(1, columns * shard.tensor_rank, columns)
                assert_equal({"": shard.tensors[f"decoder.layers.{local}.{name}"]}, {"": expected})


def test_adapters_of_nemo_are_joined(tmp_path: Path) -> None:
    import tarfile

    facts = expected_of("legacy/nemo_lora_tp2_pp2")
    with tarfile.open(fixture_path("legacy/nemo_lora_tp2_pp2/lora.nemo")) as archive:
        archive.extractall(tmp_path, filter="data")
    shards = []
    for file in sorted(tmp_path.rglob("model_weights.ckpt")):
        digits = file.parent.name.split("_")  # tp_rank_00_pp_rank_001
        root = read_torch(LocalFile(str(file))).root
        tensors = {name.removeprefix("model."): tensor for name, tensor in root.items()}
        shards.append(RankShard(int(digits[2]), int(digits[5]), 0, 0, tensors, file.parent.name))
    assert len(shards) == 4
    geometry = Geometry(num_layers=2, gated_linear_unit=True)
    joined = join(shards, Parallelism(tensor_parallel=2, pipeline_parallel=2), geometry)
    merged = facts["merged_fused"]
    assert_tensors_equal_expected({f"model.{name}": tensor for name, tensor in joined.tensors.items()}, merged)


OTHER_LAYOUTS = [
    Parallelism(1, 1),
    Parallelism(2, 1),
    Parallelism(4, 2),
    Parallelism(1, 2, 2),
    Parallelism(2, 2, num_layers_in_first_pipeline_stage=1),
    Parallelism(1, 3, pipeline_layout="Et|t*2|"),
    Parallelism(2, 1, 1, expert_parallel=2),
    Parallelism(2, 2, 1, expert_parallel=4, expert_tensor_parallel=1),
    Parallelism(4, 1, 1, expert_parallel=2, expert_tensor_parallel=2),
]


@pytest.mark.parametrize("layout", OTHER_LAYOUTS, ids=str)
@pytest.mark.parametrize("case", ["megatron_gpt_pp3_uneven", "megatron_gpt_tp2_pp2_vpp2", "megatron_moe_tp2_ep2"])
def test_another_layout_holds_the_same_model(case: str, layout: Parallelism) -> None:
    parallelism, geometry = described(case)
    if layout.expert_parallel > 1 and not geometry.num_experts:
        layout = replace(layout, expert_parallel=1)
    layers = geometry.num_layers or 0
    if layout.pipeline_layout:
        layout = replace(layout, pipeline_layout=f"E|t*{layers - 1}|tL")
    elif layers % (layout.pipeline_parallel * layout.virtual_pipeline):
        layout = replace(layout, virtual_pipeline=1)
    facts = expected_of(f"legacy/{case}")
    vocabulary = facts["true_vocab_size"]
    joined = join(stored(case, parallelism), parallelism, replace(geometry, vocab_size=vocabulary))
    target = replace(geometry, vocab_size=vocabulary, padded_vocab_size=None)
    shards = cut(joined.tensors, layout, target)
    rows = {s.tensors[n].shape[0] for s in shards for n in s.tensors if n == "embedding.word_embeddings.weight"}
    assert rows == {-(-vocabulary // (8 * layout.tensor_parallel)) * 8}
    again = join(shards, layout, target, verify_replicas=True)
    assert not again.warnings
    assert_equal(again.tensors, joined.tensors)
