"""The hub's model configuration, and how its fields are looked up in the spellings of the frameworks.

Field names are Megatron-Core's.  Each framework's spelling is a table of ``Field`` (``hugging_face``, ``nemo1``,
``megatron``), read one way to parse and the other to render; what is no one-to-one field (rope, activation,
sliding window, vocabulary) is a function beside the table.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from anyckpt.config.blocks import BlockConfig, check_blocks
from anyckpt.config.encoders import EncoderConfig, check_encoders
from anyckpt.errors import MappingError

Tokens = int | tuple[int, ...] | None

_LARGEST = 1 << 40  # no size in a model is near it; beyond it, arithmetic on a hostile file is the attack
_MOST_LAYERS = 10_000


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

PART_OF, WHOLE_NORMS = "part_of", "whole_norms"
"""Keys of ``ModelConfig.extra``."""


@dataclass(frozen=True)
class ModelConfig(BlockConfig, EncoderConfig):
    """What a model is, in Megatron-Core's words; what experts and other blocks add is in ``BlockConfig``, what models
    that are not decoders alone add in ``EncoderConfig``.

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
        extra: under ``hf`` the keys of a Hugging Face configuration that are no fields here; under ``features`` those
            of ``FEATURES`` that a Megatron or NeMo configuration has; under ``PART_OF`` the type of the larger model
            whose text part this one is; under ``WHOLE_NORMS`` that the checkpoint's norms are gamma, although the
            family's are gamma - 1.
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


def check(config: ModelConfig) -> ModelConfig:
    """The configuration itself, if a model of it can exist.

    Raises:
        MappingError: sizes that are not positive, absurd, or do not divide one another.
    """
    for name in (
        "num_layers",
        "hidden_size",
        "ffn_hidden_size",
        "num_attention_heads",
        "num_query_groups",
        "kv_channels",
    ):
        value = getattr(config, name)
        if not 0 < value < _LARGEST:
            raise MappingError(f"the configuration's {name} is not possible", expected="a positive size", found=value)
    if config.num_layers > _MOST_LAYERS:
        raise MappingError(
            "the configuration has too many layers", expected=f"at most {_MOST_LAYERS}", found=config.num_layers
        )
    if config.num_attention_heads % config.num_query_groups:
        raise MappingError(
            "the configuration's attention heads do not divide into its query groups",
            expected=f"a multiple of {config.num_query_groups}",
            found=config.num_attention_heads,
        )
    layers = config.window_attn_skip_freq
    possible = layers is None or (layers > 0 if isinstance(layers, int) else len(layers) == config.num_layers)
    if not possible:
        raise MappingError(
            "the configuration's window_attn_skip_freq is not possible",
            expected=f"a positive number or {config.num_layers} of them",
            found=layers,
        )
    for name in ("vocab_size", "padded_vocab_size", "max_position_embeddings"):
        value = getattr(config, name)
        if value is not None and not 0 < value < _LARGEST:
            raise MappingError(f"the configuration's {name} is not possible", expected="a positive size", found=value)
    if config.make_vocab_size_divisible_by < 1:
        raise MappingError(
            "the configuration's make_vocab_size_divisible_by is not possible",
            expected="a positive size",
            found=config.make_vocab_size_divisible_by,
        )
    check_blocks(config, config.num_layers)
    check_encoders(config)
    return config


# -- looking fields up ---------------------------------------------------------------------------------------


class _Required:
    """Marks a field that a configuration must have."""


REQUIRED = _Required()


def four_widths(found: Mapping[str, Any]) -> int | None:
    """Megatron's default of ``ffn_hidden_size``."""
    hidden: int | None = found["hidden_size"]
    return None if hidden is None else 4 * hidden


def share_of_a_head(found: Mapping[str, Any]) -> int | None:
    """Megatron's default of ``kv_channels``."""
    hidden, heads = found["hidden_size"], found["num_attention_heads"]
    return None if hidden is None or heads is None else hidden // max(1, heads)


def as_many_as_heads(found: Mapping[str, Any]) -> int | None:
    """Megatron's default of ``num_query_groups``."""
    heads: int | None = found["num_attention_heads"]
    return heads


@dataclass(frozen=True)
class Field:
    """A one-to-one correspondence between a hub field and a key of a framework's configuration.

    Attributes:
        hub: field of ``ModelConfig``.
        key: the framework's key; written under it.
        reader: from ``Reader``'s methods: ``integer``, ``number``, ``flag``, ``text`` or ``tokens``.
        default: what it means that the key is absent or null; ``REQUIRED``, a value, or a function of the fields
            parsed so far (tables are read in order), of which required ones may be None.
        aliases: further spellings that are read.
    """

    hub: str
    key: str
    reader: str = "integer"
    default: Any = REQUIRED
    aliases: tuple[str, ...] = ()


