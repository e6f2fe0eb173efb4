"""Fields of the hub's configuration for models whose layers are not all attention and one dense MLP.

Mixture of experts, latent attention, Mamba-2 mixers between the layers, attention with sinks.  Names are
Megatron-Core's; what a model does not have is None, or the default that Megatron-Core gives it.
"""

from __future__ import annotations

from anyckpt.config.layer_blocks import LayerBlock
from anyckpt.config.possible import check_sizes
from anyckpt.data_classes import dataclass
from anyckpt.errors import MappingError

_MOST_EXPERTS = 1_000_000  # of all layers together; names are made for each


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)  # ``ModelConfig`` has its own
class BlockConfig:
    """What a model's layers are made of, beyond attention and a dense MLP.

    Attributes:
        num_moe_experts: experts of a mixture-of-experts layer; None if all layers are dense.
        moe_router_topk: experts that a token goes to.
        moe_ffn_hidden_size: width of an expert, of one of the two halves if it is gated.
        moe_layer_freq: for each layer 1 if it has experts and 0 if it is dense; None if all have experts.
        moe_router_pre_softmax: softmax over all experts, then the choice; else over those that are chosen.
        moe_router_score_function: ``softmax`` or ``sigmoid``.
        moe_router_enable_expert_bias: the choice adds a bias per expert to the score.
        moe_router_num_groups: experts are chosen from groups; None if not.
        moe_router_group_topk: so many groups.
        moe_router_topk_scaling_factor: the chosen experts' weights are multiplied by it; None for not at all.
        moe_aux_loss_coeff: weight of the loss that balances experts.
        moe_shared_expert_intermediate_size: width of the expert that every token goes to; None if there is none.
        moe_shared_expert_gate: its output is multiplied by a gate.
        moe_latent_size: width of what experts take and give, where tokens are projected to and from it; None for the
            model's width.
        multi_latent_attention: keys, values and perhaps queries come from a narrow latent vector.
        q_lora_rank: width of the queries' latent; None if queries have none.
        kv_lora_rank: width of the keys' and values' latent.
        qk_head_dim: width of a head's part without rotary embedding.
        qk_pos_emb_head_dim: width of a head's rotary part.
        v_head_dim: width of a value head.
        mtp_num_layers: layers behind the last that predict further tokens; None if there are none.
        hybrid_override_pattern: a letter per layer: M Mamba-2, * attention, - MLP, E experts; None if not hybrid.
        mtp_hybrid_override_pattern: the same of the layers of one step of multi-token prediction.
        mamba_num_heads: heads of a Mamba-2 mixer.
        mamba_head_dim: width of one.
        mamba_num_groups: groups that share B and C.
        mamba_state_dim: width of the state.
        mamba_rms_norm: a mixer norms its gated output before the last projection.
        attention_output_gate: attention's output is multiplied by a gate, which the fused QKV has beside each query.
        linear_attention_freq: for each layer 1 if it has a gated delta net in place of attention; None if none has.
        linear_conv_kernel_dim: width of that net's convolution, in tokens.
        linear_key_head_dim: width of a head of its queries and keys.
        linear_value_head_dim: width of a head of its values.
        linear_num_key_heads: heads of its queries and keys.
        linear_num_value_heads: heads of its values, a multiple.
        short_conv_freq: for each layer 1 if it has a short convolution in place of attention; None if none has.
        short_conv_kernel_dim: width of that convolution, in tokens.
        dsa_indexer_n_heads: heads of the indexer that chooses which tokens latent attention sees; None if it sees all.
        dsa_indexer_head_dim: width of one.
        dsa_indexer_topk: how many tokens it chooses.
        heterogeneous_blocks: what each layer is, where they differ in width, in query groups, or in what they are;
            None if they do not.
        softmax_type: ``vanilla``, or ``learnable`` for an attention sink per head.
        glu_linear_offset: added to the half of a gated MLP that is not activated.
        activation_func_clamp_value: both halves are clamped to it; None for not at all.
        moe_apply_probs_on_input: the router's weight multiplies an expert's input rather than its output.
        no_rope_freq: for each layer 1 if it has no rotary embedding and 0 if it has; None if all have.
        qk_l2_norm: queries and keys are divided by their root mean square, in layers that have rotary embedding.
        attention_chunk_size: layers that have rotary embedding attend within chunks of so many tokens; None if not.
        attn_temperature_tuning: layers that have none scale queries by
            ``1 + attn_scale * log(1 + floor((position + 1) / floor_scale))``.
        attn_scale: see there.
        floor_scale: see there, in tokens.
    """

    num_moe_experts: int | None = None
    moe_router_topk: int | None = None
    moe_ffn_hidden_size: int | None = None
    moe_layer_freq: tuple[int, ...] | None = None
    moe_router_pre_softmax: bool = False
    moe_router_score_function: str = "softmax"
    moe_router_enable_expert_bias: bool = False
    moe_router_num_groups: int | None = None
    moe_router_group_topk: int | None = None
    moe_router_topk_scaling_factor: float | None = None
    moe_aux_loss_coeff: float = 0.0
    moe_shared_expert_intermediate_size: int | None = None
    moe_shared_expert_gate: bool = False
    moe_latent_size: int | None = None
    multi_latent_attention: bool = False
    q_lora_rank: int | None = None
    kv_lora_rank: int | None = None
    qk_head_dim: int | None = None
    qk_pos_emb_head_dim: int | None = None
    v_head_dim: int | None = None
    mtp_num_layers: int | None = None
    hybrid_override_pattern: str | None = None
    mtp_hybrid_override_pattern: str | None = None
    mamba_num_heads: int | None = None
    mamba_head_dim: int | None = None
    mamba_num_groups: int | None = None
    mamba_state_dim: int | None = None
    mamba_rms_norm: bool = True
    attention_output_gate: bool = False
    linear_attention_freq: tuple[int, ...] | None = None
    linear_conv_kernel_dim: int | None = None
    linear_key_head_dim: int | None = None
    linear_value_head_dim: int | None = None
    linear_num_key_heads: int | None = None
    linear_num_value_heads: int | None = None
    short_conv_freq: tuple[int, ...] | None = None
    short_conv_kernel_dim: int | None = None
    dsa_indexer_n_heads: int | None = None
    dsa_indexer_head_dim: int | None = None
    dsa_indexer_topk: int | None = None
    heterogeneous_blocks: tuple[LayerBlock, ...] | None = None
    softmax_type: str = "vanilla"
    glu_linear_offset: float = 0.0
    activation_func_clamp_value: float | None = None
    moe_apply_probs_on_input: bool = False
    no_rope_freq: tuple[int, ...] | None = None
    qk_l2_norm: bool = False
    attention_chunk_size: int | None = None
    attn_temperature_tuning: bool = False
    attn_scale: float = 0.1
    floor_scale: float = 8192.0

    def is_linear(self, layer: int) -> bool:
        """Whether a layer, counted from 0, has a gated delta net in place of attention."""
        return self.linear_attention_freq is not None and self.linear_attention_freq[layer] == 1

    def is_sparse(self, layer: int) -> bool:
        """Whether a layer, counted from 0, has experts in place of a dense MLP."""
        if self.num_moe_experts is None:
            return False
        if self.hybrid_override_pattern is not None:
            return self.hybrid_override_pattern[layer] == "E"
        return self.moe_layer_freq is None or self.moe_layer_freq[layer] == 1


