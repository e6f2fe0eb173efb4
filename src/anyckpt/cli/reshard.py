"""``anyckpt reshard``."""

from __future__ import annotations

from typing import Any

import click

from anyckpt.cli import completion, shared
from anyckpt.cli.command import Command, option
from anyckpt.cli.console import writing
from anyckpt.cli.convert import show
from anyckpt.cli.layout import layout_options, layout_request
from anyckpt.cli.shared import OUTPUT


@click.command(
    cls=Command,
    examples=(
        (
            "from whatever it has to tensor parallel 4, pipeline parallel 2",
            "anyckpt reshard run run-tp4pp2 --tp 4 --pp 2",
        ),
        ("with fewer layers beside the output layer", "anyckpt reshard run out --pp 4 --last-stage-layers 6"),
        ("weights alone", "anyckpt reshard run out --tp 1 --pp 1 --optimizer drop"),
    ),
)
@click.argument("source", metavar="SRC", shell_complete=completion.paths)
@click.argument("destination", metavar="DST", shell_complete=completion.paths)
@option(
    "--optimizer",
    title=OUTPUT,
    type=click.Choice(["keep", "drop"]),
    default="keep",
    show_default=True,
    help="Carry training state through the same rules.",
)
@layout_options
@shared.writing
def command(source: str, destination: str, as_json: bool, **options: Any) -> None:
    """Change the parallel layout of the checkpoint at SRC and keep its format.

    Sizes that are not given stay as they are.
    """
    from anyckpt.operations.reshard import reshard

    layout = layout_request(options)
    with writing("resharding", destination) as progress:
        done = reshard(source, destination, layout=layout, progress=progress, **options)
    show(done, as_json)
