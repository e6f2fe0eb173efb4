"""``anyckpt diff``."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from anyckpt.cli.console import print_json, print_line, print_note, print_table, progress_bar

if TYPE_CHECKING:
    from anyckpt.operations.diff import Difference

_SHOWN_NAMES = 20


@click.command()
@click.argument("a")
@click.argument("b")
@click.option("--rtol", type=float, default=0.0, show_default=True, help="Relative tolerance.")
@click.option("--atol", type=float, default=0.0, show_default=True, help="Absolute tolerance.")
@click.option("--raw", is_flag=True, help="Compare all tensors, training state too, under their stored names.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def command(a: str, b: str, rtol: float, atol: float, raw: bool, as_json: bool) -> int:
    """Compare the weights of checkpoints A and B by value, whatever their formats and layouts.

    Two weights are equal if |a - b| <= atol + rtol * |b|; without a tolerance, if type and bits are the same.

    Exit code: 0 equal, 1 different, 2 cannot compare.
    """
    from anyckpt.operations.diff import diff

    with progress_bar("comparing") as progress:
        found = diff(a, b, rtol=rtol, atol=atol, raw=raw, progress=progress)
    if as_json:
        print_json(found.to_json())
    else:
        _print(found)
    return 0 if found.equal else 1


def _print(found: Difference) -> None:
    if found.different:
        rows = [
            (d.name, d.reason, d.a, d.b, *("-" if v is None else f"{v:.4g}" for v in (d.max_abs, d.max_rel)))
            for d in found.different
        ]
        print_table(("name", "differs in", "a", "b", "max abs", "max rel"), rows, right=(4, 5))
    for side, names in (("A", found.only_in_a), ("B", found.only_in_b)):
        for name in names[:_SHOWN_NAMES]:
            print_line(f"only in {side}: {name}")
        if len(names) > _SHOWN_NAMES:
            print_line(f"only in {side}: {len(names) - _SHOWN_NAMES} more")
    same = found.compared - len(found.different)
    verdict = "equal" if found.equal else "different"
    print_line(f"{verdict}: {same} of {found.compared} tensors compared under {found.names} names are the same")
    for note in found.notes:
        print_note(f"note: {note}")
