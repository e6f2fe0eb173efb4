"""``anyckpt quantize``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import click

from anyckpt.cli import completion, shared
from anyckpt.cli.command import Command, option
from anyckpt.cli.console import writing
from anyckpt.cli.convert import show
from anyckpt.cli.shared import OUTPUT, QUANTIZED, RUN

if TYPE_CHECKING:
    from anyckpt.cli.slurm import Steps

_SIZE = click.IntRange(min=1)
_CALIBRATION = "What to calibrate with"


def _in_script(parameters: Mapping[str, Any], words: Sequence[str]) -> Steps:
    """Calibration once, and what it saw given to all tasks, as each would find it otherwise to the last bit."""
    from anyckpt.cli.slurm import Steps
    from anyckpt.errors import UsageError

    saved, dataset = parameters["save_statistics"], parameters["calib_dataset"]
    if parameters["statistics"] is not None:
        return Steps(words)
    if dataset is None and parameters["config"] is None:
        _check_needs_nothing(parameters)
    if saved is dataset is None:
        return Steps(words)
    if saved is None:
        raise UsageError(
            "one process calibrates in the script, and all tasks need what it saw",
            remedy="name a file that all of them see with --save-stats FILE",
        )
    calibrating = {name for each in command.params if getattr(each, "title", "") == _CALIBRATION for name in each.opts}
    left: list[str] = []
    value_follows = False
    for word in words:
        name, is_whole, _ = word.partition("=")
        if not value_follows and name not in calibrating:
            left.append(word)
        value_follows = not value_follows and name in calibrating and not is_whole
    return Steps([*left, "--stats", saved], [*words, "--dry-run"], saved)


def _check_needs_nothing(parameters: Mapping[str, Any]) -> None:
    """Raise UsageError if the algorithm, as it is written, needs activations, which the tasks would be without."""
    from anyckpt.errors import UsageError
    from anyckpt.operations.quantize import written_form
    from anyckpt.quantization.forms import layouts_of

    name = parameters["algorithm"] or "fp8"
    layout = layouts_of(name).get(written_form(name, parameters["to"] or "trtllm", parameters["quantize_form"]))
    if layout is not None and layout.sees_activations:
        raise UsageError(
            f"{name} depends on activations, and the tasks of the script would have nothing to calibrate with",
            remedy="give --calib-dataset FILE and --save-stats FILE, or --stats of an earlier calibration",
        )


@click.command(
    cls=Command,
    in_script=_in_script,
    examples=(
        (
            "AWQ for TensorRT-LLM",
            "anyckpt quantize llama-hf llama.qnemo --algorithm int4_awq --calib-dataset texts.jsonl",
        ),
        (
            "FP8 for vLLM, of a .nemo",
            "anyckpt quantize llama.nemo llama-fp8 --algorithm fp8 --to hf --calib-dataset texts.jsonl",
        ),
        (
            "as NeMo's own file says",
            "anyckpt quantize llama.nemo llama.qnemo --config megatron_gpt_ptq.yaml --calib-dataset texts.jsonl",
        ),
        ("for other GPUs, without torch", "anyckpt quantize llama-hf tp4 --algorithm int4_awq --stats seen --tp 4"),
    ),
)
@click.argument("source", metavar="SRC", shell_complete=completion.paths)
@click.argument("destination", metavar="DST", shell_complete=completion.paths)
@option(
    "--algorithm",
    title=QUANTIZED,
    metavar="NAME",
    shell_complete=completion.algorithms,
    help="fp8, int8, int8_sq, int4_awq, w4a8_awq, nvfp4; or one that needs no calibration, as for convert --quantize; "
    "null for none.  [default: fp8]",
)
@option(
    "--config",
    title=QUANTIZED,
    metavar="FILE",
    shell_complete=completion.paths,
    help="NeMo's PTQ settings in YAML (megatron_gpt_ptq.yaml, or NeMo 2's); options go before them.",
)
@option(
    "--awq-block-size",
    title=QUANTIZED,
    type=_SIZE,
    metavar="N",
    help="int4 and AWQ: columns with one scale.  [default: 128]",
)
@shared.calibrated()
@option(
    "--calib-dataset",
    title=_CALIBRATION,
    metavar="FILE",
    shell_complete=completion.paths,
    help="A text, JSON lines with a field text, or token ids (.npy, or lists in JSON lines).",
)
@option("--calib-field", title=_CALIBRATION, metavar="NAME", help="The field with the text.  [default: text, article]")
@option(
    "--num-calib-size",
    title=_CALIBRATION,
    type=_SIZE,
    metavar="N",
    help="Samples to use.  [default: 512, or what there is]",
)
@option("--calib-batch-size", title=_CALIBRATION, type=_SIZE, metavar="N", help="Sequences at a time.  [default: 64]")
@option(
    "--calib-sequence-length", title=_CALIBRATION, type=_SIZE, metavar="N", help="Tokens of a sample.  [default: 512]"
)
@option(
    "--calib-dtype",
    title=_CALIBRATION,
    type=click.Choice(["bf16", "fp16", "fp32"]),
    help="Type in which the model runs; its own if not given.",
)
@option(
    "--stats",
    "statistics",
    title=_CALIBRATION,
    metavar="FILE",
    shell_complete=completion.paths,
    help="What an earlier calibration saw, in place of a text.",
)
@option(
    "--save-stats",
    "save_statistics",
    title=_CALIBRATION,
    metavar="FILE",
    shell_complete=completion.paths,
    help="Keep what this calibration sees.",
)
@option("--to", title=OUTPUT, metavar="FORMAT", help="trtllm (a .qnemo) or hf.  [default: trtllm]")
@option(
    "--quantize-form",
    title=OUTPUT,
    metavar="FORM",
    shell_complete=completion.forms,
    help="hf: how quantized weights are stored, compressed-tensors or modelopt.",
)
@option(
    "--inference-tensor-parallel",
    "--tp",
    "inference_tensor_parallel",
    title=OUTPUT,
    type=_SIZE,
    metavar="N",
    help="Ranks to divide tensors for.",
)
@option(
    "--inference-pipeline-parallel",
    "--pp",
    "inference_pipeline_parallel",
    title=OUTPUT,
    type=_SIZE,
    metavar="N",
    help="Stages to divide layers for.",
)
@option(
    "--dtype",
    title=OUTPUT,
    type=click.Choice(["16", "fp16", "bf16", "fp32"]),
    help="Of what is not quantized; its own if not given.",
)
@shared.compress
@option("--gzip", title=OUTPUT, is_flag=True, help="trtllm: an archive that is compressed by gzip.")
@shared.family
@shared.config("Model configuration, or a model that has it, where SRC has none.", "--model-config")
@shared.tokenizer
@option("--dry-run", title=RUN, is_flag=True, help="Calibrate, print the plan and write no checkpoint.")
@shared.running
@shared.share
@shared.as_json
def command(source: str, destination: str, as_json: bool, **options: Any) -> None:
    """Quantize the model at SRC, whatever its format, to DST, as NeMo's post-training quantization does.

    Where the algorithm asks for activations, transformers runs the model over --calib-dataset, one layer at a time.
    """
    from anyckpt.operations.quantize import quantize

    options["quantize_exclude"] = options["quantize_exclude"] or None
    with writing("quantizing", destination) as progress:
        done = quantize(source, destination, progress=progress, **options)
    show(done, as_json)
