"""``anyckpt verify``."""

from __future__ import annotations

from typing import Any

import click

from anyckpt.cli import completion, shared
from anyckpt.cli.command import Command
from anyckpt.cli.console import calls_line, print_json, print_line, print_note, print_part, progress_bar


@click.command(
    cls=Command,
    examples=(
        ("is every byte there, and the model complete", "anyckpt verify llama.nemo"),
        ("read all values, too", "anyckpt verify run/iter_0001000 --deep"),
        ("is it what was published", "anyckpt verify llama-hf --checksum SHA256SUMS"),
        ("the same of one file", "anyckpt verify llama.nemo --expect sha256:9f86d081884c7d659a2feaa0..."),
    ),
)
@click.argument("path", shell_complete=completion.paths)
@click.option("--deep", is_flag=True, help="Also read every tensor, optimizers' too: NaN, infinities.")
@click.option(
    "--checksum",
    multiple=True,
    metavar="FILE",
    shell_complete=completion.paths,
    help="A list of digests (SHA256SUMS and the like, the Hub's JSON) that files must have.",
)
@click.option("--expect", multiple=True, metavar="[FILE=]sha256:HEX", help="The digest that a file must have.")
@shared.looking
@shared.as_json
def command(
    path: str, deep: bool, checksum: tuple[str, ...], expect: tuple[str, ...], as_json: bool, **sharing: Any
) -> int:
    """Check the checkpoint at PATH: byte ranges, checksums, digests, completeness of the model, calls in pickles.

    Contents are proved by digests (of anyckpt's manifest, of what the Hub published, of --checksum and --expect) and by
    checksums of containers; how many are not is said.

    Exit code: 0 sound, 1 damaged or unsafe to load with other software, 2 nothing there to check.
    """
    from anyckpt.operations.verify import verify

    with progress_bar("verifying") as progress:
        found = verify(path, deep=deep, checksum=checksum, expect=expect, progress=progress, **sharing)
    if as_json:
        print_json(found.to_json())
        return 0 if found.part is not None or found.sound else 1
    if found.part is not None:
        print_part(found.path, found.part)
        return 0
    for problem in found.problems:
        print_line(f"{problem.where}: {problem.problem}")
    for warning in found.warnings:
        print_note(f"warning: {warning}")
    checked = found.checked
    looked_at = [
        f"{checked.tensors:,} tensors in {checked.pieces:,} pieces inside their files" if found.opened else "",
        f"{checked.digests:,} digests" if checked.digests else "",
        f"{checked.checksums:,} checksums" if checked.checksums else "",
        f"{checked.published:,} file{'s' * (checked.published != 1)} as published" if checked.published else "",
        f"the contents of {checked.proved or 'none'} of them proved" if checked.proved < checked.tensors else "",
        "the model complete" if checked.model else "the text part of the model complete" if checked.text else "",
        f"the numbers of {checked.scales:,} scales" if checked.scales else "",
        f"the values of {checked.values:,} tensors" if checked.values else "",
        f"the calls of {checked.pickles:,} pickle{'s' * (checked.pickles != 1)}" if checked.pickles else "",
    ]
    others = calls_line([callee for callee in found.calls if callee.kind in ("function", "class")])
    if others:
        print_note(f"note: pickles name {others}; loading them with weights_only=False runs the code of these packages")
    for text in found.unchecked:
        print_note(f"not checked: {text}")
    damage = len(found.problems) - (found.opened and not found.safe)
    verdict = " and ".join(
        filter(
            None,
            (
                f"damaged ({damage} problem{'s' * (damage > 1)})" if damage else "",
                "" if found.safe else "unsafe to load with other software",
                "sound" if found.sound else "",
            ),
        )
    )
    print_line("; ".join(filter(None, (f"{found.path}: {verdict}", ", ".join(filter(None, looked_at))))))
    return 0 if found.sound else 1
