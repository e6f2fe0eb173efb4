"""Conversions there and back: every container, bit for bit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.support import expected_of, fixture_path, sha256_of

import anyckpt
from anyckpt.checkpoint import Checkpoint
from anyckpt.errors import UsageError

FAMILIES = ["llama", "llama31_ropescale", "llama_tied_bf16", "mistral_swa"]
TARGETS = ["safetensors", "torch", "lightning", "dcp", "megatron-core", "nemo", "nemo2", "hf"]


def digests(checkpoint: Checkpoint) -> dict[str, tuple[str, tuple[int, ...], str]]:
    return {name: (t.dtype.name, t.shape, sha256_of(t)) for name, t in checkpoint.weights().items()}


def files_of(checkpoint: Checkpoint) -> dict[str, bytes]:
    assert checkpoint.tokenizer is not None
    return {name.rpartition("/")[2]: source.read_all() for name, source in checkpoint.tokenizer.files.items()}


def settings(config: dict[str, Any]) -> dict[str, Any]:
    """What the model computes with."""
    keys = (
        "architectures", "model_type", "attention_bias", "head_dim", "hidden_act", "hidden_size", "intermediate_size",
        "max_position_embeddings", "num_attention_heads", "num_hidden_layers", "num_key_value_heads", "rms_norm_eps",
        "rope_parameters", "sliding_window", "tie_word_embeddings", "vocab_size",
    )  # fmt: skip
    return {key: config.get(key) for key in keys}


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("family", FAMILIES)
def test_hugging_face_there_and_back_has_the_same_bytes(tmp_path: Path, family: str, target: str) -> None:
    source = fixture_path(f"families/{family}/hf")
    there, back = tmp_path / "there", tmp_path / "back"
    anyckpt.convert(source, there, to=target)
    assert not anyckpt.diff(source, there, weights_only=True)
    config = source / "config.json" if anyckpt.open(there).config_kind is None else None
    anyckpt.convert(there, back, to="hf", config=config)
    assert digests(anyckpt.open(back)) == digests(anyckpt.open(source))
    before, after = (json.loads((folder / "config.json").read_text()) for folder in (source, back))
    assert settings(after) == settings(before)


@pytest.mark.parametrize("options", [{}, {"sharded": True}])
def test_a_chain_over_every_trainer_keeps_bytes_and_tokenizer(tmp_path: Path, options: dict[str, bool]) -> None:
    source = fixture_path("families/llama/hf")
    at = source
    for step, target in enumerate(("nemo", "nemo2", "megatron-core", "nemo", "megatron-core", "nemo2", "hf")):
        out = tmp_path / f"{step}-{target}"
        anyckpt.convert(at, out, to=target, **(options if target == "nemo" else {}))
        assert anyckpt.verify(out), target
        assert not anyckpt.diff(source, out), target
        assert files_of(anyckpt.open(out)).items() >= files_of(anyckpt.open(source)).items(), target
        at = out
    assert digests(anyckpt.open(at)) == digests(anyckpt.open(source))


def test_a_sharded_archive_holds_a_distributed_checkpoint(tmp_path: Path) -> None:
    source = fixture_path("families/llama/hf")
    anyckpt.convert(source, tmp_path / "flat.nemo", to="nemo")
    anyckpt.convert(source, tmp_path / "sharded.nemo", to="nemo", sharded=True)
    flat, sharded = anyckpt.open(tmp_path / "flat.nemo"), anyckpt.open(tmp_path / "sharded.nemo")
    assert "model.decoder.layers.0.self_attention.linear_qkv.weight" in flat.tensors
    assert sharded.tensors["model.decoder.layers.self_attention.linear_qkv.weight"].shape[0] == 2
    assert not anyckpt.diff(tmp_path / "flat.nemo", tmp_path / "sharded.nemo")


@pytest.mark.parametrize("target", ["safetensors", "torch", "dcp", "lightning"])
def test_a_model_that_nobody_knows_keeps_its_names(tmp_path: Path, target: str) -> None:
    source = fixture_path("nemo/asr_ctc_conformer_v3_0_0/ctc.nemo")
    done = anyckpt.convert(source, tmp_path / "out", to=target)
    assert digests(anyckpt.open(tmp_path / "out")) == digests(anyckpt.open(source))
    assert done.tensors == len(anyckpt.open(source).weights())


@pytest.mark.parametrize(
    ("relative", "target"),
    [
        ("mcore/dcp_fsdp_w2/ckpt", "torch"),
        ("mcore/dcp_fsdp_w2/ckpt", "safetensors"),
        ("nemo/lightning_fsdp2/m-step=2.ckpt", "safetensors"),
        ("legacy/ptl_adamw/model--val_loss=0.5-epoch=3.ckpt", "torch"),
        ("legacy/ptl_adamw/model--val_loss=0.5-epoch=3.ckpt", "safetensors"),
        ("legacy/zoo_legacy_tar/old.pt", "safetensors"),
        ("mcore/gpt_opt_plain/ckpt", "safetensors"),
        ("mcore/gpt_opt_plain/ckpt", "megatron-core"),
    ],
)
def test_weights_keep_their_own_names_between_containers(tmp_path: Path, relative: str, target: str) -> None:
    source = anyckpt.open(fixture_path(relative))
    done = anyckpt.convert(fixture_path(relative), tmp_path / "out", to=target)
    written = anyckpt.open(tmp_path / "out").tensors
    assert {name: (t.dtype.name, t.shape, sha256_of(t)) for name, t in written.items()} == digests(source)
    weights = {source.model_prefix + name for name in source.weights()}
    assert set(source.tensors) - weights <= set(done.ignored)


def test_converting_a_hybrid_lightning_checkpoint_matches_torchs_values(tmp_path: Path) -> None:
    expected = expected_of("nemo/lightning_fsdp2")["full_tensors"]
    source = fixture_path("nemo/lightning_fsdp2/m-step=2.ckpt")
    anyckpt.convert(source, tmp_path / "out.safetensors", to="safetensors")
    written = anyckpt.open(tmp_path / "out.safetensors")
    for name, tensor in written.tensors.items():
        facts = expected[name]
        assert (list(tensor.shape), sha256_of(tensor)) == (facts["shape"], facts["sha256"])


@pytest.mark.parametrize("target", ["torch", "dcp"])
def test_training_state_is_kept_where_it_can_be(tmp_path: Path, target: str) -> None:
    source = anyckpt.open(fixture_path("mcore/dcp_fsdp_w2/ckpt"))
    anyckpt.convert(source.path, tmp_path / "out", to=target, optimizer="keep")
    kept = anyckpt.open(tmp_path / "out")
    assert {n: (t.dtype, t.shape, sha256_of(t)) for n, t in kept.tensors.items()} == {
        n: (t.dtype, t.shape, sha256_of(t)) for n, t in source.tensors.items()
    }
    assert {name.partition(".")[0] for name in source.objects} == {name.partition(".")[0] for name in kept.objects}
    assert kept.objects["epoch"] == source.objects["epoch"] == 3


def test_training_state_that_cannot_be_kept_is_listed(tmp_path: Path) -> None:
    source = anyckpt.open(fixture_path("mcore/dcp_fsdp_w2/ckpt"))
    done = anyckpt.convert(source.path, tmp_path / "out", to="safetensors", optimizer="keep")
    state = {name for name in source.tensors if name.startswith(source.state_prefixes or ("\0",))}
    assert state
    assert state <= set(done.ignored)


def test_casts_are_those_of_numpy_and_counted(tmp_path: Path) -> None:
    source = fixture_path("families/llama/hf")
    done = anyckpt.convert(source, tmp_path / "out", to="megatron-core", dtype="bf16")
    assert done.casts == {"float32 -> bfloat16": done.tensors}
    anyckpt.convert(tmp_path / "out", tmp_path / "back", to="hf")
    before, after = anyckpt.open(source), anyckpt.open(tmp_path / "back")
    for name, tensor in before.tensors.items():
        rounded = after.tensors[name].numpy()
        assert np.array_equal(rounded, tensor.numpy().astype(rounded.dtype))


def test_progress_reaches_the_end(tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    done = anyckpt.convert(
        fixture_path("families/llama/hf"), tmp_path / "out", to="torch", progress=lambda *now: seen.append(now)
    )
    assert seen[-1] == (done.bytes_written, done.bytes_written)


def test_a_configuration_can_be_a_dictionary(tmp_path: Path) -> None:
    source = fixture_path("families/llama/hf")
    config = json.loads((source / "config.json").read_text())
    anyckpt.convert(source / "model.safetensors", tmp_path / "out", to="nemo", config=config)
    assert not anyckpt.diff(source, tmp_path / "out", weights_only=True)


@pytest.mark.parametrize(
    "options", [{"to": "nonsense"}, {"to": "hf", "optimizer": "maybe"}, {"to": "hf", "dtype": "int8"}]
)
def test_contradictory_options_are_usage_errors(tmp_path: Path, options: dict[str, str]) -> None:
    with pytest.raises(UsageError):
        anyckpt.convert(fixture_path("families/llama/hf"), tmp_path / "out", **options)  # type: ignore[arg-type]
    assert not list(tmp_path.iterdir())


def test_an_interrupted_conversion_leaves_no_destination_and_can_be_resumed(tmp_path: Path) -> None:
    source, out = fixture_path("families/llama/hf"), tmp_path / "out"

    def interrupt(done: int, total: int) -> None:
        if done > total // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        anyckpt.convert(source, out, to="megatron-core", progress=interrupt)
    assert not out.exists()
    anyckpt.convert(source, out, to="megatron-core", resume=True)
    assert anyckpt.verify(out, deep=True)
    assert not anyckpt.diff(source, out)


def test_a_model_of_unknown_family_moves_between_megatron_containers_by_name(tmp_path: Path) -> None:
    source = fixture_path("mcore/gpt_moe_ep2_seq_shared/ckpt")
    config = {"num_layers": 1, "hidden_size": 8, "encoder_seq_length": 16, "mcore_gpt": True, "num_attention_heads": 2}
    config["num_moe_experts"] = 2  # without which it would be GPT-2's
    with pytest.raises(UsageError, match="--config"):
        anyckpt.convert(source, tmp_path / "no.nemo", to="nemo", sharded=True)
    assert not list(tmp_path.iterdir())
    done = anyckpt.convert(source, tmp_path / "out.nemo", to="nemo", sharded=True, config=config)
    assert any("completeness is not checked" in note for note in done.notes)
    there = anyckpt.open(tmp_path / "out.nemo")
    names = {f"model.{name}" for name in anyckpt.open(source).weights()}
    local_specification = (
        "model.decoder.layers.mlp.linear_fc1.layer_norm_weight"  # Transformer Engine's has no such norm
    )
    assert names - set(there.tensors) == {local_specification}
    assert set(there.tensors) - names == {"model.decoder.layers.pre_mlp_layernorm.weight"}
    assert not anyckpt.diff(source, tmp_path / "out.nemo", weights_only=True)


def test_no_rule_leads_from_an_unknown_model_to_hugging_face(tmp_path: Path) -> None:
    source = fixture_path("nemo/asr_ctc_conformer_v3_0_0/ctc.nemo")
    with pytest.raises(UsageError, match="convert to safetensors, torch or dcp"):
        anyckpt.convert(source, tmp_path / "out", to="hf")


def test_manifests_do_not_travel(tmp_path: Path) -> None:
    at = fixture_path("families/llama/hf")
    for target in ("hf", "megatron-core", "nemo2", "nemo", "hf"):
        out = tmp_path / f"{len(list(tmp_path.iterdir()))}-{target}"
        anyckpt.convert(at, out, to=target)
        checkpoint = anyckpt.open(out)
        assert not [name for name in checkpoint.artifacts if "manifest" in name], target
        at = out


def test_files_without_a_place_in_the_target_are_listed(tmp_path: Path) -> None:
    source = fixture_path("families/llama/hf")
    done = anyckpt.convert(source, tmp_path / "out", to="dcp")
    assert set(done.ignored) == {"generation_config.json", "tokenizer.json", "tokenizer_config.json"}
    assert not anyckpt.convert(source, tmp_path / "hf", to="hf").ignored


def test_a_partly_trained_model_becomes_the_archive_that_training_would_have_left(tmp_path: Path) -> None:
    """NeMo wrote both: the checkpoint of the last step, and the archive at the end of training."""
    folder = fixture_path("nemo/ptl_ckpt_nemo2_5_3")
    anyckpt.convert(next(folder.glob("*-last.ckpt")), tmp_path / "out.nemo", to="nemo")
    ours, theirs = anyckpt.open(tmp_path / "out.nemo"), anyckpt.open(folder / "toy.nemo")
    assert {n: sha256_of(t) for n, t in ours.tensors.items()} == {n: sha256_of(t) for n, t in theirs.tensors.items()}
    # The vocabulary is a path of the machine that trained; the archive of training holds the file itself.
    assert {**ours.config, "vocab_file": None} == {**theirs.config, "vocab_file": None}


def test_globs_match_stored_names_and_those_without_the_common_prefix(tmp_path: Path) -> None:
    source = fixture_path("mcore/dcp_fsdp_w2") / "ckpt"
    written = []
    for number, glob in enumerate(("model.head.*", "head.*")):
        anyckpt.convert(source, tmp_path / f"{number}.pt", to="torch", include=glob)
        written.append(list(anyckpt.open(tmp_path / f"{number}.pt").tensors))
    assert written[0] == written[1] != []
