"""``model_config.yaml`` of NeMo's speech models, whose classes have sections for their modules.

Keys and defaults are those of NeMo 3.0's classes.  A key of a section that no row knows is refused; what is beside the
sections trains the model, or tells how its outputs are searched.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from anyckpt.config.model import ModelConfig, check, vocabulary_divisor
from anyckpt.config.reader import Reader
from anyckpt.config.spellings import NeMoSpeech, Spellings
from anyckpt.errors import MappingError

NEMO_VERSION = "3.0.0"
"""The release whose classes the sections are written for."""

CLASSES = frozenset({"EncDecCTCModelBPE", "EncDecRNNTBPEModel", "EncDecRNNTBPEModelWithPrompt", "EncDecMultiTaskModel"})
"""NeMo's classes of which families read the configurations."""

HYBRIDS = {
    "EncDecHybridRNNTCTCBPEModel": "EncDecRNNTBPEModel",
    "EncDecHybridRNNTCTCBPEModelWithPrompt": "EncDecRNNTBPEModelWithPrompt",
}
"""Classes with a second head, a CTC one, each with that which has the transducer alone."""


def class_name(config: Mapping[str, Any]) -> str:
    """The class that a configuration names, without its module; "" for none."""
    target = config.get("target")
    return target.rpartition(".")[2] if isinstance(target, str) else ""


def is_speech(config: Mapping[str, Any]) -> bool:
    """Whether a configuration is of one of ``CLASSES``."""
    return class_name(config) in CLASSES and isinstance(config.get("encoder"), Mapping)


def spelling_of(family: Spellings, config: Mapping[str, Any]) -> NeMoSpeech | None:
    """How a family spells a configuration that is one of its models', or None."""
    known = family.nemo_speech
    fits = known is not None and class_name(config) == known.target.rpartition(".")[2] and known.fits(config)
    return known if fits else None


def parse(family: Spellings, config: Mapping[str, Any]) -> ModelConfig:
    """The hub's configuration.

    Raises:
        MappingError: a key is missing, of the wrong type, or says something that the family cannot be.
    """
    known = family.nemo_speech
    if known is None or not is_speech(config):
        raise MappingError(
            f"model_config.yaml is not of a model of family {family.name}",
            found=str(config.get("target"))[:80],
            remedy="leave --family out",
        )
    reader = Reader(config, "model_config.yaml")
    fields = reader.fields(known.rows, {})
    found = ModelConfig(**{**family.traits, **fields, "family": family.name})
    return check(replace(found, make_vocab_size_divisible_by=vocabulary_divisor(found.vocab_size or 1)))


def render(family: Spellings, config: ModelConfig, notes: list[str]) -> dict[str, Any]:
    """A ``model_config.yaml`` that NeMo restores the model from, without its tokenizer.

    Raises:
        MappingError: NeMo's class cannot express the configuration.
    """
    known = family.nemo_speech
    assert known is not None
    rendered: dict[str, Any] = {"sample_rate": config.sampling_rate}
    for row in known.rows:
        rendered.update(row.write(config, notes))
    rendered |= {"target": known.target, "nemo_version": NEMO_VERSION}
    return rendered
