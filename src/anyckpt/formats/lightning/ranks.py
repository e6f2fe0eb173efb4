"""Lightning checkpoints of one file per rank, as NeMo 1 saves model-parallel training: ``mp_rank_00/x.ckpt``.

``checkpoints/`` has a folder for each rank, and each of them a file for each checkpoint.  Opening one rank's file
opens all of that name; so does opening ``checkpoints/`` if there is only one name in it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import chain
from typing import Any

from anyckpt.checkpoint import Checkpoint, OptimizerState, ParallelLayout
from anyckpt.containers.torch_file import read_torch_files
from anyckpt.containers.torch_file.checksums import stored_checksums
from anyckpt.containers.torch_file.flatten import flatten
from anyckpt.errors import FormatError
from anyckpt.formats.lightning import read as single
from anyckpt.formats.lightning.keys import LR_SCHEDULERS, OPTIMIZER_STATES, STATE_DICT, TRAINING_STATE
from anyckpt.formats.lightning.location import names_in, rank_folders
from anyckpt.formats.shared.rank_files import (
    Chunk,
    check_places,
    rank_shards,
    with_virtual,
)
from anyckpt.formats.shared.rank_folders import Place, by_place, parse_folder
from anyckpt.formats.shared.unfinished import check_finished, marker_of
from anyckpt.optimizer.rank_states import read_rank_states
from anyckpt.pickling.plain import to_plain
from anyckpt.plain_yaml import load_yaml_mapping
from anyckpt.storage.location import Location, look_in
from anyckpt.tensor import LazyTensor

_CHUNK = re.compile(r"model(\d{1,4})", re.ASCII)
_HYPER_PARAMETERS_FILE = "hparams.yaml"
_HYPER_PARAMETERS_LIMIT = 64 << 20
_LAST = "-last"
_EMA = "-EMA"


def read(location: Location) -> Checkpoint:
    """Open a Lightning checkpoint, of one rank or of all; a folder's only one that NeMo did not mark as unfinished.

    Of all ranks, ``tensors`` lists what is stored, by rank folder, and ``ranks`` has the weights under the hub's
    names; ``objects`` has what rank 0's file holds besides, each rank's training state by its folder, and that of
    the schedulers by its own name if all ranks have the same.  The configuration is in the files, or in a
    ``hparams.yaml`` beside the rank folders or one level above.

    Raises:
        FormatError: a file is truncated or damaged, a rank is missing or of another step, or there are several
            checkpoints to choose from.
    """
    if location.is_directory:
        folders = rank_folders(location.names)
        return _read_ranks(location, _only_name(location, folders), location.path) if folders else _marked(location)
    rank = location.place.split(location.parent) if location.parent is not None else (None, "")
    if rank[0] is None or parse_folder(rank[1]) is None:
        return _marked(location)
    return _read_ranks(look_in(location.place, rank[0]), location.name, location.path)


def _marked(location: Location) -> Checkpoint:
    checkpoint = single.read(location)
    if checkpoint.format != "lightning":
        return checkpoint
    return replace(checkpoint, details={**checkpoint.details, **_markers(location.name)})


def _markers(name: str) -> dict[str, bool]:
    """What NeMo's name of a checkpoint says: ``x-last.ckpt``, ``x-last-EMA.ckpt``."""
    stem = name.removesuffix(".ckpt")
    return {"last": stem.removesuffix(_EMA).endswith(_LAST), "averaged_weights": stem.endswith(_EMA)}


def _only_name(location: Location, folders: list[str]) -> str:
    every = sorted({name for folder in folders for name in names_in(location, folder)})
    names = [name for name in every if marker_of(location.place, location.join(name)) is None]
    if len(names) == 1:
        return names[0]
    if not names:
        check_finished(location.at(every[-1]))
    raise FormatError(
        "holds several checkpoints",
        path=location.path,
        expected="the name of one of them",
        found=", ".join(names[:8]) + (" ..." if names[8:] else ""),
        remedy=f"open {location.join(names[-1])}",
    )


