"""A page about what quantizing did to a model: a plot and tables, in one file that asks for nothing else."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from anyckpt.escaping import printable
from anyckpt.markup import Cell, Row, paragraphs, table
from anyckpt.operations.explorer.page import Section
from anyckpt.operations.explorer.page import page as page_of
from anyckpt.units import format_bytes

_WIDTH, _HEIGHT, _MARGIN = 900, 320, 45
_COLOURS = ("#1f77b4", "#d62728", "#2ca02c", "#9467bd", "#ff7f0e", "#17becf", "#8c564b", "#e377c2", "#7f7f7f")
_NUMBER = re.compile(r"\.(\d+)\.(.*)")

_EXACT = 1e9  # decibels, where exact weights are sorted


def page(report: Mapping[str, Any]) -> str:
    """The page, of a report as plain data (``Report.to_json``)."""
    total = report["total"]
    form = f", stored as {report['form']}" if report["form"] else ""
    sizes = f"{format_bytes(total['bytes_before'])} became {format_bytes(total['bytes_after'])}"
    summary = (
        f"{len(report['weights'])} weights as {report['algorithm']}{form}: {sizes}, {decibels(total['sqnr_db'])} "
        f"overall, largest error {total['max_error']:.3g}, {total['saturated']:,} saturated."
    )
    header = ("", "SQNR", "largest error", "saturated", "before", "after")
    worst = sorted(report["weights"], key=_ratio)
    tables: Sequence[tuple[str, str, Sequence[str], Sequence[Row]]] = (
        ("layers", "Layers", header, [_cells(one) for one in report["layers"]]),
        ("weights", "Weights, the worst first", header, [_cells(one) for one in worst]),
    )
    spared = table("", ("module", "reason"), _pairs(report["not_quantized"]), explore="modules")
    sections = [
        Section(
            what,
            title,
            f'<div class="names">{table("", names, rows, numbers=range(1, len(names)), explore=what)}</div>',
        )
        for what, title, names, rows in tables
        if rows
    ]
    if report["not_quantized"]:
        sections.append(Section("spared", "Not quantized", f'<div class="names">{spared}</div>'))
    if "calibration" in report:
        sections.append(_calibration(report["calibration"]))
    plot = _plot(report["weights"])
    shown = [Section("plot", "SQNR of each weight by layer", plot), *sections] if plot else sections
    return page_of("Quantization", paragraphs([summary]), shown)


def row(one: Mapping[str, Any]) -> tuple[str, ...]:
    """A line of a table for people."""
    return (
        printable(one["name"]),
        decibels(one["sqnr_db"]),
        f"{one['max_error']:.3g}",
        f"{one['saturated']:,}",
        format_bytes(one["bytes_before"]),
        format_bytes(one["bytes_after"]),
    )


def _cells(one: Mapping[str, Any]) -> list[Cell]:
    """The same with what it is sorted by."""
    keys = (None, _ratio(one), one["max_error"], one["saturated"], one["bytes_before"], one["bytes_after"])
    return [Cell(told, key) for told, key in zip(row(one), keys, strict=True)]


def _ratio(one: Mapping[str, Any]) -> float:
    return _EXACT if one["sqnr_db"] is None else float(one["sqnr_db"])


def decibels(value: float | None) -> str:
    """A ratio for people; of nothing lost, a word."""
    return "exact" if value is None else f"{value:.1f} dB"


def _pairs(listed: Sequence[Mapping[str, str]]) -> list[tuple[str, str]]:
    return [(printable(one["name"]), one["reason"]) for one in listed]


def _calibration(seen: Mapping[str, Any]) -> Section:
    """What calibration saw, by module."""
    rows: list[Row] = [
        (
            printable(one["name"]),
            "" if one["largest_input"] is None else f"{one['largest_input']:.4g}",
            ", ".join(f"{alpha:.1f}" for alpha in dict.fromkeys(one["alphas"])),
        )
        for one in seen["modules"]
    ]
    listed = table("", ("module", "largest input", "AWQ's exponents"), rows, numbers=(1,), explore="modules")
    title = f"Calibration: {seen.get('samples', 0):,} samples, {seen.get('tokens', 0):,} tokens"
    return Section("calibration", title, f'<div class="names">{listed}</div>')


def _plot(weights: Sequence[Mapping[str, Any]]) -> str:
    """The ratio of each weight by its layer, a line for each kind of weight."""
    lines: dict[str, list[tuple[int, float]]] = {}
    for one in weights:
        match = _NUMBER.search(one["name"])
        if match is not None and one["sqnr_db"] is not None and len(match[1]) < 6:
            lines.setdefault(re.sub(r"\.\d+\.", ".*.", match[2]), []).append((int(match[1]), one["sqnr_db"]))
    points = [point for line in lines.values() for point in line]
    if not points:
        return ""
    last = max(1, max(layer for layer, _ in points))
    low, high = min(value for _, value in points) - 1, max(value for _, value in points) + 1

    def place(layer: int, value: float) -> tuple[float, float]:
        across = _MARGIN + layer / last * (_WIDTH - 6 * _MARGIN)
        return round(across, 1), round(_HEIGHT - _MARGIN - (value - low) / (high - low) * (_HEIGHT - 2 * _MARGIN), 1)

    drawn = []
    for number, (kind, line) in enumerate(sorted(lines.items())[: len(_COLOURS)]):
        colour = _COLOURS[number]
        path = " ".join(f"{x},{y}" for x, y in (place(*point) for point in sorted(line)))
        dots = "".join(f'<circle cx="{x}" cy="{y}" r="2.5" fill="{colour}"/>' for x, y in (place(*p) for p in line))
        label = f'<text x="{_WIDTH - 5 * _MARGIN + 10}" y="{_MARGIN + 16 * number}" fill="{colour}">'
        label += f"{escape(printable(kind.removesuffix('.weight')))}</text>"
        drawn.append(f'<polyline points="{path}" fill="none" stroke="{colour}"/>{dots}{label}')
    for value in (low, (low + high) / 2, high):
        drawn.append(f'<text x="2" y="{place(0, value)[1]}">{value:.1f} dB</text>')
    for layer in sorted({0, last // 2, last}):
        drawn.append(f'<text x="{place(layer, low)[0]}" y="{_HEIGHT - 15}">layer {layer}</text>')
    told = "The ratio of signal to quantization noise of each weight, by its layer; the tables have the numbers."
    return f'<svg class="plot" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{told}">{"".join(drawn)}</svg>'
