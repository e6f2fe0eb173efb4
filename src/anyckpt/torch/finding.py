"""Where a checkpoint has what a state asks for: under its name, another root's, or in what holds it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

from anyckpt.checkpoint import Checkpoint
from anyckpt.formats.megatron_core.implementation import hub_state_name
from anyckpt.formats.shared import nesting
from anyckpt.tensor import LazyTensor
from anyckpt.torch.laid_out import spelled
from anyckpt.torch.live import Path


class Finder:
    """Finds names of a state among a checkpoint's."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint
        self._prefix = checkpoint.model_prefix

    @cached_property
    def _states(self) -> Mapping[str, Any]:
        """States of modules, which are read when one is asked for."""
        find = self._checkpoint.extra_states
        return {} if find is None else find()

    def names(self) -> list[str]:
        """All that the checkpoint has."""
        return [*self._checkpoint.tensors, *self._checkpoint.objects]

    @cached_property
    def _by_keys(self) -> Mapping[Path, str]:
        """Names of tensors by the keys that lead to them, as they were."""
        found = self._checkpoint
        return {
            tuple(found.original_keys.get(path[:depth], step) for depth, step in enumerate(path, 1)): name
            for name, path in found.key_paths.items()
            if name in found.tensors
        }

    def tensor(self, name: str, path: Path | None = None) -> tuple[str, LazyTensor] | None:
        """The tensor called so, or so but for the root before the model's own name, or at the end of the path; with its
        name there."""
        tensors = self._checkpoint.tensors
        root, _, rest = name.partition(".")
        plain = [name, *([rest] if root in nesting.MODELS else [])]
        for candidate in (name, *(self._prefix + inner for inner in plain)):
            if candidate in tensors:
                return candidate, tensors[candidate]
        found = None if path is None else self._by_keys.get(path)
        return None if found is None else (found, tensors[found])

    def common(self) -> list[str]:
        """Names of the objects that all ranks have alike; of all but cells of grids if the checkpoint does not say."""
        said = self._checkpoint.common
        if said is None:
            return [name for name in self._checkpoint.objects if "/shard_" not in name]
        return [name for name in self._checkpoint.objects if name in said]

    def object(self, name: str, path: Path) -> tuple[Sequence[str], Any] | None:
        """The object called so, a module's state, or what is at the end of the path: in an object that holds others, or
        in parts of which some are tensors; with the names that it is made of."""
        objects = self._checkpoint.objects
        if name in objects:
            return (name,), objects[name]
        module_state = hub_state_name(name)
        if module_state is not None and name.rpartition("/")[0] in self._checkpoint.ignored:
            return (name,), self._states.get(module_state)
        first = str(path[0])
        if first not in objects:
            return self._whole(spelled(path))
        value = objects[first]
        for key in path[1:]:
            inner = _inside(value, key)
            if inner is None:
                return None
            value = inner[0]
        return (first,), value

    def _whole(self, path: tuple[Any, ...]) -> tuple[Sequence[str], Any] | None:
        """A tuple or an object that holds tensors, of a file that has them by themselves, too."""
        checkpoint = self._checkpoint
        value = None if checkpoint.forms is None else checkpoint.forms.whole(path)
        if value is None:
            return None
        return [name for name, own in checkpoint.key_paths.items() if own[: len(path)] == path], value


def _inside(value: Any, key: Any) -> tuple[Any] | None:
    if isinstance(value, (list, tuple)) and isinstance(key, int) and key < len(value):
        return (value[key],)
    if isinstance(value, Mapping):
        for spelled in (key, str(key)):
            if spelled in value:
                return (value[spelled],)
    return None
