"""Changing a checkpoint's parallel layout: a conversion that keeps the format."""

from __future__ import annotations

import os
from typing import Any

from anyckpt.formats import registry
from anyckpt.operations.convert import Conversion, convert
from anyckpt.operations.steps.cutting import LayoutRequest
from anyckpt.storage.place import look_at


def reshard(
    source: str | os.PathLike[str],
    destination: str | os.PathLike[str],
    *,
    layout: LayoutRequest,
    optimizer: str = "keep",
    **options: Any,
) -> Conversion:
    """Write the checkpoint at ``source`` in its own format and another parallel layout.

    Args:
        source: what to read.
        destination: what to write; it appears only when it is whole.
        layout: the sizes wanted; what it does not say stays as the source's files have it.
        optimizer: ``keep`` to carry training state through the same rules, or ``drop``.
        options: as those of ``convert``.

    Raises:
        FormatError: the source is damaged.
        MappingError: a name that no partition rule covers, or a model that is incomplete.
        OutputError: the destination exists or cannot be written.
        UsageError: the layout is impossible for the model or the format.
    """
    found = registry.detect(look_at(source))
    return convert(source, destination, to=found.name, layout=layout, keep_layout=True, optimizer=optimizer, **options)
