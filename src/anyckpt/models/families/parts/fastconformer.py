"""FastConformer encoders: NVIDIA's of NeMo, which transformers has as ``parakeet_encoder``.

Megatron-Core has no such models, so that the hub's names are NeMo's.  Names, shapes and keys were compared with models
of NeMo 3.0 and of transformers 5.24, which give equal outputs.  What NeMo can build besides (other subsampling, other
norms, attention with a context) transformers' class cannot, and is refused.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from anyckpt.config.codecs import Fixed, Implied, Times
from anyckpt.config.fields import Codec, Field
from anyckpt.config.model import ModelConfig
from anyckpt.config.reader import Reader
from anyckpt.config.sections import Only, Section, Share
from anyckpt.data_classes import dataclass
from anyckpt.models.families.parts.modules import linear, norm
from anyckpt.models.language.rules import Axis, Dimension, Rule, has
from anyckpt.models.speech.featurizer import FILTERS, WINDOW

_MODULES = "nemo.collections.asr.modules"
_HUB = "encoder.layers.*"
_BIASED = has("add_bias_linear")
_NORMS = ("norm_feed_forward1", "norm_conv", "norm_self_att", "norm_feed_forward2", "norm_out")
_PROJECTIONS = {"linear_q": "q_proj", "linear_k": "k_proj", "linear_v": "v_proj", "linear_out": "o_proj"}

IGNORABLE = tuple((name, "how features are made, which follows from the configuration") for name in (WINDOW, FILTERS))


def encoder(stem: str = "encoder") -> tuple[Rule, ...]:
    """Subsampling and layers.

    Args:
        stem: what transformers' names begin with.
    """
    layer, start = f"{stem}.layers.*", f"{stem}.subsampling.layers"
    convolutions = (
        (f"{layer}.conv.pointwise_conv1", f"{_HUB}.conv.pointwise_conv1", ("twice-hidden", "hidden", "one")),
        (f"{layer}.conv.depthwise_conv", f"{_HUB}.conv.depthwise_conv", ("hidden", "one", "kernel")),
        (f"{layer}.conv.pointwise_conv2", f"{_HUB}.conv.pointwise_conv2", ("hidden", "hidden", "one")),
    )
    statistics = ("weight", "bias", "running_mean", "running_var")
    return (
        *linear(f"{stem}.subsampling.linear", "encoder.pre_encode.out", ("hidden", "subsampled")),
        *linear(f"{start}.0", "encoder.pre_encode.conv.0", ("channels", "one", "three", "three")),
        *_numbered(linear(f"{start}.*", "encoder.pre_encode.conv.*", ("channels", "one", "three", "three")), "halving"),
        *_numbered(linear(f"{start}.*", "encoder.pre_encode.conv.*", ("channels", "channels", "one", "one")), "mixing"),
        *(rule for name in _NORMS for rule in norm(f"{layer}.{name}", f"{_HUB}.{name}.")),
        *(
            rule
            for block in ("feed_forward1", "feed_forward2")
            for name, shape in (("linear1", ("ffn", "hidden")), ("linear2", ("hidden", "ffn")))
            for rule in linear(f"{layer}.{block}.{name}", f"{_HUB}.{block}.{name}", shape, bias=_BIASED)
        ),
        *(rule for source, hub, shape in convolutions for rule in linear(source, hub, shape, bias=_BIASED)),
        *(Rule((f"{layer}.conv.norm.{part}",), f"{_HUB}.conv.batch_norm.{part}", ("hidden",)) for part in statistics),
        Rule((f"{layer}.conv.norm.num_batches_tracked",), f"{_HUB}.conv.batch_norm.num_batches_tracked", ()),
        *(
            rule
            for own, name in _PROJECTIONS.items()
            for rule in linear(f"{layer}.self_attn.{name}", f"{_HUB}.self_attn.{own}", ("hidden", "hidden"),
                               bias=_BIASED)
        ),
        Rule((f"{layer}.self_attn.relative_k_proj.weight",), f"{_HUB}.self_attn.linear_pos.weight",
             ("hidden", "hidden")),
        Rule((f"{layer}.self_attn.bias_u",), f"{_HUB}.self_attn.pos_bias_u", ("heads", "head")),
        Rule((f"{layer}.self_attn.bias_v",), f"{_HUB}.self_attn.pos_bias_v", ("heads", "head")),
    )  # fmt: skip


def undivided(rules: Iterable[Rule]) -> tuple[Rule, ...]:
    """Rules of modules that NeMo does not divide among ranks."""
    return tuple(replace(rule, partition="alone") for rule in rules)


def _numbered(rules: tuple[Rule, ...], axis: str) -> tuple[Rule, ...]:
    """Rules whose star counts along another axis than layers."""
    return tuple(replace(rule, axes=(axis,)) for rule in rules)


AXES: Mapping[str, Axis] = {
    "halving": lambda config: range(2, 3 * config.halvings - 1, 3),
    "mixing": lambda config: range(3, 3 * config.halvings, 3),
}
"""Numbers of the convolutions behind the first, each with an activation behind it."""

DIMENSIONS: Mapping[str, Dimension] = {
    "three": lambda config: 3,
    "heads": lambda config: config.num_attention_heads,
    "twice-hidden": lambda config: 2 * config.hidden_size,
    "channels": lambda config: config.subsampling_conv_channels or 0,
    "subsampled": lambda config: (
        (config.subsampling_conv_channels or 0) * ((config.num_mel_bins or 0) // (config.subsampling_factor or 1))
    ),
    "kernel": lambda config: config.conv_kernel_size or 0,
    "labels": lambda config: config.vocab_size or 0,
}

TRAITS: Mapping[str, Any] = {
    "normalization": "LayerNorm",
    "activation": "silu",
    "gated_linear_unit": False,
    "position_embedding_type": "relative",
    "share_embeddings_and_output_weights": False,
}

_HEADS = Implied(
    {
        "num_query_groups": lambda found: found["num_attention_heads"],
        "kv_channels": lambda found: found["hidden_size"] // max(1, found["num_attention_heads"]),
    },
    "FastConformer's attention has as many key heads as heads, which share the width",
)

EPSILON = Implied({"layernorm_epsilon": 1e-5}, "FastConformer has one epsilon")

AUDIO: Mapping[str, Any] = {
    "sampling_rate": 16000,
    "window_length": 400,
    "hop_length": 160,
    "fft_length": 512,
    "preemphasis": 0.97,
    "audio_padding_value": 0.0,
}
"""What transformers' feature extractor takes where it is told nothing."""

