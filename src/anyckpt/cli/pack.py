"""``anyckpt pack``."""

from __future__ import annotations

import click

from anyckpt.cli import completion, shared
from anyckpt.cli.command import Command
from anyckpt.cli.console import print_archive, progress_bar


@click.command(
    cls=Command,
    examples=(("an archive of what has been unpacked and changed", "anyckpt pack unpacked model.nemo"),),
)
@click.argument("directory", metavar="DIR", shell_complete=completion.folders)
@click.argument("archive", shell_complete=completion.paths)
@click.option("--gzip", is_flag=True, help="Compress the archive.")
@click.option("--overwrite", is_flag=True, help="Replace an archive, at the end.")
@shared.as_json
def command(directory: str, archive: str, gzip: bool, overwrite: bool, as_json: bool) -> None:
    """Pack DIR, an unpacked .nemo or .qnemo, into the new file ARCHIVE."""
    from anyckpt.operations.archive import pack

    with progress_bar("packing") as progress:
        done = pack(directory, archive, gzip=gzip, overwrite=overwrite, progress=progress)
    print_archive(done, as_json)
