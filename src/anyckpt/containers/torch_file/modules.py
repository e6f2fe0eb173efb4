"""Modules that were pickled whole, seen as their ``state_dict()``.

A pickle of a ``torch.nn.Module`` names its class and holds its attributes.  ``state_dict()`` gives of them, for the
module and then for each child: what is in ``_parameters``, and in ``_buffers`` but for ``_non_persistent_buffers_set``
(torch 1.6 and later; before, all buffers are persistent).  Neither the class nor its hooks are needed for that.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from anyckpt.containers.torch_file.values import spelled
from anyckpt.data_classes import dataclass
from anyckpt.errors import FormatError, UnsafeError
from anyckpt.pickling import Record

EXTRA = "_anyckpt_packed"
"""An attribute that a reader adds to a module: what its class keeps in an object that is no module."""

_DEEPEST = 500
_REPEATS = 64
_OWN = {"_parameters", "_buffers", "_modules", EXTRA}


def module_fields(value: Any) -> Mapping[Any, Any] | None:
    """The attributes of a pickled ``torch.nn.Module``; None if it is something else.

    ``torch.fx.GraphModule`` is pickled as a call with the attributes as its first argument.
    """
    if not isinstance(value, Record):
        return None
    for fields in (value.fields(), value.args[0] if value.args else None):
        if isinstance(fields, dict) and all(isinstance(fields.get(own), dict) for own in ("_parameters", "_modules")):
            return fields
    return None


@dataclass(frozen=True)
class Entry:
    """One entry of a module.

    Attributes:
        name: as ``state_dict()`` names it, dots included.
        value: a tensor, or what holds tensors.
        persistent: whether ``state_dict()`` has it.
    """

    name: str
    value: Any
    persistent: bool = True


def state_dict(module: Record, name: str = "") -> Iterator[Entry]:
    """What ``module.state_dict()`` would give, and after each module's own what else it holds and may hold tensors.

    Args:
        module: of which ``module_fields`` is not None.
        name: the file's, for messages.

    Raises:
        FormatError: modules are nested more than 500 levels deep.
        UnsafeError: shared modules repeat a few others endlessly.
    """
    distinct = {id(module)}
    visits = 0
    todo: list[tuple[str, Record, int]] = [("", module, 1)]
    while todo:
        prefix, here, depth = todo.pop()
        visits += 1
        distinct.add(id(here))
        if depth > _DEEPEST:
            raise FormatError("modules are nested too deep", path=name, expected=f"at most {_DEEPEST} levels")
        if visits > 1000 + _REPEATS * len(distinct):
            raise UnsafeError("shared modules repeat a few others endlessly", path=name)
        fields = module_fields(here) or {}
        yield from _own(prefix, fields)
        children = [
            (f"{prefix}{spelled(key)}.", child, depth + 1)
            for key, child in fields.get("_modules", {}).items()
            if module_fields(child) is not None
        ]
        todo.extend(reversed(children))


def _own(prefix: str, fields: Mapping[Any, Any]) -> Iterator[Entry]:
    passing = fields.get("_non_persistent_buffers_set")
    buffers = fields.get("_buffers")
    for key, value in fields["_parameters"].items() if "_parameters" in fields else ():
        if value is not None:
            yield Entry(prefix + spelled(key), value)
    for key, value in buffers.items() if isinstance(buffers, dict) else ():
        if value is not None:
            yield Entry(prefix + spelled(key), value, not (isinstance(passing, (set, list, tuple)) and key in passing))
    extra = fields.get(EXTRA)
    for key, value in extra.items() if isinstance(extra, dict) else ():
        yield Entry(prefix + spelled(key), value)
    for key, value in fields.items():
        if key not in _OWN and module_fields(value) is None:
            yield Entry(prefix + spelled(key), value, False)


def classes(module: Record) -> list[str]:
    """Dotted names of the classes of a module and of those in it, each once, in order."""
    found: dict[str, None] = {}
    seen: set[int] = set()
    todo: list[Any] = [module]
    while todo:
        here = todo.pop()
        fields = module_fields(here)
        if fields is None or id(here) in seen:
            continue
        seen.add(id(here))
        found[here.path] = None
        todo.extend(reversed(list(fields["_modules"].values())))
    return list(found)
