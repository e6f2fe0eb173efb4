"""``anyckpt merge-lora``."""

from __future__ import annotations

from typing import Any

import click

from anyckpt.cli.console import progress_bar
from anyckpt.cli.convert import show, writing_options
from anyckpt.cli.layout import layout_options, layout_request


@click.command()
@click.argument("base", metavar="BASE")
@click.argument("adapter", metavar="ADAPTER")
@click.argument("destination", metavar="DST")
@click.option("--to", metavar="FORMAT", help="Format to write; that of BASE if not given.")
@click.option("--scale", type=float, default=1.0, show_default=True, metavar="X", help="Multiply the adapter by X.")
@click.option("--alpha", type=float, metavar="X", help="The adapter's alpha, where it does not say it.")
@click.option("--family", metavar="NAME", help="Model family, where BASE does not tell.")
@click.option("--config", metavar="PATH", help="Configuration of BASE, or a model that has it, where it has none.")
@click.option("--tokenizer", metavar="PATH", help="Sentencepiece model or folder of tokenizer files to send along.")
@click.option("--sharded", is_flag=True, help="nemo, lightning: a distributed checkpoint inside.")
@click.option("--max-shard-size", metavar="SIZE", help="hf: bytes per weight file, such as 5GB.")
@click.option("--include", metavar="GLOB", multiple=True, help="Take only tensors of ADAPTER whose names match.")
@click.option("--exclude", metavar="GLOB", multiple=True, help="Leave out tensors of ADAPTER whose names match.")
@layout_options
@writing_options
def command(base: str, adapter: str, destination: str, as_json: bool, **options: Any) -> None:
    """Write the model BASE with the LoRA or DoRA ADAPTER in its weights to DST.

    Any formats, forms and layouts; a base whose names are the adapter's may be of any model.  Changed weights are
    computed in float32 and rounded once, to their own type or to --dtype; everything else stays bit for bit the same.
    """
    from anyckpt.operations.merge_lora import merge_lora

    layout = layout_request(options)
    with progress_bar("merging") as progress:
        done = merge_lora(base, adapter, destination, layout=layout, progress=progress, **options)
    show(done, as_json)
