"""``anyckpt inspect``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from anyckpt.cli import completion
from anyckpt.cli.command import Command
from anyckpt.cli.console import by_reason, calls_line, print_json, print_line, print_note, print_table, progress_bar
from anyckpt.cli.model_line import model_line

if TYPE_CHECKING:
    from anyckpt.operations.inspection import Inspection, TensorFacts

_SHOWN_CONFIG = 40
_LONGEST_VALUE = 100


@click.command(
    cls=Command,
    examples=(("what it is", "anyckpt inspect model.nemo"),),
)
@click.argument("path", shell_complete=completion.paths)
@click.option(
    "--tensors", metavar="GLOB", help="List the tensors whose names match, with shape, type, shards and files."
)
@click.option("--stats", is_flag=True, help="Add min, max, mean, std, zeros, NaN and Inf of each listed tensor.")
@click.option("--digest", is_flag=True, help="Add the SHA-256 of each listed tensor's little-endian bytes in C order.")
@click.option(
    "--names",
    type=click.Choice(["stored", "hub"]),
    default="stored",
    show_default=True,
    help="Names as stored, or Megatron-Core names with shards joined and layers un-stacked.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def command(path: str, tensors: str | None, stats: bool, digest: bool, names: str, as_json: bool) -> None:
    """Say what is in the checkpoint at PATH, without loading it.

    --stats, --digest and --names hub list all tensors unless --tensors chooses some.
    """
    from anyckpt.operations.inspect import inspect

    with progress_bar("reading") as progress:
        found = inspect(path, tensors=tensors, stats=stats, digest=digest, names=names, progress=progress)
    if as_json:
        print_json(found.to_json())
        return
    _print_summary(found)
    if found.tensors is not None:
        print_line()
        _print_tensors(found.tensors)
    for warning in found.warnings:
        print_note(f"warning: {warning}")
    for note in found.notes:
        print_note(f"note: {note}")


def _print_summary(found: Inspection) -> None:
    from anyckpt.units import format_bytes

    layout = {
        "tensor": found.layout["tensor_parallel"],
        "pipeline": found.layout["pipeline_parallel"],
        "virtual pipeline": found.layout["virtual_pipeline"],
        "expert": found.layout["expert_parallel"],
    }
    training = {"step": found.step, "epoch": found.epoch, "consumed samples": found.consumed_samples}
    rows = [
        ("path", found.path),
        ("format", " ".join(filter(None, (found.format, found.format_version)))),
        ("family", _family_line(found)),
        ("model", "" if found.model is None else model_line(found.model)),
        ("adapter", _adapter_line(found.adapter)),
        ("parameters", f"{found.parameters:,}" + (f" ({found.size})" if found.parameters >= 1000 else "")),
        ("tensors", f"{found.tensor_count:,}, {format_bytes(found.bytes)}"),
        (
            "types",
            ", ".join(
                f"{count:,} {name} ({format_bytes(found.dtype_bytes[name])})" for name, count in found.dtypes.items()
            ),
        ),
        ("parallel", ", ".join(f"{name} {size}" for name, size in layout.items() if size > 1) or "whole tensors"),
        ("training", ", ".join(f"{name} {value:,}" for name, value in training.items() if value is not None)),
        ("states", ", ".join(name for name, there in found.states.items() if there)),
        ("tokenizer", _tokenizer_line(found.tokenizer)),
        ("artifacts", ", ".join(found.artifacts)),
        ("ignored", "; ".join(by_reason(found.ignored))),
        ("pickles name", calls_line(found.calls)),
        *((name.replace("_", " "), _brief(value)) for name, value in found.details.items() if _is_short(value)),
    ]
    print_table((), [(name, value) for name, value in rows if value])
    if found.config:
        _print_values(_flat("", found.config), f"config ({found.config_kind or 'unknown kind'})")
    if found.values:
        _print_values(list(found.values.items()), "state besides tensors")


def _print_values(settings: list[tuple[str, Any]], title: str) -> None:
    shown = [(name, _brief(value)) for name, value in settings[:_SHOWN_CONFIG]]
    if len(settings) > _SHOWN_CONFIG:
        shown.append((f"... {len(settings) - _SHOWN_CONFIG} more", "print all with --json"))
    print_line()
    print_table((), shown, title=title)


def _print_tensors(tensors: list[TensorFacts]) -> None:
    from anyckpt.units import format_bytes

    header = ["name", "type", "shape", "size", "shards", "files"]
    right = [3, 4]
    moments = any(tensor.statistics is not None for tensor in tensors)
    if moments:
        header += ["min", "max", "mean", "std", "zeros", "nan", "inf"]
        right += range(6, 13)
    digests = any(tensor.sha256 is not None for tensor in tensors)
    if digests:
        header.append("sha256")
    rows = []
    for tensor in tensors:
        shape = str(list(tensor.shape))
        row = [tensor.name, tensor.dtype, shape, format_bytes(tensor.nbytes), str(tensor.shards), _files(tensor.files)]
        if moments:
            row += ["-" if v is None else f"{v:,}" if isinstance(v, int) else f"{v:.5g}" for v in _moments(tensor)]
        if digests:
            row.append(tensor.sha256 or "-")
        rows.append(row)
    print_table(header, rows, right=right)


def _moments(tensor: TensorFacts) -> list[float | None]:
    s = tensor.statistics
    return [None] * 7 if s is None else [s.min, s.max, s.mean, s.std, s.zeros, s.nan, s.inf]


def _files(files: tuple[str, ...]) -> str:
    return ", ".join(files[:2]) + (f" and {len(files) - 2} more" if len(files) > 2 else "")


def _family_line(found: Inspection) -> str:
    """The family, or what the names look like."""
    likely = found.likely_families
    family = found.family or "unknown" + (f", by names {', '.join(likely)}" if likely else "")
    return family + (f" ({found.dialect} names)" if found.dialect else "")


def _adapter_line(adapter: dict[str, Any] | None) -> str:
    if adapter is None:
        return ""
    kind = {"lora": "LoRA", "dora": "DoRA"}.get(adapter["kind"], adapter["kind"])
    divisor = "the square root of the rank" if adapter["rank_stabilized"] else "the rank"
    facts = (
        f"rank {adapter['rank']}" if adapter["rank"] is not None else "",
        f"alpha {adapter['alpha']:g} over {divisor}" if adapter["alpha"] is not None else "unknown alpha",
        "beside the weights" if adapter["form"] == "inside" else adapter["form"],
        f"of {', '.join(adapter['targets'])}" if adapter["targets"] else "",
        _base_of(adapter),
    )
    return f"{kind}, " + ", ".join(filter(None, facts))


def _tokenizer_line(tokenizer: dict[str, Any] | None) -> str:
    if tokenizer is None:
        return ""
    return ": ".join(filter(None, (tokenizer["library"], ", ".join(tokenizer["files"]) or tokenizer["hub_name"])))


def _flat(prefix: str, value: Any) -> list[tuple[str, Any]]:
    if not isinstance(value, dict) or not value:
        return [(prefix, value)]
    return [row for key, item in value.items() for row in _flat(f"{prefix}.{key}" if prefix else key, item)]


def _brief(value: Any) -> str:
    text = _text(value)
    return text if len(text) <= _LONGEST_VALUE else text[: _LONGEST_VALUE - 3] + "..."


def _is_short(value: Any) -> bool:
    return bool(value) and len(_text(value)) <= _LONGEST_VALUE


def _text(value: Any) -> str:
    import json

    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _base_of(adapter: dict[str, Any]) -> str:
    if adapter["form"] == "inside":
        return ""
    return f"for {adapter['base']}" if adapter["base"] else "for an unnamed base model"