IDLE = frozenset(
    "return_dict output_hidden_states output_attentions torch_dtype dtype architectures transformers_version".split()
    + "chunk_size_feed_forward is_encoder_decoder id2label label2id problem_type _name_or_path".split()
    + "num_key_value_groups".split()
)


def hugging_face(model_type: str = "parakeet_encoder", more: tuple[Codec, ...] = (), **class_defaults: Any) -> Section:
    """``encoder_config``.

    Args:
        model_type: of the encoder.
        more: rows of an encoder that has more settings.
        class_defaults: by key, what the model's class takes other than ``ParakeetEncoderConfig``.
    """
    return Section(
        "encoder_config",
        (
            Field("num_layers", "num_hidden_layers", default=24),
            Field("hidden_size", "hidden_size", default=1024),
            Field("ffn_hidden_size", "intermediate_size", default=4096),
            Field("num_attention_heads", "num_attention_heads", default=8),
            _HEADS,
            Field("num_mel_bins", "num_mel_bins", default=80),
            Field("subsampling_factor", "subsampling_factor", default=8),
            Field("subsampling_conv_channels", "subsampling_conv_channels", default=256),
            Field("conv_kernel_size", "conv_kernel_size", default=9),
            Field("max_position_embeddings", "max_position_embeddings", default=5000),
            Field("scale_input", "scale_input", "flag", True),
            Field("add_bias_linear", "attention_bias", "flag", True),
            Fixed(
                {
                    "convolution_bias": lambda found: found["add_bias_linear"],
                    "num_key_value_heads": lambda found: found["num_attention_heads"],
                    "hidden_act": "silu",
                    "subsampling_conv_kernel_size": 3,
                    "subsampling_conv_stride": 2,
                },
                "that of NeMo's encoder",
            ),
            Field("hidden_dropout", "dropout", "number", 0.1),
            Field("attention_dropout", "attention_dropout", "number", 0.1),
            Field("activation_dropout", "activation_dropout", "number", 0.1),
            Field("position_dropout", "dropout_positions", "number", 0.0),
            Field("layer_dropout", "layerdrop", "number", 0.1),
            Field("init_method_std", "initializer_range", "number", 0.02),
            *more,
        ),
        class_defaults,
        IDLE,
        {"model_type": model_type},
    )


