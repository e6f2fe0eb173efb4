"""``anyckpt clean``."""

from __future__ import annotations

import sys
from dataclasses import replace

import click

from anyckpt.cli import completion, shared
from anyckpt.cli.command import Command
from anyckpt.cli.console import print_json, print_line, print_note

_SHOWN = 5


@click.command(
    cls=Command,
    examples=(
        ("what interrupted runs left in a folder", "anyckpt clean runs --dry-run"),
        ("remove what one left in a bucket", "anyckpt clean s3://models/llama-hf --yes"),
    ),
)
@click.argument("path", metavar="PATH", shell_complete=completion.paths)
@click.option("--dry-run", is_flag=True, help="Say what would be removed, and remove nothing.")
@click.option("-y", "--yes", is_flag=True, help="Remove it without asking.")
@shared.as_json
def command(path: str, dry_run: bool, yes: bool, as_json: bool) -> None:
    """Remove what interrupted runs left of the output PATH, or of outputs in the folder PATH.

    These are directories called .NAME.anyckpt-partial, and in an object store what is marked as unfinished, with notes,
    claims and unfinished uploads.  A whole checkpoint and what a living process is at work on are never touched.
    """
    from anyckpt.errors import UsageError
    from anyckpt.operations.clean import clean, remove

    done = clean(path, dry_run=True)
    if not as_json:
        for one in done.found:
            _tell(one.output, one.paths, one.nbytes)
        for output in done.busy:
            print_note(f"note: {output} is being written, and stays")
    if done.found and not dry_run:
        if not yes and (as_json or not sys.stdin.isatty()):
            raise UsageError("nothing is removed without being asked", path=path, remedy="add --yes, or --dry-run")
        if yes or click.confirm("remove all of this?"):
            busy = remove(done.found)
            left = tuple(one for one in done.found if one.output not in busy)
            done = replace(done, found=left, busy=(*done.busy, *busy), removed=True)
    if as_json:
        print_json(done.to_json())
    else:
        _conclude(path, len(done.found), done.nbytes, done.removed)
        for note in done.notes:
            print_note(f"note: {note}")


def _tell(output: str, paths: tuple[str, ...], nbytes: int) -> None:
    from anyckpt.units import format_bytes

    print_line(f"{output}: {format_bytes(nbytes)} of an unfinished run")
    for path in paths[:_SHOWN]:
        print_line(f"  {path}")
    if len(paths) > _SHOWN:
        print_line(f"  and {len(paths) - _SHOWN} more")


def _conclude(path: str, count: int, nbytes: int, removed: bool) -> None:
    from anyckpt.units import format_bytes

    if not count:
        print_line(f"{path}: nothing is left of unfinished runs")
    elif removed:
        print_line(f"removed what {count} unfinished run{'s' if count > 1 else ''} left, {format_bytes(nbytes)}")
    else:
        print_line(f"nothing is removed; --yes removes {format_bytes(nbytes)}")
