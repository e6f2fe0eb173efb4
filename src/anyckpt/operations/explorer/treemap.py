"""A treemap: boxes within boxes, each as large as what it stands for, as elements that a page lays out."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import field

from anyckpt.data_classes import dataclass
from anyckpt.markup import text

_MOST_BOXES = 14
_DEEPEST = 5
_LONGEST_PATH = 20
_COLOURS = 8
_ASPECT = 2.0  # of the page's box, which a narrow screen changes


@dataclass
class Node:
    """A module, with what it and those in it hold.

    Attributes:
        name: its own.
        path: the whole.
        count: tensors.
        elements: of these.
        nbytes: of these.
        inside: modules in it.
    """

    name: str
    path: str
    count: int = 0
    elements: int = 0
    nbytes: int = 0
    inside: dict[str, Node] = field(default_factory=dict)


def tree(kinds: Iterable[tuple[str, int, int, int]]) -> Node:
    """The modules of kinds of tensors; a module that holds one alone is one with it.

    Args:
        kinds: of each the name, how many tensors there are, their elements and bytes.
    """
    root = Node("", "")
    for kind, count, elements, nbytes in kinds:
        node = root
        parts = kind.replace(".*", "\0*").split(".", _LONGEST_PATH)
        for depth in range(len(parts) + 1):
            node.count, node.elements, node.nbytes = node.count + count, node.elements + elements, node.nbytes + nbytes
            if depth < len(parts):
                path = ".".join(parts[: depth + 1]).replace("\0", ".")
                node = node.inside.setdefault(parts[depth], Node(parts[depth].replace("\0", "."), path))
    return _joined(root)


def treemap(root: Node, size: Callable[[Node], int], told: Callable[[Node], str]) -> str:
    """The boxes.

    Args:
        root: of a tree.
        size: what a box stands for.
        told: the same for people.
    """
    while len(root.inside) == 1:
        root = next(iter(root.inside.values()))
    colours = {node.path: number for number, node in enumerate(_coloured(root, size)[:_COLOURS])}
    return f'<div class="treemap">{_boxes(root, size, told, colours, None, 1, _ASPECT)}</div>'


def _joined(node: Node) -> Node:
    """Without modules that hold nothing but another."""
    inside = [_joined(one) for one in node.inside.values()]
    if len(inside) == 1 and node.name and inside[0].count == node.count:
        only = inside[0]
        return Node(f"{node.name}.{only.name}", only.path, node.count, node.elements, node.nbytes, only.inside)
    return Node(
        node.name,
        node.path,
        node.count,
        node.elements,
        node.nbytes,
        {f"{one.name}{i}": one for i, one in enumerate(inside)},
    )


def _coloured(root: Node, size: Callable[[Node], int]) -> list[Node]:
    """The modules that have a colour of their own: those of a layer, and what is beside the layers."""
    found: list[Node] = []
    for node in root.inside.values():
        around = any(_is_stack(one) for one in (node, *node.inside.values()))
        found += _coloured(node, size) if around and node.inside else [node]
    return sorted(found, key=lambda node: -size(node))


def _is_stack(node: Node) -> bool:
    return node.name.endswith(".*") and not node.name.endswith("experts.*")


def _boxes(
    node: Node,
    size: Callable[[Node], int],
    told: Callable[[Node], str],
    colours: dict[str, int],
    colour: int | None,
    depth: int,
    aspect: float,
) -> str:
    inside = _largest(node, size)
    made = []
    for one, (x, y, width, height) in zip(inside, squarified([size(one) for one in inside], aspect), strict=True):
        own = colours.get(one.path, colour)
        label = f"{one.name}: {told(one)}"
        place = f"left:{x:.2%};top:{y:.2%};width:{width:.2%};height:{height:.2%}"
        box = f'class="box c{_COLOURS if own is None else own}" style="{place}" title="{text(label)}"'
        name = f"<b>{text(one.name)}</b><i>{text(told(one))}</i>"
        deeper = one.inside and depth < _DEEPEST and width * height > 0.02
        content = _boxes(one, size, told, colours, own, depth + 1, aspect * width / height) if deeper else ""
        if content:
            made.append(
                f'<div {box} role="group" aria-label="{text(label)}"><span>{name}</span><div>{content}</div></div>'
            )
        else:
            made.append(f'<button type="button" {box} data-find="{text(one.path)}">{name}</button>')
    return "".join(made)


def _largest(node: Node, size: Callable[[Node], int]) -> list[Node]:
    """The modules in one, the largest first; the smallest of very many as one."""
    inside = sorted((one for one in node.inside.values() if size(one) > 0), key=lambda one: -size(one))
    if len(inside) <= _MOST_BOXES:
        return inside
    shown, rest = inside[: _MOST_BOXES - 1], inside[_MOST_BOXES - 1 :]
    sums = [sum(getattr(one, name) for one in rest) for name in ("count", "elements", "nbytes")]
    return [*shown, Node(f"{len(rest)} more", node.path, *sums)]


def squarified(sizes: Sequence[float], aspect: float) -> list[tuple[float, float, float, float]]:
    """Boxes of these sizes that fill a unit square, as square as they can be where it is drawn ``aspect`` wide.

    The algorithm of Bruls, Huizing and van Wijk (Squarified Treemaps, 2000).

    Args:
        sizes: above zero, the largest first.
        aspect: width over height of what is filled.

    Returns:
        x, y, width and height of each box, of the whole's.
    """
    total = sum(sizes)
    areas = [size / total * aspect for size in sizes]
    x, y, width, height = 0.0, 0.0, aspect, 1.0
    made: list[tuple[float, float, float, float]] = []
    start = 0
    while start < len(areas):
        short = min(width, height)
        end = start + 1
        while end < len(areas) and _worst(areas[start : end + 1], short) <= _worst(areas[start:end], short):
            end += 1
        filled = sum(areas[start:end])
        strip = min(filled / short, max(width, height)) if short else 0.0  # never beyond what is left, however rounded
        offset = 0.0
        for area in areas[start:end]:
            length = short * area / filled if filled else 0.0
            box = (x, y + offset, strip, length) if width >= height else (x + offset, y, length, strip)
            made.append(box)
            offset += length
        if width >= height:
            x, width = x + strip, max(0.0, width - strip)
        else:
            y, height = y + strip, max(0.0, height - strip)
        start = end
    return [(x / aspect, y, width / aspect, height) for x, y, width, height in made]


def _worst(areas: Sequence[float], side: float) -> float:
    """The worst ratio of sides of boxes that share a strip along ``side``."""
    total = sum(areas)
    return max(side * side * max(areas) / (total * total), total * total / (side * side * min(areas)))
