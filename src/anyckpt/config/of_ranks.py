"""What configurations beside files of ranks say: Megatron-LM's arguments and NeMo 1's ``model_config.yaml``.

A model of ranks is joined whether its family is known or not, and whether the configuration is complete or not, so
this is less than a ``ModelConfig``: what decides shapes, as far as it is said.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from anyckpt.config import megatron, nemo1
from anyckpt.config.possible import impossible
from anyckpt.errors import FormatError, MappingError

_SIZES: Mapping[str, Callable[[Mapping[str, Any]], dict[str, Any]]] = {
    "megatron-args": megatron.sizes,
    "nemo1": nemo1.sizes,
}
_RUNS: Mapping[str, Callable[[Mapping[str, Any]], Mapping[str, Any]]] = {
    "megatron-args": lambda config: config,
    "nemo1": nemo1.unwrapped,
}

MOST_RANKS = 1 << 16
"""Ranks along one dimension; what says more is damaged, or means to be computed with for hours."""

KINDS = tuple(_SIZES)
"""Kinds of configuration that are beside files of ranks."""


def sizes(config: Mapping[str, Any], kind: str | None) -> dict[str, Any]:
    """The fields of ``ModelConfig`` that decide shapes; None, or missing, where the configuration does not say.

    Args:
        config: as stored.
        kind: one of ``KINDS``, None for none or for a configuration without a name, of which Megatron's keys are read.

    Raises:
        MappingError: a key is of the wrong type, or a size is negative.
    """
    found = _SIZES[kind or "megatron-args"](config)
    for name, value in found.items():
        if type(value) is int and value < 0:
            raise impossible(name, "a size", value)
    return found


def heads_on_a_rank(config: Mapping[str, Any], kind: str, ways: int, path: str, what: str) -> int:
    """Attention heads of one tensor-parallel rank, by which the rows of old models' projections are ordered.

    Args:
        config: as stored.
        kind: one of ``KINDS``.
        ways: how many tensor-parallel ranks there are.
        path: file of the ranks, for messages.
        what: which models, for messages.

    Raises:
        FormatError: the configuration does not say.
    """
    problem = f"num_attention_heads is needed to order the rows of attention projections {what}"
    try:
        heads = sizes(config, kind)["num_attention_heads"]
    except MappingError as error:
        raise error.told_as(FormatError, f"{problem}: {error.problem}", path=path, remedy=None) from None
    if not heads or heads % ways:
        raise FormatError(
            problem, path=path, expected=f"a multiple of the tensor-parallel size {ways}", found=heads or "none"
        )
    return int(heads) // ways


def run_words(config: Mapping[str, Any], kind: str | None) -> Mapping[str, Any]:
    """How the run was divided and its layers built, in the words of Megatron-LM's arguments."""
    return _RUNS[kind or "megatron-args"](config)
