"""A family of another package: mixture-of-experts layers after dense ones, registered through an entry point."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
from tests.models.cases import facts

import anyckpt.models.families as registry
from anyckpt import models
from anyckpt.checkpoint import Checkpoint
from anyckpt.config.fields import Field
from anyckpt.config.hugging_face import COMMON
from anyckpt.config.model import ModelConfig
from anyckpt.errors import MappingError
from anyckpt.models.families import llama
from anyckpt.models.families.parts import decoder
from anyckpt.models.language.family import Family
from anyckpt.models.language.rule_operations import GATE_UP
from anyckpt.models.language.rules import Rule
from anyckpt.tensor import LazyTensor, from_array

_SPARSE_FROM = 1


def _dense(config: ModelConfig, indices: tuple[int, ...]) -> bool:
    return indices[0] < _SPARSE_FROM


def _sparse(config: ModelConfig, indices: tuple[int, ...]) -> bool:
    return indices[0] >= _SPARSE_FROM


_EXPERT = "model.layers.*.mlp.experts.*"
_HUB_EXPERT = "decoder.layers.*.mlp.experts"

MOE = replace(
    llama.FAMILY,
    name="test-moe",
    title="a family of the tests",
    rules=(
        *(rule for rule in decoder.RULES if ".mlp." not in rule.hub),
        *(replace(rule, when=_dense) for rule in decoder.RULES if ".mlp." in rule.hub and "bias" not in rule.hub),
        Rule(
            ("model.layers.*.post_attention_layernorm.weight",),
            "decoder.layers.*.pre_mlp_layernorm.weight",
            ("hidden",),
            when=_sparse,
        ),
        Rule(
            ("model.layers.*.mlp.gate.weight",),
            "decoder.layers.*.mlp.router.weight",
            ("experts", "hidden"),
            when=_sparse,
        ),
        Rule(
            (f"{_EXPERT}.gate_proj.weight", f"{_EXPERT}.up_proj.weight"),
            f"{_HUB_EXPERT}.linear_fc1.weight*",
            ("fc1", "hidden"),
            GATE_UP,
            _sparse,
        ),
        Rule((f"{_EXPERT}.down_proj.weight",), f"{_HUB_EXPERT}.linear_fc2.weight*", ("hidden", "ffn"), when=_sparse),
    ),
    hugging_face=replace(llama.FAMILY.hugging_face, model_types=("test_moe",), architectures=("TestMoe",)),
    axes={"expert": lambda config: range(3)},
    dimensions={"experts": lambda config: 3},
)

CONFIG = {
    "model_type": "test_moe", "architectures": ["TestMoe"], "num_hidden_layers": 3, "hidden_size": 8,
    "intermediate_size": 4, "num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": 10,
}  # fmt: skip


class EntryPoint:
    name, group, value, dist = "test_moe", "anyckpt.families", "tests:MOE", None

    def load(self) -> Family:
        return MOE


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(registry, "registered", lambda group: {"test_moe": EntryPoint()})
    registry._registered.cache_clear()
    yield
    registry._registered.cache_clear()


def checkpoint() -> Checkpoint:
    tensors: dict[str, LazyTensor] = {}

    def add(name: str, *shape: int) -> None:
        tensors[name] = from_array(np.random.default_rng(len(tensors)).random(shape, dtype=np.float32))

    add("model.embed_tokens.weight", 10, 8)
    add("model.norm.weight", 8)
    add("lm_head.weight", 10, 8)
    for layer in range(3):
        prefix = f"model.layers.{layer}."
        for name, shape in (("q", (8, 8)), ("k", (4, 8)), ("v", (4, 8)), ("o", (8, 8))):
            add(f"{prefix}self_attn.{name}_proj.weight", *shape)
        add(f"{prefix}input_layernorm.weight", 8)
        add(f"{prefix}post_attention_layernorm.weight", 8)
        for mlp in ["mlp."] if layer < _SPARSE_FROM else [f"mlp.experts.{expert}." for expert in range(3)]:
            add(f"{prefix}{mlp}gate_proj.weight", 4, 8)
            add(f"{prefix}{mlp}up_proj.weight", 4, 8)
            add(f"{prefix}{mlp}down_proj.weight", 8, 4)
        if layer >= _SPARSE_FROM:
            add(f"{prefix}mlp.gate.weight", 3, 8)
    return Checkpoint("moe", "hf", tensors, dialect="hf", config=CONFIG, config_kind="hf")


def test_another_packages_family(registered: None) -> None:
    assert list(models.known_families())[-1] == "test-moe", "ours are tried first"
    source = checkpoint()
    model = models.identify(source)
    assert model is not None
    assert model.family == "test-moe"
    hub = models.to_hub(source, model)
    first = source.tensors["model.layers.2.mlp.experts.1.gate_proj.weight"].numpy()
    second = source.tensors["model.layers.2.mlp.experts.1.up_proj.weight"].numpy()
    fused = hub.tensors["decoder.layers.2.mlp.experts.linear_fc1.weight1"].numpy()
    np.testing.assert_array_equal(fused, np.concatenate([first, second]))
    assert "decoder.layers.0.mlp.linear_fc1.layer_norm_weight" in hub.tensors
    assert "decoder.layers.1.pre_mlp_layernorm.weight" in hub.tensors
    assert facts(models.from_hub(hub, "hf").tensors) == facts(source.tensors)


def test_completeness_counts_experts(registered: None) -> None:
    source = checkpoint()
    model = models.identify(source)
    assert model is not None
    for missing in list(source.tensors):
        rest = replace(source, tensors={n: t for n, t in source.tensors.items() if n != missing})
        with pytest.raises(MappingError, match="missing") as caught:
            models.to_hub(rest, model)
        assert missing in str(caught.value)


def test_the_order_is_layer_by_layer(registered: None) -> None:
    source = checkpoint()
    model = models.identify(source)
    assert model is not None
    layers = [int(name.split(".")[2]) for name in models.to_hub(source, model).tensors if ".layers." in name]
    assert layers == sorted(layers)


def test_fields_of_a_table_are_looked_up_in_order() -> None:
    keys = [entry.key for entry in (*COMMON, Field("layernorm_epsilon", "x"))]
    assert keys.index("num_attention_heads") < keys.index("num_key_value_heads")
    assert keys.index("hidden_size") < keys.index("head_dim")
