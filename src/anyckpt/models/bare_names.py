"""Names as a model's own class has them: what wrapped the module that was saved is in the way of whoever loads it.

transformers looks for ``model.embed_tokens.weight`` and finds nothing under ``_orig_mod.model.embed_tokens.weight``.
Where the family is known its rules say what is a wrapper's; else the names have to say it beyond doubt, because a
model's own parts (``model.`` of all weights of a tied one) look the same from outside.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import field

from anyckpt.checkpoint import Checkpoint
from anyckpt.config import own_part
from anyckpt.data_classes import dataclass
from anyckpt.errors import MappingError
from anyckpt.models.complete import some
from anyckpt.models.dialects.wrappers import BETWEEN, unwrapped, without_between
from anyckpt.models.families import of_config
from anyckpt.tensor import LazyTensor

_AROUND = ("pretrained_model.", "base_model.model.")
"""What trl and peft put before a whole model's names, and no class of transformers does."""

_PARALLEL = "module."
"""What torch's DataParallel and DistributedDataParallel put there, and no class either."""

_HEADS = frozenset(
    {
        "lm_head",
        "score",
        "classifier",
        "qa_outputs",
        "embed_out",
        "proj_out",
        "cls",
        "final_logits_bias",
    }
)
"""Modules that transformers' classes have beside their base model, never in it."""


@dataclass(frozen=True)
class Bare:
    """A model's tensors under its own names.

    Attributes:
        tensors: in stored order.
        wrappers: what was taken off their names, for messages; empty if they are as stored.
        leading: what all the names begin with that may be another wrapper's, where nothing tells; or "".
        stored: name -> the name that it is stored by.
    """

    tensors: dict[str, LazyTensor]
    wrappers: tuple[str, ...] = ()
    leading: str = ""
    stored: Mapping[str, str] = field(default_factory=dict)


def bare_names(checkpoint: Checkpoint) -> Bare | None:
    """Weights without what is wrapped around their model; None where only the rules of its family lead there.

    Args:
        checkpoint: whose weights have names of transformers', wrapped or not.

    Raises:
        MappingError: two names are one without their wrappers, or some are wrapped and others are not.
    """
    weights, path = checkpoint.weights(), checkpoint.path
    config = checkpoint.config if checkpoint.config_kind == "hf" else {}
    between = tuple(f"{word}." for word in BETWEEN if any(word in name.split(".") for name in weights))
    plain = {name: without_between(name) for name in weights}
    parallel = _PARALLEL if weights and all(name.startswith(_PARALLEL) for name in plain.values()) else ""
    plain = _distinct({name: own.removeprefix(parallel) for name, own in plain.items()}, path)
    family = of_config(config) if config else None
    if family is None or own_part.is_part(family, config):
        outer = _around(plain.values(), path)
    else:
        found = unwrapped({own: weights[name] for name, own in plain.items()}, family.rules, False)
        base, prefix = found.wrapper.base, found.wrapper.prefix
        at_home = f".{prefix}".endswith(f".{base}")
        outer = prefix.removesuffix(base) if at_home else ""
        if prefix and not (at_home and all(name.startswith(outer) for name in plain.values())):
            return None
    wrappers = (*between, *([parallel + outer] if parallel + outer else []))
    stored = {own[len(outer) :]: name for name, own in plain.items()}
    named = {own: weights[name] for own, name in stored.items()}
    return Bare(named, wrappers, "" if family is not None else _shared(named), stored)


def _distinct(names: dict[str, str], path: str) -> dict[str, str]:
    """The table itself, in which no two have one name."""
    taken: set[str] = set()
    for name, own in names.items():
        if own in taken:
            raise MappingError(
                "two names are one without what is wrapped around the model",
                path=path,
                tensor=name,
                found=own,
                remedy="leave one of the two out with --exclude",
            )
        taken.add(own)
    return names


def _around(names: Iterable[str], path: str) -> str:
    """What a model's names begin with that is not its class's, as far as they say.

    Raises:
        MappingError: some begin with a wrapper and others do not.
    """
    rest, outer = list(names), ""
    while rest:
        wrapper = next((word for word in _AROUND if any(name.startswith(word) for name in rest)), "")
        beside = [outer + name for name in rest if not name.startswith(wrapper)]
        if beside:
            raise MappingError(
                f"some names begin with {wrapper}, which is wrapped around a model, and {len(beside)} do not",
                path=path,
                found=some(beside),
                remedy="leave these out with --exclude",
            )
        if not wrapper:
            wrapper = _shared(rest)
            below = {name[len(wrapper) :].partition(".")[0] for name in rest}
            if not (wrapper == "module." or (wrapper and (_has_head(below) or below == {wrapper[:-1]}))):
                break
        outer += wrapper
        rest = [name[len(wrapper) :] for name in rest]
    return outer


def _has_head(modules: set[str]) -> bool:
    """Whether a head and a base model are side by side."""
    return bool(modules & _HEADS) and not modules <= _HEADS


def _shared(names: Iterable[str]) -> str:
    """The first part of all names, with its dot; "" if they have none in common."""
    first = {name.partition(".")[0] if "." in name else "" for name in names}
    return f"{first.pop()}." if len(first) == 1 and first != {""} else ""
