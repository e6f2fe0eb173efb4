"""Our rules' names against the table of Megatron-Bridge.

``tests/fixtures/bridge_names.json`` has, for families that Megatron-Bridge 0.6.2 maps, the names that its own registry
of mappings gives: Megatron's name -> Hugging Face's names, joined by spaces, in the order in which they are joined.
"""

from __future__ import annotations

import json

import pytest
from tests.support import fixture_path

from anyckpt.models import families

TABLES: dict[str, dict[str, str]] = json.loads(fixture_path("bridge_names.json").read_text())
OURS = {"kimi-k2": "deepseek-v3"}
"""Types that are of a family of another name."""
NEVER = {
    "decoder.layers.*.input_layernorm.weight": "the norm before attention of layers that Transformer Engine is not in",
    "decoder.layers.*.norm.weight": "the norm of a layer in old files of pure Mamba models",
    "decoder.final_layernorm.weight": "another name of a hybrid model's last norm",
    "decoder.layers.*.mixer.conv1d_weight": "another name of the convolution",
    "decoder.layers.*.mixer.conv1d_bias": "another name of the convolution",
    "decoder.layers.*.mamba_mixer.conv1d_weight": "another name of the convolution",
    "decoder.layers.*.mamba_mixer.conv1d_bias": "another name of the convolution",
    "decoder.layers.*.mlp.linear_fc1_up.weight": "a layer that is apart for quantization",
    "decoder.layers.*.mlp.linear_fc1.weight": "a dense layer, of models that have none",
    "decoder.layers.*.mlp.linear_fc2.weight": "a dense layer, of models that have none",
    "decoder.layers.*.mlp.linear_fc1.layer_norm_weight": "a dense layer, of models that have none",
    "decoder.layers.*.mlp.shared_experts.router.weight": "a gate of the shared expert, which no released model has",
    "decoder.layers.*.mlp.router.bias": "a bias that no released model has",
    "decoder.layers.*.self_attention.q_layernorm.weight": "the norm of a narrow query of latent attention, unfused",
    "decoder.layers.*.self_attention.kv_layernorm.weight": "the norm of latent keys and values, unfused",
    "decoder.layers.*.self_attention.linear_qkv.bias": "biases of attention, of models that have none",
}
"""Names of Megatron-Bridge that a family's rules may lack: each is none of its models', or is a dialect's."""


@pytest.mark.parametrize("family", TABLES)
def test_rules_are_those_of_megatron_bridge(family: str) -> None:
    table = TABLES[family]
    rules = families.by_name(OURS.get(family, family)).rules
    ours = {(rule.hub, " ".join(rule.source)) for rule in rules if rule.hub in table}
    strange = {(hub, source) for hub, source in ours if source not in table[hub]}
    assert strange == set()
    beyond = {rule.hub for rule in rules} - table.keys()
    assert all(hub.startswith("mtp.") or hub.endswith(".bias") or hub == "output_layer.weight" for hub in beyond), (
        beyond
    )
    assert table.keys() - {hub for hub, _ in ours} <= NEVER.keys()