def _read_ranks(root: Location, name: str, path: str) -> Checkpoint:
    found = by_place(folder for folder in rank_folders(root.names) if root.is_file(folder, name))
    files = {place: root.join(folder, name) for place, folder in found.items()}
    first = single.read(look_in(root.place, next(iter(files.values()))))
    config, kind = _configuration(first, root)
    layout = check_places(files, config, root.path)
    tensors: dict[str, LazyTensor] = {}
    objects = {key: value for key, value in first.objects.items() if not key.startswith(TRAINING_STATE)}
    warnings: list[str] = []
    chunks: list[Chunk] = []
    opened = read_torch_files(map(root.place.open, files.values()))
    optimizers: list[Any] = []
    for (place, file), contents in zip(files.items(), opened, strict=True):
        warnings += [warning for warning in contents.warnings if warning not in warnings]
        state = contents.root if isinstance(contents.root, dict) else {}
        _check_step(first, state, file)
        own = _chunks(place, state, file)
        chunks += own
        optimizers += [state.get(OPTIMIZER_STATES)] * len(own)
        flat = flatten(state, file)
        tensors.update((f"{found[place]}/{key}", tensor) for key, tensor in flat.tensors.items())
        objects.update((f"{found[place]}/{key}", state[key]) for key in TRAINING_STATE if key in state)
    layout = with_virtual(layout, chunks, config, root.path)
    ignored = dict(first.ignored)
    schedulers = [objects.get(f"{folder}/{LR_SCHEDULERS}") for folder in found.values()]
    paths: dict[str, tuple[str, ...]] = {}
    if schedulers[0] and all(to_plain(own) == to_plain(schedulers[0]) for own in schedulers):
        objects[LR_SCHEDULERS], paths[LR_SCHEDULERS] = schedulers[0], (LR_SCHEDULERS,)
    return replace(
        first,
        path=path,
        tensors=tensors,
        model_prefix="",
        state_prefixes=tuple(f"{folder}/{key}" for folder in found.values() for key in TRAINING_STATE),
        objects=objects,
        config=config,
        config_kind=kind,
        layout=layout,
        warnings=warnings,
        details={
            **first.details,
            **_markers(name),
            "rank_folders": len(files),
        },
        key_paths=paths,
        original_keys={},
        ranks=rank_shards(chunks, config, layout, ignored),
        ignored=ignored,
        optimizer=partial(_optimizer, chunks, optimizers, config, layout) if any(optimizers) else None,
        checksums=lambda: chain.from_iterable(map(stored_checksums, opened)),
    )


def _optimizer(
    chunks: Sequence[Chunk], states: Sequence[Any], config: Mapping[str, Any], layout: ParallelLayout
) -> OptimizerState:
    """The optimizer's state by parameter and rank, under the names that the weights have."""
    found = read_rank_states(chunks, states)
    slots = {
        slot: [replace(chunk, state=own) for chunk, own in zip(chunks, held, strict=True)]
        for slot, held in found.slots.items()
    }
    return OptimizerState(
        ranks={slot: rank_shards(own, config, layout, {}) for slot, own in slots.items()},
        step=found.step,
        groups=found.groups,
        grad_scaler=found.grad_scaler,
    )


def _configuration(first: Checkpoint, root: Location) -> tuple[dict[str, Any], str | None]:
    """The model's configuration: in the file, or in NeMo's file of hyper-parameters."""
    if first.config:
        return first.config, first.config_kind
    for folder in (root.path, root.parent):
        file = None if folder is None else root.place.join(folder, _HYPER_PARAMETERS_FILE)
        if file is not None and root.place.is_file(file):
            values = load_yaml_mapping(root.place.open(file).read_all(_HYPER_PARAMETERS_LIMIT), file)
            config = values["cfg"] if isinstance(values.get("cfg"), dict) else values
            return config, "nemo1"
    return {}, None


def _check_step(first: Checkpoint, state: Mapping[Any, Any], file: str) -> None:
    step = state.get("global_step")
    if step != first.training.step:
        raise FormatError(
            "ranks are of different steps",
            path=file,
            expected=f"global_step {first.training.step}, as in {first.path}",
            found=step if type(step) is int else "none",
            remedy="gather the ranks of one save",
        )


def _chunks(place: Place, state: Mapping[Any, Any], file: str) -> list[Chunk]:
    """The rank's state dict, or with virtual pipeline those under ``model0`` and following."""
    numbered = {
        int(match[1]): value
        for key, value in state.items()
        if isinstance(key, str) and isinstance(value, dict) and (match := _CHUNK.fullmatch(key))
    }
    if not numbered:
        own = state.get(STATE_DICT)
        if not isinstance(own, dict):
            raise FormatError("is a Lightning checkpoint without weights", path=file, expected=STATE_DICT)
        numbered = {0: own}
    return [Chunk(place, number, value, file) for number, value in sorted(numbered.items())]
