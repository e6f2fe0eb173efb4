"""Parakeet with a transducer that predicts durations, too: ``ParakeetForTDT``, NeMo's ``EncDecRNNTBPEModel`` with some.

The joint network's last layer has a row for each duration behind those of the tokens, in both.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from anyckpt.config.fields import Codec, Field
from anyckpt.config.model import ModelConfig
from anyckpt.config.reader import Reader
from anyckpt.config.spellings import NeMoSpeech
from anyckpt.errors import MappingError
from anyckpt.models.families import parakeet_rnnt
from anyckpt.models.families.parakeet_rnnt import durations_of
from anyckpt.models.families.parts import fastconformer


class _Durations(Codec):
    """Durations where NeMo lists them, which ``parakeet_rnnt`` writes."""

    hubs = ("durations",)

    def read(self, reader: Reader, defaults: Mapping[str, Any], found: Mapping[str, Any]) -> Mapping[str, Any]:
        listed = durations_of(reader.values)
        read = Reader({"durations": listed}, reader.what).tokens("durations")
        return {"durations": tuple(read) if isinstance(read, tuple) else None}


class _Pad(parakeet_rnnt.Pad):
    """The token that pads, which transformers' converter asks for."""

    def read(self, reader: Reader, defaults: Mapping[str, Any], found: Mapping[str, Any]) -> Mapping[str, Any]:
        said = super().read(reader, defaults, found)
        if said["pad_token_id"] is None:
            raise MappingError(
                "model_config.yaml's labels have no <pad>, by which transformers' ParakeetForTDT pads",
                expected="<pad> among the labels",
                remedy="convert to safetensors, torch or dcp, which keep names",
            )
        return said


def _suppressed(config: ModelConfig) -> list[int]:
    """Outputs that are no tokens."""
    tokens = config.vocab_size or 0
    return list(range(tokens, tokens + len(config.durations or ())))


_BASE = parakeet_rnnt.FAMILY
_COMPANIONS = _BASE.companions
assert _COMPANIONS is not None

FAMILY = replace(
    _BASE,
    name="parakeet-tdt",
    title="Parakeet TDT (FastConformer)",
    hugging_face=replace(
        _BASE.hugging_face,
        model_types=("parakeet_tdt",),
        architectures=("ParakeetForTDT",),
        defaults_of="parakeet_tdt",
        fields=(*_BASE.hugging_face.fields, Field("durations", "durations", "tokens", (0, 1, 2, 3, 4))),
    ),
    nemo_speech=NeMoSpeech(
        "nemo.collections.asr.models.rnnt_bpe_models.EncDecRNNTBPEModel",
        tuple(_Pad() if isinstance(row, parakeet_rnnt.Pad) else row for row in (_Durations(), *parakeet_rnnt.NEMO)),
        fits=lambda config: durations_of(config) is not None,
    ),
    companions=replace(
        _COMPANIONS,
        more=("<unk>", "<pad>", "<blank>"),
        marked=("<pad>", "<unk>"),
        tokenizer=fastconformer.tokenizer_words("<pad>"),
        processor=lambda config: fastconformer.processor_words("tdt"),
        generation=lambda config: {
            "decoder_start_token_id": config.blank_token_id,
            "pad_token_id": config.pad_token_id,
            "suppress_tokens": _suppressed(config),
        },
    ),
)
