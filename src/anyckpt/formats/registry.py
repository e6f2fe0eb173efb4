"""The formats that anyckpt knows: its own, and those that other packages register.

A format is a ``format.Format`` with three functions.  Another package adds one through an entry point of the group
``anyckpt.formats``, named as the format, whose value is a ``Format``; it is asked after ours.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import suppress
from functools import cache
from importlib import import_module
from typing import TYPE_CHECKING, Any

from anyckpt import pickling
from anyckpt.checkpoint import Checkpoint
from anyckpt.entry_points import loaded, registered
from anyckpt.errors import AnyckptError, FormatError, LastingError, UnknownFormatError, UsageError, did_you_mean
from anyckpt.formats.foreign import refusal
from anyckpt.formats.format import Format, WriteOptions
from anyckpt.formats.shared.unfinished import check_finished
from anyckpt.pickling.calls import Calls, danger, recording
from anyckpt.storage.location import Location, look_at, look_in, small_files
from anyckpt.storage.members import NotArchiveError, is_archive, is_gzip
from anyckpt.storage.place import Place
from anyckpt.storage.source import check_not_pointer
from anyckpt.storage.tree import ArchivePlace

if TYPE_CHECKING:
    from anyckpt.facts import FormatFacts


_BUILT_IN = {
    "nemo": "nemo",
    "nemo2": "nemo2",
    "lightning": "lightning",
    "megatron-bridge": "megatron_bridge",
    "megatron-core-zarr": "megatron_core_zarr",
    "megatron-core": "megatron_core",
    "megatron-lm": "megatron_lm",
    "dcp": "dcp",
    "peft": "peft",
    "meta": "meta",
    "trtllm": "trtllm",
    "diffusers": "diffusers",
    "hf": "hf",
    "fsdp": "fsdp",
    "gpt-neox": "gpt_neox",
    "deepspeed": "deepspeed",
    "gguf": "gguf",
    "safetensors": "safetensors",
    "npz": "npz",
    "whisper": "whisper",
    "torch": "torch",
}
"""Name -> module of this package, in the order in which they are asked; each module has ``FORMAT``."""

_LOOKED_AT = 20
_SHOWN = 3
_STATE = re.compile(r"(?i)(optim|sched|lr_sched|rng|random_states?|sampler|scaler|dataloader|training_args)")
"""How the files and folders of training state begin that trainers (accelerate, transformers) put beside weights."""
_ARCHIVES = {"_stable_baselines3_version": "Stable-Baselines3"}
"""A member that tells which software packed an archive of checkpoints -> its name."""

_loaded: dict[str, Format] = {}


def _names() -> Iterator[str]:
    """Every format's name: ours, then those that other packages register, which take longer to find."""
    yield from _BUILT_IN
    yield from (name for name in _registered() if name not in _BUILT_IN)


@cache
def _registered() -> dict[str, Any]:
    return registered("anyckpt.formats")


def _load(name: str) -> Format:
    """A format, imported when it is first asked for: opening one kind of file should not wait for all the others."""
    if name not in _loaded:
        if name in _BUILT_IN:
            found: Format = import_module(f"anyckpt.formats.{_BUILT_IN[name]}").FORMAT
        else:
            found = loaded(_registered()[name], Format)
        _loaded[name] = found
    return _loaded[name]


def formats() -> dict[str, Format]:
    """Every format by name, in the order in which they are asked to detect."""
    return {name: _load(name) for name in _names()}


def built_in() -> dict[str, Format]:
    """The formats of this package by name."""
    return {name: _load(name) for name in _BUILT_IN}


def facts() -> dict[str, FormatFacts]:
    """Every format that can be read or written, by name, in the order in which an unknown path is tried.

    Raises:
        UsageError: a package that is installed registers one that cannot be loaded.
    """
    from anyckpt.facts import FormatFacts

    return {
        name: FormatFacts(
            name=name,
            title=known.title,
            reads=True,
            writes=known.plan is not None,
            names=known.dialect(WriteOptions()),
            config=known.config_kind,
            sharded=known.sharded,
            adapters=known.adapters is not None,
            own=name in _BUILT_IN,
        )
        for name, known in formats().items()
    }


def by_name(name: str) -> Format:
    """The format called ``name``.

    Raises:
        UsageError: there is none.
    """
    if name not in _BUILT_IN and name not in _registered():
        raise UsageError(
            f"unknown format {name!r}",
            expected=f"one of {', '.join(_names())}",
            remedy=did_you_mean(name, {known: _load(known).title for known in _names()}),
        )
    return _load(name)


def suffixes() -> dict[str, tuple[Format, bool]]:
    """How the names of files of each format that can be written end -> the format, and whether that is an archive."""
    found: dict[str, tuple[Format, bool]] = {}
    for known in formats().values():
        if known.plan is not None:
            for suffix in known.suffixes:
                found.setdefault(suffix, (known, False))
            for suffix in known.archive_suffixes:
                found.setdefault(suffix, (known, True))
    return found


def detect(location: Location) -> Format:
    """The first format that recognises a location.

    Raises:
        FormatError: none does.
    """
    if not location.is_directory and not location.head:
        raise FormatError("is empty", path=location.path, remedy="copy it again from its origin")
    check_not_pointer(location.head, location.path)
    for name in _names():
        known = _load(name)
        if known.detect(location):
            return known
    foreign = refusal(location.head, location.path)
    if foreign is not None:
        raise foreign
    raise UnknownFormatError(
        "is not a checkpoint of any known format",
        path=location.path,
        expected=f"one of {', '.join(_names())}",
        found="a directory with " + (", ".join(location.names[:5]) or "nothing in it")
        if location.is_directory
        else f"a file that begins with {location.head[:8]!r}",
        remedy=_within(location) or _nearby(location),
    )


