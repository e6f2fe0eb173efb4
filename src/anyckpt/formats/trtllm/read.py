"""Reading a TensorRT-LLM checkpoint: ranks joined to whole tensors under its own names."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from anyckpt.checkpoint import Checkpoint, ParallelLayout
from anyckpt.containers.safetensors import read_safetensors_files
from anyckpt.errors import AnyckptError, FormatError, LastingError, MappingError
from anyckpt.formats.shared.hub_folder import read_json
from anyckpt.formats.trtllm import tokenizer
from anyckpt.formats.trtllm.container import CONFIG, LAYERS, RANK, opened, rank_file
from anyckpt.formats.trtllm.division import (
    Division,
    Heads,
    copies,
    division,
    heads_of,
    join,
    layer_of,
    positive,
)
from anyckpt.formats.trtllm.loading import refused
from anyckpt.formats.trtllm.vocabulary import true_size
from anyckpt.layout.replicas import SMALL, Replicas, compare
from anyckpt.storage.location import Location
from anyckpt.tensor import LazyTensor

Tensors = dict[str, LazyTensor]

METHOD = "trtllm"
_ELSEWHERE = ("quantization", "mapping", "rank")
"""Keys of ``config.json`` that say nothing of the model: they are in ``quantization`` and ``layout``."""
_SHOWN = ("quant_algo", "kv_cache_quant_algo", "group_size", "has_zero_point", "pre_quant_scale", "exclude_modules")
"""What of ``quantization`` a person wants to know."""
_MOST_RANKS = 100_000


def read(location: Location) -> Checkpoint:
    """Open a folder or archive.

    Raises:
        FormatError: a rank's file is missing or damaged, or ``config.json`` is.
        MappingError: ranks do not hold the parts of one model.
    """
    folder, container = opened(location)
    stated = read_json(folder.open(CONFIG))
    mapping = _mapping(stated, location.path)
    layout = ParallelLayout(mapping["tp_size"], mapping["pp_size"])
    ranks = _read_ranks(folder, location.path, layout.tensor_parallel * layout.pipeline_parallel)
    config = {key: value for key, value in stated.items() if key not in _ELSEWHERE}
    warnings: list[str] = []
    try:
        tensors = _joined(ranks, layout, config, warnings)
    except AnyckptError as error:
        error.path = error.path or location.path
        raise
    found, artifacts = tokenizer.read(folder)
    quantization = _quantization(stated, artifacts, location.path)
    warnings += refused(tensors, quantization)
    size = true_size(tensors, config, quantization)
    if size is not None:
        config["vocab_size"] = size
    ignored = {}
    if folder.is_folder(tokenizer.NEMO2):
        ignored[tokenizer.NEMO2] = "NeMo 2's description of the model that was exported; its tokenizer is taken"
    return Checkpoint(
        location.path,
        "trtllm",
        tensors,
        format_version=_version(stated),
        dialect="trtllm",
        config=config,
        config_kind="trtllm",
        tokenizer=found,
        artifacts={name: source for name, source in artifacts.items() if name != LAYERS},
        layout=layout,
        warnings=warnings,
        ignored=ignored,
        details={
            "container": container,
            "mapping": mapping,
            **{key: (quantization or {})[key] for key in _SHOWN if (quantization or {}).get(key) is not None},
        },
        quantization=quantization,
    )


def _version(config: Mapping[str, Any]) -> str | None:
    producer = config.get("producer")
    if isinstance(producer, Mapping) and isinstance(producer.get("name"), str):
        return f"{producer['name']} {producer.get('version', '')}".strip()
    return f"TensorRT-LLM {config['version']}" if isinstance(config.get("version"), str) else None


def _mapping(config: Mapping[str, Any], path: str) -> dict[str, int]:
    """Sizes of the layout, each at least 1.

    Raises:
        FormatError: they are not possible.
        MappingError: ranks divide experts or sequences, of which we know no more.
    """
    stated = config.get("mapping", {})
    if not isinstance(stated, Mapping):
        raise FormatError(f"{CONFIG}'s mapping is no mapping", path=path, found=type(stated).__name__)
    sizes = {}
    for key in ("world_size", "tp_size", "pp_size", "cp_size", "moe_tp_size", "moe_ep_size"):
        value = stated.get(key, 1)
        if type(value) is not int or not -1 <= value <= _MOST_RANKS:
            raise FormatError(f"{CONFIG}'s {key} is not possible", path=path, expected="a number of ranks", found=value)
        if key in stated or not key.startswith(("moe", "cp")):
            sizes[key] = max(1, value)  # TensorRT-LLM writes -1 for experts that it has none of
    for key, what in (("cp_size", "sequences"), ("moe_ep_size", "experts")):
        if sizes.get(key, 1) > 1:
            raise MappingError(
                f"its ranks divide {what}, and how is not known here",
                path=path,
                expected=f"{key} 1",
                found=sizes[key],
                remedy="export the model again with tensor and pipeline parallel ranks alone",
            )
    world = sizes["tp_size"] * sizes["pp_size"]
    if "world_size" in stated and sizes["world_size"] != world:
        raise FormatError(
            f"{CONFIG}'s world_size is not that of its ranks", path=path, expected=world, found=sizes["world_size"]
        )
    return {**sizes, "world_size": world}


def _read_ranks(folder: Location, path: str, world: int) -> list[Tensors]:
    present = {int(match[1]) for name in folder.names if (match := RANK.fullmatch(name))}
    missing = [rank_file(number) for number in range(world) if number not in present]
    if missing or len(present) != world:
        surplus = [rank_file(number) for number in sorted(present) if number >= world]
        raise FormatError(
            f"{len(missing)} of {world} ranks' files are missing: {', '.join(missing[:8])}"
            if missing
            else f"has more ranks' files than {CONFIG} says: {', '.join(surplus[:8])}",
            path=path,
            expected=f"{rank_file(0)} to {rank_file(world - 1)}",
            found=f"{len(present)} files",
            remedy="copy the folder again from its origin",
        )
    sources = [folder.open(rank_file(number)) for number in range(world)]
    return [tensors for tensors, _ in read_safetensors_files(sources)]


def _joined(
    ranks: Sequence[Tensors], layout: ParallelLayout, config: Mapping[str, Any], warnings: list[str]
) -> Tensors:
    """Every tensor whole, layers numbered through all stages."""
    count = layout.tensor_parallel
    heads = heads_of(config, count)
    result: Tensors = {}
    before = 0
    for stage in range(layout.pipeline_parallel):
        parts = ranks[stage * count : (stage + 1) * count]
        _check_same_names(parts, stage * count)
        layers = [found[0] for name in parts[0] if (found := layer_of(name)) is not None]
        for name in parts[0]:
            key = _global(name, before)
            if key in result:
                raise MappingError("is on two pipeline stages", tensor=key)
            result[key] = _joined_one(name, parts, config, heads, warnings)
        before += 1 + max(layers, default=-1)
    return result


def _global(name: str, before: int) -> str:
    found = layer_of(name)
    return name if found is None else f"transformer.layers.{before + found[0]}.{found[1]}"


def _check_same_names(parts: Sequence[Tensors], first: int) -> None:
    for number, part in enumerate(parts[1:], 1):
        odd = sorted(parts[0].keys() ^ part.keys())
        if odd:
            raise MappingError(
                f"{len(odd)} tensors are not in all of {rank_file(first)} and {rank_file(first + number)}",
                tensor=odd[0],
                remedy="copy the files again, of one export",
            )


def _joined_one(
    name: str, parts: Sequence[Tensors], config: Mapping[str, Any], heads: Heads, warnings: list[str]
) -> LazyTensor:
    pieces = [part[name] for part in parts]
    if len(pieces) == 1:
        return pieces[0]
    try:
        how = division(name, parts[0], config)
        whole = join(pieces, how, heads)
        warnings += compare(_replicas(name, pieces, how, heads))
    except LastingError as error:
        error.tensor = error.tensor or name
        raise error.told_as(MappingError) from None
    return _without_padding(name, whole, how, config, heads.ranks)


def _replicas(name: str, pieces: Sequence[LazyTensor], how: Division, heads: Heads) -> Iterator[Replicas]:
    """Copies that are small enough to be read."""
    for first, other, rank in copies(pieces, how, heads):
        if first.nbytes <= SMALL:
            yield Replicas(name, (("the first rank", first), (f"rank {rank}", other)))


def _without_padding(name: str, tensor: LazyTensor, how: Division, config: Mapping[str, Any], ranks: int) -> LazyTensor:
    """Without the rows after the last that make them divide."""
    key = "max_position_embeddings" if "position" in name else "vocab_size"
    true = positive(config, key)
    if how.kind != "padded" or true is None or not true < tensor.shape[0] < true + ranks:
        return tensor
    return tensor.narrow(0, 0, true)


def _quantization(config: Mapping[str, Any], artifacts: Mapping[str, Any], path: str) -> dict[str, Any] | None:
    """How weights are quantized, as ``config.json`` and the file beside it say; None if they are not."""
    stated = config.get("quantization")
    if stated is None:
        return None
    if not isinstance(stated, Mapping):
        raise FormatError(f"{CONFIG}'s quantization is no mapping", path=path, found=type(stated).__name__)
    facts = dict(stated)
    if facts.get("quant_algo") == "MIXED_PRECISION" and LAYERS in artifacts:
        facts["quantized_layers"] = read_json(artifacts[LAYERS]).get("quantized_layers")
    if facts.get("quant_algo") is None and facts.get("kv_cache_quant_algo") is None:
        return None
    return {"quant_method": METHOD, **facts}
