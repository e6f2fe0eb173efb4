"""Where else a model can go that a framework cannot have, for the remedy of an error."""

from __future__ import annotations

from anyckpt.config.model import ModelConfig
from anyckpt.config.spellings import Spellings
from anyckpt.errors import MappingError


def other_targets(family: Spellings, config: ModelConfig, besides: str) -> str:
    """What to say of the formats whose frameworks have models of the family with such positions.

    Args:
        family: of the model.
        config: the model's.
        besides: ``NeMo 1``, ``NeMo 2`` or ``Megatron-Core``, which has not.
    """
    core = config.position_embedding_type != "alibi"  # which is of NeMo 1's own modules
    there = {
        "NeMo 1": ["nemo"] if family.nemo1 else [],
        "NeMo 2": ["nemo2"] if family.nemo2 is not None and core else [],
        "Megatron-Core": ["megatron-core", "megatron-lm"] if family.megatron and core else [],
    }
    names = [name for framework, formats in there.items() if framework != besides for name in formats] or ["hf"]
    return f"convert to {', '.join(names[:-1])} or {names[-1]}" if names[1:] else f"convert to {names[0]}"


def lacking(family: Spellings, config: ModelConfig, framework: str) -> MappingError:
    """The error for a framework that has no models of a family, or whose names for them are not known."""
    unknown = framework in family.unmapped
    return MappingError(
        f"how {framework} names models of family {family.name} is not known"
        if unknown
        else f"{framework} has no models of family {family.name}",
        remedy=other_targets(family, config, framework),
    )
