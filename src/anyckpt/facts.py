"""What anyckpt says that it knows: a format and a model family as plain facts, for people and programs."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from anyckpt.data_classes import dataclass


@dataclass(frozen=True)
class FormatFacts:
    """A format.

    Attributes:
        name: as in ``convert(to=...)``.
        title: what it is, for people.
        reads: it can be opened.
        writes: it can be written.
        names: how it names weights: ``hf`` or a dialect of Megatron's; None if any names do.
        config: spelling of the configuration that it holds: ``hf``, ``nemo1``, ``nemo2``, ``megatron-args``, ``meta``;
            None if it holds none.
        sharded: it can also hold a distributed checkpoint.
        adapters: it has a place for what an adapter says of itself.
        own: it is anyckpt's own; another package brings it if not.
    """

    name: str
    title: str
    reads: bool
    writes: bool
    names: str | None
    config: str | None
    sharded: bool
    adapters: bool
    own: bool

    def __repr__(self) -> str:
        return _shown(self)


@dataclass(frozen=True)
class FamilyFacts:
    """A model family.

    Attributes:
        name: as in ``convert(family=...)``.
        title: what it is, for people.
        model_types: ``model_type`` in ``config.json``, those that are read; the first is written.
        architectures: classes of transformers that are read.
        megatron: Megatron-Core has such models.
        nemo1: NeMo 1 has.
        nemo2: NeMo 2 has.
        meta: Meta's or Mistral's own code has.
        trtllm: TensorRT-LLM has, and its names for them are known.
        own: it is anyckpt's own; another package brings it if not.
    """

    name: str
    title: str
    model_types: tuple[str, ...]
    architectures: tuple[str, ...]
    megatron: bool
    nemo1: bool
    nemo2: bool
    meta: bool
    trtllm: bool
    own: bool

    def __repr__(self) -> str:
        return _shown(self)


def _shown(facts: Any) -> str:
    """What is so, by the fields' names: ``hf: Hugging Face folder (reads, writes, names=hf)``."""
    said = []
    for field in fields(facts)[2:]:
        value = getattr(facts, field.name)
        if value is True:
            said.append(field.name)
        elif value:
            said.append(f"{field.name}={' '.join(value) if isinstance(value, tuple) else value}")
    return f"<{facts.name}: {facts.title} ({', '.join(said)})>"
