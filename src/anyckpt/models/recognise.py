"""Which families' tensors a checkpoint's names look like, where no configuration tells the family.

Names tell the kind of a model, never its sizes: how many heads share a projection's rows is in no shape.  So this
only says what to look for; a conversion needs the configuration.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from functools import cache

from anyckpt.config import meta_names
from anyckpt.data_classes import dataclass
from anyckpt.errors import LastingError
from anyckpt.models.dialects import spellings
from anyckpt.models.dialects.wrappers import unwrapped
from anyckpt.models.families import by_name, each_family
from anyckpt.models.language.family import Family
from anyckpt.tensor import LazyTensor

_INDEX = re.compile(r"(?<=\.)\d+(?=\.|$)|(?<=weight)\d+$|(?<=bias)\d+$|(?<=_l)\d+$")
_OPTIONAL = re.compile(
    r".*\.bias|output_layer\.weight|mtp\..*|.*\.self_attention\.[qk]_layernorm\.weight|(lm_head|pooler|binary_head)\..*"
)
"""Hub names that models of one family may have or not."""
_ROUTER = re.compile(r"decoder\.layers\.\*\.mlp\.router\.weight")
_DENSE = re.compile(r"decoder\.layers\.\*\.mlp\.linear_fc.*")
"""Of a family with experts, all of whose layers may have them."""


@dataclass(frozen=True)
class Resemblance:
    """The families that names resemble most.

    Attributes:
        families: their names; several that name tensors alike, or that the tensors there do not tell apart, but none
            that is ``like`` another.
        strange: names that no rule of theirs explains.
    """

    families: tuple[str, ...]
    strange: tuple[str, ...]

    @property
    def text(self) -> str:
        """The families as a message has them."""
        return " or ".join(filter(None, (", ".join(self.families[:-1]), self.families[-1])))


def resemblance(weights: Mapping[str, LazyTensor]) -> Resemblance | None:
    """The families whose rules explain most of a model's tensors by name, or None if none explains any.

    Whatever the names are, this says no more than that: it is advice, for which no command should fail.

    Args:
        weights: under their stored names, of Hugging Face, Meta or any Megatron dialect.
    """
    dialect = spellings.detect(weights)
    by_hub, by_meta = spellings.is_megatron(dialect), dialect in meta_names.SPELLINGS
    try:
        names = spellings.to_hub_names(weights)[0] if by_hub else weights
    except LastingError:
        return None  # two names are the same tensor, or its other half is missing
    alike: dict[str, list[str]] = {}
    for name in names:
        alike.setdefault(_INDEX.sub("*", name), []).append(name)
    firsts = {each[0]: names[each[0]] for each in alike.values()}
    told = [family for family in each_family() if not family.like and (family.meta is not None or not by_meta)]
    kinds = [_Kind(family, by_hub, firsts) for family in told]
    best = min((kind.distance for kind in kinds), default=None)
    if best is None or best[0] == len(alike):
        return None
    nearest = [kind for kind in kinds if kind.distance == best]
    strange = tuple(name for first in nearest[0].strange for name in alike[_INDEX.sub("*", first)])
    return Resemblance(tuple(kind.family.name for kind in nearest), strange)


class _Kind:
    """A family, held against names.

    Args:
        family: the family.
        by_hub: whether the names are the hub's.
        tensors: one of each kind of name.
    """

    def __init__(self, family: Family, by_hub: bool, tensors: Mapping[str, LazyTensor]) -> None:
        self.family = family
        rules = [rule for rule in family.rules if not rule.optional and (by_hub or rule.source)]
        stored = {name: name for name in tensors}
        if not by_hub:
            if family.meta is not None and meta_names.spelling(tensors) is not None:
                stored = {meta_names.family_name(name, family.meta)[0]: name for name in tensors}
            else:
                found = unwrapped(tensors, family.rules, False)
                stored = {name: found.stored(name) for name in found.tensors}
        hubs: set[str] = set()
        self.strange = []
        for name in stored:
            explained = _explained(family, by_hub, name)
            hubs.update(explained)
            if not explained and family.reason_to_ignore(name) is None:
                self.strange.append(stored[name])
        absent = {rule.hub for rule in rules} - hubs
        sparse = any(_ROUTER.fullmatch(hub) for hub in hubs)
        needed = sum(not (_OPTIONAL.fullmatch(hub) or (sparse and _DENSE.fullmatch(hub))) for hub in absent)
        wrong = sum(family.traits.get(trait, said) != said for trait, said in _said(hubs).items())
        self.distance = (len(self.strange), wrong, needed)


def _said(hubs: Iterable[str]) -> dict[str, bool]:
    """What the presence of tensors says of the configuration."""
    ends = {hub.rpartition("self_attention.")[2] for hub in hubs if "self_attention." in hub}
    if "linear_qkv.weight" not in ends:
        return {}
    return {
        "add_qkv_bias": "linear_qkv.bias" in ends and "linear_proj.bias" not in ends,
        "qk_layernorm": "q_layernorm.weight" in ends,
    }


def _explained(family: Family, by_hub: bool, name: str) -> list[str]:
    """The hub patterns that a name may be of."""
    return _hubs(family.name, by_hub).get(_INDEX.sub("*", name), [])


@cache
def _hubs(family: str, by_hub: bool) -> dict[str, list[str]]:
    """Hub patterns by kind of name: looked up, because compiling every family's patterns takes longer than reading."""
    definition = by_name(family)
    hubs: dict[str, list[str]] = {}
    for rule in definition.rules:
        for source in (rule.hub,) if by_hub else rule.source:
            hubs.setdefault(_INDEX.sub("*", source), []).append(rule.hub)
    for variant in () if by_hub else definition.hugging_face.variants:
        for name in variant.names:
            stored = hubs.setdefault(_INDEX.sub("*", variant.stored), [])
            stored.extend(hubs.get(_INDEX.sub("*", name), ()))
    return hubs
