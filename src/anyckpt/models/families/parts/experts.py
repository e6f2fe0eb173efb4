"""Rules that mixture-of-experts families share; no family itself."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from anyckpt.config.fields import Codec, Field
from anyckpt.config.model import ModelConfig
from anyckpt.config.possible import layers_of
from anyckpt.config.reader import Reader
from anyckpt.config.spellings import Variant
from anyckpt.models.families.parts import decoder
from anyckpt.models.language.rule_operations import GATE_UP, INTERLEAVED_QKV
from anyckpt.models.language.rules import Rule

LAYER = "model.layers.*"
HUB = "decoder.layers.*"


def is_sparse(config: ModelConfig, indices: tuple[int, ...]) -> bool:
    """Whether the layer has experts."""
    return config.is_sparse(indices[0])


def is_dense(config: ModelConfig, indices: tuple[int, ...]) -> bool:
    """Whether the layer has a dense MLP."""
    return not config.is_sparse(indices[0])


ATTENTION = tuple(
    rule for rule in decoder.RULES if rule.hub.startswith(f"{HUB}.self_attention.") and not rule.hub.endswith(".bias")
)
"""Llama's, without biases."""

BIAS_OF_QUERY_KEY_VALUE = Rule(
    tuple(f"{name}.bias" for name in decoder.QUERY_KEY_VALUE),
    f"{HUB}.self_attention.linear_qkv.bias",
    ("qkv",),
    INTERLEAVED_QKV,
)

LEADING = tuple(rule for rule in decoder.RULES if rule.hub.startswith("embedding."))
TRAILING = tuple(rule for rule in decoder.RULES if rule.hub.startswith(("decoder.final", "output_layer.")))

DENSE = (
    Rule((f"{LAYER}.post_attention_layernorm.weight",), f"{HUB}.mlp.linear_fc1.layer_norm_weight", ("hidden",),
         when=is_dense),
    Rule((f"{LAYER}.mlp.gate_proj.weight", f"{LAYER}.mlp.up_proj.weight"), f"{HUB}.mlp.linear_fc1.weight",
         ("fc1", "hidden"), GATE_UP, is_dense),
    Rule((f"{LAYER}.mlp.down_proj.weight",), f"{HUB}.mlp.linear_fc2.weight", ("hidden", "ffn"), when=is_dense),
)  # fmt: skip
"""The MLP of layers without experts: the norm before it is fused into it, which that before experts is not."""


def experts(
    module: str = "mlp", router: str = "gate", gate: str = "gate_proj", up: str = "up_proj", down: str = "down_proj"
) -> tuple[Rule, ...]:
    """Norm, router and experts of a layer, each with a gate, by the names that the family gives them."""
    each = f"{LAYER}.{module}.experts.*"
    return (
        Rule((f"{LAYER}.post_attention_layernorm.weight",), f"{HUB}.pre_mlp_layernorm.weight", ("hidden",),
             when=is_sparse),
        Rule((f"{LAYER}.{module}.{router}.weight",), f"{HUB}.mlp.router.weight", ("experts", "hidden"),
             when=is_sparse),
        Rule((f"{each}.{gate}.weight", f"{each}.{up}.weight"), f"{HUB}.mlp.experts.linear_fc1.weight*",
             ("expert-fc1", "hidden"), GATE_UP, is_sparse),
        Rule((f"{each}.{down}.weight",), f"{HUB}.mlp.experts.linear_fc2.weight*", ("hidden", "expert-ffn"),
             when=is_sparse),
    )  # fmt: skip


_SHARED, _HUB_SHARED = f"{LAYER}.mlp.shared_expert", f"{HUB}.mlp.shared_experts"

GATED_SHARED = (
    Rule((f"{_SHARED}.gate_proj.weight", f"{_SHARED}.up_proj.weight"), f"{_HUB_SHARED}.linear_fc1.weight",
         ("shared-fc1", "hidden"), GATE_UP, is_sparse),
    Rule((f"{_SHARED}.down_proj.weight",), f"{_HUB_SHARED}.linear_fc2.weight", ("hidden", "shared-ffn"),
         when=is_sparse),
    Rule((f"{LAYER}.mlp.shared_expert_gate.weight",), f"{_HUB_SHARED}.gate_weight", ("one", "hidden"), when=is_sparse),
)  # fmt: skip
"""Qwen's expert that every token goes to, with its gate."""


