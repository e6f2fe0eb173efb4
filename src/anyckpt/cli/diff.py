"""``anyckpt diff``."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import click

from anyckpt.cli import completion, shared
from anyckpt.cli.command import Command
from anyckpt.cli.console import print_json, print_line, print_note, print_part, progress_bar
from anyckpt.cli.tables import Column, print_table

if TYPE_CHECKING:
    from anyckpt.operations.difference import Difference, TensorDifference
    from anyckpt.operations.steps.configurations import Setting
    from anyckpt.operations.steps.movement import Movement

_SHOWN_NAMES = 20
_SORTS = ("name", "relative", "max", "mean", "cosine")


def _tolerances(_: click.Context, parameter: click.Parameter, given: Sequence[str]) -> dict[str, float]:
    """``1e-3``, ``bf16=1e-2`` or both, with commas between or in several options."""
    result = {}
    for text in ",".join(given).split(",") if given else ():
        name, equals, number = text.rpartition("=")
        try:
            result[name.strip()] = float(number if name or not equals else "")
        except ValueError:
            raise click.BadParameter(
                f"{text!r} is no number, nor TYPE=NUMBER such as bf16=1e-2", param=parameter
            ) from None
    return result


def _tolerance(option: str, word: str) -> Callable[[Callable[..., int]], Callable[..., int]]:
    return click.option(
        option,
        multiple=True,
        metavar="[TYPE=]NUMBER",
        callback=_tolerances,
        help=f"{word} tolerance, of all types or of one (bf16=1e-2,fp32=1e-6).",
    )


@click.command(
    cls=Command,
    examples=(
        ("whether a conversion lost anything", "anyckpt diff llama-hf llama.nemo"),
        (
            "what a fine-tuning changed, the most changed layers first",
            "anyckpt diff base tuned --layers --sort relative",
        ),
        ("everything in two checkpoints of one run", "anyckpt diff step-1000 step-2000 --raw"),
        ("up to rounding", "anyckpt diff a b --rtol 1e-3,bf16=1e-2 --atol 1e-6"),
    ),
)
@click.argument("a", shell_complete=completion.paths)
@click.argument("b", shell_complete=completion.paths)
@_tolerance("--rtol", "Relative")
@_tolerance("--atol", "Absolute")
@click.option("--tensors", multiple=True, metavar="GLOB", help="Compare these tensors alone, by their common names.")
@click.option("--stats", is_flag=True, help="Tell how far each tensor moved: relative norm, cosine, largest and mean.")
@click.option("--layers", is_flag=True, help="Tell it of each layer.")
@click.option("--sort", type=click.Choice(_SORTS), help="Those that moved most, by this, first.")
@click.option("--top", type=click.IntRange(min=1), metavar="N", help="The N that moved most alone.")
@click.option(
    "--raw",
    is_flag=True,
    help="Compare all tensors, objects and files of one name as they are stored, under stored names.",
)
@click.option("--weights-only", is_flag=True, help="Leave aside configuration and training state.")
@shared.looking
@shared.as_json
def command(
    a: str,
    b: str,
    rtol: dict[str, float],
    atol: dict[str, float],
    tensors: tuple[str, ...],
    stats: bool,
    layers: bool,
    sort: str | None,
    top: int | None,
    raw: bool,
    weights_only: bool,
    as_json: bool,
    **sharing: Any,
) -> int:
    """Compare weights, configuration and training state of checkpoints A and B by value, whatever their formats.

    Optimizers' state meets by parameter.  Two tensors are equal if |a - b| <= atol + rtol * |b|; without a tolerance,
    if type and bits are the same.  What only one of the two has is a difference; what is not compared is named.

    How far a tensor moved is its relative norm |A - B| / |A|, the cosine of the angle between both, and the largest and
    the mean difference of an element.  Which layers moved most: diff A B --layers --top 10.

    Exit code: 0 equal, 1 different, 2 cannot compare.
    """
    from anyckpt.operations.diff import diff

    moved = stats or layers or sort is not None or top is not None
    with progress_bar("comparing") as progress:
        found = diff(
            a,
            b,
            rtol=rtol,
            atol=atol,
            tensors=tensors,
            statistics=moved,
            raw=raw,
            weights_only=weights_only,
            progress=progress,
            **sharing,
        )
    if as_json:
        print_json(found.to_json(sort=sort, top=top))
    elif found.part is not None:
        print_part(f"{a} and {b}", found.part)
    else:
        _print(found, layers, sort, top)
    return 0 if found.part is not None or found.equal else 1


def _print(found: Difference, layers: bool, sort: str | None, top: int | None) -> None:
    told = set()
    if found.movements is not None:
        chosen = found.most_moved(sort=sort, top=top, layers=layers)
        _print_movements(chosen, "layer" if layers else "tensor")
        told = {movement.name for movement in found.movements}
        all_that_moved = len(found.most_moved(layers=layers))
        if len(chosen) < all_that_moved:
            print_line(f"{all_that_moved - len(chosen)} more differ less")
    others = [tensor for tensor in found.different if tensor.name not in told]
    types = Counter((d.a.split()[0], d.b.split()[0]) for d in found.different if d.name in told and d.reason == "dtype")
    for (one, other), count in types.items():
        print_line(f"{_counted(count, 'tensor')} of another type: {one} in A, {other} in B")
    if others:
        rows = [(d.name, d.reason, d.a, d.b, *_largest(d)) for d in others]
        print_table(
            ["name", "differs in", "a", "b", Column("max abs", right=True), Column("max rel", right=True)], rows
        )
    for side, names in (("A", found.only_in_a), ("B", found.only_in_b)):
        for name in names[:_SHOWN_NAMES]:
            print_line(f"only in {side}: {name}")
        if len(names) > _SHOWN_NAMES:
            print_line(f"only in {side}: {len(names) - _SHOWN_NAMES} more")
    for settings, what in _beside(found):
        for setting in settings[:_SHOWN_NAMES]:
            print_line(f"{what}{f' {setting.name}' * (setting.name != what)}: {_said(setting)}")
        if len(settings) > _SHOWN_NAMES:
            print_line(f"{what}: {len(settings) - _SHOWN_NAMES} more differences")
    print_line(_verdict(found))
    for text in found.not_compared:
        print_note(f"not compared: {text}")
    for note in found.notes:
        print_note(f"note: {note}")


def _beside(found: Difference) -> Sequence[tuple[Sequence[Setting], str]]:
    return (found.configuration, "configuration"), (found.state, "training state"), (found.files, "files")


def _print_movements(movements: Sequence[Movement], what: str) -> None:
    if not movements:
        return
    rows = [
        (
            m.name,
            _number(m.relative),
            "-" if m.cosine is None else f"{m.cosine:.6f}",
            _number(m.max_abs),
            _number(m.mean_abs),
            f"{m.differing:,} of {m.elements:,}",
        )
        for m in movements
    ]
    numbers = (
        Column("relative", right=True),
        Column("cosine", right=True, optional=1),
        Column("max abs", right=True),
        Column("mean abs", right=True, optional=2),
        Column("differ", right=True, optional=3),
    )
    print_table([Column(what), *numbers], rows)


def _largest(tensor: TensorDifference) -> tuple[str, str]:
    """The largest differences; NaN or infinite where that is what differs."""
    if tensor.nonfinite:
        worst = "nan" if tensor.nan else "inf"
        return worst, worst
    return _number(tensor.max_abs), _number(tensor.max_rel)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


def _said(setting: Setting) -> str:
    if setting.a is not None and setting.b is not None:
        return f"{setting.a} in A, {setting.b} in B"
    side, value = ("A", setting.a) if setting.b is None else ("B", setting.b)
    return f"only in {side}" + ("" if value in (None, "there") else f" ({value})")


def _counted(count: int, what: str) -> str:
    return f"{count} {what}{'s' * (count > 1)}"


def _verdict(found: Difference) -> str:
    same = found.compared - len(found.different)
    counts = f"{same} of {found.compared} tensors compared under {found.names} names are the same"
    if found.equal:
        return f"equal: {counts}" if found.complete else f"the weights are equal: {counts}"
    sides = [
        f"{len(names)} only in {side}" for side, names in (("A", found.only_in_a), ("B", found.only_in_b)) if names
    ]
    settings = [f"{_counted(len(those), 'difference')} of {what}" for those, what in _beside(found) if those]
    return "; ".join([f"different: {counts}", *sides, *settings])
