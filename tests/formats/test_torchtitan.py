"""A step that torchtitan's own manager saved, and what its own adapter makes of the weights for transformers.

Facts: torchtitan 0.3.0 on two ranks of gloo, with FSDP2, its Llama 3 of one layer, AdamW and a schedule of its own.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.support import fixture_path

import anyckpt
from anyckpt.errors import AnyckptError
from anyckpt.formats import registry
from anyckpt.operations.steps.joining import open_checkpoint

STEP = fixture_path("torchtitan/step-2")
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 32,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
    "max_position_embeddings": 128,
    "tie_word_embeddings": False,
    "hidden_act": "silu",
}


def test_what_it_holds() -> None:
    found = registry.read(STEP)
    assert found.format == "dcp" and found.training.step == 2
    assert found.training.has_optimizer and found.training.has_scheduler
    assert "layers.0.attention.qkv_linear.wq.weight" in found.weights()


def test_its_weights_are_what_torchtitan_makes_of_them(tmp_path: Path) -> None:
    anyckpt.convert(STEP, tmp_path / "hf", to="hf", config=CONFIG)
    expected = open_checkpoint(fixture_path("torchtitan/expected.safetensors")).tensors
    found = open_checkpoint(tmp_path / "hf").tensors
    assert found.keys() == expected.keys()
    assert all(found[name].numpy().tobytes() == expected[name].numpy().tobytes() for name in expected)


def test_its_names_come_back(tmp_path: Path) -> None:
    anyckpt.convert(STEP, tmp_path / "hf", to="hf", config=CONFIG)
    anyckpt.convert(tmp_path / "hf", tmp_path / "step-2", to="dcp", names="torchtitan")
    stored, written = registry.read(STEP).weights(), registry.read(tmp_path / "step-2").weights()
    assert written.keys() == stored.keys()
    assert all(written[name].numpy().tobytes() == stored[name].numpy().tobytes() for name in stored)


def test_state_of_fused_projections_is_refused(tmp_path: Path) -> None:
    """Its optimizer sees one weight for query, key and value, which the model's state parts."""
    with pytest.raises(AnyckptError, match="wqkv.*the optimizer's names are not the weights'"):
        anyckpt.convert(STEP, tmp_path / "m", to="megatron-core", config=CONFIG, optimizer="keep")
