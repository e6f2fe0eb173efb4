"""Tensors for people and programs: alike layers as one, each by itself, or as a tree of modules."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from anyckpt.cli.tables import Column, print_heading, print_table, print_tsv, times, width
from anyckpt.escaping import printable
from anyckpt.units import format_bytes, size_label

if TYPE_CHECKING:
    from anyckpt.operations.inspection import Inspection, TensorFacts, TensorGroup
    from anyckpt.operations.steps.module_tree import Module

_FACTS = (
    Column("name"),
    Column("type", part="facts"),
    Column("shape", part="facts"),
    Column("size", right=True, part="facts"),
    Column("shards", right=True, optional=1, part="facts"),
    Column("files", optional=2, part="facts"),
)
_MOMENTS = tuple(Column(name, right=True, part="moments") for name in "min max mean std zeros nan inf".split())
_DIGEST = Column("sha256", part="digest")
_SHOWN_TIED = 3


def print_groups(found: Inspection) -> None:
    """The listed tensors, those of alike layers in one line."""
    rows = []
    for group in found.groups():
        first, count = group.tensors[0], len(group.tensors)
        shape = str(list(first.shape)) + (f" {times()} {count}" if count > 1 else "")
        rows.append([group.name, first.dtype, shape, format_bytes(group.nbytes), f"{group.shards:,}", _files(group)])
    print_table(_FACTS, rows)
    tied = {tensor.name: tensor.same_as for tensor in found.tensors or () if tensor.same_as is not None}
    for name, other in list(tied.items())[:_SHOWN_TIED]:
        print(printable(f"{name} is the same as {other} in the file"))


def print_each(tensors: Sequence[TensorFacts]) -> None:
    """Every tensor by itself, with statistics and digests if there are any."""
    moments = any(tensor.statistics is not None for tensor in tensors)
    digests = any(tensor.sha256 is not None for tensor in tensors)
    rows = []
    for tensor in tensors:
        row = [tensor.name, tensor.dtype, str(list(tensor.shape)), format_bytes(tensor.nbytes)]
        row += [f"{tensor.shards:,}", _files(tensor)]
        if moments:
            row += ["-" if v is None else f"{v:,}" if isinstance(v, int) else f"{v:.4g}" for v in _moments(tensor)]
        if digests:
            row.append(tensor.sha256 or "-")
        rows.append(row)
    print_table([*_FACTS, *(_MOMENTS if moments else ()), *([_DIGEST] if digests else [])], rows)


def print_each_tsv(tensors: Sequence[TensorFacts]) -> None:
    """Every tensor in a line with tabs: bytes and numbers as they are."""
    moments = any(tensor.statistics is not None for tensor in tensors)
    digests = any(tensor.sha256 is not None for tensor in tensors)
    columns = ["name", "dtype", "shape", "nbytes", "shards", "files"]
    columns += [column.title for column in _MOMENTS] if moments else []
    columns += ["sha256"] if digests else []
    print_tsv(
        columns,
        (
            [
                *(tensor.name, tensor.dtype, list(tensor.shape), tensor.nbytes, tensor.shards, ",".join(tensor.files)),
                *(_moments(tensor) if moments else ()),
                *([tensor.sha256] if digests else []),
            ]
            for tensor in tensors
        ),
    )


def print_tree(tree: Module, path: str, depth: int | None) -> None:
    """Every module with what it takes, those that are alike in one line.

    Args:
        tree: ``Inspection.tree``.
        path: what the root is called.
        depth: levels below the root to show; all if None.
    """
    rows = list(_rows(tree, path, 0, depth))
    sizes = [(format_bytes(module.nbytes), size_label(module.elements), f"{module.tensors:,}") for module, _ in rows]
    titles = ("size", "parameters", "tensors")
    widths = [max(len(title), *(len(row[i]) for row in sizes)) for i, title in enumerate(titles)]
    room = width()

    def beginning(cells: Sequence[str], name: str) -> str:
        return "  ".join(cell.rjust(size) for cell, size in zip(cells, widths, strict=True)) + "  " + printable(name)

    print_heading(beginning(titles, "module"))
    for cells, (module, name) in zip(sizes, rows, strict=True):
        start = beginning(cells, name)
        line = f"{start}  {printable(module.look)}" if module.look else start
        print(line if room is None or len(line) <= room else start)


def print_tree_tsv(tree: Module, path: str, depth: int | None) -> None:
    """The same in lines with tabs, names in full."""
    print_tsv(
        ("nbytes", "parameters", "tensors", "count", "module"),
        ((m.nbytes, m.elements, m.tensors, m.count, name) for m, name in _paths(tree, path, "", depth)),
    )


def _rows(module: Module, name: str, level: int, depth: int | None) -> Iterator[tuple[Module, str]]:
    yield module, "  " * level + name + (f" {times()} {module.count}" if module.count > 1 else "")
    if depth is None or level < depth:
        for inner in module.modules:
            yield from _rows(inner, inner.name, level + 1, depth)


def _paths(module: Module, name: str, prefix: str, depth: int | None) -> Iterator[tuple[Module, str]]:
    yield module, name
    if depth is None or depth > 0:
        for inner in module.modules:
            full = f"{prefix}{inner.name}"
            yield from _paths(inner, full, f"{full}.", None if depth is None else depth - 1)


def _moments(tensor: TensorFacts) -> list[float | None]:
    s = tensor.statistics
    return [None] * 7 if s is None else [s.min, s.max, s.mean, s.std, s.zeros, s.nan, s.inf]


def _files(tensors: TensorFacts | TensorGroup) -> str:
    files = tensors.files
    return ", ".join(files[:2]) + (f" and {len(files) - 2:,} more" if len(files) > 2 else "")
