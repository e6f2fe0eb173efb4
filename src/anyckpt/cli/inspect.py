"""``anyckpt inspect``."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import click

from anyckpt.cli import completion, shared, tables
from anyckpt.cli.command import Command, option
from anyckpt.cli.console import by_reason, calls_line, print_json, print_line, print_note, print_part, progress_bar
from anyckpt.cli.model_line import model_line, sizes_line

if TYPE_CHECKING:
    from anyckpt.cli.slurm import Steps
    from anyckpt.operations.inspection import Inspection

_LONGEST_VALUE = 100
_SHOWN_RATES = 4
_SHOWN_STAGES = 64
_TENSORS = "Tensors"
_REST = "What is no tensor"
_QUANTIZATION = "quantization"


def _in_script(parameters: Mapping[str, Any], words: Sequence[str]) -> Steps:
    from anyckpt.cli.slurm import Steps
    from anyckpt.operations.inspect import check_shared

    check_shared("--slurm", stats=parameters["stats"], digest=parameters["digest"])
    return Steps(words)


@click.command(
    cls=Command,
    in_script=_in_script,
    examples=(
        ("what it is", "anyckpt inspect model.nemo"),
        ("its tensors, those of alike layers in one line", "anyckpt inspect llama-hf --tensors '*'"),
        ("what takes the room", "anyckpt inspect llama-hf --tree --depth 2"),
        ("is there a NaN, and where", "anyckpt inspect run/step-1000 --stats"),
        ("for a spreadsheet", "anyckpt inspect llama-hf --stats --tsv"),
        ("the configuration as a file", "anyckpt inspect model.nemo --config"),
        ("how the learning rate was scheduled", "anyckpt inspect last.ckpt --objects 'lr_schedulers*'"),
    ),
)
@click.argument("path", shell_complete=completion.paths)
@option(
    "--tensors",
    title=_TENSORS,
    metavar="GLOB",
    help="List the tensors whose names match, with shape, type, shards and files.",
)
@option(
    "--all", "each", title=_TENSORS, is_flag=True, help="List each layer's, rather than those that are alike as one."
)
@option("--tree", title=_TENSORS, is_flag=True, help="Show what each module takes, as du does of folders.")
@option("--depth", title=_TENSORS, type=click.IntRange(min=0), metavar="N", help="Levels of --tree.")
@option("--stats", title=_TENSORS, is_flag=True, help="Add min, max, mean, std, zeros, NaN and Inf of each tensor.")
@option(
    "--digest",
    title=_TENSORS,
    is_flag=True,
    help="Add the SHA-256 of each tensor's little-endian bytes in C order.",
)
@option(
    "--names",
    title=_TENSORS,
    type=click.Choice(["stored", "hub"]),
    default="stored",
    show_default=True,
    help="Names as stored, or Megatron-Core names with shards joined and layers un-stacked.",
)
@option("--tsv", title=_TENSORS, is_flag=True, help="Print the list, or the tree, with tabs between, and nothing else.")
@option("--config", title=_REST, is_flag=True, help="Print the whole configuration as YAML, and nothing else.")
@option(
    "--objects",
    title=_REST,
    metavar="GLOB",
    help="Print the state besides tensors whose names, or dotted paths in it, match, as YAML and nothing else.",
)
@shared.looking
@shared.as_json
def command(
    path: str,
    tensors: str | None,
    each: bool,
    tree: bool,
    depth: int | None,
    stats: bool,
    digest: bool,
    names: str,
    tsv: bool,
    config: bool,
    objects: str | None,
    as_json: bool,
    **sharing: Any,
) -> None:
    """Say what is in the checkpoint at PATH, without loading it.

    --all, --stats, --digest, --tsv, --tree and --names hub list all tensors unless --tensors chooses some.  --stats and
    --digest list each by itself.
    """
    from anyckpt.operations.inspect import inspect

    if tensors is None and (each or tsv) and not tree:
        tensors = "*"
    tree = tree or depth is not None
    with progress_bar("reading") as progress:
        found = inspect(
            path, tensors=tensors, stats=stats, digest=digest, names=names, tree=tree, progress=progress, **sharing
        )
    if as_json:
        print_json(found.to_json())
        return
    if found.part is not None:
        print_part(path, found.part)
        return
    if config or objects is not None:
        _print_yaml(found, config, objects)
        return
    if not tsv:
        _print_summary(found)
    _print_tensors(found, each or stats or digest, depth, tsv)
    for warning in found.warnings:
        print_note(f"warning: {warning}")
    for note in found.notes:
        print_note(f"note: {note}")


def _print_yaml(found: Inspection, config: bool, objects: str | None) -> None:
    from anyckpt.errors import UsageError
    from anyckpt.plain_yaml import dump_yaml

    if config and not found.config:
        raise UsageError("has no configuration", path=found.path, remedy="see --objects '*' for what else is in it")
    told = dict(found.config) if config else {}
    if objects is not None:
        told |= found.state(objects)
    print(dump_yaml(told, ascii_only=True), end="")


def _print_tensors(found: Inspection, each: bool, depth: int | None, tsv: bool) -> None:
    from anyckpt.cli import tensor_tables

    if found.tensors is None or not (found.tensors or tsv):
        return
    if not tsv:
        print_line()
    if found.tree is not None:
        show = tensor_tables.print_tree_tsv if tsv else tensor_tables.print_tree
        show(found.tree, found.path, depth)
    elif tsv:
        tensor_tables.print_each_tsv(found.tensors)
    elif each:
        tensor_tables.print_each(found.tensors)
    else:
        tensor_tables.print_groups(found)


def _print_summary(found: Inspection) -> None:
    from anyckpt.cli.stages import stages_line, stages_picture
    from anyckpt.units import format_bytes

    sizes = {
        "tensor": found.layout["tensor_parallel"],
        "pipeline": found.layout["pipeline_parallel"],
        "virtual pipeline": found.layout["virtual_pipeline"],
        "expert": found.layout["expert_parallel"],
    }
    stages = found.stages or []
    parallel = [f"{name} {size}" for name, size in sizes.items() if size > 1]
    picture = stages_picture(stages, tables.width()) if stages and not stages_line(stages) else []
    if stages and not picture:
        parallel.append(stages_line(stages))
    types = [f"{count:,} {name} ({format_bytes(found.dtype_bytes[name])})" for name, count in found.dtypes.items()]
    rows = [
        ("path", found.path),
        ("format", " ".join(filter(None, (found.format, found.format_version)))),
        ("family", _family_line(found)),
        ("model", sizes_line(found.sizes or {}) if found.model is None else model_line(found.model)),
        ("adapter", _adapter_line(found.adapter)),
        ("parameters", f"{found.parameters:,}" + (f" ({found.size})" if found.parameters >= 1000 else "")),
        ("tensors", f"{found.tensor_count:,}, {format_bytes(found.bytes)}"),
        ("types", ", ".join(types)),
        (_QUANTIZATION, _text(found.details.get(_QUANTIZATION) or "")),
        ("training", _training_line(found)),
        ("states", ", ".join(name for name, there in found.states.items() if there)),
        ("parallel", ", ".join(parallel) or "whole tensors"),
        ("tokenizer", _tokenizer_line(found.tokenizer)),
        ("artifacts", ", ".join(found.artifacts)),
        ("ignored", "; ".join(by_reason(found.lost()))),
        ("pickles name", calls_line(found.calls)),
        ("configuration", _config_line(found)),
        ("other state", _objects_line(found)),
        ("details", _details_line({name: value for name, value in found.details.items() if name != _QUANTIZATION})),
    ]
    tables.print_facts([(name, value) for name, value in rows if value])
    if picture:
        print_line()
        tables.print_heading("pipeline ranks and their layers")
        for line in picture[:_SHOWN_STAGES]:
            print(line)
        if picture[_SHOWN_STAGES:]:
            print_line(f"... {len(picture) - _SHOWN_STAGES} more, all of them with --json")


def _training_line(found: Inspection) -> str:
    counts = {"step": found.step, "epoch": found.epoch, "consumed samples": found.consumed_samples}
    told = [f"{name} {value:,}" for name, value in counts.items() if value is not None]
    rates = [f"{rate:g}" for rate in found.learning_rates]
    if rates:
        more = f" and {len(rates) - _SHOWN_RATES} more" if rates[_SHOWN_RATES:] else ""
        told.append(f"learning rate{'s' * (len(rates) > 1)} {' and '.join(rates[:_SHOWN_RATES])}{more}")
    if found.loss_scale is not None:
        told.append(f"loss scale {found.loss_scale:,g}")
    return ", ".join(told)


def _config_line(found: Inspection) -> str:
    if not found.config:
        return ""
    count = _settings(found.config)
    return f"{found.config_kind or 'of unknown kind'}, {count:,} setting{'s' * (count != 1)} (--config prints them)"


def _settings(value: Any) -> int:
    return sum(map(_settings, value.values())) if isinstance(value, dict) and value else 1


def _objects_line(found: Inspection) -> str:
    """The kinds of state besides tensors, by patterns that ``--objects`` takes."""
    kinds = Counter(_kind(name) for name in found.objects)
    if not kinds:
        return ""
    told = ", ".join(f"{kind} ({count})" if count > 1 else kind for kind, count in kinds.items())
    return f"{told} (--objects GLOB prints them)"


def _kind(name: str) -> str:
    """``callbacks.*`` of ``callbacks.ModelCheckpoint{...}.dirpath``, ``mp_rank_*/rng`` of ``mp_rank_01/rng``."""
    first, dot, _ = name.partition(".")
    return re.sub(r"\d+([_.]\d+)*", "*", first) + ".*" * bool(dot)


def _details_line(details: dict[str, Any]) -> str:
    told = [f"{name.replace('_', ' ')} {_text(value)}" for name, value in details.items() if _is_short(value)]
    return "; ".join(told)


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


def _is_short(value: Any) -> bool:
    return bool(value) and len(_text(value)) <= _LONGEST_VALUE


def _text(value: Any) -> str:
    import json

    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _base_of(adapter: dict[str, Any]) -> str:
    if adapter["form"] == "inside":
        return ""
    return f"for {adapter['base']}" if adapter["base"] else "for an unnamed base model"
