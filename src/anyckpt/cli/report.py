"""``anyckpt report``."""

from __future__ import annotations

import click

from anyckpt.cli import completion, shared
from anyckpt.cli.command import Command
from anyckpt.cli.console import print_json, print_line, print_note, progress_bar


@click.command(
    cls=Command,
    examples=(
        ("what is inside and where it lies", "anyckpt report model.nemo -o model.html"),
        ("which layers look odd", "anyckpt report model --stats -o model.html"),
        ("what training changed", "anyckpt report step-2000 --against step-1000 -o changes.html"),
    ),
)
@click.argument("path", shell_complete=completion.paths)
@click.option("-o", "--output", metavar="FILE", required=True, help="The page to write, .html.")
@click.option("--stats", is_flag=True, help="Read the tensors: statistics, magnitudes and outliers over depth.")
@click.option(
    "--against",
    metavar="OTHER",
    shell_complete=completion.paths,
    help="Also compare with OTHER: how far every tensor has moved.",
)
@click.option("--tensors", metavar="GLOB", help="Only the tensors whose names match.")
@click.option(
    "--names",
    type=click.Choice(["stored", "hub"]),
    default="stored",
    show_default=True,
    help="Names as stored, or Megatron-Core names with shards joined and layers un-stacked.",
)
@click.option("--overwrite", is_flag=True, help="Replace FILE if it exists.")
@shared.as_json
def command(
    path: str,
    output: str,
    stats: bool,
    against: str | None,
    tensors: str | None,
    names: str,
    overwrite: bool,
    as_json: bool,
) -> None:
    """Write a page about the checkpoint at PATH, to look at in a browser.

    It is one file that asks for nothing else: an overview, modules by size, what lies where, a table of tensors to
    search and sort, the configuration.  Needs the extra: pip install 'anyckpt[report]'.
    """
    from anyckpt.operations.report import report
    from anyckpt.units import format_bytes

    with progress_bar("reading") as progress:
        done = report(
            path,
            output,
            stats=stats,
            against=against,
            tensors=tensors,
            names=names,
            overwrite=overwrite,
            progress=progress,
        )
    if as_json:
        print_json(done.to_json())
        return
    print_line(f"{done.output}: {done.tensors:,} tensors, {format_bytes(done.bytes)}")
    for warning in done.warnings:
        print_note(f"warning: {warning}")
