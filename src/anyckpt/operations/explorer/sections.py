"""The parts of a checkpoint's page that no statistics are needed for."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from anyckpt.checkpoint.grouping import numbers_told
from anyckpt.markup import Cell, Row, paragraphs, table, text
from anyckpt.operations.explorer.names import Standing, expert_of, short
from anyckpt.operations.explorer.page import Section
from anyckpt.operations.explorer.rows import Stack, Tensors, folded
from anyckpt.operations.explorer.summary import summary
from anyckpt.operations.explorer.treemap import Node, tree, treemap
from anyckpt.operations.inspection import Inspection
from anyckpt.units import format_bytes, size_label

_MOST_WARNINGS = 30
_MOST_SETTINGS = 1500
_LONGEST_VALUE = 400
_MOST_MODULES = 400
_MOST_FILES = 1500
_OUTSIDE = "outside layers"
_SEVERAL = ["tensors"]
_MOMENTS = ["min", "max", "mean", "std", "max |x| / std", "zeros", "NaN", "Inf"]


def overview(found: Inspection, stacks: Sequence[Stack]) -> Section:
    """What it is, in large figures and in lines."""
    figures = [
        ("parameters", found.size),
        ("tensors", f"{found.tensor_count:,}"),
        ("bytes of tensors", format_bytes(found.bytes)),
        ("format", found.format),
        ("family", found.family or "unknown"),
        ("layers", f"{len(stacks[0].layers):,}" if stacks else ""),
        ("step", "" if found.step is None else f"{found.step:,}"),
    ]
    cards = "".join(f"<div><dt>{text(name)}</dt><dd>{text(value)}</dd></div>" for name, value in figures if value)
    lines = table("", (), summary(found)).replace("<table", '<table class="facts"', 1)
    warnings = paragraphs(found.warnings[:_MOST_WARNINGS], "warning")
    if len(found.warnings) > _MOST_WARNINGS:
        warnings += paragraphs([f"and {len(found.warnings) - _MOST_WARNINGS:,} more warnings"])
    return Section("overview", "Overview", f'<dl class="cards">{cards}</dl>{warnings}{lines}{paragraphs(found.notes)}')


def modules(tensors: Sequence[Tensors], told: Mapping[str, Standing]) -> Section:
    """A treemap of modules, layers of a stack as one, and the same as a table."""
    kinds: dict[str, list[int]] = {}
    for one in tensors:
        sums = kinds.setdefault(told[one.name].kind, [0, 0, 0])
        for i, value in enumerate((one.count, one.elements, one.nbytes)):
            sums[i] += value
    root = tree((kind, count, elements, nbytes) for kind, (count, elements, nbytes) in kinds.items())
    nodes = [node for node in _nodes(root) if node.nbytes]
    rows = [
        (
            node.path,
            Cell(f"{node.count:,}", node.count),
            Cell(size_label(node.elements), node.elements, node.elements / max(1, root.elements)),
            Cell(format_bytes(node.nbytes), node.nbytes, node.nbytes / max(1, root.nbytes)),
        )
        for node in nodes[:_MOST_MODULES]
    ]
    more = paragraphs(
        [f"{len(nodes) - _MOST_MODULES:,} more modules are not listed here."][: len(nodes) > _MOST_MODULES]
    )
    maps = {
        "bytes": treemap(root, lambda node: node.nbytes, lambda node: format_bytes(node.nbytes)),
        "elements": treemap(root, lambda node: node.elements, lambda node: size_label(node.elements)),
    }
    choices = "".join(
        f'<label><input type="radio" name="size" value="map-{name}"{" checked" * (not i)}> {name}</label>'
        for i, name in enumerate(maps)
    )
    boxes = "".join(
        f'<div id="map-{name}"{" hidden" if i else ""}>{one}</div>' for i, (name, one) in enumerate(maps.items())
    )
    listed = table(
        "modules with all that is in them; * stands for the layers, or experts, of a stack",
        ("module", "tensors", "elements", "bytes"),
        rows,
        numbers=(1, 2, 3),
        explore="modules",
    )
    return Section(
        "modules",
        "Modules",
        "<p>Each box is as large as what it holds; all layers of a stack are drawn as one. "
        "Choose a box to list its tensors.</p>"
        f"<fieldset data-either hidden><legend>Size by</legend>{choices}</fieldset>{boxes}"
        f'<details class="names"><summary>Modules as a table</summary>{listed}{more}</details>',
    )


def types(found: Inspection) -> Section:
    """Element types."""
    rows = [
        (
            name,
            Cell(f"{count:,}", count),
            Cell(
                format_bytes(found.dtype_bytes[name]),
                found.dtype_bytes[name],
                found.dtype_bytes[name] / max(1, found.bytes),
            ),
        )
        for name, count in sorted(found.dtypes.items(), key=lambda item: -found.dtype_bytes[item[0]])
    ]
    listed = table("", ("type", "tensors", "bytes"), rows, numbers=(1, 2))
    return Section("types", "Types", f'<div class="scroll">{listed}</div>')


def file_rows(tensors: Sequence[Tensors], told: Mapping[str, Standing]) -> dict[str, dict[str, Any]]:
    """File -> its ``bytes``, ``tensors``, ``layers`` (stack -> layer -> bytes), ``experts``."""
    files: dict[str, dict[str, Any]] = {}
    for one in tensors:
        where, expert = told[one.name], expert_of(one.name)
        for file, nbytes in one.files.items():
            facts = files.setdefault(file, {"bytes": 0, "tensors": 0, "layers": {}, "outside": 0, "experts": set()})
            facts["bytes"] += nbytes
            facts["tensors"] += 1
            if where.layer is None:
                facts["outside"] += nbytes
            else:
                layers = facts["layers"].setdefault(where.stack, {})
                layers[where.layer] = layers.get(where.layer, 0) + nbytes
            if expert is not None:
                facts["experts"].add(expert)
    return files


def files_table(files: Mapping[str, Mapping[str, Any]], ranks: Mapping[str, str]) -> str:
    """Files, with what is in them.

    Args:
        files: as of :func:`file_rows`.
        ranks: file -> the ranks that wrote it, where files are of ranks.
    """
    largest = max((facts["bytes"] for facts in files.values()), default=1) or 1
    experts = any(facts["experts"] for facts in files.values())
    header = ["file", *(["rank"] if ranks else []), "layers", *(["experts"] if experts else []), "tensors", "bytes"]
    rows: list[Row] = []
    for name, facts in list(files.items())[:_MOST_FILES]:
        rows.append(
            (
                name,
                *([ranks.get(name, "")] if ranks else []),
                _layers(facts),
                *([numbers_told(sorted(facts["experts"]))] if experts else []),
                Cell(f"{facts['tensors']:,}", facts["tensors"]),
                Cell(format_bytes(facts["bytes"]), facts["bytes"], facts["bytes"] / largest),
            )
        )
    more = len(files) - len(rows)
    numbers = (len(header) - 2, len(header) - 1)
    listed = table("tensors that lie in several files count in each", header, rows, numbers=numbers, explore="files")
    return f'<div class="names">{listed}</div>' + paragraphs([f"{more:,} more files are not listed."][: more > 0])


def tensors_table(tensors: Sequence[Tensors], told: Mapping[str, Standing]) -> Section:
    """The tensors, alike ones together where there are very many."""
    rows = folded(tensors, told)
    header, numbers, cells = tensor_rows(rows)
    several = len(rows) < len(tensors)
    note = f"{len(tensors):,} tensors in {len(rows):,} rows: alike ones are together."
    listed = table("", header, cells, numbers=numbers, explore="rows" if several else "tensors")
    return Section("tensors", "Tensors", f"{paragraphs([note][:several])}{listed}")


def tensor_rows(rows: Sequence[Tensors]) -> tuple[list[str], list[int], list[list[str | Cell]]]:
    """A table's columns, which of them are numbers, and its cells."""
    several = any(one.count > 1 for one in rows)
    statistics = any(one.statistics is not None for one in rows)
    header = ["tensor", *_SEVERAL[:several], "type", "shape", "elements", "bytes", "pieces", "file"]
    numbers = [header.index(name) for name in ("elements", "bytes", "pieces", *_SEVERAL[:several])]
    if statistics:
        numbers += range(len(header), len(header) + len(_MOMENTS))
        header += _MOMENTS
    cells: list[list[str | Cell]] = []
    for one in rows:
        row: list[str | Cell] = [
            one.name,
            *[f"{one.count:,}"][:several],
            one.dtype,
            "several" if one.shape is None else str(list(one.shape)),
            Cell(size_label(one.elements), one.elements),
            Cell("shared" if one.elements and not one.nbytes else format_bytes(one.nbytes), one.nbytes),
            f"{one.shards:,}",
            _files(one.files),
        ]
        cells.append(row + _moments(one) if statistics else row)
    return header, numbers, cells


