"""The format's own plan of the state of all ranks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from anyckpt.checkpoint import Checkpoint
from anyckpt.containers.dcp.chunks import HeldBox
from anyckpt.data_classes import dataclass
from anyckpt.engine.plan import Plan
from anyckpt.formats import registry
from anyckpt.formats.format import WriteOptions
from anyckpt.formats.shared import nesting
from anyckpt.indexing import Shape
from anyckpt.torch.live import Index, Path
from anyckpt.torch.objects import Frozen
from anyckpt.torch.options import Options
from anyckpt.torch.whole import LiveSource


@dataclass(frozen=True)
class Laid:
    """What a plan depends on besides tensors and objects.

    Attributes:
        options: of the save.
        boxes: which boxes of each tensor the ranks hold.
        paths: the keys that lead to each name.
        sources: the live tensors that this rank writes, by tensor's name and first index.
    """

    options: Options
    boxes: Mapping[str, tuple[HeldBox, ...]]
    paths: Mapping[str, tuple[Any, ...]]
    sources: dict[tuple[str, Shape], LiveSource]

    def plan(self, tensors: Mapping[str, Any], objects: Mapping[str, Frozen]) -> Plan:
        """The format's own plan."""
        options = self.options
        known = registry.by_name(options.format)
        assert known.plan is not None
        paths, keys = key_paths({name: self.paths[name] for name in (*tensors, *objects) if name in self.paths})
        prefix, state_prefixes = nesting.prefixes(tensors, paths)
        checkpoint = Checkpoint(
            "the state of a training job",
            "dcp",
            dict(tensors),
            model_prefix=prefix,
            state_prefixes=state_prefixes,
            objects={name: value.inert() for name, value in objects.items()},
            config=dict(options.config or {}),
            config_kind="hf" if options.config else None,
            key_paths=paths,
            original_keys=keys,
            common=tuple(objects),
        )
        asked = WriteOptions(
            max_shard_size=options.max_shard_size,
            held={name: self.boxes[name] for name in tensors},
        )
        return known.plan(checkpoint, asked)


def key_paths(paths: Mapping[str, Path]) -> tuple[dict[str, tuple[Any, ...]], dict[tuple[Any, ...], Any]]:
    """Paths as a checkpoint has them, and the keys of dictionaries that are no strings by the path that leads there."""
    plain: dict[str, tuple[Any, ...]] = {}
    keys: dict[tuple[Any, ...], Any] = {}
    for name, path in paths.items():
        plain[name] = spelled(path)
        for depth, key in enumerate(path, 1):
            if type(key) is not Index and not isinstance(key, str):
                keys[plain[name][:depth]] = key
    return plain, keys


def spelled(path: Path) -> tuple[str | int, ...]:
    """A path as a checkpoint has it: positions in lists are numbers, and keys of dictionaries text."""
    return tuple(int(key) if type(key) is Index else str(key) for key in path)
