"""``.nemo`` archives with a folder per rank: those of NeMo 2.5.3 joined and cut again, and damaged ones refused."""

from __future__ import annotations

import gzip
import io
import tarfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.support import assert_tensors_equal_expected, expected_of, file_bytes, fixture_path, sha256_of, write_plan

from anyckpt.checkpoint import Checkpoint, ParallelLayout
from anyckpt.containers.torch_file import read_torch, zip_parts
from anyckpt.engine.plan import OutputFile
from anyckpt.errors import AnyckptError, FormatError, MappingError, UsageError
from anyckpt.formats import registry
from anyckpt.formats.format import WriteOptions
from anyckpt.formats.nemo import FORMAT
from anyckpt.formats.registry import look_at
from anyckpt.layout import cut
from anyckpt.models.dialects import spellings
from anyckpt.operations.steps.joining import geometry_of, open_checkpoint, parallelism_of
from anyckpt.plain_yaml import dump_yaml, load_yaml_mapping
from anyckpt.storage.local_file import LocalFile
from anyckpt.storage.source import MemorySource
from anyckpt.storage.tar import read_tar
from anyckpt.tensor import LazyTensor, from_array

NAMES = ["nemo1_mp_tp2", "nemo1_mp_tp2_pp2"]
Members = dict[str, bytes]


def archive_of(name: str) -> Path:
    return fixture_path(f"nemo/{name}/model.nemo")


def members_of(path: Path) -> Members:
    return {m.name: m.source.read_all() for m in read_tar(LocalFile(path)).values() if not m.is_directory}


def packed(members: Members, path: Path) -> Path:
    with tarfile.open(path, "w:") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(f"./{name}")
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def saved(root: Any) -> bytes:
    return file_bytes(OutputFile("", zip_parts(root)))


def state_of(data: bytes) -> dict[str, Any]:
    root = read_torch(MemorySource(data, "member")).root
    assert isinstance(root, dict)
    return root


def facts(state: dict[str, Any]) -> dict[str, Any]:
    return {
        name: (value.dtype.name, value.shape, sha256_of(value)) if isinstance(value, LazyTensor) else value
        for name, value in state.items()
    }


def stacked(checkpoint: Checkpoint) -> dict[str, LazyTensor]:
    return spellings.rename(checkpoint.weights(), "hub", "nemo-sharded")[0]


@pytest.mark.parametrize("form", ["tar", "gzip", "directory"])
@pytest.mark.parametrize("name", NAMES)
def test_joined_fixture_equals_the_whole_model(name: str, form: str, tmp_path: Path) -> None:
    path = archive_of(name)
    if form == "gzip":
        (tmp_path / "m.nemo").write_bytes(gzip.compress(path.read_bytes()))
        path = tmp_path / "m.nemo"
    elif form == "directory":
        for member, data in members_of(path).items():
            (tmp_path / member).parent.mkdir(exist_ok=True)
            (tmp_path / member).write_bytes(data)
        path = tmp_path
    expected = expected_of(f"nemo/{name}")
    checkpoint = open_checkpoint(path)
    assert_tensors_equal_expected(stacked(checkpoint), expected["global_tensors_by_sharded_key"])
    assert checkpoint.config == expected["config"] and checkpoint.config_kind == "nemo1"
    assert checkpoint.layout == ParallelLayout(expected["tp"], expected["pp"])
    assert checkpoint.tokenizer is not None and checkpoint.tokenizer.library == "sentencepiece"
    assert checkpoint.warnings == [] and checkpoint.artifacts == {}
    assert all(key.endswith("_extra_state") for key in checkpoint.ignored)


@pytest.mark.parametrize("name", NAMES)
def test_stored_names_are_those_of_the_files(name: str) -> None:
    expected = expected_of(f"nemo/{name}")
    checkpoint = FORMAT.read(look_at(archive_of(name)))
    wide = expected["pp"] > 1
    stored = {
        (f"tp_rank_{r['tp']:02d}_pp_rank_{r['pp']:03d}/" if wide else f"mp_rank_{r['tp']:02d}/").replace("/", ".") + key
        for r in expected["per_rank_state_dict"]
        for key in r["tensors"]
    }
    assert set(checkpoint.tensors) == stored
    assert len(checkpoint.ranks) == expected["tp"] * expected["pp"]
    assert checkpoint.details["rank_folders"] == len(checkpoint.ranks)
    checks = list(checkpoint.checksums())
    assert len(checks) >= len(stored)


