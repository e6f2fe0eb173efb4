"""Options that several commands have, each said once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import click

from anyckpt.cli import completion
from anyckpt.cli.command import SLURM, option

Decorated = TypeVar("Decorated", bound=Callable[..., Any])
Decorator = Callable[[Any], Any]

OUTPUT = "What to write"
MODEL = "What the model is"
QUANTIZED = "Quantizing"
RUN = "How to do it"
SHARED = "By several processes"


def together(*options: Decorator) -> Callable[[Decorated], Decorated]:
    """Several options, in the order in which ``--help`` shows them."""

    def add(command: Decorated) -> Decorated:
        for each in reversed(options):
            command = each(command)
        return command

    return add


output = option(
    "-o",
    "--output",
    "destination",
    title=OUTPUT,
    required=True,
    metavar="DST",
    shell_complete=completion.paths,
    help="What to write.",
)
sharded = option(
    "--sharded",
    title=OUTPUT,
    is_flag=True,
    help="nemo, lightning: a distributed checkpoint inside; hf: by rank, as NeMo Automodel.",
)
shard_size = option("--max-shard-size", title=OUTPUT, metavar="SIZE", help="hf: bytes per weight file, such as 5GB.")
family = option(
    "--family",
    title=MODEL,
    metavar="NAME",
    shell_complete=completion.families,
    help="Model family, where the checkpoint does not tell.",
)
tokenizer = option(
    "--tokenizer",
    title=MODEL,
    metavar="PATH",
    shell_complete=completion.paths,
    help="Sentencepiece model or folder of tokenizer files to send along.",
)
compress = option(
    "--compress/--no-compress", title=OUTPUT, default=None, help="trtllm: one archive (.qnemo), not a directory."
)
as_json = click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")


def to(text: str) -> Callable[[Decorated], Decorated]:
    """``--to``, with its help."""
    return option("--to", title=OUTPUT, metavar="FORMAT", shell_complete=completion.formats, help=text)


def config(text: str, name: str = "--config", metavar: str = "PATH") -> Callable[[Decorated], Decorated]:
    """The model's configuration, with its help."""
    return option(name, title=MODEL, metavar=metavar, shell_complete=completion.paths, help=text)


def calibrated(where: str = "") -> Callable[[Decorated], Decorated]:
    """What is asked of quantizing by what calibration saw, and of quantizing at all.

    Args:
        where: what the help of those for calibration alone begins with.
    """
    return together(
        option(
            "--sq-alpha",
            title=QUANTIZED,
            type=float,
            metavar="X",
            help="int8_sq: how much moves into weights.  [default: 1.0]",
        ),
        option(
            "--enable-kv-cache/--no-enable-kv-cache",
            title=QUANTIZED,
            default=None,
            help=_begun(where, "Scales of keys and values in 8 bits; by default as NeMo decides."),
        ),
        option(
            "--decoder-type",
            title=QUANTIZED,
            metavar="NAME",
            help=f"{where}NeMo's word for the family, such as llama or gpt.",
        ),
        option(
            "--quantize-exclude",
            title=QUANTIZED,
            metavar="GLOB",
            multiple=True,
            help="Leave modules that match as they are.",
        ),
        option(
            "--report",
            title=QUANTIZED,
            metavar="FILE",
            shell_complete=completion.paths,
            help="Write what quantizing did to every weight, as JSON or .html.",
        ),
    )


def _begun(where: str, sentence: str) -> str:
    return where + sentence[0].lower() + sentence[1:] if where else sentence


def _ask_for_script(ctx: click.Context, parameter: click.Parameter, asked: bool) -> None:
    if asked and not ctx.resilient_parsing:
        ctx.meta[SLURM] = parameter.opts[0]


def _sharing(title: str, help_of_share: str) -> Callable[[Decorated], Decorated]:
    return together(
        option("--share", title=title, metavar="I/N", help=help_of_share),
        option(
            "--wait",
            title=title,
            type=float,
            metavar="SECONDS",
            help="With --share: the first waits for the others, so long without a sign of them.  "
            "[default: 600 with auto]",
        ),
        option(
            "--slurm",
            title=title,
            is_flag=True,
            expose_value=False,
            callback=_ask_for_script,
            help="Print a script for sbatch in which several tasks do this, and do nothing.",
        ),
    )


def _engine(title: str, what: str) -> Callable[[Decorated], Decorated]:
    return option(
        "--engine",
        title=title,
        type=click.Choice(["ray"]),
        help=f"ray: by the nodes of a Ray cluster, all of which see {what}.",
    )


share = together(
    _sharing(
        RUN, "Do the I-th of N parts; the last of N processes publishes DST.  auto: as torchrun, srun or mpirun says."
    ),
    _engine(RUN, "SRC and DST"),
)
"""Of every command whose work several processes can do."""

looking = together(
    _sharing(SHARED, "Read the I-th of N parts; one of N processes answers.  auto: as torchrun, srun or mpirun says."),
    option(
        "--records",
        title=SHARED,
        metavar="DIR",
        shell_complete=completion.paths,
        help="With --share: a folder that all processes see, for what each finds until one answers.",
    ),
    _engine(SHARED, "what is read"),
)
"""The same of those that write nothing."""

running = together(
    option("--overwrite", title=RUN, is_flag=True, help="Replace an existing checkpoint, at the end."),
    option("--resume", title=RUN, is_flag=True, help="Continue what an interrupted run left."),
    option("--force", title=RUN, is_flag=True, help="Read a checkpoint that is marked as unfinished, too."),
    option("--workers", title=RUN, type=click.IntRange(min=1), metavar="N", help="Threads."),
    option("--memory", title=RUN, metavar="SIZE", help="Bytes for blocks in flight, such as 512MB."),
    option("--private", title=RUN, is_flag=True, help="hf://: make the repository a private one, if there is none."),
    option("--commit-message", title=RUN, metavar="TEXT", help="hf://: what the commit says."),
)
"""Of every command that writes a checkpoint."""

writing = together(
    option(
        "--dtype",
        title=OUTPUT,
        type=click.Choice(["bf16", "fp16", "fp32", "bfloat16", "float16", "float32"]),
        metavar="TYPE",
        help="Cast floating-point weights, and dequantize quantized ones: bf16, fp16 or fp32 (or bfloat16, float16, "
        "float32).",
    ),
    option("--dry-run", title=RUN, is_flag=True, help="Print the plan and write nothing."),
    running,
    share,
    as_json,
)
"""The same of those that write what they read, in another type if that is asked for."""
