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
@click.option("--raw", is_flag=True, help="Compare all tensors and objects, training state too, as they are stored.")
@click.option("--weights-only", is_flag=True, help="Leave aside all that is no tensor.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def command(a: str, b: str, rtol: float, atol: float, raw: bool, weights_only: bool, as_json: bool) -> int:
    """Compare weights and configuration of checkpoints A and B by value, whatever their formats and layouts.

    Two weights are equal if |a - b| <= atol + rtol * |b|; without a tolerance, if type and bits are the same.  What
    only one of the two has is a difference; what is not compared is named.

    Exit code: 0 equal, 1 different, 2 cannot compare.
    """
    from anyckpt.operations.diff import diff

    with progress_bar("comparing") as progress:
        found = diff(a, b, rtol=rtol, atol=atol, raw=raw, weights_only=weights_only, progress=progress)
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
    for settings, what in ((found.configuration, "configuration"), (found.state, "state")):
        for setting in settings[:_SHOWN_NAMES]:
            print_line(f"{what} {setting.name}: {_said(setting.a)} in A, {_said(setting.b)} in B")
        if len(settings) > _SHOWN_NAMES:
            print_line(f"{what}: {len(settings) - _SHOWN_NAMES} more differences")
    print_line(_verdict(found))
    for text in found.not_compared:
        print_note(f"not compared: {text}")
    for note in found.notes:
        print_note(f"note: {note}")


def _said(value: str | None) -> str:
    return "not said" if value is None else value


def _verdict(found: Difference) -> str:
    same = found.compared - len(found.different)
    counts = f"{same} of {found.compared} tensors compared under {found.names} names are the same"
    if found.equal:
        return f"equal: {counts}" if found.complete else f"the weights are equal: {counts}"
    others = (
        (found.only_in_a, "only in A"),
        (found.only_in_b, "only in B"),
        (found.configuration, "differences of configuration"),
        (found.state, "differences of state"),
    )
    return "; ".join([f"different: {counts}", *(f"{len(names)} {what}" for names, what in others if names)])
