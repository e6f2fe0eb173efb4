"""``anyckpt edit``."""

from __future__ import annotations

import click

from anyckpt.cli import completion, shared
from anyckpt.cli.command import Command
from anyckpt.cli.console import print_archive, progress_bar


@click.command(
    cls=Command,
    examples=(
        ("a setting, in place", "anyckpt edit model.nemo --set trainer.devices=1"),
        (
            "another tokenizer, in another archive",
            "anyckpt edit model.nemo --replace-artifact tokenizer.model=new.model -o other.nemo",
        ),
    ),
)
@click.argument("archive", shell_complete=completion.paths)
@click.option("--set", "settings", metavar="KEY=VALUE", multiple=True, help="Configuration key (a.b.c) and YAML value.")
@click.option(
    "--replace-artifact",
    "artifacts",
    metavar="NAME=PATH",
    multiple=True,
    help="Artifact, by name or by the configuration key that refers to it, and the file with its new contents.",
)
@click.option(
    "-o",
    "--output",
    metavar="PATH",
    shell_complete=completion.paths,
    help="Write another archive; ARCHIVE itself is replaced otherwise.",
)
@click.option("--overwrite", is_flag=True, help="Replace the output if it exists.")
@shared.as_json
def command(
    archive: str,
    settings: tuple[str, ...],
    artifacts: tuple[str, ...],
    output: str | None,
    overwrite: bool,
    as_json: bool,
) -> None:
    """Change configuration or artifacts of the .nemo or .qnemo ARCHIVE; weights are copied and never loaded."""
    from anyckpt.operations.archive import edit, parse_replacement, parse_setting

    with progress_bar("editing") as progress:
        done = edit(
            archive,
            set=dict(map(parse_setting, settings)),
            replace=dict(map(parse_replacement, artifacts)),
            output=output,
            overwrite=overwrite,
            progress=progress,
        )
    print_archive(done, as_json)
