"""Nemotron ASR, which hears while one speaks: NeMo's ``EncDecRNNTBPEModel`` of a cache-aware FastConformer.

transformers' class is ``NemotronAsrStreamingForRNNT``, whose transducer is Parakeet's.  Names, settings and files are
those that transformers' converter of ``.nemo`` writes; which lookaheads there are its processor says.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from anyckpt.checkpoint import Checkpoint
from anyckpt.config.fields import Codec, Field
from anyckpt.config.model import ModelConfig
from anyckpt.config.reader import Reader
from anyckpt.config.spellings import HuggingFace, NeMoSpeech
from anyckpt.data_classes import dataclass
from anyckpt.models.families import parakeet_rnnt
from anyckpt.models.families.parakeet_rnnt import durations_of
from anyckpt.models.families.parts import fastconformer, streaming_fastconformer
from anyckpt.models.speech.companions import Companions, processor_settings

_PROCESSOR = "NemotronAsrStreamingProcessor"
_LOOKAHEADS = "supported_num_lookahead_tokens"
_USUAL = (13, 6, 1, 0)
"""What the processor takes where it is told nothing."""


def processing(config: ModelConfig) -> dict[str, Any]:
    """Keys of ``processor_config.json``."""
    lookaheads = list(config.lookaheads or ())
    return {
        "blank_token": "<blank>",
        "default_num_lookahead_tokens": lookaheads[0],
        "processor_class": _PROCESSOR,
        _LOOKAHEADS: lookaheads,
    }


@dataclass(frozen=True, kw_only=True)
class Streaming(Companions):
    """Also the lookaheads, of which the configuration says the usual one."""

    def read(self, config: ModelConfig, checkpoint: Checkpoint) -> ModelConfig:
        found = super().read(config, checkpoint)
        settings = processor_settings(checkpoint)
        if checkpoint.config_kind != "hf" or not settings:
            return found
        stated = Reader(settings, "processor_config.json").tokens(_LOOKAHEADS)
        listed = _USUAL if stated is None else (stated if isinstance(stated, tuple) else (stated,))
        usual = (config.lookaheads or listed)[0]
        return replace(found, lookaheads=(usual, *(steps for steps in listed if steps != usual)))


_BASE = parakeet_rnnt.FAMILY
_BESIDE = _BASE.companions
assert _BESIDE is not None

NEMO: tuple[Codec, ...] = (
    streaming_fastconformer.PREPROCESSOR,
    streaming_fastconformer.NEMO_ENCODER,
    *parakeet_rnnt.BEHIND_ENCODER,
)

FAMILY = replace(
    _BASE,
    name="nemotron-asr-streaming",
    title="Nemotron ASR streaming (cache-aware FastConformer)",
    rules=fastconformer.undivided((*streaming_fastconformer.encoder(), *parakeet_rnnt.TRANSDUCER)),
    axes={key: axis for key, axis in _BASE.axes.items() if key not in fastconformer.AXES},
    dimensions={**_BASE.dimensions, **streaming_fastconformer.DIMENSIONS},
    hugging_face=HuggingFace(
        model_types=("nemotron_asr_streaming",),
        architectures=("NemotronAsrStreamingForRNNT",),
        fields=(
            Field("vocab_size", "vocab_size", default=1025),
            Field("pad_token_id", "pad_token_id", "tokens", 0),
            Field("blank_token_id", "blank_token_id", default=1024),
            *parakeet_rnnt.TRANSDUCER_FIELDS,
        ),
        codecs=(
            streaming_fastconformer.hugging_face(),
            *parakeet_rnnt.BESIDE_ENCODER,
        ),
        activation_key=None,
        attention_bias=None,
    ),
    nemo_speech=NeMoSpeech(
        "nemo.collections.asr.models.rnnt_bpe_models.EncDecRNNTBPEModel",
        NEMO,
        fits=lambda config: durations_of(config) is None and fastconformer.streams(config),
    ),
    companions=Streaming(
        pieces=_BESIDE.pieces,
        more=("<unk>", "<pad>", "<blank>"),
        marked=("<pad>", "<unk>", "<blank>"),
        tokenizer=fastconformer.tokenizer_words("<pad>", _PROCESSOR),
        processor=processing,
        extractor="NemotronAsrStreamingFeatureExtractor",
        extractor_settings={"mel_filters_dtype": "float32"},
        unread=_BESIDE.unread,
        generation=_BESIDE.generation,
    ),
)
