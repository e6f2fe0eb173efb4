"""Names with more or less before them than the family's rules have.

A model's class may be wrapped (``module.``, ``_orig_mod.``, ``base_model.model.``), and so may its parts be; it may be
the text part of a model that also sees (``language_model.model.`` of transformers 4, ``model.language_model.`` of
transformers 5), or may be saved without its head and so without the prefix of the part that is not the head.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Set
from functools import cached_property
from itertools import chain, count, takewhile

from anyckpt.config.hub_names import EMBEDDING
from anyckpt.data_classes import dataclass
from anyckpt.models.language.rules import Rule
from anyckpt.tensor import LazyTensor

BETWEEN = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_forward_module")
"""What torch.compile, FSDP, activation checkpointing and Lightning's Fabric put before the names of any module."""

_TEXTS = ("language_model.", "thinker.")
"""Of names of other stacks that end alike, those of the text: of two such parts that are both in a model."""
_FURTHER = "mtp."
"""Layers of multi-token prediction where they are beside the model, as its head is."""


@dataclass(frozen=True)
class Wrapper:
    """What is before the names.

    Attributes:
        base: what the rules' names begin with, but those of the head.
        prefix: what is stored in place of it.
        outer: what is stored before the names of the head.
        heads: first words of the names of the head.
    """

    base: str = ""
    prefix: str = ""
    outer: str = ""
    heads: frozenset[str] = frozenset()

    def peeled(self, name: str) -> str | None:
        """A stored name as the family's rules have it; None if it is beside the model."""
        inside = name[len(self.outer) :]
        if name.startswith(self.outer) and inside.partition(".")[0] in self.heads:
            return inside
        return self.base + name[len(self.prefix) :] if name.startswith(self.prefix) else None

    def around(self, name: str) -> str:
        """The stored name of a tensor of the family."""
        return self.prefix + name[len(self.base) :] if name.startswith(self.base) else self.outer + name


@dataclass(frozen=True)
class Unwrapped:
    """Tensors under names as a family's rules have them.

    Attributes:
        tensors: of the model, and whatever else is not recognised as another part's.
        others: stored names of other parts, if the model is said to be a part.
        wrapper: what is stored before the names.
        renamed: stored names of those ``tensors`` that have another name here.
    """

    tensors: dict[str, LazyTensor]
    others: tuple[str, ...]
    wrapper: Wrapper
    renamed: Mapping[str, str]

    def stored(self, name: str) -> str:
        """The stored name of a tensor that is called ``name`` here, or that it would have if it is missing."""
        if name in self.tensors:
            return self.renamed.get(name, name)
        plain = self.wrapper.around(name)
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
    plain = {name: without_between(name) for name in tensors}
    wrapper = _wrapper_of(set(plain.values()), rules, is_part)
    wanted = {name: wrapper.peeled(each) for name, each in plain.items()}
    called: dict[str, str] = {}
    for name in sorted(tensors, key=lambda name: (wanted[name] is None, plain[name] != name)):
        key = wanted[name]
        if key is not None or not is_part:
            called[_free(plain[name] if key is None else key, called)] = name
    here = {name: key for key, name in called.items()}
    return Unwrapped(
        {here[name]: tensor for name, tensor in tensors.items() if name in here},
        tuple(name for name in tensors if name not in here),
        wrapper,
        {key: name for key, name in called.items() if key != name},
    )


def without_between(name: str) -> str:
    """A name without the parts that are of ``BETWEEN``."""
    if not any(word in name for word in BETWEEN):
        return name
    return ".".join(word for word in name.split(".") if word not in BETWEEN) or name


def _wrapper_of(names: Set[str], rules: Iterable[Rule], is_part: bool) -> Wrapper:
    anchor, patterns = _patterns(rules)
    base = _base(anchor, patterns)
    prefix = _prefix(names, anchor, base)
    if prefix is None or (prefix == base and not is_part):
        return Wrapper()
    outside = [pattern for pattern in patterns if base and not pattern.startswith(base)]
    heads = frozenset(name.partition(".")[0] for name in outside)
    return Wrapper(base, prefix, _outer(names, prefix, base, outside), heads)


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
    shared = [anchor, *(pattern for pattern in patterns if "*" in pattern and not pattern.startswith(_FURTHER))]
    parts = zip(*(pattern.split(".")[:-1] for pattern in shared), strict=False)
    return "".join(f"{same[0]}." for same in takewhile(lambda each: len(set(each)) == 1, parts))


def _prefix(names: Set[str], anchor: str, base: str) -> str | None:
    """What is stored before the names in place of ``base``; None if that is not clear."""
    if not anchor or anchor in names:
        return base if anchor else None
    tail = anchor[len(base) :]
    found = [name[: -len(tail)] for name in names if name == tail or name.endswith(f".{tail}")]
    for candidates in (found, *([prefix for prefix in found if text in prefix] for text in _TEXTS)):
        shortest = min(candidates, key=len, default=None)
        if shortest is not None and all(prefix.startswith(shortest) for prefix in candidates):
            return shortest
    return None


def _outer(names: Set[str], prefix: str, base: str, outside: list[str]) -> str:
    """What is stored before the names that are outside the base: some leading part of its prefix."""
    parts = prefix.split(".")[:-1]
    for length in range(len(parts), -1, -1):
        outer = "".join(f"{part}." for part in parts[:length])
        if any(outer + name in names for name in outside):
            return outer
    return prefix.removesuffix(base) if f".{prefix}".endswith(f".{base}") else ""
