"""Whether a model is whole: every tensor that its configuration implies, and no other."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping

from anyckpt.errors import IncompleteError, few
from anyckpt.tensor import LazyTensor

SHOWN = 8
"""Names listed in a message; more do not help."""


def check_complete(
    expected: Iterable[tuple[str, ...]],
    found: Mapping[str, LazyTensor],
    family: str,
    path: str | None,
    spelled: Callable[[str], str] = str,
) -> None:
    """Every expected name is there and no other one.

    Args:
        expected: names that belong together.
        found: tensors by name.
        family: name of the family, for the message.
        path: of the checkpoint, for the message.
        spelled: a name as the file has it.

    Raises:
        IncompleteError: with both lists, of what is missing and of what no rule covers.
    """
    wanted = [name for names in expected for name in names]
    missing = [spelled(name) for name in wanted if name not in found]
    unknown = sorted(map(spelled, found.keys() - set(wanted)), key=natural)
    if not missing and not unknown:
        return
    problems = []
    if missing:
        layers = _whole_layers(missing, list(map(spelled, wanted)))
        text = f"layer {', '.join(map(str, layers[:SHOWN]))} is missing: " if layers else ""
        problems.append(f"{text}{len(missing)} tensors of the model are missing: {some(missing)}")
    if unknown:
        problems.append(f"no rule of family {family} covers {len(unknown)} tensors: {some(unknown)}")
    remedy = "copy the missing files; if the configuration is wrong, give the right one with --config"
    if unknown:
        remedy = (
            "choose another --family, give the right configuration with --config, leave the tensors out with "
            "--exclude, or convert names unchanged to safetensors"
        )
    error = IncompleteError(
        "; ".join(problems),
        path=path,
        tensor=(missing or unknown)[0] if len(missing or unknown) == 1 else None,
        remedy=remedy,
    )
    error.missing, error.unknown = tuple(missing), tuple(unknown)
    raise error


def _whole_layers(missing: list[str], wanted: list[str]) -> list[int]:
    """Layers of which nothing is there, if all that is missing belongs to such layers."""
    lost = _by_layer(missing)
    layers = _by_layer(wanted)
    whole = [layer for layer, names in lost.items() if layer is not None and len(names) == len(layers[layer])]
    return sorted(whole) if len(whole) == len(lost) else []


def _by_layer(names: Iterable[str]) -> dict[int | None, list[str]]:
    grouped: dict[int | None, list[str]] = {}
    for name in names:
        match = re.search(r"\.(\d{1,7})\.", name)
        grouped.setdefault(int(match[1]) if match else None, []).append(name)
    return grouped


def some(names: Iterable[str]) -> str:
    """The first names, for a message."""
    listed = sorted(names, key=natural)
    return few(listed, SHOWN)


def natural(name: str) -> list[tuple[int, str]]:
    """Sort key that puts layer 2 before layer 10."""
    return [(int(part), "") if part.isdecimal() and len(part) < 18 else (-1, part) for part in re.split(r"(\d+)", name)]
