"""``anyckpt average``."""

from __future__ import annotations

from typing import Any

import click

from anyckpt.cli import completion, shared
from anyckpt.cli.command import Command, option
from anyckpt.cli.console import writing
from anyckpt.cli.convert import show
from anyckpt.cli.layout import layout_options, layout_request
from anyckpt.cli.shared import OUTPUT


def numbers(ctx: click.Context, parameter: click.Parameter, value: str | None) -> list[float] | None:
    """Numbers with commas between."""
    if value is None:
        return None
    try:
        return [float(number) for number in value.split(",")]
    except ValueError:
        raise click.BadParameter("expected numbers with commas between, such as 1,1,2", ctx, parameter) from None


@click.command(
    cls=Command,
    examples=(
        ("the mean of two", "anyckpt average step-1000 step-2000 -o mean"),
        ("weighted, and written for vLLM", "anyckpt average a.nemo b.nemo -o mean --weights 1,3 --to hf"),
        ("add to A what B has learned over C", "anyckpt average A B C -o sum --weights 1,1,-1"),
    ),
)
@click.argument("sources", nargs=-1, required=True, metavar="SRC...", shell_complete=completion.paths)
@shared.output
@option(
    "--weights",
    title=OUTPUT,
    callback=numbers,
    metavar="W1,W2,...",
    help="A weight per SRC; all equal if not given.",
)
@shared.to("Format to write; what DST's name tells, else that of the first SRC if not given.")
@shared.sharded
@shared.shard_size
@option("--include", title=OUTPUT, metavar="GLOB", multiple=True, help="Take only weights whose names in SRC match.")
@option("--exclude", title=OUTPUT, metavar="GLOB", multiple=True, help="Leave out weights whose names in SRC match.")
@shared.family
@shared.config("Model configuration, where the checkpoints have none.", metavar="FILE")
@shared.tokenizer
@layout_options
@shared.writing
def command(sources: tuple[str, ...], destination: str, as_json: bool, **options: Any) -> None:
    """Write the mean of the weights of two or more checkpoints of one model.

    16-bit weights are summed in float32, others in float64, and rounded once.  Whole numbers and booleans must be
    equal in all of them; a BatchNorm's counters are added up.  The sum is divided by that of --weights, of which some
    may be negative: 1,1,-1 adds to A what B has and C has not.  Optimizers are left out; configuration, tokenizer and
    what no other SRC has are those of the first SRC.
    """
    from anyckpt.operations.average import average

    layout = layout_request(options)
    with writing("averaging", destination) as progress:
        done = average(sources, destination, layout=layout, progress=progress, **options)
    show(done, as_json)
