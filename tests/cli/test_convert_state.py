"""``anyckpt convert --optimizer keep`` and ``--names``: what users see."""

from __future__ import annotations

from pathlib import Path

from tests.cli.runner import Runner
from tests.support import fixture_path

RANKS = "legacy/megatron_gpt_tp2_pp2"


def test_state_is_refused_in_one_line_that_offers_to_drop_it(anyckpt: Runner, tmp_path: Path) -> None:
    source = fixture_path("mcore/gpt_opt_dp_zero_dp2") / "ckpt"
    found = anyckpt("convert", source, tmp_path / "out", "--to", "dcp", "--optimizer", "keep")
    assert "nothing tells the order of the parameters" in found.error
    assert "leave it out with --optimizer drop" in found.error
    assert not (tmp_path / "out").exists()
    assert anyckpt("convert", source, tmp_path / "out", "--to", "dcp", "--optimizer", "drop").code == 0


def test_what_is_left_behind_is_told(anyckpt: Runner, tmp_path: Path) -> None:
    out = tmp_path / "out"
    found = anyckpt(
        "convert", fixture_path(RANKS), out, "--to", "megatron-lm", "--optimizer", "keep", "--tp", "1", "--json"
    ).json
    reasons = {entry["name"]: entry["reason"] for entry in found["ignored"]}
    assert reasons["rng_state/shard_0.0_2.2"] == "is not carried to another layout"
    assert not any("optimizer" in name for name in reasons)
    assert any("--no-load-rng" in note for note in found["notes"])


def test_names_are_chosen(anyckpt: Runner, tmp_path: Path) -> None:
    ranks, file = tmp_path / "ranks", tmp_path / "out.safetensors"
    assert anyckpt("convert", fixture_path("families/llama/hf"), ranks, "--to", "megatron-lm", "--tp", "2").code == 0
    assert anyckpt("convert", ranks, file, "--to", "safetensors", "--names", "hf").code == 0
    shown = anyckpt("inspect", file, "--all").out
    assert "model.layers.0.self_attn.q_proj.weight" in shown and "linear_qkv" not in shown
    found = anyckpt("convert", ranks, tmp_path / "x", "--to", "hf", "--names", "hub")
    assert "hf has names of its own" in found.error
