"""``anyckpt migrate-config``."""

from __future__ import annotations

import sys
from typing import Any, Literal

import click

from anyckpt.cli import completion
from anyckpt.cli.command import Command
from anyckpt.cli.console import print_json, print_note


@click.command(
    cls=Command,
    examples=(
        ("Python for NeMo 2", "anyckpt migrate-config megatron_gpt_config.yaml -o train.py"),
        ("the checkpoint section of Megatron-Bridge", "anyckpt migrate-config old.yaml --to megatron-bridge"),
    ),
)
@click.argument("source", metavar="OLD.yaml", shell_complete=completion.paths)
@click.option(
    "-o",
    "--output",
    metavar="NEW",
    shell_complete=completion.paths,
    help="Write to this file (.py: Python) instead of to the terminal.",
)
@click.option(
    "--to",
    type=click.Choice(["nemo2", "megatron-bridge", "anyckpt"]),
    default="nemo2",
    show_default=True,
    help="Whose words: NeMo 2's classes, the checkpoint section of Megatron-Bridge, or anyckpt.torch's.",
)
@click.option("--form", type=click.Choice(["yaml", "python"]), help="YAML with _target_, or Python calls.")
@click.option("--overwrite", is_flag=True, help="Replace NEW if it exists.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object with the outcome of every setting.")
def command(
    source: str,
    output: str | None,
    to: Literal["nemo2", "megatron-bridge", "anyckpt"],
    form: Literal["yaml", "python"] | None,
    overwrite: bool,
    as_json: bool,
) -> None:
    """Translate the NeMo 1 training file OLD.yaml, and say what becomes of each of its settings.

    Every argument has a comment with the setting that it comes from; settings without an argument stand below, with
    what has taken their place.  Nothing that OLD.yaml names is imported or run.
    """
    from anyckpt.operations.migrate_config import migrate_config, write_migrated

    done = migrate_config(source, to=to)
    chosen = form or ("python" if output is not None and output.endswith(".py") else "yaml")
    if output is not None:
        write_migrated(done, output, chosen, overwrite=overwrite)
    if as_json:
        print_json(done.to_json())
    elif output is None:
        sys.stdout.write(done.text(chosen))
    else:
        print_note(_summary(done.migration.settings, output))
    for note in done.notes:
        print_note(f"note: {note}")
    for warning in done.warnings():
        print_note(f"warning: {warning}")
    unknown = done.unknown()
    if unknown:
        print_note(f"warning: not known, look them up in your own code: {', '.join(unknown)}")


def _summary(settings: Any, output: str) -> str:
    counts: dict[str, int] = {}
    for item in settings:
        counts[item.outcome] = counts.get(item.outcome, 0) + 1
    return f"{output}: {len(settings)} settings: " + ", ".join(f"{count} {name}" for name, count in counts.items())
