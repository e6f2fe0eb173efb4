"""Changing a checkpoint's parallel layout: a conversion that keeps the format."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

from anyckpt.formats import registry
from anyckpt.operations.convert import Conversion, converted
from anyckpt.operations.options import asked, documented
from anyckpt.operations.steps.casts import KEEP_IN_FP32
from anyckpt.operations.steps.layout_request import LayoutRequest
from anyckpt.operations.steps.threads import Progress
from anyckpt.storage.location import look_at


@documented
def reshard(
    source: str | os.PathLike[str],
    destination: str | os.PathLike[str],
    *,
    layout: LayoutRequest,
    optimizer: str = "keep",
    family: str | None = None,
    config: str | os.PathLike[str] | Mapping[str, Any] | None = None,
    tokenizer: str | os.PathLike[str] | None = None,
    names: str | None = None,
    adapter_form: str | None = None,
    alpha: float | None = None,
    dtype: str | None = None,
    keep_in_fp32: Sequence[str] = KEEP_IN_FP32,
    include: str | Sequence[str] | None = None,
    exclude: str | Sequence[str] | None = None,
    max_shard_size: int | str | None = None,
    sharded: bool = False,
    force: bool = False,
    overwrite: bool = False,
    resume: bool = False,
    share: str | None = None,
    wait: float | None = None,
    private: bool = False,
    commit_message: str | None = None,
    workers: int | None = None,
    memory: int | str | None = None,
    dry_run: bool = False,
    progress: Progress | None = None,
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
    options = asked(locals(), to=registry.detect(look_at(source)).name, keep_layout=True)
    return converted(source, destination, options)