def _within(location: Location) -> str | None:
    """Which members of an archive are checkpoints, or archives themselves."""
    if location.is_directory or not (is_archive(location.head) or is_gzip(location.head)):
        return None
    inside = ArchivePlace(location.path, location.open(), location.place, location.path)
    try:
        names = list(inside.listing())
    except NotArchiveError:
        return None
    found: dict[str, str] = {}
    files = [inside.path_of(name) for name in names[:_LOOKED_AT]]
    for path in [*inside.folders()[:_LOOKED_AT], *files]:
        if any(path.startswith(folder) for folder in found):
            continue
        with suppress(FormatError):
            there = look_in(inside, path)
            known = _format_of(there)
            if known is not None or is_archive(there.head):
                found[path] = "archive" if known is None else known.name
    shown = [f"{path} ({what})" for path, what in found.items()]
    writer = next((f" of {software}" for mark, software in _ARCHIVES.items() if mark in names), "")
    return f"it is an archive{writer}: open a member of it, {' or '.join(shown)}" if shown else None


def _nearby(location: Location) -> str | None:
    """Which checkpoints the user may have meant: those in the directory, or the one that the path is a part of.

    A trainer's folder has its optimizer's state and others beside the weights, which may be checkpoints by their form.
    """
    weights = [name for name in location.names if not _STATE.match(name)]
    states = [name for name in location.names if _STATE.match(name)]
    for names in (weights, states):
        inside = [looks for name in names[:_LOOKED_AT] if (looks := _looks_like(location.place, location.join(name)))]
        if inside:
            return f"open {' or '.join(inside[:_SHOWN])}"
    around = None if location.parent is None else _looks_like(location.place, location.parent)
    return None if around is None else f"open {around}"


def _looks_like(place: Place, path: str) -> str | None:
    """A path with the name of the format that it looks like, None if it looks like no checkpoint."""
    known = _format_at(place, path)
    return None if known is None else f"{path}, which looks like {known.name}"


def _format_at(place: Place, path: str) -> Format | None:
    with suppress(FormatError):
        return _format_of(look_in(place, path)) if place.is_folder(path) or place.is_file(path) else None
    return None


def _format_of(location: Location) -> Format | None:
    if not location.head and not location.is_directory:
        return None
    return next((known for known in map(_load, _BUILT_IN) if known.detect(location)), None)


def _only_weights(location: Location) -> str | None:
    """What is the one checkpoint in a trainer's folder that is no training state; None if there are none or several.

    accelerate's folders (``save_state``) and those of transformers' trainer with FSDP are so: ``pytorch_model_fsdp_0``
    or ``model.safetensors`` beside ``optimizer_0`` and others, without a configuration.
    """
    weights = [name for name in location.names if not _STATE.match(name)]
    states = [name for name in location.names if _STATE.match(name)]
    if len(weights) > _LOOKED_AT or not any(
        _format_at(location.place, location.join(name)) for name in states[:_LOOKED_AT]
    ):
        return None
    found = [name for name in weights if _format_at(location.place, location.join(name)) is not None]
    return found[0] if len(found) == 1 else None


def read(path: str | os.PathLike[str] | Location, *, force: bool = False, met: Calls | None = None) -> Checkpoint:
    """Open whatever is at ``path``.

    In a trainer's folder of one checkpoint of weights and training state beside it, that is the weights.

    Args:
        path: a file or directory, or a location in any place.
        force: open a checkpoint that NeMo marked as unfinished, too.
        met: takes what pickles ask for, also where the checkpoint cannot be opened.

    Raises:
        FormatError: it is not a checkpoint, a damaged one, or an unfinished one.
    """
    location = look_at(path)
    if not force:
        check_finished(location)
    with recording(met) as calls, small_files(location):
        try:
            checkpoint = _read_there(location, force)
        except AnyckptError as error:
            if not calls.pickles:
                _look_for_names(location)
            if error.remedy is None and isinstance(error, FormatError) and not location.is_directory:
                error.remedy = _nearby(location)  # the file may be a part of what the user means
            code = calls.of_kind("code")
            if code:
                error.problem += f"; besides, {danger(code)}"
                error.remedy = "do not open it with other software before finding out where it came from"
            raise
    checkpoint.calls = calls
    checkpoint.place = location.place
    checkpoint.warnings = calls.told_with(checkpoint.warnings)
    return checkpoint


def _read_there(location: Location, force: bool) -> Checkpoint:
    """The checkpoint of the format that recognises a location, or that of the only weights in a trainer's folder."""
    try:
        known = detect(location)
    except FormatError:
        inside = _only_weights(location)
        if inside is None:
            raise
        there = location.at(inside)
        if not force:
            check_finished(there)
        checkpoint = detect(there).read(there)
        told = (
            f"{inside} is the only checkpoint of weights in {location.path}: the training state beside it is not read"
        )
        checkpoint.warnings = [told, *checkpoint.warnings]
        return checkpoint
    return known.read(location)


def _look_for_names(location: Location) -> None:
    """Record what a file that is of no format asks for if it begins as a pickle does: an attack may be no more."""
    if location.head[:1] in (b"\x80", b"c", b"(", b"]", b"}"):
        with suppress(LastingError):
            pickling.load_prefix(location.open(), 0, persistent_load=lambda _: None, name=location.path)
