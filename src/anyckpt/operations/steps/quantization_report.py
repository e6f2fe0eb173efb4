"""What quantizing did to every weight: how far its numbers are from what they were, and what it takes in bytes."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from anyckpt.blockwise import Tiles, keeping
from anyckpt.data_classes import dataclass
from anyckpt.indexing import Array
from anyckpt.operations.steps.quantizing import Quantized
from anyckpt.operations.steps.report_page import page
from anyckpt.operations.steps.text_file import write_text
from anyckpt.operations.steps.threads import Advance, Meter, each
from anyckpt.quantization import dequantize
from anyckpt.quantization.stored import Request
from anyckpt.tensor import Constant, LazyTensor, as_numbers

_CHUNK_ELEMENTS = 1 << 18
_TILES_BYTES = 32 << 20
_LAYER = re.compile(r"(.*?\.\d+)\.")

_TOP = {"float8_e4m3fn": 0x7E, "int32": 0xFF}
"""A byte of the largest codes, by their element type: integers in words are stored from the least one on."""

_BEYOND = {
    "float8_e4m3fn": (464 / 448, 464 / 448),
    "int8": (127.5 / 127, 128.5 / 127),
    "int4": (7.5 / 7, 8.5 / 7),
    "nvfp4": (7 / 6, 7 / 6),
    "mxfp4": (7 / 6, 7 / 6),
}
"""Half a step beyond the largest and the least number, over the largest: what is farther out has no code near it."""


@dataclass
class Measured:
    """Sums over elements.

    Attributes:
        name: of a weight, of a layer, or ``total``.
        bytes_before: bytes of the weights as they were written without quantizing.
        bytes_after: bytes of their codes and scales.
        elements: how many there are.
        signal: sum of squares.
        noise: sum of squared differences.
        max_error: the largest difference.
        saturated: elements for which there was no code that is large enough.
    """

    name: str
    bytes_before: int = 0
    bytes_after: int = 0
    elements: int = 0
    signal: float = 0.0
    noise: float = 0.0
    max_error: float = 0.0
    saturated: int = 0

    @property
    def sqnr_db(self) -> float | None:
        """Ten times the logarithm of signal over noise; None if nothing was lost, or if there is nothing but zeros."""
        return 10 * math.log10(self.signal / self.noise) if self.signal and self.noise else None

    def to_json(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "elements": self.elements,
            "bytes_before": self.bytes_before,
            "bytes_after": self.bytes_after,
            "sqnr_db": self.sqnr_db,
            "max_error": self.max_error,
            "saturated": self.saturated,
        }


@dataclass(frozen=True)
class Report:
    """What quantizing did.

    Attributes:
        algorithm: as asked for.
        form: as asked for, None for the usual one.
        weights: each that was quantized.
        spared: modules that were not -> reason.
        calibration: what it saw, by module, and how; None without one.
    """

    algorithm: str
    form: str | None
    weights: tuple[Measured, ...]
    spared: Mapping[str, str]
    calibration: Mapping[str, Any] | None = None

    @property
    def layers(self) -> list[Measured]:
        """The weights of each layer together."""
        by_layer: dict[str, list[Measured]] = {}
        for one in self.weights:
            match = _LAYER.match(one.name)
            by_layer.setdefault(match[1] if match else one.name, []).append(one)
        return [_together(name, several) for name, several in by_layer.items()]

    @property
    def total(self) -> Measured:
        """All weights together."""
        return _together("total", self.weights)

    def to_json(self) -> dict[str, Any]:
        """As ``--report`` writes it."""
        seen = {} if self.calibration is None else {"calibration": dict(self.calibration)}
        return {
            "algorithm": self.algorithm,
            "form": self.form,
            "total": self.total.to_json(),
            "layers": [one.to_json() for one in self.layers],
            "weights": [one.to_json() for one in self.weights],
            "not_quantized": [{"name": name, "reason": why} for name, why in self.spared.items()],
            **seen,
        }


def report_on(done: Quantized, request: Request, workers: int | None = None) -> Report:
    """Measure what a quantizing step made: the numbers that will be read, computed once more from the source.

    Args:
        done: the step.
        request: what was asked for.
        workers: threads.

    Raises:
        FormatError: bytes are missing from a file, or a weight holds what is no number.
    """
    assert done.written is not None
    written, path = done.written, done.checkpoint.path
    largest = dict(written.tensors)
    for name in done.before:
        codes = written.made[name][0]
        largest[codes] = _top(largest[codes], written.numbers)
    numbers, limits = (
        dequantize(tensors, written.config, "float32", path).tensors for tensors in (written.tensors, largest)
    )
    beyond = _BEYOND[written.numbers]

    def measure(name: str, advance: Advance) -> Measured:
        before = done.before[name]
        one = Measured(name, before.nbytes, sum(written.tensors[part].nbytes for part in written.made[name]))
        with keeping(Tiles(_TILES_BYTES)):
            _compare(one, before, numbers[name], limits[name], beyond, advance)
        return one

    return Report(
        request.algorithm,
        request.form,
        tuple(each(measure, done.before, Meter(0, None), workers)),
        written.choice.spared,
        _calibration(done, request),
    )


def _calibration(done: Quantized, request: Request) -> dict[str, Any] | None:
    """What calibration saw, of the modules that were quantized."""
    found, statistics = done.calibration, request.statistics
    if found is None or statistics is None:
        return None
    modules = [name.removesuffix(".weight") for name in done.before]
    return {
        **statistics.facts,
        "computed_in": statistics.computed_in,
        "modules": [
            {"name": name, "largest_input": found.largest.get(name), "alphas": list(found.alphas.get(name, ()))}
            for name in modules
        ],
        "caches": [
            {"name": name, "largest_key": keys, "largest_value": values}
            for name, (keys, values) in found.caches.items()
        ],
    }


def write_report(report: Report, file: str | os.PathLike[str]) -> None:
    """Write JSON, or a page of HTML if the name ends so, whole or not at all.

    Raises:
        OutputError: the file cannot be written.
    """
    path = os.fspath(file)
    document = report.to_json()
    text = page(document) if path.lower().endswith((".html", ".htm")) else json.dumps(document, indent=2) + "\n"
    write_text(path, text, overwrite=True)


def _top(codes: LazyTensor, numbers: str) -> LazyTensor:
    """As many codes of the largest number."""
    plain = numbers == "int8" and codes.dtype.itemsize == 1
    byte = _TOP.get(codes.dtype.name, 0x7F if plain else 0x77)
    return Constant(codes.dtype, codes.shape, bytes([byte]) * codes.dtype.itemsize)


def _compare(
    one: Measured,
    before: LazyTensor,
    after: LazyTensor,
    limit: LazyTensor,
    beyond: tuple[float, float],
    advance: Advance,
) -> None:
    buffers = [np.empty(min(before.size, _CHUNK_ELEMENTS), tensor.dtype.raw) for tensor in (before, after, limit)]
    for start in range(0, before.size, _CHUNK_ELEMENTS):
        count = min(_CHUNK_ELEMENTS, before.size - start)
        parts = [buffer[:count] for buffer in buffers]
        for tensor, part in zip((before, after, limit), parts, strict=True):
            tensor.fill(start, part)
        was = as_numbers(parts[0], before.dtype).astype(np.float32)
        gap = was - parts[1].view(np.float32)
        np.abs(gap, out=gap)
        one.signal += _sum_of_squares(was)
        one.noise += _sum_of_squares(gap)
        one.max_error = max(one.max_error, float(gap.max()))
        largest = parts[2].view(np.float32)
        one.saturated += int(np.count_nonzero(was > beyond[0] * largest))
        one.saturated += int(np.count_nonzero(was < -beyond[1] * largest))
        one.elements += count
        advance(count * before.dtype.itemsize)


def _sum_of_squares(values: Array) -> float:
    with np.errstate(over="ignore"):
        found = float(np.dot(values, values))
    return found if math.isfinite(found) else float(np.dot(wide := values.astype(np.float64), wide))


def _together(name: str, several: Iterable[Measured] | Sequence[Measured]) -> Measured:
    whole = Measured(name)
    for one in several:
        whole.bytes_before += one.bytes_before
        whole.bytes_after += one.bytes_after
        whole.elements += one.elements
        whole.signal += one.signal
        whole.noise += one.noise
        whole.max_error = max(whole.max_error, one.max_error)
        whole.saturated += one.saturated
    return whole