@dataclass(eq=False, repr=False, match_args=False)
class _Channels(Codec):
    """Channels of the subsampling's convolutions, of which -1 are as many as the width."""

    hubs = ("subsampling_conv_channels",)
    keys = ("subsampling_conv_channels",)

    def read(self, reader: Reader, defaults: Mapping[str, Any], found: Mapping[str, Any]) -> Mapping[str, Any]:
        stated = reader.integer(self.keys[0])
        return {self.hubs[0]: found["hidden_size"] if stated in (None, -1) else stated}

    def write(self, config: ModelConfig, notes: list[str]) -> Mapping[str, Any]:
        return {self.keys[0]: config.subsampling_conv_channels}


@dataclass(eq=False, repr=False, match_args=False)
class _Preemphasis(Codec):
    """The share of the sample before that is taken off, of which null is none."""

    hubs = ("preemphasis",)
    keys = ("preemph",)

    def read(self, reader: Reader, defaults: Mapping[str, Any], found: Mapping[str, Any]) -> Mapping[str, Any]:
        stated = reader.number("preemph")
        return {"preemphasis": (0.0 if "preemph" in reader.values else 0.97) if stated is None else stated}

    def write(self, config: ModelConfig, notes: list[str]) -> Mapping[str, Any]:
        return {} if config.preemphasis == 0.97 else {"preemph": config.preemphasis}


def with_rows(section: Section, *rows: Codec) -> Section:
    """A section with other rows in the place of those for the same keys."""
    keys = {key for row in rows for key in row.keys}
    kept = [row for row in section.rows if not keys & set(row.keys)]
    assert len(kept) < len(section.rows)
    return replace(section, rows=(*kept, *rows))


def target(of: str) -> Only:
    """The class of a section's module, one of NeMo's for speech, under whichever of its modules it is."""
    name = f"{_MODULES}.{of}"
    return Only("_target_", name, also=lambda value, fields: str(value).rpartition(".")[2] == of)


def _power_of_two(found: Mapping[str, Any]) -> int:
    return 1 << max(0, ((found["window_length"] or 1) - 1).bit_length())


PREPROCESSOR = Section(
    "preprocessor",
    (
        target("AudioToMelSpectrogramPreprocessor"),
        Field("sampling_rate", "sample_rate", default=16000),
        Only("normalize", "per_feature"),
        Share("window_length", "window_size", "sampling_rate", 0.02),
        Share("hop_length", "window_stride", "sampling_rate", 0.01),
        Only("window", "hann"),
        Field("num_mel_bins", "features", default=64),
        Field("fft_length", "n_fft", default=_power_of_two),
        Only("log", True),
        Only("log_zero_guard_type", "add", written=False),
        Only("log_zero_guard_value", 2.0**-24, written=False),
        Only("mag_power", 2.0, written=False),
        Only("mel_norm", "slaney", written=False),
        Only("lowfreq", 0, written=False),
        Only("highfreq", lambda found: (found["sampling_rate"] or 0) / 2, written=False),
        Only("exact_pad", False, written=False),
        Only("frame_splicing", 1),
        _Preemphasis(),
        Field("audio_padding_value", "pad_value", "number", 0.0),
    ),
    idle=frozenset("rng nb_augmentation_prob nb_max_freq use_torchaudio stft_exact_pad stft_conv".split()),
    constants={"dither": 1e-5, "pad_to": 0},
)
"""Random noise and padding to a length, which are told apart from what is heard, are NeMo's in training alone."""


