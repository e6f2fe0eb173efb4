"""TorchScript archives (``torch.jit.save``: scripted, traced, frozen, quantized), of which only the data are read.

``data.pkl`` holds the module with its attributes, ``constants.pkl`` the tensors that its program names
``CONSTANTS.c0`` and so on (a frozen module has all its weights there), ``code/`` the program.  Which attributes are
parameters and buffers stands in the program's declarations, ``__parameters__ = ["weight", ]``; these two lines are
read as text, and nothing else of the program is.  Facts: ``torch/csrc/jit/serialization`` of torch 1.4 to 2.13.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import field
from typing import Any

from anyckpt.containers.torch_file.modules import EXTRA
from anyckpt.data_classes import dataclass
from anyckpt.errors import FormatError
from anyckpt.pickling import Global, Record
from anyckpt.storage.source import ByteSource
from anyckpt.tensor import LazyTensor

_PROGRAM = "__torch__"
_BOUND = "__torch__.torch.classes."
_LONGEST_CODE = 32 << 20
_MANGLED = re.compile(r"___torch_mangle_\d+\.")
_NAMES = re.compile(r'"((?:[^"\\]|\\.)*)"')


def readable(name: str) -> str:
    """The name of a class as its author wrote it."""
    return _MANGLED.sub("", name).removeprefix(f"{_PROGRAM}.")


def constructors() -> dict[str, Callable[[tuple[Any, ...]], Any]]:
    """Stand-ins for the functions that TorchScript's pickler calls to say of which type a container is."""
    lists = ("build_intlist", "build_tensorlist", "build_doublelist", "build_boollist")
    return {f"torch.jit._pickle.{name}": _first for name in (*lists, "restore_type_tag")}


def _first(arguments: tuple[Any, ...]) -> Any:
    return arguments[0] if arguments and isinstance(arguments[0], (list, dict)) else NotImplemented


@dataclass
class Declarations:
    """What a program declares of its modules.

    Args:
        code: gives the text of a file of the program, or None if there is none.
    """

    code: Callable[[str], ByteSource | None]
    _texts: dict[str, str | None] = field(default_factory=dict)

    def of(self, kind: Global) -> tuple[set[str], set[str] | None] | None:
        """Names of a class's parameters and of its buffers, None for these where all tensors are one or the other."""
        text = self._text(kind.module)
        found = None if text is None else re.search(rf"^class {re.escape(kind.name)}\(.*\):\n", text, re.MULTILINE)
        if text is None or found is None:
            return None
        end = text.find("\nclass ", found.end())
        body = text[found.end() : None if end < 0 else end]
        parameters, buffers = _declared(body, "__parameters__"), _declared(body, "__buffers__")
        return None if parameters is None else (parameters, buffers)

    def _text(self, module: str) -> str | None:
        if module not in self._texts:
            source = self.code(f"{module.replace('.', '/')}.py")
            try:
                text = None if source is None else source.read_all(_LONGEST_CODE).decode("utf-8", "replace")
            except FormatError:
                text = None
            self._texts[module] = text
        return self._texts[module]


def _declared(body: str, what: str) -> set[str] | None:
    line = re.search(rf"^  {what} = \[(.*)\]$", body, re.MULTILINE)
    return None if line is None else set(_NAMES.findall(line[1]))


def as_modules(root: Any, declarations: Declarations) -> None:
    """Give each module of a program the attributes that a pickled ``torch.nn.Module`` has."""
    seen: set[int] = set()
    todo = [root]
    while todo:
        here = todo.pop()
        if id(here) in seen:
            continue
        seen.add(id(here))
        if isinstance(here, (list, tuple)):
            todo.extend(here)
        elif isinstance(here, dict):
            todo.extend(here.values())
        elif isinstance(here, Record) and _is_module(here):
            todo.extend(here.state.values())
            here.state = _fields(here.state, declarations.of(here.type))


def _is_module(value: Any) -> bool:
    if not isinstance(value, Record) or not isinstance(value.type, Global) or not isinstance(value.state, dict):
        return False
    return f"{value.type.module}.".startswith(f"{_PROGRAM}.") and not value.path.startswith(_BOUND)


def _fields(state: Mapping[Any, Any], declared: tuple[set[str], set[str] | None] | None) -> dict[str, Any]:
    parameters, buffers = (None, None) if declared is None else declared
    fields: dict[str, Any] = {"_parameters": {}, "_buffers": {}, "_modules": {}, EXTRA: {}}
    for key, value in state.items():
        if isinstance(value, LazyTensor) and parameters is not None and key in parameters:
            fields["_parameters"][key] = value
        elif isinstance(value, LazyTensor) and (buffers is None or key in buffers):
            fields["_buffers"][key] = value
        elif isinstance(value, Record) and isinstance(value.type, Global) and value.path.startswith(_BOUND):
            fields[EXTRA][key] = value.state  # quantized weights, which their module packs into an object
        elif _is_module(value):
            fields["_modules"][key] = value
        elif key not in fields:
            fields[key] = value
    return fields


def add_constants(root: Any, constants: Any) -> None:
    """Show a program's constants beside its module, and as its weights where it has no others."""
    if not isinstance(root, Record) or not isinstance(root.state, dict) or not isinstance(constants, (list, tuple)):
        return
    tensors = {f"CONSTANTS.c{number}": value for number, value in enumerate(constants) if value is not None}
    if _has_tensors(root):
        root.state.update(tensors)
    else:
        root.state.setdefault(EXTRA, {}).update(tensors)


def _has_tensors(root: Record) -> bool:
    seen: set[int] = set()
    todo: list[Any] = [root]
    while todo:
        here = todo.pop()
        if not isinstance(here, Record) or not isinstance(here.state, dict) or id(here) in seen:
            continue
        seen.add(id(here))
        if any(here.state.get(kind) for kind in ("_parameters", "_buffers", EXTRA)):
            return True
        todo.extend(here.state.get("_modules", {}).values())
    return False
