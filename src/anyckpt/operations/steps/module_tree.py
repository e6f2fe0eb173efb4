"""What each module of a model takes, as ``du`` says it of folders; modules that are alike are one."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from anyckpt.checkpoint.grouping import grouped
from anyckpt.data_classes import dataclass

_DEEPEST = 64


@dataclass(frozen=True)
class Leaf:
    """A tensor, as far as sizes go.

    Attributes:
        name: dotted.
        look: its type and shape.
        elements: how many it has; 0 if another tensor has the same in the file.
        nbytes: bytes of these.
    """

    name: str
    look: str
    elements: int
    nbytes: int


@dataclass(frozen=True)
class Module:
    """A module, or a tensor; or several that are alike.

    Attributes:
        name: below the module that holds it, such as ``layers.{0-31}``.
        count: how many there are.
        tensors: in all of them.
        elements: of all these.
        nbytes: bytes of all these.
        look: of a tensor, its type and shape; else empty.
        modules: what each of them holds, with the sizes that it has in all of them.
    """

    name: str
    count: int
    tensors: int
    elements: int
    nbytes: int
    look: str = ""
    modules: tuple[Module, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Plain values; ``bytes`` and ``parameters`` are those of all that are alike."""
        return {
            "name": self.name,
            "count": self.count,
            "tensors": self.tensors,
            "parameters": self.elements,
            "bytes": self.nbytes,
            "look": self.look or None,
            "modules": [module.to_json() for module in self.modules],
        }


class _Node:
    """A module that is being built."""

    def __init__(self) -> None:
        self.inside: dict[str, _Node] = {}
        self.leaf: Leaf | None = None
        self.look = -1
        self.groups: list[tuple[str, int, _Node]] = []


def module_tree(leaves: Iterable[Leaf]) -> Module:
    """The modules of a model by the dots in its tensors' names; its root has no name."""
    root = _Node()
    for leaf in leaves:
        node = root
        for word in leaf.name.split(".", _DEEPEST):
            node = node.inside.setdefault(word, _Node())
        node.leaf = leaf
    _put_together(root, {})
    return _as_module("", 1, 1, root)


def _put_together(node: _Node, looks: dict[Any, int]) -> None:
    """Give every node a number that says how it looks, and make groups of what looks alike in it."""
    for inner in node.inside.values():
        _put_together(inner, looks)
    for group in grouped({word: inner.look for word, inner in node.inside.items()}):
        node.groups.append((group.name, group.count, node.inside[next(iter(group))]))
    own = None if node.leaf is None else (node.leaf.look, node.leaf.nbytes)
    look = own, tuple((name, count, inner.look) for name, count, inner in node.groups)
    node.look = looks.setdefault(look, len(looks))


def _as_module(name: str, count: int, times: int, node: _Node) -> Module:
    """A node of which there are ``count`` in each of ``times`` others."""
    times *= count
    while name and node.leaf is None and len(node.groups) == 1:
        more, inner_count, node = node.groups[0]
        name, count, times = f"{name}.{more}", count * inner_count, times * inner_count
    modules = tuple(_as_module(inner, number, times, each) for inner, number, each in node.groups)
    leaf = node.leaf
    return Module(
        name,
        count,
        sum(module.tensors for module in modules) + (times if leaf is not None else 0),
        sum(module.elements for module in modules) + (leaf.elements * times if leaf is not None else 0),
        sum(module.nbytes for module in modules) + (leaf.nbytes * times if leaf is not None else 0),
        leaf.look if leaf is not None else "",
        modules,
    )