NEMO_ENCODER = Section(
    "encoder",
    (
        target("ConformerEncoder"),
        Only("feat_in", lambda found: found["num_mel_bins"]),
        Field("hidden_size", "d_model"),
        Only(
            "feat_out",
            -1,
            also=lambda value, found: type(value) is int and (value < 1 or value == found["hidden_size"]),
        ),
        Field("num_layers", "n_layers"),
        Only("subsampling", "dw_striding", absent="striding"),
        Field("subsampling_factor", "subsampling_factor", default=4),
        _Channels(),
        Only("causal_downsampling", False),
        Only("reduction", None, written=False),
        Times("ffn_hidden_size", "ff_expansion_factor", "hidden_size", 4),
        Only("self_attention_model", "rel_pos"),
        Field("num_attention_heads", "n_heads", default=4),
        _HEADS,
        Only("att_context_size", [-1, -1], also=lambda value, found: value == [[-1, -1]]),
        Only("att_context_style", "regular"),
        Only("att_chunk_context_size", None, written=False),
        Field("scale_input", "xscaling", "flag", True),
        Field("max_position_embeddings", "pos_emb_max_len", default=5000),
        Field("conv_kernel_size", "conv_kernel_size", default=31),
        Only("conv_norm_type", "batch_norm"),
        Only("conv_context_size", lambda found: [((found["conv_kernel_size"] or 1) - 1) // 2] * 2, written=False),
        Only("conv_context_style", "regular", written=False),
        Field("add_bias_linear", "use_bias", "flag", True),
        Field("hidden_dropout", "dropout", "number", 0.1),
        Field("position_dropout", "dropout_emb", "number", 0.1),
        Field("attention_dropout", "dropout_att", "number", 0.0),
        Field("layer_dropout", "stochastic_depth_drop_prob", "number", 0.0),
        Implied({"activation_dropout": 0.1, "init_method_std": 0.02}),
    ),
    idle=frozenset(
        (
            "att_context_probs dropout_pre_encoder stochastic_depth_mode stochastic_depth_start_layer "
            "reduction_position reduction_factor global_tokens global_tokens_spacing global_attn_separate "
            "use_pytorch_sdpa use_pytorch_sdpa_backends sync_max_audio_length subsampling_conv_chunking_factor "
            "conv_dual_mode"
        ).split()
    ),
    constants={"untie_biases": True},
)
"""Biases of positions that layers share are each layer's own where they are stored."""


def streams(config: Mapping[str, Any]) -> bool:
    """Whether a ``model_config.yaml`` is of a cache-aware encoder, which hears nothing of what comes later."""
    encoder = config.get("encoder")
    if not isinstance(encoder, Mapping):
        return False
    return bool(encoder.get("causal_downsampling")) or encoder.get("conv_context_size") == "causal"


def tokenizer_words(pad: str, processor: str = "ParakeetProcessor") -> Mapping[str, Any]:
    """Keys of ``tokenizer_config.json``, by the token that pads and the processor's class."""
    return {
        "pad_token": pad,
        "processor_class": processor,
        "tokenizer_class": "ParakeetTokenizer",
        "unk_token": "<unk>",
    }


def processor_words(decoder: str) -> Mapping[str, Any]:
    """Keys of ``processor_config.json``, by what decodes."""
    return {"blank_token": "<blank>", "decoder_type": decoder, "processor_class": "ParakeetProcessor"}
