"""``anyckpt convert``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from anyckpt.cli import completion, shared
from anyckpt.cli.command import Command, option
from anyckpt.cli.console import by_reason, print_json, print_line, print_note, writing
from anyckpt.cli.layout import layout_options, layout_request
from anyckpt.cli.shared import MODEL, OUTPUT, QUANTIZED
from anyckpt.cli.tables import Column, print_table

if TYPE_CHECKING:
    from anyckpt.operations.convert import Conversion

_SHOWN_FILES = 20
_SHOWN_SHARES = 8
_SHOWN_LAYERS = 12


@click.command(
    cls=Command,
    examples=(
        ("to Hugging Face, for vLLM and transformers", "anyckpt convert run/model.nemo llama-hf --to hf"),
        ("the name of a file tells its format", "anyckpt convert llama-hf llama.nemo"),
        (
            "to files of 8 tensor-parallel ranks for Megatron-LM",
            "anyckpt convert llama-hf ranks --to megatron-lm --tp 8",
        ),
        (
            "in another type, and see first what would be written",
            "anyckpt convert a b --to hf --dtype bfloat16 --dry-run",
        ),
        ("quantized for serving", "anyckpt convert llama-hf llama-fp8 --to hf --quantize fp8"),
        (
            "from the Hugging Face Hub, and to it",
            "anyckpt convert hf:org/model hf://me/model-fp8 --to hf --quantize fp8",
        ),
        ("go on after an interruption", "anyckpt convert llama-hf llama.nemo --resume"),
    ),
)
@click.argument("source", metavar="SRC", shell_complete=completion.paths)
@click.argument("destination", metavar="DST", shell_complete=completion.paths)
@shared.to(
    "Format to write, such as hf, nemo, nemo2, megatron-core.  If not given, what DST's name tells: .nemo, .ckpt, .pt, "
    ".safetensors, .qnemo."
)
@option(
    "--names",
    title=OUTPUT,
    metavar="DIALECT",
    shell_complete=completion.dialects,
    help="lightning, dcp, torch, safetensors: how to name weights (hf, hub, megatron-core, nemo-flat, nemo-sharded, "
    "nemo2, or another package's); as the source does if not given.",
)
@option(
    "--experts",
    title=OUTPUT,
    type=click.Choice(["each", "stacked"]),
    help="hf: a tensor for each expert, or one for all of a layer, which transformers 5 reads as well; as is usual for "
    "the family if not given.",
)
@option(
    "--module",
    title=OUTPUT,
    metavar="NAME",
    help="Take one module of the model alone, such as llm or perception.encoder, its name taken off.",
)
@option(
    "--put",
    title=OUTPUT,
    metavar="MODULE=PATH",
    multiple=True,
    help="Replace one module of the model by that of another, of the same names and shapes: perception=asr.nemo, "
    "llm=tuned-llama.",
)
@option(
    "--include",
    title=OUTPUT,
    metavar="GLOB",
    multiple=True,
    help="Take only weights whose source names match, or what else matches none of them (an EMA copy).",
)
@option("--exclude", title=OUTPUT, metavar="GLOB", multiple=True, help="Leave out weights whose source names match.")
@option(
    "--rename",
    title=OUTPUT,
    metavar="PATTERN=REPLACEMENT",
    multiple=True,
    help="Rename weights of SRC before anything else looks at names: a glob ('module.*=*'), or after re: a regular "
    "expression.",
)
@option(
    "--drop-layers",
    title=OUTPUT,
    metavar="LAYERS",
    help="Leave out layers, such as 10-20,31 (from 0 on), and number those behind them anew; of an encoder-decoder, "
    "encoder:2-3,decoder:5.",
)
@option("--keep-layers", title=OUTPUT, metavar="LAYERS", help="Keep these layers alone.")
@option(
    "--optimizer",
    title=OUTPUT,
    type=click.Choice(["keep", "drop"]),
    default="drop",
    show_default=True,
    help="Carry training state, where the target can hold it.",
)
@shared.sharded
@option(
    "--backend",
    title=OUTPUT,
    type=click.Choice(["torch_dist", "zarr", "fsdp_dtensor"]),
    help="nemo2: torch_dist or zarr inside; megatron-core and megatron-bridge: torch_dist or fsdp_dtensor, which "
    "Megatron-FSDP loads; the first if not given.",
)
@shared.compress
@option("--gzip", title=OUTPUT, is_flag=True, help="trtllm, nemo: an archive that is compressed by gzip.")
@option(
    "--tensor-type",
    title=OUTPUT,
    type=click.Choice(["f32", "f16", "bf16", "q8_0", "q4_0", "q4_1", "q5_0", "q5_1"]),
    help="gguf: how matrices are stored; as they are if not given.",
)
@shared.shard_size
@shared.family
@shared.config("Model configuration, or a model that has it, where SRC has none.")
@option(
    "--model-id",
    title=MODEL,
    metavar="ID",
    help="In place of --config: a model by name, such as meta-llama/Meta-Llama-3-8B, or a folder of NeMo 2; SRC must "
    "agree with it.",
)
@shared.tokenizer
@option(
    "--tokenizer-library",
    title=MODEL,
    type=click.Choice(["sentencepiece", "huggingface", "tiktoken"]),
    help="What reads --tokenizer, where its file does not tell; with huggingface it may be a name on the hub.",
)
@option(
    "--adapter-form",
    title="Adapters",
    type=click.Choice(["canonical", "fused"]),
    help="LoRA: an update per Hugging Face module, or one per fused weight of Megatron, at a higher rank.",
)
@option("--alpha", title="Adapters", type=float, metavar="X", help="LoRA: alpha, where the adapter does not say it.")
@option(
    "--quantize",
    title=QUANTIZED,
    metavar="ALGORITHM",
    shell_complete=completion.algorithms,
    help="hf, trtllm: quantize linear weights: fp8, fp8_per_channel, fp8_blocks, int8, int8_wo, int4, int4_wo, nvfp4, "
    "mxfp4; with --stats int8_sq, int4_awq, w4a8_awq.",
)
@option(
    "--quantize-form",
    title=QUANTIZED,
    metavar="FORM",
    shell_complete=completion.forms,
    help="How quantized weights are stored: compressed-tensors, modelopt, fp8 (DeepSeek's), mxfp4 (GPT-OSS's).",
)
@option(
    "--group-size",
    title=QUANTIZED,
    type=int,
    metavar="N",
    help="int4 and AWQ: columns with one scale.  [default: 128]",
)
@option(
    "--activation-scale",
    title=QUANTIZED,
    type=float,
    metavar="X",
    help="Scale of activations, where the form stores it.",
)
@option(
    "--activation-scales",
    title=QUANTIZED,
    metavar="PATH",
    shell_complete=completion.paths,
    help="Scales of activations by module: JSON, or a quantized model whose input_scale are taken.",
)
@option(
    "--stats",
    "statistics",
    title=QUANTIZED,
    metavar="FILE",
    shell_complete=completion.paths,
    help="What calibration saw, as anyckpt quantize saves it; int8_sq, int4_awq and w4a8_awq need it.",
)
@shared.calibrated("With --stats: ")
@layout_options
@shared.writing
def command(source: str, destination: str, as_json: bool, **options: Any) -> None:
    """Convert the checkpoint at SRC, whatever its format, to another one at DST.

    Values stay bit for bit the same unless --dtype asks for a cast.  DST appears only when it is whole.
    """
    from anyckpt.operations.convert import convert

    options["quantize_exclude"] = options["quantize_exclude"] or None
    layout = layout_request(options)
    with writing("converting", destination) as progress:
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
    numbers = ("SQNR", "largest error", "saturated", "before", "after")
    columns = [Column("layer"), *(Column(name, right=True) for name in numbers)]
    print_table(columns, [*rows, row(report["total"])], title=title)
    print_line()


def _print(done: Conversion) -> None:
    from anyckpt.units import format_bytes, format_seconds

    if done.dry_run:
        shown = list(done.files[:_SHOWN_FILES])
        rows = [(file["path"] or done.output, format_bytes(file["bytes"]), str(file["tensors"])) for file in shown]
        if len(done.files) > len(shown):
            rest = done.files[_SHOWN_FILES:]
            rows.append((f"... {len(rest)} more", format_bytes(sum(f["bytes"] for f in rest)), ""))
        print_table([Column("file"), Column("size", right=True), Column("tensors", right=True)], rows)
        print_line()
    if done.quantization is not None:
        _print_quantization(done.quantization)
    for cast, count in done.casts.items():
        print_line(f"cast {cast}: {count} tensors")
    for line in by_reason(done.lost()):
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
