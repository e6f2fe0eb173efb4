"""Opening a ``.nemo`` in place: its configuration, its weights wherever they lie in it, and its other members."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import field
from itertools import chain
from typing import Any

from anyckpt.checkpoint import AdapterSettings, Checkpoint, ParallelLayout, RankShard, StoredChecksum
from anyckpt.config.nemo_speech import class_name, is_speech
from anyckpt.containers.torch_file import read_torch, read_torch_files
from anyckpt.containers.torch_file.checksums import stored_checksums
from anyckpt.data_classes import dataclass
from anyckpt.engine.names import MANIFEST_NAME, UNFINISHED_NAME
from anyckpt.errors import FormatError
from anyckpt.formats.nemo.config import adapter_settings, is_megatron_config, missing_artifacts
from anyckpt.formats.nemo.container import (
    CONFIG,
    FLAT_WEIGHTS,
    SHARDED_WEIGHTS,
    Container,
    Subfolder,
    open_container,
)
from anyckpt.formats.nemo.naming import FLAT
from anyckpt.formats.nemo.tokenizer import read_tokenizer
from anyckpt.formats.shared.no_weights import extra_state_reason
from anyckpt.formats.shared.rank_files import (
    Chunk,
    check_places,
    has_local_norms,
    rank_shards,
    with_virtual,
)
from anyckpt.formats.shared.rank_folders import Place, by_place
from anyckpt.pickling.walk import find_leaves
from anyckpt.plain_yaml import load_yaml_mapping
from anyckpt.storage.folder import Folder
from anyckpt.storage.location import Location
from anyckpt.storage.source import ByteSource
from anyckpt.tensor import LazyTensor

_FLAT_NAME = re.compile(r"^model\.(?:module\.)?(?:decoder|embedding|output_layer)\.")
_ADAPTER = re.compile(r"\.adapter_layer\.lora_|\.adapter\.|_extra_state$")
_EXTRA_STATE = re.compile(r"(^|\.)_extra_state$")


@dataclass
class _Weights:
    """What the weights of a ``.nemo`` are found to be."""

    tensors: dict[str, LazyTensor]
    kind: str
    dialect: str | None
    objects: dict[str, Any] = field(default_factory=dict)
    layout: ParallelLayout = field(default_factory=ParallelLayout)
    warnings: list[str] = field(default_factory=list)
    ignored: dict[str, str] = field(default_factory=dict)
    details: dict[str, Any] = field(default_factory=dict)
    checksums: Callable[[], Iterable[StoredChecksum]] = tuple
    ranks: tuple[RankShard, ...] = ()
    key_paths: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    common: tuple[str, ...] | None = None
    holds_states: Callable[[], bool] | None = None


def read(location: Location) -> Checkpoint:
    """Open a ``.nemo`` file or an unpacked one.

    Where it has a folder per rank, ``tensors`` lists what is stored by folder, and ``ranks`` has the weights under
    the hub's names.

    Raises:
        FormatError: the archive is damaged, has no configuration or no weights, or lacks ranks.
        UnsafeError: a member is a link, climbs out, is there twice; or the configuration is a bomb.
    """
    container = open_container(location)
    files = _files(container)
    config = read_config(container, files)
    weights = _read_weights(container, files, config, location.path)
    others = _others(container, files)
    tokenizer = read_tokenizer(config, others)
    missing = [
        f"{CONFIG}: {key} refers to {name!r}, which the archive lacks"
        for key, name in missing_artifacts(config, others).items()
    ]
    used = set() if tokenizer is None else {id(source) for source in tokenizer.files.values()}
    return Checkpoint(
        path=location.path,
        format="nemo",
        format_version=_text(config.get("nemo_version")),
        tensors=weights.tensors,
        dialect=weights.dialect or (FLAT if weights.kind == "flat" and _is_own(config) else None),
        objects=weights.objects,
        config=config,
        config_kind="nemo1" if is_megatron_config(config) or is_speech(config) else None,
        tokenizer=tokenizer,
        artifacts={name: source for name, source in others.items() if id(source) not in used},
        layout=weights.layout,
        warnings=[*weights.warnings, *missing],
        unloadable=missing,
        ignored=weights.ignored,
        details={
            **weights.details,
            "container": container.kind,
            "weights": weights.kind,
            "target": _text(config.get("target")),
            "nemo_version": _text(config.get("nemo_version")),
            "members": [{"name": name, "bytes": source.size} for name, source in _sized(container, files)],
        },
        key_paths=weights.key_paths,
        common=weights.common,
        checksums=weights.checksums,
        ranks=weights.ranks,
        holds_states=weights.holds_states,
        adapter=_adapter(weights, config, location.path),
    )


def _adapter(weights: _Weights, config: dict[str, Any], path: str) -> AdapterSettings | None:
    """What the configuration says of the adapter, if the weights are one: a model may have been trained with it."""
    names = weights.ranks[0].tensors if weights.ranks else weights.tensors
    of_adapter = bool(names) and all(_ADAPTER.search(name) for name in names)
    return (adapter_settings(config, path) or AdapterSettings()) if of_adapter else None


@dataclass(frozen=True)
class Members:
    """What is in a ``.nemo``, for who makes a module of it.

    Attributes:
        config: ``model_config.yaml``.
        others: files that are neither configuration nor weights.
        weights: the file with the state dict; None if the weights are of ranks or a distributed checkpoint.
    """

    config: dict[str, Any]
    others: dict[str, ByteSource]
    weights: ByteSource | None

    def state(self) -> dict[Any, Any] | None:
        """The state dict as it was pickled, with what it says of its modules.

        Raises:
            FormatError: the file is damaged, or holds none.
        """
        return None if self.weights is None else _state_dict(read_torch(self.weights).root, self.weights.name)


def read_members(location: Location) -> Members:
    """Open a ``.nemo`` file or an unpacked one, and read no weights.

    Raises:
        FormatError: the archive is damaged, or has no configuration.
        UnsafeError: a member is a link, climbs out, is there twice; or the configuration is a bomb.
    """
    container = open_container(location)
    files = _files(container)
    flat = FLAT_WEIGHTS in files
    return Members(
        read_config(container, files), _others(container, files), container.folder.open(FLAT_WEIGHTS) if flat else None
    )


def _files(container: Container) -> list[str]:
    names = list(container.members) if container.members else list(container.folder.names())
    return [name for name in names if not (container.members and container.members[name].is_directory)]


def _is_own(config: dict[str, Any]) -> bool:
    """Whether a model is of a class of NeMo's with an encoder that is none of Megatron's, and names are NeMo's own.

    Such names may look like the hub's (``decoder.layers.0.``), and NeMo finds them under no others.
    """
    return bool(class_name(config)) and isinstance(config.get("encoder"), dict) and not is_megatron_config(config)


def _others(container: Container, files: list[str]) -> dict[str, ByteSource]:
    """Files that are neither configuration nor weights."""
    return {
        name: container.folder.open(name)
        for name in files
        if name not in (CONFIG, FLAT_WEIGHTS, MANIFEST_NAME, UNFINISHED_NAME)
        and not name.startswith(f"{SHARDED_WEIGHTS}/")
        and not name.endswith(f"/{FLAT_WEIGHTS}")
    }


def read_config(container: Container, files: list[str]) -> dict[str, Any]:
    """``model_config.yaml`` as plain data.

    Raises:
        FormatError: it is missing or invalid.
        UnsafeError: it would build objects, or expands without bound.
    """
    folder = container.folder
    if CONFIG not in files:
        elsewhere = next((name for name in files if name.endswith(f"/{CONFIG}")), None)
        raise FormatError(
            f"has no {CONFIG}",
            path=folder.name,
            expected=f"{CONFIG} at the top of the archive",
            found=elsewhere or (", ".join(files[:5]) or "no files"),
            remedy="pack it again from within that folder" if elsewhere else "check that it is a .nemo file",
        )
    source = folder.open(CONFIG)
    return load_yaml_mapping(source.read_all(limit=64 << 20), source.name)


def _read_weights(container: Container, files: list[str], config: dict[str, Any], path: str) -> _Weights:
    flat = FLAT_WEIGHTS in files
    sharded = any(name.startswith(f"{SHARDED_WEIGHTS}/") for name in files)
    folders = (name.removesuffix(f"/{FLAT_WEIGHTS}") for name in files if name.endswith(f"/{FLAT_WEIGHTS}"))
    ranks = by_place(folders)
    if flat + sharded + bool(ranks) > 1:
        raise FormatError(
            "holds weights in more than one layout",
            path=path,
            expected=f"one of {FLAT_WEIGHTS}, {SHARDED_WEIGHTS}/ and rank folders",
            found=", ".join(name for name in files if name.endswith(FLAT_WEIGHTS) or SHARDED_WEIGHTS in name)[:200],
        )
    if ranks:
        return _read_ranks(container.folder, ranks, config, path)
    if flat:
        return _read_flat(container.folder.open(FLAT_WEIGHTS))
    if sharded:
        return _read_sharded(container, path)
    raise FormatError(
        "has no weights",
        path=path,
        expected=f"{FLAT_WEIGHTS}, {SHARDED_WEIGHTS}/ or rank folders",
        found=", ".join(files[:5]),
        remedy="copy it again from its origin",
    )


def _read_ranks(folder: Folder, ranks: dict[Place, str], config: dict[str, Any], path: str) -> _Weights:
    """A state dict for each rank."""
    layout = check_places(ranks, config, path)
    tensors: dict[str, LazyTensor] = {}
    warnings: list[str] = []
    chunks: list[Chunk] = []
    opened = read_torch_files(folder.open(f"{rank}/{FLAT_WEIGHTS}") for rank in ranks.values())
    for (place, rank), contents in zip(ranks.items(), opened, strict=True):
        name = f"{rank}/{FLAT_WEIGHTS}"
        root = _state_dict(contents.root, name)
        warnings += [warning for warning in contents.warnings if warning not in warnings]
        chunks.append(Chunk(place, 0, root, name))
        for keys, tensor in find_leaves(dict(root), lambda value: isinstance(value, LazyTensor)):
            tensors[".".join(map(str, (rank, *keys)))] = tensor
    layout = with_virtual(layout, chunks, config, path)
    ignored: dict[str, str] = {}
    shards = rank_shards(chunks, config, layout, ignored)
    return _Weights(
        tensors,
        "ranks",
        None,
        layout=layout,
        warnings=warnings,
        ignored=ignored,
        details={"rank_folders": len(ranks), "local_norms": has_local_norms(chunks)},
        checksums=lambda: chain.from_iterable(map(stored_checksums, opened)),
        ranks=shards,
    )


def _state_dict(root: Any, name: str) -> dict[Any, Any]:
    if not isinstance(root, dict):
        raise FormatError("does not hold a state dict", path=name, expected="a dictionary", found=type(root).__name__)
    return root


def _read_flat(source: ByteSource) -> _Weights:
    """``torch.save(state_dict)``; the top level is the state dict."""
    contents = read_torch(source)
    root = _state_dict(contents.root, source.name)
    tensors: dict[str, LazyTensor] = {}
    holders: set[Any] = set()
    for keys, tensor in find_leaves(dict(root), lambda value: isinstance(value, LazyTensor)):
        name = ".".join(map(str, keys))
        if name in tensors:
            raise FormatError("two tensors have the same name", path=source.name, tensor=name)
        tensors[name] = tensor
        holders.add(keys[0])
    if not tensors:
        raise FormatError("holds no tensors", path=source.name, remedy="copy it again from its origin")
    objects = {str(key): value for key, value in root.items() if key not in holders}
    is_megatron = all(_FLAT_NAME.match(name) for name in tensors)
    return _Weights(
        tensors,
        "flat",
        FLAT if is_megatron else None,
        objects,
        warnings=list(contents.warnings),
        ignored={name: extra_state_reason(state) for name, state in objects.items() if _EXTRA_STATE.search(name)},
        details={"torch_generation": contents.generation},
        checksums=lambda: stored_checksums(contents),
    )


def _read_sharded(container: Container, path: str) -> _Weights:
    """A Megatron-Core distributed checkpoint inside the archive."""
    from anyckpt.formats.megatron_core.reader import read_torch_dist
    from anyckpt.formats.megatron_core_zarr.location import is_zarr
    from anyckpt.formats.megatron_core_zarr.reader import read_zarr

    folder = Subfolder(container.folder, SHARDED_WEIGHTS)
    found = read_zarr(folder, path=path) if is_zarr(folder) else read_torch_dist(folder, path=path)
    return _Weights(
        found.tensors,
        "sharded",
        found.dialect,
        found.objects,
        found.layout,
        found.warnings,
        found.ignored,
        found.details,
        found.checksums,
        key_paths=found.key_paths,
        common=found.common,
        holds_states=found.holds_states,
    )


def _sized(container: Container, files: list[str]) -> list[tuple[str, ByteSource]]:
    return [(name, container.folder.open(name)) for name in files]


def _text(value: object) -> str | None:
    return None if value is None else str(value)
