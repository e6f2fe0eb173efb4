"""``anyckpt average``."""

from __future__ import annotations

from typing import Any

import click

from anyckpt.cli.console import progress_bar
from anyckpt.cli.convert import show, writing_options
from anyckpt.cli.layout import layout_options, layout_request


def _numbers(ctx: click.Context, parameter: click.Parameter, value: str | None) -> list[float] | None:
    if value is None:
        return None
    try:
        return [float(number) for number in value.split(",")]
    except ValueError:
        raise click.BadParameter("expected numbers with commas between, such as 1,1,2", ctx, parameter) from None


@click.command()
@click.argument("sources", nargs=-1, required=True, metavar="SRC...")
@click.option("-o", "--output", "destination", required=True, metavar="DST", help="What to write.")
@click.option("--weights", callback=_numbers, metavar="W1,W2,...", help="A weight per SRC; all equal if not given.")
@click.option("--to", metavar="FORMAT", help="Format to write; that of the first SRC if not given.")
@click.option("--family", metavar="NAME", help="Model family, where the checkpoints do not tell.")
@click.option("--config", metavar="FILE", help="Model configuration, where the checkpoints have none.")
@click.option("--tokenizer", metavar="PATH", help="Sentencepiece model or folder of tokenizer files to send along.")
@click.option("--sharded", is_flag=True, help="nemo, lightning: a distributed checkpoint inside.")
@click.option("--max-shard-size", metavar="SIZE", help="hf: bytes per weight file, such as 5GB.")
@click.option("--include", metavar="GLOB", multiple=True, help="Take only weights whose names in SRC match.")
@click.option("--exclude", metavar="GLOB", multiple=True, help="Leave out weights whose names in SRC match.")
@layout_options
@writing_options
def command(sources: tuple[str, ...], destination: str, as_json: bool, **options: Any) -> None:
    """Write the mean of the weights of two or more checkpoints of one model.

    16-bit weights are summed in float32, others in float64, and rounded once.  Whole numbers and booleans must be
    equal in all of them; a BatchNorm's counters are added up.  The sum is divided by that of --weights, of which some
    may be negative: 1,1,-1 adds to A what B has and C has not.  Optimizers are left out; configuration, tokenizer and
    what no other SRC has are those of the first SRC.
    """
    from anyckpt.operations.average import average

    layout = layout_request(options)
    with progress_bar("averaging") as progress:
        done = average(sources, destination, layout=layout, progress=progress, **options)
    show(done, as_json)
