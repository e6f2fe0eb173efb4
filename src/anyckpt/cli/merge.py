"""``anyckpt merge``."""

from __future__ import annotations

from typing import Any

import click

from anyckpt.cli import completion, shared
from anyckpt.cli.average import numbers
from anyckpt.cli.command import Command, option
from anyckpt.cli.console import writing
from anyckpt.cli.convert import show
from anyckpt.cli.layout import layout_options, layout_request
from anyckpt.cli.shared import OUTPUT


def _one_or_each(ctx: click.Context, parameter: click.Parameter, value: str | None) -> float | list[float] | None:
    found = numbers(ctx, parameter, value)
    return found[0] if found is not None and len(found) == 1 else found


_HOW = "How to merge"


@click.command(
    cls=Command,
    examples=(
        (
            "half of what two models have learned over their base",
            "anyckpt merge A B -o sum --base C --method task_arithmetic --weights 0.5,0.5",
        ),
        (
            "the same with a fifth of each update, by TIES",
            "anyckpt merge A B -o ties --base C --method ties --density 0.2",
        ),
        ("two adapters at once", "anyckpt merge lora-1 lora-2 -o merged --base C --method task_arithmetic"),
        ("a recipe of mergekit, written for NeMo", "anyckpt merge --recipe recipe.yaml -o merged.nemo --to nemo"),
    ),
)
@click.argument("sources", nargs=-1, metavar="[SRC...]", shell_complete=completion.paths)
@option(
    "--method",
    title=_HOW,
    type=click.Choice(["linear", "task_arithmetic", "slerp", "ties", "dare_linear", "dare_ties"]),
    metavar="METHOD",
    help="linear, task_arithmetic, slerp, ties, dare_linear or dare_ties.  [default: linear]",
)
@option(
    "--base",
    title=_HOW,
    metavar="PATH",
    shell_complete=completion.paths,
    help="What the SRCs were trained from, and what adapters among them are added to.",
)
@option(
    "--weights",
    title=_HOW,
    callback=numbers,
    metavar="W1,W2,...",
    help="A weight per SRC, of any sign; 1 for each if not given.",
)
@option(
    "--density",
    title=_HOW,
    callback=_one_or_each,
    metavar="D[,D2,...]",
    help="ties, dare_*: share of each update that is left; one, or one per SRC.",
)
@option(
    "--t", title=_HOW, type=float, metavar="T", help="slerp: 0 for the first SRC, 1 for the second.  [default: 0.5]"
)
@option("--scale", title=_HOW, type=float, metavar="X", help="Multiply the sum of updates by X (mergekit's lambda).")
@option(
    "--normalize/--no-normalize",
    title=_HOW,
    default=None,
    help="Divide sums by that of the weights.  [default: linear and ties do]",
)
@option(
    "--rescale/--no-rescale",
    title=_HOW,
    default=None,
    help="Scale what is left of an update to make up for what is not.  [default: dare_* do]",
)
@option("--seed", title=_HOW, type=int, default=0, show_default=True, metavar="N", help="dare_*: of what is left.")
@option(
    "--recipe",
    title=_HOW,
    metavar="FILE",
    shell_complete=completion.paths,
    help="A YAML file of mergekit in place of SRC and all of the above.",
)
@shared.output
@shared.to("Format to write; what DST's name tells, else that of the base or first SRC if not given.")
@option("--names", title=OUTPUT, metavar="DIALECT", help="lightning, dcp, torch, safetensors: how to name weights.")
@shared.sharded
@shared.shard_size
@option("--include", title=OUTPUT, metavar="GLOB", multiple=True, help="Take only weights whose names match.")
@option("--exclude", title=OUTPUT, metavar="GLOB", multiple=True, help="Leave out weights whose names match.")
@shared.family
@shared.config("Model configuration, where the checkpoints have none.", metavar="FILE")
@shared.tokenizer
@layout_options
@shared.writing
def command(sources: tuple[str, ...], destination: str, as_json: bool, **options: Any) -> None:
    """Merge models of one architecture, of any formats and layouts, or adapters into their base.

    linear adds weighted models; task_arithmetic adds to the base what each SRC has learned over it; ties and dare_*
    do so with the largest elements, or random ones, of each update alone; slerp goes along the arc between two.
    Names are Hugging Face's where the family is known, so that results do not depend on formats.  Configuration and
    files are those of the base, or of the first SRC; optimizers are left out.
    """
    from anyckpt.operations.merge import merge

    layout = layout_request(options)
    with writing("merging", destination) as progress:
        done = merge(sources, destination, layout=layout, progress=progress, **options)
    show(done, as_json)