def configuration(found: Inspection) -> Section:
    """Settings and what else is beside the tensors; nothing if there are none."""
    parts = []
    for title, values in (
        (f"configuration ({found.config_kind or 'of no known kind'})", found.config),
        ("state besides tensors", found.values),
        ("of this format", found.details),
    ):
        settings = list(_flat("", values)) if values else []
        if not settings:
            continue
        rows = [(name, _shortened(value)) for name, value in settings[:_MOST_SETTINGS]]
        more = len(settings) - len(rows)
        listed = table("", ("setting", "value"), rows, explore="settings")
        left = paragraphs([f"{more:,} more are not listed; inspect --json has them all."][: more > 0])
        parts.append(f"<h3>{text(title)}</h3>{listed}{left}")
    html = "".join(parts)
    return Section("configuration", "Configuration", html and f'<div class="names">{html}</div>')


def layer_sizes(stack: Stack) -> dict[str, list[float]]:
    """Part of a layer -> its bytes in each layer of the stack, the largest first."""
    parts: dict[str, list[float]] = {}
    for kind, cells in stack.cells.items():
        module, _, inside = short(kind).partition(".")
        part = f"{module}.experts" if inside.startswith("experts.") else module
        sizes = parts.setdefault(part, [0.0] * len(stack.layers))
        for i, layer in enumerate(stack.layers):
            if layer in cells:
                sizes[i] += cells[layer].nbytes
    return dict(sorted(parts.items(), key=lambda item: -sum(item[1])))


