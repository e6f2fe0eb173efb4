"""``anyckpt convert``."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from anyckpt.cli.console import by_reason, print_json, print_line, print_note, print_table, progress_bar

if TYPE_CHECKING:
    from anyckpt.operations.convert import Conversion

_SHOWN_FILES = 20


@click.command()
@click.argument("source", metavar="SRC")
@click.argument("destination", metavar="DST")
@click.option("--to", required=True, metavar="FORMAT", help="Format to write, such as hf, nemo, nemo2, megatron-core.")
@click.option("--family", metavar="NAME", help="Model family, where the checkpoint does not tell.")
@click.option("--config", metavar="FILE", help="Model configuration, where the checkpoint has none.")
@click.option("--tokenizer", metavar="PATH", help="Sentencepiece model or folder of tokenizer files to send along.")
@click.option("--dtype", type=click.Choice(["bf16", "fp16", "fp32"]), help="Cast floating-point weights.")
@click.option(
    "--optimizer", type=click.Choice(["keep", "drop"]), default="drop", show_default=True,
    help="Carry training state, where names stay as they are and the target can hold it.",
)  # fmt: skip
@click.option("--sharded", is_flag=True, help="nemo: put a distributed checkpoint into the archive.")
@click.option("--max-shard-size", metavar="SIZE", help="hf: bytes per weight file, such as 5GB.")
@click.option("--include", metavar="GLOB", multiple=True, help="Take only weights whose source names match.")
@click.option("--exclude", metavar="GLOB", multiple=True, help="Leave out weights whose source names match.")
@click.option("--workers", type=click.IntRange(min=1), metavar="N", help="Threads.")
@click.option("--memory", metavar="SIZE", help="Bytes for blocks in flight, such as 512MB.")
@click.option("--overwrite", is_flag=True, help="Replace an existing checkpoint, at the end.")
@click.option("--resume", is_flag=True, help="Continue what an interrupted run left.")
@click.option("--dry-run", is_flag=True, help="Print the plan and write nothing.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def command(
    source: str,
    destination: str,
    to: str,
    family: str | None,
    config: str | None,
    tokenizer: str | None,
    dtype: str | None,
    optimizer: str,
    sharded: bool,
    max_shard_size: str | None,
    include: tuple[str, ...],
    exclude: tuple[str, ...],
    workers: int | None,
    memory: str | None,
    overwrite: bool,
    resume: bool,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Convert the checkpoint at SRC, whatever its format, to FORMAT at DST.

    Values stay bit for bit the same unless --dtype asks for a cast.  DST appears only when it is whole.
    """
    from anyckpt.operations.convert import convert

    with progress_bar("converting") as progress:
        done = convert(
            source, destination, to=to, family=family, config=config, tokenizer=tokenizer, dtype=dtype,
            include=include, exclude=exclude, max_shard_size=max_shard_size, sharded=sharded, optimizer=optimizer,
            overwrite=overwrite, resume=resume, workers=workers, memory=memory, dry_run=dry_run, progress=progress,
        )  # fmt: skip
    if as_json:
        print_json(done.to_json())
    else:
        _print(done)


def _print(done: Conversion) -> None:
    from anyckpt.units import format_bytes, format_seconds

    if done.dry_run:
        shown = list(done.files[:_SHOWN_FILES])
        rows = [(file["path"] or done.output, format_bytes(file["bytes"]), str(file["tensors"])) for file in shown]
        if len(done.files) > len(shown):
            rest = done.files[_SHOWN_FILES:]
            rows.append((f"... {len(rest)} more", format_bytes(sum(f["bytes"] for f in rest)), ""))
        print_table(("file", "size", "tensors"), rows, right=(1, 2))
        print_line()
    for cast, count in done.casts.items():
        print_line(f"cast {cast}: {count} tensors")
    for line in by_reason(done.ignored):
        print_line(f"left out: {line}")
    for note in done.notes:
        print_note(f"note: {note}")
    size = format_bytes(done.bytes_written)
    if done.dry_run:
        print_line(f"{done.output}: {done.format}, {done.tensors} tensors, {size} (dry run: nothing is written)")
        return
    rate = format_bytes(done.bytes_written / done.seconds) if done.seconds else size
    print_line(
        f"{done.output}: {done.format}, {done.tensors} tensors, {size} in {format_seconds(done.seconds)} "
        f"({rate}/s, peak memory {format_bytes(done.peak_rss_bytes)})"
    )
