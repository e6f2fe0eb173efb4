"""StarCoder2: LayerNorm and biases everywhere, a plain tanh GELU MLP, rope.

The map was checked against transformers 5.23 and Megatron-Core 0.16.  NeMo's classes have the erf GELU and untie the
embeddings; the released models have the tanh GELU, and 3B and 7B are tied.
"""

from __future__ import annotations

from collections.abc import Iterator

from anyckpt.config.hugging_face import COMMON
from anyckpt.config.model import Field, ModelConfig
from anyckpt.config.spellings import HuggingFace, NeMo2
from anyckpt.models.families import llama
from anyckpt.models.language.family import Family
from anyckpt.models.language.parameter_order import DECODER
from anyckpt.models.language.rules import Rule

_LAYER = "model.layers.*"
_HUB = "decoder.layers.*"

NORM_BIASES = (
    Rule((f"{_LAYER}.input_layernorm.bias",), f"{_HUB}.self_attention.linear_qkv.layer_norm_bias", ("hidden",)),
    Rule((f"{_LAYER}.post_attention_layernorm.bias",), f"{_HUB}.mlp.linear_fc1.layer_norm_bias", ("hidden",)),
    Rule(("model.norm.bias",), "decoder.final_layernorm.bias", ("hidden",)),
)
"""Of LayerNorm in models that are named as Llama."""


def plain_mlp(up: str, down: str) -> tuple[Rule, ...]:
    """An MLP without gate, by the names of its two layers."""
    return (
        Rule((f"{_LAYER}.mlp.{up}.weight",), f"{_HUB}.mlp.linear_fc1.weight", ("fc1", "hidden")),
        Rule((f"{_LAYER}.mlp.{up}.bias",), f"{_HUB}.mlp.linear_fc1.bias", ("fc1",), when=llama.biased),
        Rule((f"{_LAYER}.mlp.{down}.weight",), f"{_HUB}.mlp.linear_fc2.weight", ("hidden", "ffn")),
        Rule((f"{_LAYER}.mlp.{down}.bias",), f"{_HUB}.mlp.linear_fc2.bias", ("hidden",), when=llama.biased),
    )  # fmt: skip


WITHOUT_MLP = tuple(
    rule for rule in llama.RULES if not rule.hub.startswith(f"{_HUB}.mlp.") or rule.hub.endswith("layer_norm_weight")
)


def _caveats(config: ModelConfig, kind: str) -> Iterator[str]:
    if kind == "hf" and config.activation == "gelu" and "hf" not in config.extra:
        yield (
            "NeMo's StarCoder2 classes have the erf GELU, the released models the tanh one: if this is a released "
            "model, set hidden_act to gelu_pytorch_tanh in config.json"
        )


FAMILY = Family(
    name="starcoder2",
    title="StarCoder2",
    rules=(*WITHOUT_MLP, *NORM_BIASES, *plain_mlp("c_fc", "c_proj")),
    ignorable=llama.IGNORABLE,
    traits={
        "normalization": "LayerNorm",
        "layernorm_zero_centered_gamma": False,
        "gated_linear_unit": False,
        "add_qkv_bias": False,
        "qk_layernorm": False,
        "position_embedding_type": "rope",
        "rotary_interleaved": False,
        "parallel_residual": False,
    },
    recognise=lambda config: config.activation == "gelu_tanh" and config.rotary_percent == 1.0,
    caveats=_caveats,
    hugging_face=HuggingFace(
        model_types=("starcoder2",),
        architectures=("Starcoder2ForCausalLM",),
        windowed=True,
        registered=DECODER,
        fields=(
            *(entry for entry in COMMON if entry.key != "head_dim"),
            Field("layernorm_epsilon", "norm_epsilon", "number"),
            Field("hidden_dropout", "residual_dropout", "number", 0.0),
            Field("add_bias_linear", "use_bias", "flag", True),
        ),
        attention_bias=None,
    ),
    nemo2=NeMo2(
        module="nemo.collections.llm.gpt.model.starcoder2",
        model="Starcoder2Model",
        configs=("Starcoder2Config*",),
        choose=lambda config: "Starcoder2Config",
    ),
)  # fmt: skip
