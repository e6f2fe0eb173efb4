"""Cache-aware FastConformer encoders: NVIDIA's of NeMo, which transformers has as ``nemotron_asr_streaming_encoder``.

Convolutions are causal, their norms are layer norms, and attention sees chunks: some steps before its own and few
behind it.  transformers numbers the subsampling's convolutions in pairs, NeMo with what lies between them.  Names,
shapes and keys were compared with a model of NeMo 3.0 and transformers 5.24's class, which give equal outputs.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from anyckpt.config.fields import Codec
from anyckpt.config.model import ModelConfig
from anyckpt.config.reader import Reader
from anyckpt.config.sections import Only, Section
from anyckpt.data_classes import dataclass
from anyckpt.errors import MappingError
from anyckpt.models.families.parts import fastconformer
from anyckpt.models.families.parts.modules import linear
from anyckpt.models.language.rules import Condition, Dimension, Rule

_SUBSAMPLING = "encoder.subsampling"
_NORM = "encoder.layers.*.conv.norm"
_MOST_PAIRS = 5
"""Factors of subsampling up to 64; models have 8."""


def _has_pair(number: int) -> Condition:
    return lambda config, indices: config.halvings > number + 1


def _subsampling() -> Iterable[Rule]:
    hub = "encoder.pre_encode.conv"
    yield from linear(f"{_SUBSAMPLING}.conv_in", f"{hub}.0", ("channels", "one", "three", "three"))
    for number in range(_MOST_PAIRS):
        pair, there = f"{_SUBSAMPLING}.layers.{number}", _has_pair(number)
        deep, wide = f"{hub}.{3 * number + 2}", f"{hub}.{3 * number + 3}"
        yield from linear(f"{pair}.depthwise_conv", deep, ("channels", "one", "three", "three"), when=there)
        yield from linear(f"{pair}.pointwise_conv", wide, ("channels", "channels", "one", "one"), when=there)


def encoder() -> tuple[Rule, ...]:
    """Subsampling and layers."""
    others = (
        rule
        for rule in fastconformer.encoder()
        if not rule.source[0].startswith((f"{_SUBSAMPLING}.layers.", f"{_NORM}.running", f"{_NORM}.num_batches"))
    )
    return (*_subsampling(), *others)


def _subsampled(config: ModelConfig) -> int:
    channels = config.num_mel_bins or 0
    for _ in range(config.halvings):
        channels = channels // 2 + 1
    return channels * (config.subsampling_conv_channels or 0)


DIMENSIONS: Mapping[str, Dimension] = {**fastconformer.DIMENSIONS, "subsampled": _subsampled}
"""A causal convolution has one more channel of the spectrogram than half of them."""


class _Contexts(Codec):
    """NeMo's pairs of steps before and behind, one or several, of which the first is the usual one."""

    hubs = ("left_context", "lookaheads")
    keys = ("att_context_size",)

    def read(self, reader: Reader, defaults: Mapping[str, Any], found: Mapping[str, Any]) -> Mapping[str, Any]:
        stated = reader.values.get(self.keys[0])
        pairs = stated if isinstance(stated, list) and stated and isinstance(stated[0], list) else [stated]
        steps = [tuple(pair) if isinstance(pair, list) else () for pair in pairs]
        whole = all(len(pair) == 2 and all(type(n) is int and n >= 0 for n in pair) for pair in steps)
        if not whole or len({pair[0] for pair in steps}) != 1:
            raise MappingError(
                f"the {reader.what}'s {self.keys[0]} is one that transformers' class does not have",
                expected="[left, right], or several such pairs with the same left, none of them unlimited",
                found=f"{stated!r:.80}",
                remedy="convert to safetensors, torch or dcp, which keep names",
            )
        return {"left_context": steps[0][0], "lookaheads": tuple(pair[1] for pair in steps)}

    def write(self, config: ModelConfig, notes: list[str]) -> Mapping[str, Any]:
        pairs = [[config.left_context, steps] for steps in config.lookaheads or ()]
        return {self.keys[0]: pairs if len(pairs) > 1 else pairs[0]}


@dataclass(eq=False, repr=False, match_args=False)
class Window(Codec):
    """transformers' window, which counts the step itself, and the usual lookahead.

    The others are the processor's, and are read from its file.
    """

    hubs = ("left_context", "lookaheads")
    keys = ("sliding_window", "default_num_lookahead_tokens")

    def read(self, reader: Reader, defaults: Mapping[str, Any], found: Mapping[str, Any]) -> Mapping[str, Any]:
        window, usual = (reader.integer(key) for key in self.keys)
        return {
            "left_context": (71 if window is None else window) - 1,
            "lookaheads": (13 if usual is None else usual,),
        }

    def write(self, config: ModelConfig, notes: list[str]) -> Mapping[str, Any]:
        usual = (config.lookaheads or (0,))[0]
        return {"sliding_window": (config.left_context or 0) + 1, "default_num_lookahead_tokens": usual}


PREPROCESSOR = fastconformer.with_rows(
    fastconformer.PREPROCESSOR, Only("normalize", "NA", also=lambda value, found: value is False)
)
"""Features are not normalised, for which NeMo has a word that is none of its ways to do it."""

NEMO_ENCODER = fastconformer.with_rows(
    fastconformer.NEMO_ENCODER,
    Only("causal_downsampling", True, absent=False),
    _Contexts(),
    Only("att_context_style", "chunked_limited", absent="regular"),
    Only("conv_norm_type", "layer_norm", absent="batch_norm"),
    Only("conv_context_size", "causal", absent="not causal",
         also=lambda value, found: value == [(found["conv_kernel_size"] or 1) - 1, 0]),
)  # fmt: skip


def hugging_face() -> Section:
    """``encoder_config``."""
    section = fastconformer.hugging_face("nemotron_asr_streaming_encoder", (Window(),))
    return replace(section, idle=section.idle | {"supported_num_lookahead_tokens"})
