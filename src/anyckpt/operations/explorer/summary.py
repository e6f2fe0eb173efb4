"""What an inspection found, in lines for people."""

from __future__ import annotations

from collections.abc import Iterable

from anyckpt.operations.inspection import Inspection
from anyckpt.units import format_bytes

_LONGEST_LIST = 12


def summary(found: Inspection) -> list[tuple[str, str]]:
    """What it is and its value, a line each; without what is not there."""
    training = {"step": found.step, "epoch": found.epoch, "consumed samples": found.consumed_samples}
    layout = {name.replace("_", " "): size for name, size in found.layout.items() if size > 1}
    tokenizer = found.tokenizer or {}
    likely = f" (by names {', '.join(found.likely_families)})" if found.likely_families else ""
    lines = [
        ("path", found.path),
        ("format", " ".join(filter(None, (found.format, found.format_version)))),
        ("family", (found.family or "unknown") + likely),
        ("names", found.dialect or ""),
        ("parameters", f"{found.parameters:,} ({found.size})"),
        ("tensors", f"{found.tensor_count:,}, {format_bytes(found.bytes)}"),
        ("types", ", ".join(f"{name}: {count:,}" for name, count in found.dtypes.items())),
        ("layout", ", ".join(f"{name} {size}" for name, size in layout.items()) or "whole tensors"),
        ("training", ", ".join(f"{name} {value:,}" for name, value in training.items() if value is not None)),
        ("states", ", ".join(name for name, there in found.states.items() if there)),
        ("tokenizer", ": ".join(filter(None, (tokenizer.get("library"), _some(tokenizer.get("files") or ()))))),
        ("other files", _some(found.artifacts)),
        ("pickles run", _some([callee.name for callee in found.calls if callee.kind == "code"])),
        ("left aside", _some(found.lost())),
    ]
    return [line for line in lines if line[1]]


def _some(names: Iterable[str]) -> str:
    listed = list(names)
    more = len(listed) - _LONGEST_LIST
    return ", ".join(listed[:_LONGEST_LIST]) + (f" and {more:,} more" if more > 0 else "")
