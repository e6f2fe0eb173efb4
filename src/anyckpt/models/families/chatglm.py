"""ChatGLM 2 and 3, and GLM-4 in the same code: query, key and value in one matrix, rope on half of each head.

Neighbouring channels are rotated.  Names, shapes and keys are those of the released models' own code
(``modeling_chatglm.py``, ``configuration_chatglm.py``).  ``rope_ratio`` divides positions in ChatGLM2-6B-32K and
multiplies theta in ChatGLM 3 and GLM-4; the configuration says which only by the name that it carries.  NVIDIA's
converters do not know the key.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from anyckpt.config.codecs import Fixed, Words, same_as
from anyckpt.config.fields import Codec, Field, as_many_as_heads
from anyckpt.config.model import ModelConfig
from anyckpt.config.reader import Reader
from anyckpt.config.spellings import HuggingFace, NeMo2
from anyckpt.errors import MappingError
from anyckpt.models.families.parts import decoder
from anyckpt.models.families.parts.apart import RemoteCode
from anyckpt.models.families.parts.modules import linear
from anyckpt.models.language.family import Family
from anyckpt.models.language.rule_operations import CONCATENATED_QKV
from anyckpt.models.language.rules import Rule

_LAYER = "transformer.encoder.layers.*"
_HUB = "decoder.layers.*"
_BASE = 10000.0
_GROUPS = {False: as_many_as_heads, True: same_as("num_query_groups")}
_SECOND = "chatglm2"
_PLAIN = "that of a model without prefix encoder or packed weights, which is the one to convert"
_EXPECTED = {"rmsnorm": True, "post_layer_norm": True, "apply_residual_connection_post_layernorm": False}
_MODEL = "modeling_chatglm.ChatGLMForConditionalGeneration"
_CLASSES = {
    "AutoConfig": "configuration_chatglm.ChatGLMConfig", "AutoModel": _MODEL, "AutoModelForCausalLM": _MODEL,
}  # fmt: skip

RULES = (
    Rule(("transformer.embedding.word_embeddings.weight",), "embedding.word_embeddings.weight",
         ("vocabulary", "hidden")),
    Rule((f"{_LAYER}.input_layernorm.weight",), f"{_HUB}.self_attention.linear_qkv.layer_norm_weight", ("hidden",)),
    *linear(f"{_LAYER}.self_attention.query_key_value", f"{_HUB}.self_attention.linear_qkv", ("qkv", "hidden"),
            CONCATENATED_QKV, bias=decoder.biased_qkv),
    *linear(f"{_LAYER}.self_attention.dense", f"{_HUB}.self_attention.linear_proj", ("hidden", "attention"),
            bias=decoder.biased),
    Rule((f"{_LAYER}.post_attention_layernorm.weight",), f"{_HUB}.mlp.linear_fc1.layer_norm_weight", ("hidden",)),
    *linear(f"{_LAYER}.mlp.dense_h_to_4h", f"{_HUB}.mlp.linear_fc1", ("fc1", "hidden"), bias=decoder.biased),
    *linear(f"{_LAYER}.mlp.dense_4h_to_h", f"{_HUB}.mlp.linear_fc2", ("hidden", "ffn"), bias=decoder.biased),
    Rule(("transformer.encoder.final_layernorm.weight",), "decoder.final_layernorm.weight", ("hidden",)),
    Rule(("transformer.output_layer.weight",), "output_layer.weight", ("vocabulary", "hidden"), when=decoder.untied),
)  # fmt: skip


class _Ratio(Codec):
    """``rope_ratio``: of positions in the second generation, of theta since."""

    hubs = ("rotary_base", "rope_scaling")
    keys = ("rope_ratio",)

    def read(self, reader: Reader, defaults: Mapping[str, Any], found: Mapping[str, Any]) -> Mapping[str, Any]:
        ratio = reader.number("rope_ratio") or 1.0
        interpolated = _SECOND in (reader.text("_name_or_path") or "").lower() and ratio != 1
        return {
            "rotary_base": _BASE if interpolated else _BASE * ratio,
            "rope_scaling": {"rope_type": "linear", "factor": ratio} if interpolated else None,
        }

    def write(self, config: ModelConfig, notes: list[str]) -> Mapping[str, Any]:
        scaling = config.rope_scaling
        if scaling is None:
            return {} if config.rotary_base == _BASE else {"rope_ratio": config.rotary_base / _BASE}
        if scaling.get("rope_type") != "linear" or config.rotary_base != _BASE:
            raise MappingError(
                "ChatGLM has no such rope", expected="rope_scaling of type linear with theta 10000, or none",
                found=dict(scaling),
            )  # fmt: skip
        name = config.extra.get("hf", {}).get("_name_or_path") or "zai-org/chatglm2-6b-32k"
        return {"rope_ratio": scaling["factor"], "_name_or_path": name}


NEMO2_CONFIGS = ("ChatGLMConfig", "ChatGLM2Config6B", "ChatGLM3Config6B")

FAMILY = Family(
    name="chatglm",
    title="ChatGLM 2 and 3",
    rules=RULES,
    ignorable=(("transformer.rotary_pos_emb.inv_freq", decoder.FREQUENCIES),),
    traits={
        **{name: value for name, value in decoder.TRAITS.items() if name != "add_qkv_bias"},
        "rotary_interleaved": True,
        "rotary_percent": 0.5,
    },
    hugging_face=HuggingFace(
        model_types=("chatglm",),
        architectures=("ChatGLMModel", "ChatGLMForConditionalGeneration"),
        defaults={
            "padded_vocab_size": 65024,
            "hidden_size": 4096,
            "ffn_hidden_size": 13696,
            "num_layers": 28,
            "num_attention_heads": 32,
            "kv_channels": 128,
            "seq_length": 2048,
            "layernorm_epsilon": 1e-5,
        },
        fields=(
            Field("num_layers", "num_layers"),
            Field("hidden_size", "hidden_size"),
            Field("ffn_hidden_size", "ffn_hidden_size"),
            Field("num_attention_heads", "num_attention_heads"),
            Field("num_query_groups", "multi_query_group_num", default=1),
            Field("kv_channels", "kv_channels"),
            Field("vocab_size", "padded_vocab_size", aliases=("vocab_size",)),
            Field("max_position_embeddings", "seq_length"),
            Field("layernorm_epsilon", "layernorm_epsilon", "number"),
            Field("init_method_std", "initializer_range", "number", 0.02),
            Field("attention_dropout", "attention_dropout", "number", 0.0),
            Field("hidden_dropout", "hidden_dropout", "number", 0.0),
            Field("add_bias_linear", "add_bias_linear", "flag", False),
            Field("add_qkv_bias", "add_qkv_bias", "flag", False),
            Field("share_embeddings_and_output_weights", "tie_word_embeddings", "flag", False),
            Field("bos_token_id", "bos_token_id", "tokens", None),
            Field("eos_token_id", "eos_token_id", "tokens", None),
            Field("pad_token_id", "pad_token_id", "tokens", None),
        ),
        constants={**_EXPECTED, "original_rope": True},
        expected=_EXPECTED,
        rotary_percent=0.5,
        attention_bias=None,
        activation_key=None,
        codecs=(
            Words("num_query_groups", "multi_query_attention", _GROUPS, False, "flag"),
            RemoteCode("zai-org/chatglm3-6b", _CLASSES),
            _Ratio(),
            Fixed({"pre_seq_len": 0, "quantization_bit": 0}, _PLAIN, "integer", written=False),
        ),
    ),
    nemo2=NeMo2(
        module="nemo.collections.llm.gpt.model.chatglm",
        model="ChatGLMModel",
        configs=NEMO2_CONFIGS,
        choose=lambda config: {32768: "ChatGLM2Config6B", 8192: "ChatGLM3Config6B"}.get(
            config.max_position_embeddings or 0, "ChatGLMConfig"
        ),
    ),
)  # fmt: skip
