"""``anyckpt convert``."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import click

from anyckpt.cli.console import by_reason, print_json, print_line, print_note, print_table, progress_bar
from anyckpt.cli.layout import layout_options, layout_request

if TYPE_CHECKING:
    from anyckpt.operations.convert import Conversion

Command = TypeVar("Command", bound=Callable[..., Any])

_SHOWN_FILES = 20
_SHOWN_SHARES = 8
_SHOWN_LAYERS = 12


_WRITING = (
    click.option(
        "--dtype",
        type=click.Choice(["bf16", "fp16", "fp32"]),
        help="Cast floating-point weights, and dequantize quantized ones.",
    ),
    click.option("--workers", type=click.IntRange(min=1), metavar="N", help="Threads."),
    click.option("--memory", metavar="SIZE", help="Bytes for blocks in flight, such as 512MB."),
    click.option("--force", is_flag=True, help="Read a checkpoint that is marked as unfinished, too."),
    click.option("--overwrite", is_flag=True, help="Replace an existing checkpoint, at the end."),
    click.option("--resume", is_flag=True, help="Continue what an interrupted run left."),
    click.option("--share", metavar="I/N", help="Do the I-th of N parts; the last of N processes publishes DST."),
    click.option("--dry-run", is_flag=True, help="Print the plan and write nothing."),
    click.option("--json", "as_json", is_flag=True, help="Print one JSON object."),
)


def writing_options(command: Command) -> Command:
    """Options of every command that writes a checkpoint."""
    for option in reversed(_WRITING):
        command = option(command)
    return command


@click.command()
@click.argument("source", metavar="SRC")
@click.argument("destination", metavar="DST")
@click.option("--to", required=True, metavar="FORMAT", help="Format to write, such as hf, nemo, nemo2, megatron-core.")
@click.option("--family", metavar="NAME", help="Model family, where the checkpoint does not tell.")
@click.option("--config", metavar="PATH", help="Model configuration, or a model that has it, where SRC has none.")
@click.option(
    "--model-id",
    metavar="ID",
    help="In place of --config: a model by name, such as meta-llama/Meta-Llama-3-8B, or a folder of NeMo 2; SRC must "
    "agree with it.",
)
@click.option("--tokenizer", metavar="PATH", help="Sentencepiece model or folder of tokenizer files to send along.")
@click.option(
    "--tokenizer-library",
    type=click.Choice(["sentencepiece", "huggingface", "tiktoken"]),
    help="What reads --tokenizer, where its file does not tell; with huggingface it may be a name on the hub.",
)
@click.option(
    "--names",
    metavar="DIALECT",
    help="lightning, dcp, torch, safetensors: how to name weights (hf, hub, megatron-core, nemo-flat, nemo-sharded, "
    "nemo2, or another package's); as the source does if not given.",
)
@click.option(
    "--adapter-form",
    type=click.Choice(["canonical", "fused"]),
    help="LoRA: an update per Hugging Face module, or one per fused weight of Megatron, at a higher rank.",
)
@click.option("--alpha", type=float, metavar="X", help="LoRA: alpha, where the adapter does not say it.")
@click.option(
    "--optimizer",
    type=click.Choice(["keep", "drop"]),
    default="drop",
    show_default=True,
    help="Carry training state, where the target can hold it.",
)
@click.option("--sharded", is_flag=True, help="nemo, lightning: a distributed checkpoint inside.")
@click.option(
    "--backend",
    type=click.Choice(["torch_dist", "zarr"]),
    help="nemo2: kind of distributed checkpoint inside; torch_dist if not given.",
)
@click.option("--compress/--no-compress", default=False, help="trtllm: one archive (.qnemo), not a directory.")
@click.option("--max-shard-size", metavar="SIZE", help="hf: bytes per weight file, such as 5GB.")
@click.option(
    "--include",
    metavar="GLOB",
    multiple=True,
    help="Take only weights whose source names match, or what else matches none of them (an EMA copy).",
)
@click.option("--exclude", metavar="GLOB", multiple=True, help="Leave out weights whose source names match.")
@click.option(
    "--rename",
    metavar="PATTERN=REPLACEMENT",
    multiple=True,
    help="Rename weights of SRC before anything else looks at names: a glob ('module.*=*'), or after re: a regular "
    "expression.",
)
@click.option(
    "--quantize",
    metavar="ALGORITHM",
    help="hf, trtllm: quantize linear weights: fp8, fp8_per_channel, fp8_blocks, int8, int8_wo, int4, int4_wo, nvfp4, "
    "mxfp4.",
)
@click.option(
    "--quantize-form",
    metavar="FORM",
    help="How quantized weights are stored: compressed-tensors, modelopt, fp8 (DeepSeek's), mxfp4 (GPT-OSS's).",
)
@click.option("--group-size", type=int, metavar="N", help="int4: columns with one scale.  [default: 128]")
@click.option("--activation-scale", type=float, metavar="X", help="Scale of activations, where the form stores it.")
@click.option(
    "--activation-scales",
    metavar="PATH",
    help="Scales of activations by module: JSON, or a quantized model whose input_scale are taken.",
)
@click.option("--quantize-exclude", metavar="GLOB", multiple=True, help="Leave modules that match as they are.")
@click.option("--report", metavar="FILE", help="Write what quantizing did to every weight, as JSON or .html.")
@layout_options
@writing_options
def command(source: str, destination: str, as_json: bool, **options: Any) -> None:
    """Convert the checkpoint at SRC, whatever its format, to FORMAT at DST.

    Values stay bit for bit the same unless --dtype asks for a cast.  DST appears only when it is whole.
    """
    from anyckpt.operations.convert import convert

    options["quantize_exclude"] = options["quantize_exclude"] or None
    layout = layout_request(options)
    with progress_bar("converting") as progress:
        done = convert(source, destination, layout=layout, progress=progress, **options)
    show(done, as_json)


def show(done: Conversion, as_json: bool) -> None:
    """Print what was done, or would be."""
    if as_json:
        print_json(done.to_json())
    else:
        _print(done)


def _print_quantization(report: dict[str, Any]) -> None:
    """What quantizing did to the layers: all of them, or those that lost most."""
    from anyckpt.operations.steps.report_page import row

    layers = report["layers"]
    rows = [row(layer) for layer in layers]
    title = ""
    if len(rows) > _SHOWN_LAYERS:
        lossy = [layer for layer in layers if layer["sqnr_db"] is not None]
        worst = sorted(lossy, key=lambda layer: float(layer["sqnr_db"]))[:_SHOWN_LAYERS]
        rows, title = [row(layer) for layer in worst], f"the {_SHOWN_LAYERS} of {len(layers)} layers that lost most:"
    header = ("layer", "SQNR", "largest error", "saturated", "before", "after")
    print_table(header, [*rows, row(report["total"])], right=(1, 2, 3, 4, 5), title=title)
    print_line()


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
    if done.quantization is not None:
        _print_quantization(done.quantization)
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
    if done.missing_shares:
        missing = ", ".join(done.missing_shares[:_SHOWN_SHARES]) + (
            " ..." if done.missing_shares[_SHOWN_SHARES:] else ""
        )
        print_line(f"{done.output}: share {done.share} of {done.format}, {size} in {format_seconds(done.seconds)}")
        print_line(f"the output appears when all shares are written; missing: {missing}")
        return
    rate = format_bytes(done.bytes_written / done.seconds) if done.seconds else size
    print_line(
        f"{done.output}: {done.format}, {done.tensors} tensors, {size} in {format_seconds(done.seconds)} "
        f"({rate}/s, peak memory {format_bytes(done.peak_rss_bytes)})"
    )
