"""Which objects ``torch.load(weights_only=True)`` refuses, so that a user learns it before training starts."""

from __future__ import annotations

from typing import Any

from anyckpt.containers.torch_file.values import FormedTensor
from anyckpt.pickling import DictRecord, Global, Record
from anyckpt.pickling.walk import find_leaves

_ALLOWED = set(
    """
    collections.OrderedDict collections.Counter torch.nn.parameter.Parameter torch.serialization._get_layout
    torch.Size torch.Tensor torch.device _codecs.encode builtins.bytearray builtins.set builtins.complex
    """.split()
)
"""Of torch 2.13, ``torch/_weights_only_unpickler.py``, without what this package writes for tensors."""


def refused(root: Any) -> list[str]:
    """Dotted names of classes and functions in ``root`` that are not allowed, each once, in order."""
    found: dict[str, None] = {}
    for _, value in find_leaves(root, _is_refused):
        if isinstance(value, FormedTensor):
            found.update(
                dict.fromkeys([value.facts.kind.path] if value.facts.kind else refused(value.facts.attributes))
            )
        else:
            found[_name(value)] = None
    return list(found)


def _name(value: Any) -> str:
    if isinstance(value, (Record, DictRecord)):
        return value.type.path if isinstance(value.type, Global) else "a call of a call"
    return {frozenset: "builtins.frozenset", range: "builtins.range", slice: "builtins.slice"}.get(type(value), "?")


def _is_refused(value: Any) -> bool:
    if isinstance(value, (Record, DictRecord)):
        return _name(value) not in _ALLOWED
    if isinstance(value, FormedTensor):
        return value.facts.kind is not None or bool(refused(value.facts.attributes))
    return isinstance(value, (frozenset, range, slice))
