"""The formats that anyckpt knows: its own, and those that other packages register.

A format is a ``Format`` with three functions.  Another package adds one through the entry point group
``anyckpt.formats``, whose value is a ``Format``.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import import_module
from importlib.metadata import entry_points
from typing import Any

from anyckpt.checkpoint import Checkpoint
from anyckpt.engine.plan import Plan
from anyckpt.errors import FormatError, UsageError


@dataclass(frozen=True)
class WriteOptions:
    """What a user asked of a writer.

    Attributes:
        max_shard_size: bytes per weight file where the format shards by size (``hf``); None for its default.
        sharded: ``nemo``: write a distributed checkpoint inside the archive instead of one flat file.
        ranks: how many files a distributed checkpoint is spread over.
    """

    max_shard_size: int | None = None
    sharded: bool = False
    ranks: int = 1


@dataclass(frozen=True)
class Location:
    """What is at a path, looked at once for all formats' ``detect``.

    Attributes:
        path: as the user gave it.
        is_directory: whether it is one (links followed).
        head: first 512 bytes of a file; empty for a directory.
        names: names in a directory, sorted; empty for a file.
    """

    path: str
    is_directory: bool
    head: bytes = b""
    names: tuple[str, ...] = ()

    @property
    def suffix(self) -> str:
        return os.path.splitext(self.path)[1].lower()

    def join(self, *parts: str) -> str:
        return os.path.join(self.path, *parts)


def look_at(path: str | os.PathLike[str]) -> Location:
    """What is at ``path``.

    Raises:
        FormatError: nothing is, or it cannot be read.
    """
    text = os.fspath(path)
    try:
        if os.path.isdir(text):
            return Location(text, True, names=tuple(sorted(os.listdir(text))))
        with open(text, "rb") as file:
            return Location(text, False, head=file.read(512))
    except FileNotFoundError as error:
        raise FormatError("does not exist", path=text, remedy="check the path") from error
    except OSError as error:
        raise FormatError(f"cannot be opened: {error.strerror}", path=text) from error


@dataclass(frozen=True)
class Format:
    """How a checkpoint lies on disk.

    Attributes:
        name: as in ``--to``.
        title: one line for people.
        detect: whether a location holds this format, at the price of a few small reads; formats are asked in the
            registry's order, most specific first.
        read: opens a location; reads indices and configuration, no tensor data.
        plan: lays a checkpoint out in files; tensors already have the names of ``dialect``.  None if read-only.
        dialect: how this format names weights: ``hf``, a Megatron dialect, or None if any names do.  A function of
            the options, because a ``.nemo`` names them one way flat and another sharded.
        config_kind: spelling of the configuration that ``plan`` expects in ``Checkpoint.config``, or None.
        single_file: whether the output is one file rather than a directory.
    """

    name: str
    title: str
    detect: Callable[[Location], bool]
    read: Callable[[Location], Checkpoint]
    plan: Callable[[Checkpoint, WriteOptions], Plan] | None = None
    dialect: Callable[[WriteOptions], str | None] = field(default=lambda options: None)
    config_kind: str | None = None
    single_file: bool = False


_BUILT_IN = (
    "nemo",
    "nemo2",
    "lightning",
    "megatron_core",
    "megatron_lm",
    "dcp",
    "hf",
    "safetensors",
    "torch_file",
)
"""Modules of this package in the order in which they are asked; each has ``FORMAT``."""

_loaded: dict[str, Format] = {}


def formats() -> dict[str, Format]:
    """Every format by name, in the order in which they are asked to detect."""
    if not _loaded:
        for entry in entry_points(group="anyckpt.formats"):
            extra: Any = entry.load()
            _loaded[extra.name] = extra
        for module in _BUILT_IN:
            known: Format = import_module(f"anyckpt.formats.{module}").FORMAT
            _loaded[known.name] = known
    return dict(_loaded)


def by_name(name: str) -> Format:
    """The format called ``name``.

    Raises:
        UsageError: there is none.
    """
    known = formats()
    if name not in known:
        raise UsageError(f"unknown format {name!r}", expected=f"one of {', '.join(known)}")
    return known[name]


def detect(location: Location) -> Format:
    """The first format that recognises a location.

    Raises:
        FormatError: none does.
    """
    if not location.is_directory and not location.head:
        raise FormatError("is empty", path=location.path, remedy="copy it again from its origin")
    for known in formats().values():
        if known.detect(location):
            return known
    raise FormatError(
        "is not a checkpoint of any known format",
        path=location.path,
        expected=f"one of {', '.join(formats())}",
        found="a directory with " + (", ".join(location.names[:5]) or "nothing in it")
        if location.is_directory
        else f"a file that begins with {location.head[:8]!r}",
    )


def read(path: str | os.PathLike[str]) -> Checkpoint:
    """Open whatever is at ``path``.

    Raises:
        FormatError: it is not a checkpoint, or a damaged one.
    """
    location = look_at(path)
    return detect(location).read(location)