def _nodes(node: Node) -> Iterable[Node]:
    for one in sorted(node.inside.values(), key=lambda one: -one.nbytes):
        yield one
        yield from _nodes(one)


def _layers(facts: Mapping[str, Any]) -> str:
    stacks = facts["layers"]
    told = [f"{f'{name} ' if len(stacks) > 1 else ''}{numbers_told(sorted(layers))}" for name, layers in stacks.items()]
    return "; ".join([*told, *([_OUTSIDE] if facts["outside"] else [])])


def _files(files: Mapping[str, int]) -> str:
    names = list(files)
    return ", ".join(names[:2]) + (f" and {len(names) - 2:,} more" if len(names) > 2 else "")


def _moments(one: Tensors) -> list[str | Cell]:
    found = one.statistics
    if found is None:
        return [""] * len(_MOMENTS)
    return [
        *(number(value) for value in (found.min, found.max, found.mean, found.std, one.peak)),
        *(f"{count:,}" for count in (found.zeros, found.nan, found.inf)),
    ]


def number(value: float | None) -> Cell:
    """A number with four digits; nothing for None."""
    return Cell("") if value is None else Cell(f"{value:.4g}")


def _flat(prefix: str, value: Any) -> Iterable[tuple[str, Any]]:
    if not isinstance(value, Mapping) or not value:
        yield prefix, value
        return
    for key, item in value.items():
        yield from _flat(f"{prefix}.{key}" if prefix else str(key), item)


def _shortened(value: Any) -> str:
    told = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    return told if len(told) <= _LONGEST_VALUE else f"{told[: _LONGEST_VALUE - 1]}…"