def test_gate_and_up_are_not_simply_concatenated() -> None:
    """The known trap: each rank has a part of the gate and a part of the up projection."""
    first, second = FORMAT.read(look_at(archive_of(NAMES[0]))).ranks
    name = "decoder.layers.0.mlp.linear_fc1.weight"
    plain = np.concatenate([first.tensors[name].numpy(), second.tensors[name].numpy()])
    joined = open_checkpoint(archive_of(NAMES[0])).tensors[name].numpy()
    assert plain.shape == joined.shape and not np.array_equal(plain, joined)
    half = len(joined) // 2
    parts = [rank.tensors[name].numpy() for rank in (first, second)]
    assert np.array_equal(joined[:half], np.concatenate([part[: len(part) // 2] for part in parts]))
    assert np.array_equal(joined[half:], np.concatenate([part[len(part) // 2 :] for part in parts]))


@pytest.mark.parametrize("name", NAMES)
def test_cut_again_gives_the_files_that_nemo_wrote(name: str, tmp_path: Path) -> None:
    whole = open_checkpoint(archive_of(name))
    ranks = cut(whole.tensors, parallelism_of(whole), geometry_of(whole))
    assert FORMAT.plan is not None
    options = WriteOptions(layout=whole.layout)
    assert FORMAT.dialect(options) == "hub"
    plan = FORMAT.plan(replace(whole, ranks=tuple(ranks)), options)
    path = write_plan(plan, tmp_path / "m.nemo")
    original, ours = members_of(archive_of(name)), members_of(path)
    assert original.keys() == ours.keys()
    with tarfile.open(archive_of(name)) as theirs, tarfile.open(path) as mine:
        assert set(theirs.getnames()) == set(mine.getnames())
    for member, data in original.items():
        if member.endswith(".ckpt"):
            assert facts(state_of(ours[member])) == facts(state_of(data)), member
        elif member.endswith(".yaml"):
            assert load_yaml_mapping(ours[member], member) == load_yaml_mapping(data, member)
        else:
            assert ours[member] == data


def test_another_layout_of_the_same_model(tmp_path: Path) -> None:
    whole = open_checkpoint(archive_of(NAMES[1]))
    layout = ParallelLayout(1, 2)
    parallelism = replace(parallelism_of(whole), tensor_parallel=1, pipeline_parallel=2)
    ranks = tuple(cut(whole.tensors, parallelism, geometry_of(whole)))
    plan = FORMAT.plan(replace(whole, ranks=ranks, layout=layout), WriteOptions(layout=layout))  # type: ignore[misc]
    again = open_checkpoint(write_plan(plan, tmp_path / "m.nemo"))
    assert again.layout == layout and again.config["tensor_model_parallel_size"] == 1
    assert_tensors_equal_expected(stacked(again), expected_of(f"nemo/{NAMES[1]}")["global_tensors_by_sharded_key"])


def test_norms_of_transformer_engine_stay_fused(tmp_path: Path) -> None:
    whole = open_checkpoint(archive_of(NAMES[0]))
    ranks = tuple(cut(whole.tensors, parallelism_of(whole), geometry_of(whole)))
    source = replace(whole, ranks=ranks, details={}, config={**whole.config, "transformer_engine": True})
    plan = FORMAT.plan(source, WriteOptions(layout=whole.layout))  # type: ignore[misc]
    state = state_of(members_of(write_plan(plan, tmp_path / "m.nemo"))["mp_rank_00/model_weights.ckpt"])
    assert "model.decoder.layers.0.self_attention.linear_qkv.layer_norm_weight" in state
    assert not any("input_layernorm" in name for name in state)


@pytest.mark.parametrize("layout", [ParallelLayout(2, 2, 2), ParallelLayout(2, 1, 1, 2)])
def test_ranks_that_nemo_has_no_files_for(layout: ParallelLayout) -> None:
    source = replace(FORMAT.read(look_at(archive_of(NAMES[0]))), layout=layout)
    with pytest.raises(UsageError, match="no files for ranks"):
        FORMAT.plan(source, WriteOptions(layout=layout))  # type: ignore[misc]


def test_rank_outside_the_layout_is_not_written() -> None:
    source = replace(FORMAT.read(look_at(archive_of(NAMES[0]))), layout=ParallelLayout(1))
    with pytest.raises(UsageError, match="outside the layout"):
        FORMAT.plan(source, WriteOptions(layout=ParallelLayout(1)))  # type: ignore[misc]


def old_model(tp: int, *, gated: bool, legacy: bool = False, wrapper: str = "model.") -> tuple[Members, dict[str, Any]]:
    """Ranks as NeMo's own modules name them, and the global tensors that they are of."""
    hidden, ffn, heads, rows = 8, 12, 4, 16
    rng = np.random.default_rng(0)

    def made(*shape: int) -> np.ndarray[Any, Any]:
        return rng.standard_normal(shape).astype(np.float32)

    qkv, gate, up = made(heads, 3, hidden // heads, hidden), made(ffn, hidden), made(ffn, hidden)
    dense, down, words, norm = made(hidden, hidden), made(hidden, ffn), made(rows, hidden), made(hidden)
    whole = {
        "embedding.word_embeddings.weight": words,
        "decoder.layers.0.self_attention.linear_qkv.layer_norm_weight": norm,
        "decoder.layers.0.self_attention.linear_qkv.weight": qkv.reshape(3 * hidden, hidden),
        "decoder.layers.0.self_attention.linear_proj.weight": dense,
        "decoder.layers.0.mlp.linear_fc1.layer_norm_weight": norm + 1,
        "decoder.layers.0.mlp.linear_fc1.weight": np.concatenate([gate, up]) if gated else gate,
        "decoder.layers.0.mlp.linear_fc2.weight": down,
        "decoder.final_layernorm.weight": norm + 2,
    }
    config = {
        "num_layers": 1, "hidden_size": hidden, "ffn_hidden_size": ffn, "num_attention_heads": heads,
        "activation": "swiglu" if gated else "gelu", "tensor_model_parallel_size": tp, "encoder_seq_length": 4,
        "make_vocab_size_divisible_by": 1, "megatron_legacy": legacy,
    }  # fmt: skip
    members: Members = {"model_config.yaml": dump_yaml(config).encode()}
    for rank in range(tp):
        own = qkv[rank * heads // tp : (rank + 1) * heads // tp]
        layer = f"{wrapper}language_model.encoder.layers.0."
        state = {
            f"{wrapper}language_model.embedding.word_embeddings.weight": np.split(words, tp)[rank],
            f"{wrapper}language_model.rotary_pos_emb.inv_freq": norm,
            f"{layer}input_layernorm.weight": norm,
            f"{layer}self_attention.query_key_value.weight": (
                own.transpose(1, 0, 2, 3) if legacy else own
            ).reshape(-1, hidden),
            f"{layer}self_attention.dense.weight": np.split(dense, tp, 1)[rank],
            f"{layer}post_attention_layernorm.weight": norm + 1,
            f"{layer}mlp.dense_h_to_4h.weight": np.split(gate, tp)[rank],
            f"{layer}mlp.dense_4h_to_h.weight": np.split(down, tp, 1)[rank],
            f"{wrapper}language_model.encoder.final_layernorm.weight": norm + 2,
        }  # fmt: skip
        if gated:
            state[f"{layer}mlp.dense_h_to_4h_2.weight"] = np.split(up, tp)[rank]
        tensors = {name: from_array(np.ascontiguousarray(array)) for name, array in state.items()}
        members[f"mp_rank_{rank:02d}/model_weights.ckpt"] = saved(tensors)
    return members, whole


@pytest.mark.parametrize("wrapper", ["model.", "model.module."])
@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("gated", [False, True])
def test_names_of_nemos_own_modules(gated: bool, legacy: bool, wrapper: str, tmp_path: Path) -> None:
    members, whole = old_model(2, gated=gated, legacy=legacy, wrapper=wrapper)
    checkpoint = open_checkpoint(packed(members, tmp_path / "m.nemo"))
    assert checkpoint.tensors.keys() == whole.keys()
    for name, array in whole.items():
        assert np.array_equal(checkpoint.tensors[name].numpy(), array), name
    assert "language_model.rotary_pos_emb.inv_freq" in checkpoint.ignored


def test_adapters_of_four_ranks_are_joined() -> None:
    checkpoint = open_checkpoint(fixture_path("legacy/nemo_lora_tp2_pp2/lora.nemo"))
    expected = expected_of("legacy/nemo_lora_tp2_pp2")
    assert checkpoint.layout == ParallelLayout(2, 2)
    whole = {f"model.{name}": tensor for name, tensor in checkpoint.tensors.items()}
    assert_tensors_equal_expected(whole, expected["merged_fused"])


def changed(name: str, **values: Any) -> Members:
    members = members_of(archive_of(name))
    config = load_yaml_mapping(members["model_config.yaml"], "config")
    return {**members, "model_config.yaml": dump_yaml({**config, **values}).encode()}


def without(name: str, part: str) -> Members:
    return {member: data for member, data in members_of(archive_of(name)).items() if part not in member}


def with_state(name: str, rank: str, **changes: Any) -> Members:
    members = members_of(archive_of(name))
    state = dict(state_of(members[f"{rank}/model_weights.ckpt"]))
    for key, value in changes.items():
        state[key] = value
        if value is ...:
            del state[key]
    return {**members, f"{rank}/model_weights.ckpt": saved(state)}


FC2 = "model.decoder.layers.0.mlp.linear_fc2.weight"
BAD: dict[str, tuple[Members, str]] = {
    "missing rank": (without(NAMES[1], "tp_rank_01_pp_rank_001"), "rank folder is missing.*tp_rank_01_pp_rank_001"),
    "missing first rank": (without(NAMES[0], "mp_rank_00"), "rank folder is missing.*mp_rank_00"),
    "fewer ranks in the configuration": (
        changed(NAMES[0], tensor_model_parallel_size=1),
        "contradict each other.*tensor parallel 1 .*by the configuration.*tensor parallel 2",
    ),
    "more ranks in the configuration": (changed(NAMES[0], tensor_model_parallel_size=4), "missing.*mp_rank_02"),
    "pipeline in the configuration": (changed(NAMES[0], pipeline_model_parallel_size=2), "missing.*pp_rank_001"),
    "impossible size": (changed(NAMES[0], tensor_model_parallel_size=-1), "is not possible.*found -1"),
    "text for a size": (changed(NAMES[0], tensor_model_parallel_size="2"), "is not possible"),
    "virtual pipeline": (
        changed(NAMES[1], virtual_pipeline_model_parallel_size=2),
        "contradict each other on the virtual pipeline",
    ),
    "experts": (changed(NAMES[0], expert_model_parallel_size=2), "ranks that hold different experts"),
    "more layers in the configuration": (changed(NAMES[1], num_layers=4), "disagree on the decoder layers"),
    "truncated rank": (
        {k: v[: len(v) // 2] if "mp_rank_01" in k else v for k, v in members_of(archive_of(NAMES[0])).items()},
        "mp_rank_01",
    ),
    "missing tensor": (with_state(NAMES[0], "mp_rank_01", **{FC2: ...}), "in one rank's file but not in another's"),
    "unknown tensor": (
        with_state(NAMES[0], "mp_rank_01", **{"model.decoder.strange": from_array(np.zeros(2))}),
        "decoder.strange",
    ),
    "object": (with_state(NAMES[0], "mp_rank_01", **{FC2: "x"}), "is not a dense tensor"),
    "one folder twice": (
        {**members_of(archive_of(NAMES[0])), "mp_rank_000/model_weights.ckpt": b"x"},
        "two folders are of the same rank",
    ),
    "fully sharded": (
        {**members_of(archive_of(NAMES[0])), "mp_rank_00_fsdp_shard_00000/model_weights.ckpt": b"x"},
        "fully sharded data parallelism",
    ),
    "flat weights too": (
        {**members_of(archive_of(NAMES[0])), "model_weights.ckpt": b"x"},
        "more than one layout",
    ),
    "half without the other": (
        with_state(
            NAMES[0], "mp_rank_00", **{"model.language_model.mlp.dense_h_to_4h_2.weight": from_array(np.zeros((2, 2)))}
        ),
        "second half of a gated layer whose first half is missing",
    ),
    "legacy without heads": (changed(NAMES[0], megatron_legacy=True, num_attention_heads=3), "num_attention_heads"),
    "list for a state dict": (
        {**members_of(archive_of(NAMES[0])), "mp_rank_00/model_weights.ckpt": saved([1])},
        "does not hold a state dict",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_archives_are_named(case: str, tmp_path: Path) -> None:
    members, message = BAD[case]
    path = packed(members, tmp_path / "m.nemo")
    with pytest.raises((FormatError, MappingError), match=message):
        open_checkpoint(path)


def test_replicated_tensors_that_differ_are_said(tmp_path: Path) -> None:
    name = "model.decoder.final_layernorm.weight"
    state = state_of(members_of(archive_of(NAMES[0]))["mp_rank_01/model_weights.ckpt"])
    other = from_array(state[name].numpy() + np.asarray(1, state[name].dtype.numpy))
    path = packed(with_state(NAMES[0], "mp_rank_01", **{name: other}), tmp_path / "m.nemo")
    warnings = open_checkpoint(path).warnings
    assert len(warnings) == 1 and "decoder.final_layernorm.weight" in warnings[0]


@pytest.mark.parametrize("suffix", [".nemo", ".ckpt", "-EMA.nemo"])
def test_unfinished_checkpoints_are_refused_unless_forced(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"m{suffix}"
    path.write_bytes(archive_of(NAMES[0]).read_bytes())
    (tmp_path / "m-unfinished").touch()
    with pytest.raises(FormatError, match="marked as unfinished"):
        registry.read(path)
    assert len(open_checkpoint(path, force=True).tensors) == 15
    (tmp_path / "m-unfinished").unlink()
    assert len(open_checkpoint(path).tensors) == 15


def test_only_our_errors_escape(tmp_path: Path) -> None:
    """Single bytes changed anywhere in a rank's pickle or zip directory."""
    members = members_of(archive_of(NAMES[0]))
    data = members["mp_rank_00/model_weights.ckpt"]
    for at in range(0, len(data), 97):
        broken = data[:at] + bytes([data[at] ^ 0x41]) + data[at + 1 :]
        path = packed({**members, "mp_rank_00/model_weights.ckpt": broken}, tmp_path / "m.nemo")
        try:
            open_checkpoint(path)
        except AnyckptError:
            continue
