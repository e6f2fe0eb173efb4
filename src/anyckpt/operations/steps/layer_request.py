"""Layers that a user names by their numbers."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace

from anyckpt.data_classes import dataclass
from anyckpt.errors import UsageError

_RANGE = re.compile(r"(\d{1,7})(?:-(\d{1,7}))?")
_MOST = 1 << 20
_STACKS = ("encoder", "decoder")


@dataclass(frozen=True)
class LayerRequest:
    """Layers that a user names.

    Attributes:
        said: as the user wrote it.
        layers: their numbers, from 0 on.
        drop: they are left out; else they alone are kept.
        stack: whose they are, ``encoder`` or ``decoder``; None in a model of one stack.
        others: the same of the other stack.
    """

    said: str
    layers: frozenset[int]
    drop: bool
    stack: str | None = None
    others: tuple[LayerRequest, ...] = ()

    def kept(self, count: int, path: str) -> list[int]:
        """The layers that stay, of so many.

        Raises:
            UsageError: there are none of these numbers, or none or all are left.
        """
        option = "--drop-layers" if self.drop else "--keep-layers"
        beyond = [layer for layer in sorted(self.layers) if layer >= count]
        if beyond:
            raise UsageError(
                f"{option} {self.said} names layers that the model has not",
                path=path,
                expected=f"0 to {count - 1}",
                found=", ".join(map(str, beyond[:5])),
            )
        kept = [layer for layer in range(count) if (layer in self.layers) != self.drop]
        if not kept:
            raise UsageError(f"{option} {self.said} leaves no layer", path=path, expected=f"some of 0 to {count - 1}")
        return kept


def parse_layers(said: str | Sequence[int] | None, *, drop: bool) -> LayerRequest | None:
    """Layers by their numbers from 0 on: ``10-20,31`` (both ends included), or a sequence of them.

    Of an encoder-decoder, by stack: ``encoder:2-3,decoder:0,5``; one that is not named stays whole.

    Raises:
        UsageError: it is no such list.
    """
    if said is None:
        return None
    option = "--drop-layers" if drop else "--keep-layers"
    text = said if isinstance(said, str) else ",".join(map(str, said))
    of: dict[str | None, set[int]] = {}
    stack = None
    for said_part in text.replace(" ", "").split(","):
        name, colon, part = said_part.rpartition(":")
        if colon and (name not in _STACKS or name in of or None in of):
            raise UsageError(f"{option} names no stack", expected="encoder: or decoder:, each once", found=said_part)
        stack = name if colon else stack
        layers = of.setdefault(stack, set())
        match = _RANGE.fullmatch(part)
        if match is None or int(match[2] or match[1]) < int(match[1]) or int(match[2] or match[1]) > _MOST:
            raise UsageError(f"{option} is no list of layers", expected="such as 10-20,31, from 0 on", found=text)
        layers.update(range(int(match[1]), int(match[2] or match[1]) + 1))
    first, *others = (LayerRequest(text, frozenset(own), drop, name) for name, own in of.items())
    return replace(first, others=tuple(others))
