"""Names with more or less before them than the family's rules have.

A model's class may be wrapped (``module.``, ``_orig_mod.``, ``base_model.model.``), and so may its parts be; it may be
the text part of a model that also sees (``language_model.model.`` of transformers 4, ``model.language_model.`` of
transformers 5), or may be saved without its head and so without the prefix of the part that is not the head.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import chain, count, takewhile

from anyckpt.config.hub_names import EMBEDDING
from anyckpt.models.language.rules import Rule
from anyckpt.tensor import LazyTensor

BETWEEN = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_forward_module")
"""What torch.compile, FSDP, activation checkpointing and Lightning's Fabric put before the names of any module."""

_TEXT = "language_model."


@dataclass(frozen=True)
class Unwrapped:
    """Tensors under names as a family's rules have them.

    Attributes:
        tensors: of the model, and whatever else is not recognised as another part's.
        others: stored names of other parts, if the model is said to be a part.
        base: what the rules' names begin with, but those of the head.
        prefix: what is stored in place of it.
        outer: what is stored before the names of the head.
        renamed: stored names of those ``tensors`` that have another name here.
    """

    tensors: dict[str, LazyTensor]
    others: tuple[str, ...] = ()
    base: str = ""
    prefix: str = ""
    outer: str = ""
    renamed: Mapping[str, str] = field(default_factory=dict)

    def stored(self, name: str) -> str:
        """The stored name of a tensor that is called ``name`` here, or that it would have if it is missing."""
        if name in self.tensors:
            return self.renamed.get(name, name)
        plain = self.prefix + name[len(self.base) :] if name.startswith(self.base) else self.outer + name
        ends = [at for at, letter in enumerate(plain, 1) if letter == "."]
        module = next((plain[:end] for end in reversed(ends) if plain[:end] in self._modules), "")
        return self._modules[module] + plain[len(module) :]

    @cached_property
    def _modules(self) -> dict[str, str]:
        """The stored spelling of every module's name, with its dot, by that without what is between."""
        spelled = {"": ""}
        for name in map(self.stored, self.tensors):
            plain = stored = ""
            for word in name.split(".")[:-1]:
                stored += f"{word}."
                plain += "" if word in BETWEEN else f"{word}."
                spelled[plain] = stored
        return spelled


def unwrapped(tensors: Mapping[str, LazyTensor], rules: Iterable[Rule], is_part: bool) -> Unwrapped:
    """Tensors without their wrapper's prefix, and with the family's.

    No tensor takes the place of another: where two would have one name, the one without the prefix gets a number.

    Args:
        tensors: by stored name.
        rules: the family's.
        is_part: the model is a part of what is stored, so that what is beside it belongs to other parts.
    """
    plain: dict[str, str] = {}
    for name in sorted(tensors, key=lambda name: without_between(name) != name):
        plain[_free(without_between(name), plain)] = name
    inner = {name: key for key, name in plain.items()}
    found = _unprefixed({inner[name]: tensor for name, tensor in tensors.items()}, rules, is_part)
    stored = {key: plain[found.stored(key)] for key in found.tensors}
    others = tuple(plain[name] for name in found.others)
    return replace(found, others=others, renamed={key: name for key, name in stored.items() if key != name})


def without_between(name: str) -> str:
    """A name without the parts that are of ``BETWEEN``."""
    if not any(word in name for word in BETWEEN):
        return name
    return ".".join(word for word in name.split(".") if word not in BETWEEN) or name


def _unprefixed(tensors: Mapping[str, LazyTensor], rules: Iterable[Rule], is_part: bool) -> Unwrapped:
    anchor, patterns = _patterns(rules)
    base = _base(anchor, patterns)
    prefix = _prefix(tensors, anchor, base)
    if prefix is None or (prefix == base and not is_part):
        return Unwrapped(dict(tensors))
    outside = [pattern for pattern in patterns if base and not pattern.startswith(base)]
    outer = _outer(tensors, prefix, base, outside)
    heads = {name.partition(".")[0] for name in outside}
    wanted: dict[str, str | None] = {}
    for name in tensors:
        if name.startswith(outer) and name[len(outer) :].partition(".")[0] in heads:
            wanted[name] = name[len(outer) :]
        else:
            wanted[name] = base + name[len(prefix) :] if name.startswith(prefix) else None
    others = tuple(name for name, key in wanted.items() if key is None) if is_part else ()
    called: dict[str, str] = {}
    for name, key in sorted(wanted.items(), key=lambda item: item[1] is None):
        if key is not None or not is_part:
            called[_free(name if key is None else key, called)] = name
    here = {name: key for key, name in called.items()}
    kept = {here[name]: tensor for name, tensor in tensors.items() if name in here}
    return Unwrapped(kept, others, base, prefix, outer, {key: name for key, name in called.items() if key != name})


def base_of(rules: Iterable[Rule]) -> str:
    """What the names of all of a family's model begin with, but those of its head."""
    return _base(*_patterns(rules))


def _free(name: str, taken: Mapping[str, str]) -> str:
    """The name itself, or with the first number behind it that makes it another than those that are taken."""
    return next(each for each in chain((name,), (f"{name}#{number}" for number in count(2))) if each not in taken)


def _patterns(rules: Iterable[Rule]) -> tuple[str, list[str]]:
    """A name that tells where the model is, and all names."""
    listed = list(rules)
    patterns = [pattern for rule in listed for pattern in rule.source]
    embedding = next((rule.source[0] for rule in listed if rule.hub == EMBEDDING and rule.source), None)
    return embedding or next((pattern for pattern in patterns if "*" not in pattern), ""), patterns


def _base(anchor: str, patterns: list[str]) -> str:
    """The prefix that all of the model but its head has."""
    shared = [anchor, *(pattern for pattern in patterns if "*" in pattern)]
    parts = zip(*(pattern.split(".")[:-1] for pattern in shared), strict=False)
    return "".join(f"{same[0]}." for same in takewhile(lambda each: len(set(each)) == 1, parts))


def _prefix(tensors: Mapping[str, LazyTensor], anchor: str, base: str) -> str | None:
    """What is stored before the names in place of ``base``; None if that is not clear."""
    if not anchor or anchor in tensors:
        return base if anchor else None
    tail = anchor[len(base) :]
    found = [name[: -len(tail)] for name in tensors if name == tail or name.endswith(f".{tail}")]
    for candidates in (found, [prefix for prefix in found if _TEXT in prefix]):
        shortest = min(candidates, key=len, default=None)
        if shortest is not None and all(prefix.startswith(shortest) for prefix in candidates):
            return shortest
    return None


def _outer(tensors: Mapping[str, LazyTensor], prefix: str, base: str, outside: list[str]) -> str:
    """What is stored before the names that are outside the base: some leading part of its prefix."""
    parts = prefix.split(".")[:-1]
    for length in range(len(parts), -1, -1):
        outer = "".join(f"{part}." for part in parts[:length])
        if any(outer + name in tensors for name in outside):
            return outer
    return prefix.removesuffix(base) if f".{prefix}".endswith(f".{base}") else ""