_SIZES = tuple(
    """
    num_moe_experts moe_router_topk moe_ffn_hidden_size moe_router_num_groups moe_router_group_topk moe_latent_size
    moe_shared_expert_intermediate_size q_lora_rank kv_lora_rank qk_head_dim qk_pos_emb_head_dim v_head_dim
    mtp_num_layers mamba_num_heads mamba_head_dim mamba_num_groups mamba_state_dim attention_chunk_size
    linear_conv_kernel_dim linear_key_head_dim linear_value_head_dim linear_num_key_heads linear_num_value_heads
    short_conv_kernel_dim dsa_indexer_n_heads dsa_indexer_head_dim dsa_indexer_topk
    """.split()
)
_LATENT = ("kv_lora_rank", "qk_head_dim", "qk_pos_emb_head_dim", "v_head_dim")
_MAMBA = ("mamba_num_heads", "mamba_head_dim", "mamba_num_groups", "mamba_state_dim")


_OF_LAYERS = (
    "moe_layer_freq",
    "hybrid_override_pattern",
    "heterogeneous_blocks",
    "no_rope_freq",
    "linear_attention_freq",
    "short_conv_freq",
)
_DELTA = (
    "linear_conv_kernel_dim",
    "linear_key_head_dim",
    "linear_value_head_dim",
    "linear_num_key_heads",
    "linear_num_value_heads",
)


def check_blocks(config: BlockConfig, num_layers: int) -> None:
    """Check that a model of these blocks can exist.

    Raises:
        MappingError: sizes that are missing, not positive or absurd, or lists that are not of the layers' length.
    """
    check_sizes(config, _SIZES)
    needed = [name for on, names in _needed(config) if on for name in names if getattr(config, name) is None]
    if needed:
        raise MappingError(
            f"the configuration has no {needed[0]}", remedy="give a complete configuration with --config"
        )
    if (config.num_moe_experts or 0) * (num_layers + (config.mtp_num_layers or 0)) > _MOST_EXPERTS:
        raise MappingError(
            "the configuration has too many experts",
            expected=f"at most {_MOST_EXPERTS} in all layers",
            found=f"{config.num_moe_experts} in {num_layers} layers",
        )
    if config.linear_attention_freq is not None:
        keys, values = config.linear_num_key_heads or 1, config.linear_num_value_heads or 0
        if values % keys:
            raise MappingError(
                "the heads of the gated delta net's values do not divide among those of its keys",
                expected=f"a multiple of {keys}", found=values,
            )  # fmt: skip
    for name in _OF_LAYERS:
        value = getattr(config, name)
        if value is not None and len(value) != num_layers:
            raise MappingError(
                f"the configuration's {name} is not of the model's length", expected=num_layers, found=len(value)
            )


def _needed(config: BlockConfig) -> tuple[tuple[bool, tuple[str, ...]], ...]:
    """Whether a kind of block is there, and the sizes that it needs."""
    return (
        (config.num_moe_experts is not None, ("moe_router_topk", "moe_ffn_hidden_size")),
        (config.multi_latent_attention, _LATENT),
        ("M" in (config.hybrid_override_pattern or ""), _MAMBA),
        ("E" in (config.hybrid_override_pattern or ""), ("num_moe_experts",)),
        (config.linear_attention_freq is not None, _DELTA),
    )
