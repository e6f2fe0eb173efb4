"""Averaging checkpoints of one model: the elements' weighted mean, computed block by block while it is written."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from anyckpt.errors import UsageError
from anyckpt.formats import registry
from anyckpt.operations.average_adapters import are_adapters, mean_of_adapters
from anyckpt.operations.convert import Conversion, converted
from anyckpt.operations.keywords import MergeWords, check_writable, taking
from anyckpt.operations.options import ConvertOptions
from anyckpt.operations.steps.aligned_models import Choice, align, chosen
from anyckpt.operations.steps.destination import aimed_at
from anyckpt.operations.steps.full_precision import codes_side_by_side, in_full_precision
from anyckpt.operations.steps.globs import as_patterns
from anyckpt.operations.steps.joining import join_ranks
from anyckpt.operations.steps.layout_request import LayoutRequest
from anyckpt.operations.steps.user_files import read_config
from anyckpt.operations.steps.weighted_mean import check_shares, shown
from anyckpt.storage.location import public_path

if TYPE_CHECKING:
    from typing_extensions import Unpack


@taking(MergeWords)
def average(
    sources: Sequence[str | os.PathLike[str]],
    destination: str | os.PathLike[str],
    *,
    to: str | None = None,
    weights: Sequence[float] | None = None,
    family: str | None = None,
    config: str | os.PathLike[str] | Mapping[str, Any] | None = None,
    include: str | Sequence[str] | None = None,
    exclude: str | Sequence[str] | None = None,
    layout: LayoutRequest | None = None,
    force: bool = False,
    names: str | None = None,
    adapter_form: str | None = None,
    **others: Unpack[MergeWords],
) -> Conversion:
    """Write the mean of checkpoints of one model, of any formats and layouts.

    A tensor of ``float16`` or ``bfloat16`` is summed in float32, one of ``float32`` or ``float64`` in float64; the
    mean is rounded once, to the type that the tensor has.  All other tensors (integers, booleans, 8-bit floats) must
    be equal in all sources; with ``dtype``, quantized weights are numbers and averaged, too.  Where
    sources name or divide weights differently they meet under the hub's names.  Optimizers and other training state
    are left out.  Configuration and tokenizer are those of the first source.

    Args:
        sources: two or more; their formats are detected.
        destination: what to write; it appears only when it is whole.
        to: name of the target format; if None, what the destination's name tells (``.nemo``), else
            the first source's, in its parallel layout.
        weights: one number per source; the sum is divided by theirs, so that 1, 1, -1 is what two sources have both
            learned over the third.  All equal if None.
        family: the model family, where checkpoints do not tell.
        config: the model's configuration, where checkpoints have none.
        include: glob or globs of the first source's weight names; others are left out.
        exclude: glob or globs of weight names to leave out.

    Raises:
        FormatError: a source is damaged.
        MappingError: the sources are not of one model: names, shapes or element types differ, or tensors that cannot
            be averaged are not equal.
        OutputError: the destination exists or cannot be written.
        UsageError: fewer than two sources, or weights that are not one per source.
    """
    shares = _shares(len(sources), weights)
    if to is not None:
        registry.by_name(to)
    origins = [public_path(path) for path in sources]
    check_writable(destination, origins, others)
    stored = [registry.read(path, force=force) for path in sources]
    options = ConvertOptions(
        **aimed_at(destination, to, stored[0]),
        **others,
        family=family,
        config=read_config(config),
        layout=layout,
        names=names,
        adapter_form=adapter_form,
    )
    rules = options.request.rules
    plain = [
        in_full_precision(join_ranks(each, rules=rules, family=family), options.cast_to, options.given)
        for each in stored
    ]
    opened = [step.checkpoint for step in plain]
    choice = Choice(
        as_patterns(include), as_patterns(exclude), family, options.plain_config, options.request.vocab_size
    )
    if are_adapters(opened):
        made_of = [chosen(checkpoint, opened[0], choice) for checkpoint in opened]
        mean = mean_of_adapters(made_of, shares)
    else:
        with codes_side_by_side(opened):
            aligned = align(opened, choice)
            mean, made_of = aligned.mean(shares), aligned.averaged()
    rule = f"mean of {len(opened)} checkpoints" + ("" if weights is None else f", weighted {shown(shares)}")
    if any(share < 0 for share in shares):
        rule += f" and divided by {math.fsum(shares):g}: some are subtracted"
    told = dict.fromkeys(text for step in plain for text in (*step.notes, *step.checkpoint.warnings))
    told |= dict.fromkeys(made_of[0].warnings)
    merged = replace(mean.checkpoint, optimizer=None, warnings=[rule, *mean.notes, *told])
    return converted(merged, destination, options.for_numbers(), sources=origins, made_of=made_of)


def _shares(count: int, weights: Sequence[float] | None) -> list[float]:
    """A weight per source.

    Raises:
        UsageError: there are too few sources, or the weights are not possible.
    """
    if count < 2:
        raise UsageError("there is nothing to average", expected="two or more checkpoints", found=count)
    if weights is None:
        return [1.0] * count
    shares = [float(weight) for weight in weights]
    if len(shares) != count:
        raise UsageError("every checkpoint needs a weight", expected=f"{count} weights", found=len(shares))
    check_shares(shares)
    return shares
