"""NeMo 2's configuration classes: names and defaults as read in NeMo 2.6's sources."""

from __future__ import annotations

from typing import Any

import pytest
from tests.models.test_config import NEMO2_BASE, model_of

HYBRID = {
    "NemotronHConfig4B": (52, 3072, 12288, 32, 8, 112, 64, 128),
    "NemotronHConfig8B": (52, 4096, 21504, 32, 8, 128, 64, 128),
    "NemotronHConfig47B": (98, 8192, 30720, 64, 8, 256, 64, 256),
    "NemotronHConfig56B": (118, 8192, 32768, 64, 8, 256, 64, 256),
    "NemotronNano9Bv2": (56, 4480, 15680, 40, 8, 128, 80, 128),
    "NemotronNano12Bv2": (62, 5120, 20480, 40, 8, 128, 80, 128),
}


@pytest.mark.parametrize("name", HYBRID)
def test_nemotron_h(name: str) -> None:
    config = model_of({"_target_": f"{NEMO2_BASE}.ssm.{name}"}).config
    found = (
        config.num_layers, config.hidden_size, config.ffn_hidden_size, config.num_attention_heads,
        config.num_query_groups, config.mamba_num_heads, config.mamba_head_dim, config.mamba_state_dim,
    )  # fmt: skip
    assert found == HYBRID[name]
    assert config.kv_channels == 128
    assert len(config.hybrid_override_pattern or "") == config.num_layers


def test_letters_of_nanos_layers() -> None:
    letters = "M-M-M-M*-M-M-M-M*-M-M-M-M*-M-M-M-M*-M-M-M-M*-M-M-M-M*-M-M-M-M-"
    config = model_of({"_target_": f"{NEMO2_BASE}.ssm.NemotronNano12Bv2"}).config
    assert config.hybrid_override_pattern == letters


@pytest.mark.parametrize(
    ("name", "facts"),
    [
        ("gemma2.Gemma2Config27B", {"kv_channels": 128, "num_layers": 46, "query_pre_attn_scalar": 144}),
        ("gemma2.Gemma2Config9B", {"kv_channels": 256, "num_layers": 42, "query_pre_attn_scalar": 256}),
        ("mistral.MistralNeMoConfig12B", {"num_layers": 40, "kv_channels": 128, "rotary_base": 1e6}),
        ("mistral.MistralNeMoConfig123B", {"num_layers": 88, "num_attention_heads": 96, "rotary_base": 1e6}),
        ("mixtral.MixtralConfig8x22B", {"num_layers": 56, "max_position_embeddings": 4096}),
        ("qwen3.Qwen3Config30B_A3B", {"num_layers": 48, "num_query_groups": 4}),
        ("qwen3.Qwen3Config235B_A22B", {"num_layers": 94, "num_query_groups": 4}),
    ],
)
def test_defaults(name: str, facts: dict[str, Any]) -> None:
    config = model_of({"_target_": f"{NEMO2_BASE}.{name}"}).config
    assert {key: getattr(config, key) for key in facts} == facts
