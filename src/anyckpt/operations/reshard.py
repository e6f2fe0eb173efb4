"""Changing a checkpoint's parallel layout: a conversion that keeps the format."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from anyckpt.formats import registry
from anyckpt.operations.convert import Conversion, converted
from anyckpt.operations.keywords import ReshardWords, taking
from anyckpt.operations.options import ConvertOptions
from anyckpt.operations.steps.layout_request import LayoutRequest
from anyckpt.storage.location import look_at

if TYPE_CHECKING:
    from typing_extensions import Unpack


@taking(ReshardWords)
def reshard(
    source: str | os.PathLike[str],
    destination: str | os.PathLike[str],
    *,
    layout: LayoutRequest,
    optimizer: str = "keep",
    **others: Unpack[ReshardWords],
) -> Conversion:
    """Write the checkpoint at ``source`` in its own format and another parallel layout.

    Args:
        source: what to read.
        destination: what to write; it appears only when it is whole.
        layout: the sizes wanted; what it does not say stays as the source's files have it.
        optimizer: ``keep`` to carry training state through the same rules, or ``drop``.

    Raises:
        FormatError: the source is damaged.
        MappingError: a name that no partition rule covers, or a model that is incomplete.
        OutputError: the destination exists or cannot be written.
        UsageError: the layout is impossible for the model or the format.
    """
    target = registry.detect(look_at(source)).name
    options = ConvertOptions(to=target, keep_layout=True, layout=layout, optimizer=optimizer, **others)
    return converted(source, destination, options)
