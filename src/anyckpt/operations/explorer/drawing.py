"""Pictures by bokeh, which ships the script that draws them; each with what people read and choose beside it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from anyckpt.data_classes import dataclass
from anyckpt.errors import MissingLibraryError
from anyckpt.escaping import printable
from anyckpt.markup import text
from anyckpt.operations.explorer.page import Drawing
from anyckpt.operations.steps.statistics import Magnitudes
from anyckpt.units import byte_unit, format_bytes

COLOURS = ("#3f7fc4", "#c9653c", "#4b9a57", "#9367bd", "#b3861a", "#1f9198", "#c2558a", "#7d8b3f", "#7c8792")
_ROW_HEIGHT = 22
_AXES_HEIGHT = 130
_TALLEST = 900
_MOST_LABELS = 60
_LONGEST_LABEL = 38
_HISTOGRAM_HEIGHT = 420
_RAREST = 1e-7  # the share that is drawn in the darkest colour
_MOST_POWERS = 48
_MOST_COLUMNS = 300
_NOT_A_NUMBER = "#d1242f"


@dataclass(frozen=True)
class Picture:
    """A picture within a page.

    Attributes:
        html: what stands in the page.
        drawing: what is drawn in it.
    """

    html: str
    drawing: Drawing


@dataclass(frozen=True)
class Cells:
    """Coloured cells of a heat map.

    Attributes:
        choice: what must be chosen for them to be seen, one of each list of choices.
        x: columns, as numbers.
        y: rows, as numbers.
        values: what the colour tells.
        told: the same for people, with what it is of.
    """

    choice: tuple[str, ...]
    x: Sequence[int]
    y: Sequence[int]
    values: Sequence[float]
    told: Sequence[str]


@dataclass(frozen=True)
class Line:
    """A line over the layers.

    Attributes:
        choice: what must be chosen for it to be seen.
        series: what it is of.
        x: layers.
        y: numbers.
    """

    choice: tuple[str, ...]
    series: str
    x: Sequence[int]
    y: Sequence[float]


class Drawings:
    """Makes pictures.

    Raises:
        MissingLibraryError: the extra ``report`` is not installed.
    """

    def __init__(self) -> None:
        try:
            from bokeh.resources import Resources
        except ImportError as error:
            raise MissingLibraryError(
                f"pictures need bokeh: {error}", remedy="pip install 'anyckpt[report]'"
            ) from error
        self._made = 0
        self._resources = Resources

    def library(self) -> str:
        """The script that draws, from bokeh's package; the parts for text in TeX and for servers are not in it."""
        return str(self._resources(mode="inline", components=["bokeh"]).js_raw[0])

    def heat_map(
        self,
        told: str,
        cells: Sequence[Cells],
        *,
        across: str,
        rows: Mapping[int, str],
        choices: Mapping[str, Sequence[str]] | None = None,
        logarithmic: bool = False,
        colour: str,
    ) -> Picture:
        """Cells by column and row.

        Args:
            told: what it shows, in a sentence.
            cells: at least one, with values above zero if ``logarithmic``; NaN has a colour of its own.
            across: what the columns are.
            rows: number -> label; the first is on top.
            choices: what people choose between -> words.
            logarithmic: whether colours go by the logarithm.
            colour: what the colour tells.
        """
        from bokeh.models import ColorBar, ColumnDataSource, HoverTool, LinearColorMapper, LogColorMapper
        from bokeh.palettes import Viridis256

        height = min(_TALLEST, _AXES_HEIGHT + _ROW_HEIGHT * len(rows))
        figure = self._figure(across, height)
        values = [value for one in cells for value in one.values if math.isfinite(value)] or [1.0]
        low, high = min(values) if logarithmic else 0.0, max(values)
        mapper = (LogColorMapper if logarithmic else LinearColorMapper)(
            palette=Viridis256, low=low, high=high if high > low else (low * 2 or 1), nan_color=_NOT_A_NUMBER
        )
        for one in cells:
            data = {
                "x": list(one.x),
                "y": list(one.y),
                "v": [value if math.isfinite(value) else math.nan for value in one.values],
                "t": [printable(t) for t in one.told],
            }
            drawn = figure.rect(
                "x",
                "y",
                width=1,
                height=1,
                source=ColumnDataSource(data),
                fill_color={"field": "v", "transform": mapper},
                line_color={"field": "v", "transform": mapper},
                line_width=0.5,
            )
            drawn.tags = ["", *one.choice]
        figure.add_tools(HoverTool(tooltips=[("", "@t")]))
        self._rows(figure, rows)
        figure.add_layout(ColorBar(color_mapper=mapper, height=8, background_fill_color=None, padding=8), "below")
        return self._picture(figure, f"{told} Colour: {colour}.", choices or {}, height)

    def lines(self, told: str, lines: Sequence[Line], *, choices: Mapping[str, Sequence[str]]) -> Picture:
        """Lines over the layers, which people switch on and off.

        Args:
            told: what it shows, in a sentence.
            lines: at least one.
            choices: what people choose between -> words; the first is the stack.
        """
        from bokeh.models import ColumnDataSource, HoverTool

        figure = self._figure("layer", 380)
        figure.y_range.only_visible = True
        colours: dict[str, str] = {}
        series: dict[tuple[str, str], str] = {}
        for one in lines:
            label = printable(one.series)
            colour = colours.setdefault(f"{one.choice[0]}\0{label}", COLOURS[len(colours) % len(COLOURS)])
            series[one.choice[0], label] = colour
            data = {"x": list(one.x), "y": list(one.y), "s": [label] * len(one.x)}
            source = ColumnDataSource(data)
            for drawn in (
                figure.line("x", "y", source=source, line_color=colour, line_width=2),
                figure.scatter("x", "y", source=source, size=5, fill_color=colour, line_color=colour),
            ):
                drawn.tags = [label, *one.choice]
        figure.add_tools(HoverTool(tooltips=[("", "@s"), ("layer", "@x"), ("", "@y{0.00000a}")]))
        legend = "".join(
            f'<button type="button" aria-pressed="true" value="{text(label)}" data-with="{text(stack)}" '
            f'style="--own:{colour}">{text(label)}</button>'
            for (stack, label), colour in series.items()
        )
        return self._picture(
            figure, told, choices, 380, f'<div class="legend" role="group" aria-label="lines">{legend}</div>'
        )

    def stacked(self, told: str, layers: Sequence[int], series: Mapping[str, Sequence[float]], across: str) -> Picture:
        """A bar for each layer, of parts that add up.

        Args:
            told: what it shows, in a sentence.
            layers: their numbers.
            series: part -> bytes in each layer.
            across: what the columns are.
        """
        from bokeh.models import ColumnDataSource, HoverTool

        figure = self._figure(across, 340)
        unit, name_of_unit = byte_unit(max(map(sum, zip(*series.values(), strict=True)), default=0))
        figure.yaxis.axis_label = name_of_unit
        figure.y_range.start = 0
        below = [0.0] * len(layers)
        legend = []
        for number, (name, sizes) in enumerate(series.items()):
            label = printable(name)
            colour = COLOURS[min(number, len(COLOURS) - 1)]
            top = [one + size / unit for one, size in zip(below, sizes, strict=True)]
            told_sizes = [format_bytes(size) for size in sizes]
            data = {"x": list(layers), "b": below, "t": top, "n": told_sizes, "s": [label] * len(top)}
            drawn = figure.vbar(
                "x", bottom="b", top="t", width=0.86, source=ColumnDataSource(data), fill_color=colour, line_color=None
            )
            drawn.tags = [label]
            below = top
            legend.append(
                f'<button type="button" aria-pressed="true" value="{text(label)}" style="--own:{colour}">'
                f"{text(label)}</button>"
            )
        figure.add_tools(HoverTool(tooltips=[("layer", "@x"), ("", "@s"), ("", "@n")]))
        return self._picture(
            figure, told, {}, 340, f'<div class="legend" role="group" aria-label="parts">{"".join(legend)}</div>'
        )

    def histograms(self, told: str, kinds: Sequence[tuple[str, Mapping[int, tuple[Magnitudes, int]]]]) -> Picture:
        """Shares of magnitudes by layer, of one kind of tensor at a time.

        Args:
            told: what it shows, in a sentence.
            kinds: name, and layer -> magnitudes and the number of all elements.
        """
        import numpy as np
        from bokeh.models import ColorBar, FixedTicker, HoverTool, LogColorMapper, NumeralTickFormatter, PlainText
        from bokeh.palettes import Viridis256

        figure = self._figure("layer", _HISTOGRAM_HEIGHT)
        figure.x_range.only_visible = figure.y_range.only_visible = True
        figure.x_range.range_padding = figure.y_range.range_padding = 0
        figure.ygrid.visible = False
        mapper = LogColorMapper(palette=Viridis256, low=_RAREST, high=1.0, low_color="#00000000")
        powers: set[int] = set()
        for name, columns in kinds:
            low = min(found.lowest for found, _ in columns.values())
            high = max(found.lowest + len(found.counts) for found, _ in columns.values())
            low = max(low, high - _MOST_POWERS)
            first, last = min(columns), min(max(columns), min(columns) + _MOST_COLUMNS)
            shares = np.zeros((high - low, last - first + 1), np.float32)
            for layer, (found, elements) in columns.items():
                counts = found.counts[max(0, low - found.lowest) :]
                if layer <= last:
                    start = max(0, found.lowest - low)
                    shares[start : start + len(counts), layer - first] = np.array(counts) / elements
            drawn = figure.image(
                image=[shares], x=first - 0.5, y=low, dw=last - first + 1, dh=high - low, color_mapper=mapper
            )
            drawn.tags = ["", name]
            powers.update(range(low, high + 1))
        figure.add_tools(HoverTool(tooltips=[("layer", "$x{0}"), ("share of elements", "@image{0.0000%}")]))
        ticks = [power for power in sorted(powers) if power % 4 == 0]
        figure.yaxis.ticker = FixedTicker(ticks=ticks)
        figure.yaxis.major_label_overrides = {power: PlainText(text=f"{2.0**power:.2g}") for power in ticks}
        figure.yaxis.axis_label = "magnitude"
        share = NumeralTickFormatter(format="0.[000000]%")
        figure.add_layout(
            ColorBar(color_mapper=mapper, height=8, formatter=share, background_fill_color=None, padding=8), "below"
        )
        return self._picture(
            figure, f"{told} Colour: share of elements.", {"Tensors": [name for name, _ in kinds]}, _HISTOGRAM_HEIGHT
        )

    def _figure(self, across: str, height: int) -> Any:
        from bokeh.plotting import figure

        made = figure(
            height=height,
            sizing_mode="stretch_width",
            tools="pan,xwheel_zoom,box_zoom,reset",
            active_scroll=None,
            active_drag=None,
            toolbar_location="above",
            x_axis_label=across,
            background_fill_color=None,
            border_fill_color=None,
            output_backend="canvas",
        )
        made.toolbar.logo = None
        made.xgrid.visible = False
        made.xaxis.ticker.min_interval = 1
        made.xaxis.minor_tick_line_color = None
        return made

    def _rows(self, figure: Any, rows: Mapping[int, str]) -> None:
        """Labels of rows, as plain text: strings would be taken for TeX where they look like it."""
        from bokeh.models import FixedTicker, PlainText, Range1d

        numbers = list(rows)
        figure.y_range = Range1d(max(numbers) + 0.5, min(numbers) - 0.5)
        figure.ygrid.visible = False
        if len(numbers) <= _MOST_LABELS:
            figure.yaxis.ticker = FixedTicker(ticks=numbers)
            figure.yaxis.major_label_overrides = {
                number: PlainText(text=_shortened(printable(label))) for number, label in rows.items()
            }
        else:
            figure.yaxis.ticker.min_interval = 1

    def _picture(
        self, figure: Any, told: str, choices: Mapping[str, Sequence[str]], height: int, legend: str = ""
    ) -> Picture:
        from bokeh.embed import json_item

        self._made += 1
        ident = f"drawing-{self._made}"
        selects = "".join(
            f"<label{' hidden' * (len(words) < 2)}>{text(what)}<select>"
            + "".join(f'<option value="{text(word)}">{text(word)}</option>' for word in words)
            + "</select></label>"
            for what, words in choices.items()
        )
        tools = f'<div class="tools">{selects}</div>' if selects else ""
        html = (
            f'<figure><figcaption>{text(told)}</figcaption>{tools}<div class="drawing" id="{ident}" role="img" '
            f'aria-label="{text(told)}" style="min-height:{height}px"></div>{legend}</figure>'
        )
        return Picture(html, Drawing(ident, dict(json_item(figure, ident))))


def _shortened(label: str) -> str:
    return label if len(label) <= _LONGEST_LABEL else f"…{label[1 - _LONGEST_LABEL :]}"