class Reader:
    """A configuration from a file, looked up with typed and checked methods; every error names the key.

    Args:
        values: the configuration.
        what: what to call it in a message.
    """

    def __init__(self, values: Mapping[str, Any], what: str) -> None:
        self.values = values
        self.what = what

    def fields(self, table: Iterable[Field], defaults: Mapping[str, Any], *, complete: bool = True) -> dict[str, Any]:
        """Hub fields from a table.

        Args:
            table: the correspondence.
            defaults: by key, what its absence means in this model's class; stronger than the table's defaults.
            complete: refuse a configuration without a required key; else its field is None.

        Raises:
            MappingError: a required key is absent or a value is not of its type.
        """
        found: dict[str, Any] = {}
        for entry in table:
            value = self.read(entry, defaults)
            if value is None and entry.default is REQUIRED:
                if complete:
                    self.require((entry,), {entry.hub: None})
            elif value is None:
                value = entry.default(found) if callable(entry.default) else entry.default
            found[entry.hub] = value
        return found

    def require(self, table: Iterable[Field], found: Mapping[str, Any]) -> None:
        """Raise MappingError if a required field of the table is not among those found."""
        for entry in table:
            if entry.default is REQUIRED and found[entry.hub] is None:
                raise MappingError(
                    f"the {self.what} has no {entry.key}", remedy="give a complete configuration with --config"
                )

    def read(self, entry: Field, defaults: Mapping[str, Any]) -> Any:
        """One field's value, or None if its key is absent or null and the defaults do not have it."""
        reader: Callable[[str], Any] = getattr(self, entry.reader)
        for key in (entry.key, *entry.aliases):
            if self.values.get(key) is not None:
                return reader(key)
        if entry.key in self.values and entry.key in defaults and entry.default is None:
            return None  # an explicit null, where null means something
        return defaults.get(entry.key)

    def integer(self, key: str) -> int | None:
        value = self.values.get(key)
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if value is None or (type(value) is int and abs(value) < _LARGEST):
            return value
        raise self._wrong(key, "a whole number")

    def number(self, key: str) -> float | None:
        value = self.values.get(key)
        if isinstance(value, str):  # YAML 1.1 reads 1e-5 as text
            try:
                value = float(value)
            except ValueError:
                raise self._wrong(key, "a number") from None
        if value is None:
            return None
        if isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e30:
            return float(value)
        raise self._wrong(key, "a finite number")

    def flag(self, key: str) -> bool | None:
        value = self.values.get(key)
        if value is None or isinstance(value, bool):
            return value
        raise self._wrong(key, "true or false")

    def text(self, key: str) -> str | None:
        value = self.values.get(key)
        if value is None or isinstance(value, str):
            return value
        raise self._wrong(key, "text")

    def mapping(self, key: str) -> Mapping[str, Any]:
        value = self.values.get(key)
        if value is None:
            return {}
        if isinstance(value, Mapping):
            return value
        raise self._wrong(key, "a mapping")

    def tokens(self, key: str) -> Tokens:
        value = self.values.get(key)
        several = value if isinstance(value, (list, tuple)) else [value]
        if value is None or all(type(token) is int and abs(token) < _LARGEST for token in several):
            return tuple(value) if isinstance(value, (list, tuple)) else value
        raise self._wrong(key, "a token id or several")

    def frequency(self, key: str) -> int | tuple[int, ...] | None:
        value = self.values.get(key)
        if value is None or (type(value) is int and abs(value) < _LARGEST):
            return value
        if isinstance(value, (list, tuple)) and all(type(number) is int and number in (0, 1) for number in value):
            return tuple(value)
        raise self._wrong(key, "a whole number, or 0 or 1 for each layer")

    def pair(self, key: str) -> tuple[int, int] | None:
        value = self.values.get(key)
        if value is None:
            return None
        if (
            isinstance(value, (list, tuple))
            and len(value) == 2
            and all(type(n) is int and abs(n) < _LARGEST for n in value)
        ):
            return value[0], value[1]
        raise self._wrong(key, "two whole numbers")

    def features(self) -> dict[str, Any]:
        """What of ``FEATURES`` is on."""
        return {key: self.values[key] for key in FEATURES if self.values.get(key)}

    def _wrong(self, key: str, expected: str) -> MappingError:
        return MappingError(
            f"the {self.what}'s {key} is of the wrong type", expected=expected, found=repr(self.values[key])[:80]
        )


OPTIONAL = (
    Field("window_attn_skip_freq", "window_attn_skip_freq", "frequency", None),
    Field("rotary_base_local", "rotary_base_local", "number", None),
    Field("query_pre_attn_scalar", "query_pre_attn_scalar", "number", None),
    Field("attn_logit_softcapping", "attn_logit_softcapping", "number", None),
    Field("final_logit_softcapping", "final_logit_softcapping", "number", None),
    Field("parallel_residual", "parallel_residual", "flag", False),
    Field("shared_layernorm", "shared_layernorm", "flag", False),
)
"""Fields that few families have, which Megatron's arguments and NeMo 1 are told only where they say something.

They are ours there: Megatron-LM and NeMo 1 ignore them, and a family's ``caveats`` say so.
"""


def render_optional(config: ModelConfig) -> dict[str, Any]:
    """Those of ``OPTIONAL`` that are not at their defaults."""
    rendered = render_fields(OPTIONAL, config)
    return {entry.key: rendered[entry.key] for entry in OPTIONAL if getattr(config, entry.hub) != entry.default}


def render_fields(table: Iterable[Field], config: ModelConfig) -> dict[str, Any]:
    """A framework's keys and values from a table; tuples become lists."""
    rendered: dict[str, Any] = {}
    for entry in table:
        value = getattr(config, entry.hub)
        rendered[entry.key] = list(value) if isinstance(value, tuple) else value
    return rendered


def whole(value: float) -> int | float:
    """An integer where the value is one: Megatron declares ``rotary_base`` as an integer."""
    return int(value) if float(value).is_integer() else value
