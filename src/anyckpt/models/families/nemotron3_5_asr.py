"""Nemotron 3.5 ASR, which is told a language: NeMo's ``EncDecRNNTBPEModelWithPrompt``, ``Nemotron3_5AsrForRNNT``.

Behind the encoder of ``nemotron_asr_streaming`` two linear layers join which language it is to every step.  The names
of languages are NeMo's ``prompt_dictionary``, which transformers has in its processor's file; tokens that are such
names (``<en-US>``) it marks as special.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from anyckpt.checkpoint import Checkpoint
from anyckpt.config.codecs import Fixed, Written
from anyckpt.config.fields import Field
from anyckpt.config.model import ModelConfig
from anyckpt.config.reader import Reader
from anyckpt.config.spellings import NeMoSpeech
from anyckpt.data_classes import dataclass
from anyckpt.errors import MappingError
from anyckpt.models.families import nemotron_asr_streaming
from anyckpt.models.families.parts import fastconformer
from anyckpt.models.families.parts.modules import linear
from anyckpt.models.families.parts.transducer import Wrappers
from anyckpt.models.speech.companions import processor_settings

_PROCESSOR = "Nemotron3_5AsrProcessor"
_NAMES, _DEFAULT = "prompt_dictionary", "default_prompt_id"
_AUTOMATIC, _USUAL = "auto", 101
"""The name by which a model finds the language itself, and its number in NVIDIA's."""


def _listed(values: Mapping[str, Any], what: str) -> tuple[tuple[str, int], ...]:
    """Names with their numbers, sorted, as files have any order; those that YAML took for other types as text."""
    named = Reader(values, what).mapping(_NAMES)
    numbers = Reader({str(name): number for name, number in named.items()}, f"{what}'s {_NAMES}")
    return tuple((name, numbers.integer(name) or 0) for name in sorted(numbers.values))


class _Prompts(Wrappers):
    """The languages, among NeMo's defaults of a model.

    NeMo has no key for the usual one, and does not look at ours, which says it where that is not the automatic one.
    """

    hubs: tuple[str, ...] = (*Wrappers.hubs, "num_prompts", "prompts", "usual_prompt")
    keys: tuple[str, ...] = (*Wrappers.keys, "num_prompts")

    def read(self, reader: Reader, defaults: Mapping[str, Any], found: Mapping[str, Any]) -> Mapping[str, Any]:
        section = Reader(reader.mapping("model_defaults"), f"{reader.what}'s model_defaults")
        if not section.flag("initialize_prompt_feature"):
            raise MappingError(
                f"{section.what} has no prompts, which transformers' class has",
                expected="initialize_prompt_feature: true",
                remedy="convert to safetensors, torch or dcp, which keep names",
            )
        names, usual = _listed(section.values, section.what), section.integer(_DEFAULT)
        return {
            **super().read(reader, defaults, found),
            "num_prompts": section.integer("num_prompts") or 128,
            "prompts": names,
            "usual_prompt": dict(names).get(_AUTOMATIC, _USUAL) if usual is None else usual,
        }

    def write(self, config: ModelConfig, notes: list[str]) -> Mapping[str, Any]:
        written = dict(super().write(config, notes))
        names, own = dict(config.prompts), {}
        if names.get(_AUTOMATIC, _USUAL) != config.usual_prompt:
            own = {_DEFAULT: config.usual_prompt}
            notes.append(
                f"NeMo takes the language called {_AUTOMATIC} where none is given, and transformers number "
                f"{config.usual_prompt}"
            )
        if not names:
            notes.append("no names of languages are known: put them into model_defaults.prompt_dictionary")
        prompts = {"num_prompts": config.num_prompts, "initialize_prompt_feature": True, _NAMES: names}
        written["model_defaults"] = {**written["model_defaults"], **prompts, **own}
        return {**written, "num_prompts": config.num_prompts}


def _processing(config: ModelConfig) -> Mapping[str, Any]:
    said = nemotron_asr_streaming.processing(config)
    return {**said, "processor_class": _PROCESSOR, "num_prompts": config.num_prompts, _NAMES: dict(config.prompts)}


@dataclass(frozen=True, kw_only=True)
class _Companions(nemotron_asr_streaming.Streaming):
    """Also the names of languages."""

    def read(self, config: ModelConfig, checkpoint: Checkpoint) -> ModelConfig:
        found = super().read(config, checkpoint)
        settings = processor_settings(checkpoint) if checkpoint.config_kind == "hf" else {}
        return replace(found, prompts=_listed(settings, "processor_config.json")) if _NAMES in settings else found


_BASE = nemotron_asr_streaming.FAMILY
_BESIDE = _BASE.companions
assert _BESIDE is not None

_KERNEL = fastconformer.undivided(
    (
        *linear("prompt_projector.linear_1", "prompt_kernel.0", ("twice-hidden", "prompted")),
        *linear("prompt_projector.linear_2", "prompt_kernel.2", ("hidden", "twice-hidden")),
    )
)

FAMILY = replace(
    _BASE,
    name="nemotron3.5-asr",
    title="Nemotron 3.5 ASR streaming (cache-aware FastConformer, told a language)",
    rules=(*_BASE.rules, *_KERNEL),
    dimensions={**_BASE.dimensions, "prompted": lambda config: config.hidden_size + (config.num_prompts or 0)},
    hugging_face=replace(
        _BASE.hugging_face,
        model_types=("nemotron3_5_asr",),
        architectures=("Nemotron3_5AsrForRNNT",),
        defaults_of="nemotron3_5_asr",
        fields=(
            *(
                replace(row, default={"vocab_size": 13088, "blank_token_id": 13087}.get(row.key, row.default))
                for row in _BASE.hugging_face.fields
            ),
            Field("num_prompts", "num_prompts", default=128),
            Field("usual_prompt", _DEFAULT, default=_USUAL),
        ),
        codecs=(
            *(row for row in _BASE.hugging_face.codecs if not isinstance(row, Written)),
            Written({"is_encoder_decoder": True}),
            Fixed({"prompt_intermediate_size": lambda found: 2 * found["hidden_size"]}, "that of NeMo's class"),
        ),
    ),
    nemo_speech=NeMoSpeech(
        "nemo.collections.asr.models.rnnt_bpe_models_prompt.EncDecRNNTBPEModelWithPrompt",
        tuple(_Prompts() if isinstance(row, Wrappers) else row for row in nemotron_asr_streaming.NEMO),
    ),
    companions=_Companions(
        **{
            **vars(_BESIDE),
            "processor": _processing,
            "tokenizer": fastconformer.tokenizer_words("<pad>", _PROCESSOR),
            "tags": re.compile(r"<[a-z]{2,3}-[A-Za-z]{2}>"),
        }
    ),
)
