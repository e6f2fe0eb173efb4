"""``anyckpt reshard``."""

from __future__ import annotations

from typing import Any

import click

from anyckpt.cli.console import progress_bar
from anyckpt.cli.convert import show, writing_options
from anyckpt.cli.layout import layout_options, layout_request


@click.command()
@click.argument("source", metavar="SRC")
@click.argument("destination", metavar="DST")
@click.option(
    "--optimizer",
    type=click.Choice(["keep", "drop"]),
    default="keep",
    show_default=True,
    help="Carry training state through the same rules.",
)
@layout_options
@writing_options
def command(source: str, destination: str, as_json: bool, **options: Any) -> None:
    """Change the parallel layout of the checkpoint at SRC and keep its format.

    Sizes that are not given stay as they are.
    """
    from anyckpt.operations.reshard import reshard

    layout = layout_request(options)
    with progress_bar("resharding") as progress:
        done = reshard(source, destination, layout=layout, progress=progress, **options)
    show(done, as_json)
