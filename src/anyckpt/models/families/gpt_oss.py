"""GPT-OSS 20B and 120B in bf16: attention sinks, a window in every other layer, biases in router and experts.

transformers stores a layer's experts in one tensor, as (in, out), with gate and up in turn.  Checked by equal logits in
Megatron-Core 0.16 with plain rope, and against Megatron-Bridge 0.3.1's tensors; the released files are MXFP4 and their
rope is scaled by YaRN: that was read from the sources only.  The model is as wide as its experts, so shapes do not tell
whether a matrix is transposed: it always is.
"""

from __future__ import annotations

from collections.abc import Sequence

from anyckpt.config.codecs import Implied, same_as
from anyckpt.config.fields import Field
from anyckpt.config.model import ModelConfig
from anyckpt.config.spellings import HuggingFace, NeMo2, Variant
from anyckpt.config.windows import AllBut, LayerWindow
from anyckpt.models.families.parts import decoder
from anyckpt.models.families.parts import experts as sparse
from anyckpt.models.families.parts.fields import LLAMA_FIELDS
from anyckpt.models.language.family import Family
from anyckpt.models.language.rule_operations import IDENTITY, TRANSPOSED, RowWise, Transposed
from anyckpt.models.language.rules import Rule
from anyckpt.tensor import LazyTensor, concatenate


class GateUpInTurn(RowWise):
    """One tensor whose even rows are the gate and whose odd rows are up, as two halves."""

    def to_hub(self, sources: Sequence[LazyTensor], config: ModelConfig) -> LazyTensor:
        rows, rest = sources[0].shape[0] // 2, sources[0].shape[1:]
        pairs = sources[0].reshape((rows, 2, *rest))
        return concatenate([pairs.narrow(1, half, 1).reshape((rows, *rest)) for half in range(2)], 0)

    def from_hub(self, tensor: LazyTensor, config: ModelConfig) -> Sequence[LazyTensor]:
        rows, rest = tensor.shape[0] // 2, tensor.shape[1:]
        halves = [tensor.narrow(0, half * rows, rows).reshape((rows, 1, *rest)) for half in range(2)]
        return [concatenate(halves, 1).reshape(tensor.shape)]


_IN_TURN = GateUpInTurn()
_ATTENTION = f"{sparse.LAYER}.self_attn"
_HUB_ATTENTION = f"{sparse.HUB}.self_attention"
_EXPERTS = f"{sparse.LAYER}.mlp.experts"
_HUB_EXPERTS = f"{sparse.HUB}.mlp.experts"

_YARN = {
    "rope_type": "yarn", "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False,
    "original_max_position_embeddings": 4096,
}  # fmt: skip
"""What transformers' class takes where ``config.json`` says nothing of rope."""


def _stack(name: str) -> Variant:
    return Variant(f"{_EXPERTS}.{name}", (f"{_EXPERTS}.*.{name}",), written=True)


FAMILY = Family(
    name="gpt-oss",
    title="GPT-OSS",
    rules=(
        *sparse.LEADING,
        *sparse.ATTENTION,
        sparse.BIAS_OF_QUERY_KEY_VALUE,
        Rule((f"{_ATTENTION}.o_proj.bias",), f"{_HUB_ATTENTION}.linear_proj.bias", ("hidden",)),
        Rule((f"{_ATTENTION}.sinks",), f"{_HUB_ATTENTION}.core_attention.softmax_offset", ("heads",)),
        Rule((f"{sparse.LAYER}.post_attention_layernorm.weight",), f"{sparse.HUB}.pre_mlp_layernorm.weight",
             ("hidden",)),
        Rule((f"{sparse.LAYER}.mlp.router.weight",), f"{sparse.HUB}.mlp.router.weight", ("experts", "hidden")),
        Rule((f"{sparse.LAYER}.mlp.router.bias",), f"{sparse.HUB}.mlp.router.bias", ("experts",)),
        Rule((f"{_EXPERTS}.*.gate_up_proj",), f"{_HUB_EXPERTS}.linear_fc1.weight*", ("expert-fc1", "hidden"),
             Transposed(_IN_TURN)),
        Rule((f"{_EXPERTS}.*.gate_up_proj_bias",), f"{_HUB_EXPERTS}.linear_fc1.bias*", ("expert-fc1",), _IN_TURN),
        Rule((f"{_EXPERTS}.*.down_proj",), f"{_HUB_EXPERTS}.linear_fc2.weight*", ("hidden", "expert-ffn"), TRANSPOSED),
        Rule((f"{_EXPERTS}.*.down_proj_bias",), f"{_HUB_EXPERTS}.linear_fc2.bias*", ("hidden",), IDENTITY),
        *sparse.TRAILING,
    ),
    traits={
        **{name: value for name, value in decoder.TRAITS.items() if name != "add_qkv_bias"},
        "activation": "quick_gelu",
        "add_bias_linear": True,
        "softmax_type": "learnable",
        "glu_linear_offset": 1.0,
        "moe_layer_freq": None,
        "moe_router_score_function": "softmax",
        "moe_router_pre_softmax": False,
        "moe_shared_expert_intermediate_size": None,
    },
    features=frozenset({"num_moe_experts", "num_experts", "yarn"}),
    recognise=lambda config: config.num_moe_experts is not None,
    nemo1=False,
    dimensions={"heads": lambda config: config.num_attention_heads},
    hugging_face=HuggingFace(
        model_types=("gpt_oss",),
        architectures=("GptOssForCausalLM",),
        fields=(
            *LLAMA_FIELDS,
            *sparse.fields("num_local_experts"),
            Field("activation_func_clamp_value", "swiglu_limit", "number"),
        ),
        constants={"hidden_act": "silu", "swiglu_alpha": 1.702},
        rotary_base=150_000.0,
        rope_scaling=_YARN,
        attention_bias=True,
        activation_key=None,
        codecs=(
            LayerWindow(AllBut(2), unset=128),
            Implied({"moe_ffn_hidden_size": same_as("ffn_hidden_size"), "add_qkv_bias": True}),
        ),
        keys=frozenset({"initial_context_length", "experts_per_token"}),
        variants=tuple(
            _stack(name) for name in ("gate_up_proj", "gate_up_proj_bias", "down_proj", "down_proj_bias")
        ),
    ),
    nemo2=NeMo2(
        module="nemo.collections.llm.gpt.model.gpt_oss",
        model="GPTOSSModel",
        configs=("GPTOSSConfig*",),
        codecs=(Field("window_attn_skip_freq", "window_attn_skip_freq", "frequency", None),),
    ),
)  # fmt: skip
