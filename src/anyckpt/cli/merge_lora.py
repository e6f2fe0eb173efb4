"""``anyckpt merge-lora``."""

from __future__ import annotations

from typing import Any

import click

from anyckpt.cli import completion, shared
from anyckpt.cli.command import Command, option
from anyckpt.cli.console import writing
from anyckpt.cli.convert import show
from anyckpt.cli.layout import layout_options, layout_request

_ADAPTER = "The adapter"


@click.command(
    cls=Command,
    examples=(
        ("a model with its adapter in it, in the model's format", "anyckpt merge-lora llama-hf adapter merged"),
        ("the same, less strongly, for NeMo", "anyckpt merge-lora llama-hf adapter merged.nemo --to nemo --scale 0.7"),
    ),
)
@click.argument("base", metavar="BASE", shell_complete=completion.paths)
@click.argument("adapter", metavar="ADAPTER", shell_complete=completion.paths)
@click.argument("destination", metavar="DST", shell_complete=completion.paths)
@option(
    "--scale",
    title=_ADAPTER,
    type=float,
    default=1.0,
    show_default=True,
    metavar="X",
    help="Multiply the adapter by X.",
)
@option("--alpha", title=_ADAPTER, type=float, metavar="X", help="Its alpha, where it does not say it.")
@option("--include", title=_ADAPTER, metavar="GLOB", multiple=True, help="Take only tensors of it whose names match.")
@option("--exclude", title=_ADAPTER, metavar="GLOB", multiple=True, help="Leave out tensors of it whose names match.")
@shared.to("Format to write; what DST's name tells, else that of BASE if not given.")
@shared.sharded
@shared.shard_size
@shared.family
@shared.config("Configuration of BASE, or a model that has it, where it has none.")
@shared.tokenizer
@layout_options
@shared.writing
def command(base: str, adapter: str, destination: str, as_json: bool, **options: Any) -> None:
    """Write the model BASE with the LoRA or DoRA ADAPTER in its weights to DST.

    Any formats, forms and layouts; a base whose names are the adapter's may be of any model.  Changed weights are
    computed in float32 and rounded once, to their own type or to --dtype; everything else stays bit for bit the same.
    """
    from anyckpt.operations.merge_lora import merge_lora

    layout = layout_request(options)
    with writing("merging", destination) as progress:
        done = merge_lora(base, adapter, destination, layout=layout, progress=progress, **options)
    show(done, as_json)
