"""The hub's model configuration, in Megatron-Core's words."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import field
from typing import Any

from anyckpt.config.blocks import BlockConfig, check_blocks
from anyckpt.config.encoders import EncoderConfig, check_encoders
from anyckpt.config.possible import check_layers, check_sizes, impossible
from anyckpt.config.speech import SpeechConfig, check_speech
from anyckpt.data_classes import dataclass
from anyckpt.errors import MappingError

Tokens = int | tuple[int, ...] | None

_LARGEST_NUMBER = 1e30


FEATURES = (
    "num_moe_experts",
    "num_experts",
    "multi_latent_attention",
    "mtp_num_layers",
    "hybrid_override_pattern",
    "hybrid_layer_pattern",
    "is_hybrid_model",
    "heterogeneous_block_specs",
    "heterogeneous_layers_config_path",
    "heterogeneous_layers_config_encoded_json",
    "attention_output_gate",
    "experimental_attention_variant",
    "no_rope_freq",
    "qk_l2_norm",
    "moe_apply_probs_on_input",
    "decoder_num_layers",
    "mcore_bert",
    "mcore_t5",
    "glu_activation",
)
"""Switches of other architectures: a family that does not know one that is on is not the model's.

They are Megatron-Core's, but for ``glu_activation`` of Megatron-DeepSpeed and Megatron-LLM, whose gate is the second
half.
"""

PART_OF, WHOLE, WHOLE_NAMES, WHOLE_NORMS = "part_of", "whole", "whole_names", "whole_norms"
"""Keys of ``ModelConfig.extra``."""


@dataclass(frozen=True)
class ModelConfig(BlockConfig, EncoderConfig, SpeechConfig):
    """What a model is, in Megatron-Core's words; what experts and other blocks add is in ``BlockConfig``, what models
    that are not decoders alone add in ``EncoderConfig``, what those add that hear in ``SpeechConfig``.

    Attributes:
        family: name of the model family, as in ``--family``.
        num_layers: transformer layers.
        hidden_size: width of the residual stream.
        ffn_hidden_size: width of the MLP, of one of the two halves if it is gated.
        num_attention_heads: query heads.
        num_query_groups: key and value heads.
        kv_channels: width of one head.
        vocab_size: true vocabulary, without padding rows; None if the checkpoint does not tell.
        padded_vocab_size: rows of the stored embedding where they are known to be padded, or None.
        make_vocab_size_divisible_by: Megatron pads the vocabulary to a multiple of this times tensor parallelism.
        normalization: ``RMSNorm`` or ``LayerNorm``.
        layernorm_zero_centered_gamma: norms store gamma - 1.
        layernorm_epsilon: added to the variance.
        activation: ``silu``, ``gelu``, ``gelu_tanh``, ``quick_gelu``, ``relu`` or ``squared_relu``.
        gated_linear_unit: the MLP multiplies an activated gate.
        add_bias_linear: every linear layer has a bias.
        add_qkv_bias: query, key and value have one.
        qk_layernorm: queries and keys are normalised per head.
        position_embedding_type: ``rope``, ``learned_absolute``, ...
        rotary_base: theta of the rotary embedding.
        rotary_percent: fraction of a head that is rotated.
        rotary_interleaved: neighbouring channels are rotated rather than halves.
        rope_scaling: in transformers' spelling, with ``rope_type``; None for plain rope.
        max_position_embeddings: longest sequence in tokens.
        share_embeddings_and_output_weights: the output layer is the embedding.
        init_method_std: standard deviation of the initialisation.
        window_size: tokens to the (left, right) that attention sees besides the token itself; None for all.
        window_attn_skip_freq: which layers have the window: None for all, N for all but every N-th (from 1), or for
            each layer 1 if it has and 0 if it sees all.
        rotary_base_local: theta in layers that have the window, where it is another.
        query_pre_attn_scalar: attention scores are divided by its square root; None for the width of a head.
        attn_logit_softcapping: attention scores are squashed to plus or minus this; None for not at all.
        final_logit_softcapping: the same of the logits.
        parallel_residual: attention and MLP of a layer read the same residual stream, and their outputs are added.
        shared_layernorm: and they share the norm before them.
        attention_dropout: probability.
        hidden_dropout: probability.
        bos_token_id: or None.
        eos_token_id: one, several, or None.
        pad_token_id: or None.
        dtype: element type of the weights, in torch's name.
        towers: by the key that a Hugging Face configuration has it under, each of the models that this one is made of;
            where they are two that are trained together, and its own fields are those of the one that reads.
        extra: under ``hf`` the keys of a Hugging Face configuration that are no fields here; under ``features`` those
            of ``FEATURES`` that a Megatron or NeMo configuration has; under ``PART_OF`` the type of the larger model
            whose text part this one is, under ``WHOLE`` its ``config.json``, and under ``WHOLE_NAMES`` what its
            tensors' names begin with, by ``text``, ``head`` and other parts; under ``WHOLE_NORMS`` that the
            checkpoint's norms are gamma, although the family's are gamma - 1.
    """

    family: str
    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_attention_heads: int
    num_query_groups: int
    kv_channels: int
    vocab_size: int | None = None
    padded_vocab_size: int | None = None
    make_vocab_size_divisible_by: int = 128
    normalization: str = "LayerNorm"
    layernorm_zero_centered_gamma: bool = False
    layernorm_epsilon: float = 1e-5
    activation: str = "gelu"
    gated_linear_unit: bool = False
    add_bias_linear: bool = True
    add_qkv_bias: bool = False
    qk_layernorm: bool = False
    position_embedding_type: str = "learned_absolute"
    rotary_base: float = 10000.0
    rotary_percent: float = 1.0
    rotary_interleaved: bool = False
    rope_scaling: Mapping[str, Any] | None = None
    max_position_embeddings: int | None = None
    share_embeddings_and_output_weights: bool = True
    init_method_std: float = 0.02
    window_size: tuple[int, int] | None = None
    window_attn_skip_freq: int | tuple[int, ...] | None = None
    rotary_base_local: float | None = None
    query_pre_attn_scalar: float | None = None
    attn_logit_softcapping: float | None = None
    final_logit_softcapping: float | None = None
    parallel_residual: bool = False
    shared_layernorm: bool = False
    attention_dropout: float = 0.0
    hidden_dropout: float = 0.0
    bos_token_id: Tokens = None
    eos_token_id: Tokens = None
    pad_token_id: Tokens = None
    dtype: str | None = None
    towers: Mapping[str, ModelConfig] = field(default_factory=dict)
    extra: Mapping[str, Any] = field(default_factory=dict)

    @property
    def rows(self) -> int | None:
        """Rows of the embedding at tensor parallel size 1: as stored where that is known, else padded by the rule."""
        if self.padded_vocab_size is not None or self.vocab_size is None:
            return self.padded_vocab_size
        return padded(self.vocab_size, self.make_vocab_size_divisible_by)


def padded(count: int, multiple: int) -> int:
    """The next multiple of ``multiple`` that is not below ``count``."""
    return -(-count // multiple) * multiple


def vocabulary_divisor(vocab_size: int) -> int:
    """The largest power of two, at most 128, that divides the vocabulary: NeMo's and Bridge's importers' choice.

    It means that nothing is padded at tensor parallel size 1.
    """
    return math.gcd(vocab_size, 128)


_SIZES = tuple(
    """
    num_layers hidden_size ffn_hidden_size num_attention_heads num_query_groups kv_channels vocab_size
    padded_vocab_size max_position_embeddings make_vocab_size_divisible_by
    """.split()
)


def check(config: ModelConfig) -> ModelConfig:
    """The configuration itself, if a model of it can exist.

    Raises:
        MappingError: sizes that are not positive, absurd, or do not divide one another.
    """
    check_sizes(config, _SIZES)
    check_layers(config.num_layers)
    if config.num_attention_heads % config.num_query_groups:
        raise MappingError(
            "the configuration's attention heads do not divide into its query groups",
            expected=f"a multiple of {config.num_query_groups}",
            found=config.num_attention_heads,
        )
    layers = config.window_attn_skip_freq
    possible = layers is None or (layers > 0 if isinstance(layers, int) else len(layers) == config.num_layers)
    if not possible:
        raise impossible("window_attn_skip_freq", f"a positive number or {config.num_layers} of them", layers)
    for name in ("query_pre_attn_scalar", "rotary_base"):
        number = getattr(config, name)
        if number is not None and not 0 < number < _LARGEST_NUMBER:
            raise impossible(name, "a positive number", number)
    check_blocks(config, config.num_layers)
    check_encoders(config)
    check_speech(config, config.num_mel_bins)
    return config


def whole(value: float) -> int | float:
    """An integer where the value is one: Megatron declares ``rotary_base`` as an integer."""
    return int(value) if float(value).is_integer() else value
