"""``anyckpt unpack``."""

from __future__ import annotations

import click

from anyckpt.cli import completion, shared
from anyckpt.cli.command import Command
from anyckpt.cli.console import print_archive, progress_bar


@click.command(
    cls=Command, examples=(("the files of an archive, to look at or to change", "anyckpt unpack model.nemo unpacked"),)
)
@click.argument("archive", shell_complete=completion.paths)
@click.argument("directory", metavar="DIR", shell_complete=completion.paths)
@click.option("--overwrite", is_flag=True, help="Replace an unpacked checkpoint, at the end.")
@shared.as_json
def command(archive: str, directory: str, overwrite: bool, as_json: bool) -> None:
    """Unpack the .nemo or .qnemo ARCHIVE into the new directory DIR."""
    from anyckpt.operations.archive import unpack

    with progress_bar("unpacking") as progress:
        done = unpack(archive, directory, overwrite=overwrite, progress=progress)
    print_archive(done, as_json)