def has_shared(config: ModelConfig, indices: tuple[int, ...]) -> bool:
    """Whether the layer has experts, and one for every token beside them."""
    return config.moe_shared_expert_intermediate_size is not None and config.is_sparse(indices[0])


def shared_experts() -> tuple[Rule, ...]:
    """The expert for every token, as DeepSeek names it."""
    shared, hub = f"{LAYER}.mlp.shared_experts", f"{HUB}.mlp.shared_experts"
    return (
        Rule((f"{shared}.gate_proj.weight", f"{shared}.up_proj.weight"), f"{hub}.linear_fc1.weight",
             ("shared-fc1", "hidden"), GATE_UP, has_shared),
        Rule((f"{shared}.down_proj.weight",), f"{hub}.linear_fc2.weight", ("hidden", "shared-ffn"), when=has_shared),
    )  # fmt: skip


def fields(count: str, *aliases: str) -> tuple[Field, ...]:
    """How many experts there are, by its key, how many a token goes to, and the loss that balances them."""
    return (
        Field("num_moe_experts", count, aliases=aliases),
        Field("moe_router_topk", "num_experts_per_tok"),
        Field("moe_aux_loss_coeff", "router_aux_loss_coef", "number"),
    )


_EXPERT = f"{LAYER}.mlp.experts.*"


def of_mlx(
    block: str = "mlp", gate: str = "gate_proj", up: str = "up_proj", down: str = "down_proj"
) -> tuple[Variant, ...]:
    """mlx-lm's names of experts, which it stacks.

    Args:
        block: what of a layer has the experts.
        gate, up, down: what the family calls an expert's weights.
    """
    own = {"gate_proj": gate, "up_proj": up, "down_proj": down}
    return tuple(
        Variant(f"{LAYER}.{block}.switch_mlp.{name}.weight", (f"{LAYER}.{block}.experts.*.{part}.weight",))
        for name, part in own.items()
    )


STACKED = (
    Variant(f"{LAYER}.mlp.experts.gate_up_proj", (f"{_EXPERT}.gate_proj.weight", f"{_EXPERT}.up_proj.weight")),
    Variant(f"{LAYER}.mlp.experts.down_proj", (f"{_EXPERT}.down_proj.weight",)),
    *of_mlx(),
)
"""transformers 5's layout in memory, and on disk with ``save_original_format=False``; and mlx-lm's."""

_TOGETHER = tuple(variant for variant in STACKED if ".experts." in variant.stored)
STACKED_WRITTEN = tuple(replace(variant, written=True) for variant in _TOGETHER)
"""As Qwen3.5 is published."""
STACKED_TRANSPOSED = tuple(replace(variant, transposed=True, written=True) for variant in _TOGETHER)
"""Qwen3-VL's on disk, (in, out) for each expert under the names of the other layout."""

READ_TRANSPOSED = tuple(replace(variant, transposed=True) for variant in _TOGETHER)
"""The same where only shapes tell which of the two it is."""


class SteppedLayers(Codec):
    """Megatron's list in Qwen's two keys: every so many layers have experts, but for those that are dense."""

    hubs = ("moe_layer_freq",)
    keys = ("decoder_sparse_step", "mlp_only_layers")

    def read(self, reader: Reader, defaults: Mapping[str, Any], found: Mapping[str, Any]) -> Mapping[str, Any]:
        step = reader.integer("decoder_sparse_step")
        step = 1 if step is None else step
        listed = reader.tokens("mlp_only_layers") or ()  # a list of whole numbers, or one
        dense = {listed} if isinstance(listed, int) else set(listed)
        layers = layers_of(found["num_layers"])
        return {
            "moe_layer_freq": pattern(layer not in dense and step > 0 and (layer + 1) % step == 0 for layer in layers)
        }

    def write(self, config: ModelConfig, notes: list[str]) -> Mapping[str, Any]:
        return {"decoder_sparse_step": 1, "mlp_only_layers": dense_layers(config)}


def pattern(layers: Iterable[bool]) -> tuple[int, ...] | None:
    """Megatron's list of layers, each with experts or dense; None if all have experts."""
    listed = tuple(map(int, layers))
    return None if all(listed) else listed


def dense_layers(config: ModelConfig) -> list[int]:
    """Layers without experts."""
    return [layer for layer, sparse in enumerate(config.moe_layer_freq or ()) if not sparse]
