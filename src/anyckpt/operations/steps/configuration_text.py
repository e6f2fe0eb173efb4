"""Calls with their arguments as YAML or as Python, each argument with where it comes from."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from keyword import iskeyword
from typing import Any

from anyckpt.data_classes import dataclass
from anyckpt.escaping import printable
from anyckpt.plain_yaml import dump_yaml

_CALLBACKS = ("early_stopping", "overlap", "garbage_collection", "profiling")
_PRECEDES = {
    "strategy": ("ddp",),
    "trainer": ("strategy", "precision", *_CALLBACKS),
    "logger": ("checkpoint",),
    "saver": ("options", "retention"),
}


@dataclass(frozen=True)
class Section:
    """A call.

    Attributes:
        name: of the variable or key that holds it.
        target: dotted name of what is called.
        arguments: name -> the value as plain data, and the setting that it comes from.
    """

    name: str
    target: str
    arguments: Mapping[str, tuple[Any, str]]


def yaml_text(sections: Sequence[Section], below: Iterable[str]) -> str:
    """The calls as Hydra and NeMo-Run spell them, by ``_target_``."""
    lines: list[str] = []
    for section in sections:
        lines += [f"{section.name}:", f"  _target_: {section.target}"]
        for name, (value, origin) in section.arguments.items():
            first, *more = dump_yaml({name: value}).rstrip("\n").split("\n")
            if more and isinstance(
                value, str
            ):  # a comment within a string of several lines would be part of it, or end it
                lines += [f"  # {printable(origin)}", f"  {first}"]
            else:
                lines.append(f"  {first}  # {printable(origin)}")
            lines += [f"  {line}" if line else "" for line in more]
    return "\n".join([*lines, *(f"# {line}".rstrip() for line in below)]) + "\n"


def python_text(sections: Sequence[Section], below: Iterable[str]) -> str:
    """The calls as statements, in an order in which each finds what it is given."""
    ordered = _in_order(sections)
    modules = {target.rpartition(".")[0] for section in ordered for target in _targets(section)}
    lines = [f"import {module}" for module in sorted(modules)]
    for section in ordered:
        lines += ["", f"{section.name} = {section.target}("]
        given = _given(section.name, {other.name for other in ordered})
        for name, (value, origin) in section.arguments.items():
            beside = given.pop(name, None)
            said = (
                f"[{beside[1:-1]}, *{_expression(value)}]" if beside and isinstance(value, list) else _expression(value)
            )
            lines.append(f"    {_argument(name, said)},  # {printable(origin)}")
        lines += [f"    {name}={said}," for name, said in given.items()]
        lines.append(")")
    return "\n".join([*lines, *(f"# {line}".rstrip() for line in below)]) + "\n"


def _in_order(sections: Sequence[Section]) -> list[Section]:
    last = [section for section in sections if section.name in _PRECEDES]
    return [section for section in sections if section.name not in _PRECEDES] + last


def _given(name: str, there: set[str]) -> dict[str, str]:
    """Arguments that are other calls."""
    if name == "logger" and "checkpoint" in there:
        return {"ckpt": "checkpoint"}
    if name == "saver":
        return {
            argument: other for argument, other in (("options", "options"), ("keep", "retention")) if other in there
        }
    if name == "strategy" and "ddp" in there:
        return {"ddp": "ddp"}
    if name != "trainer":
        return {}
    found = {"strategy": "strategy"} if "strategy" in there else {}
    if "precision" in there:
        found["plugins"] = "[precision]"
    callbacks = [other for other in _CALLBACKS if other in there]
    return {**found, "callbacks": f"[{', '.join(callbacks)}]"} if callbacks else found


def _argument(name: str, said: str) -> str:
    """A keyword argument, also of a name that Python does not take for one."""
    return f"{name}={said}" if name.isidentifier() and not iskeyword(name) else f"**{{{name!r}: {said}}}"


def _targets(section: Section) -> Iterable[str]:
    yield section.target
    for value, _ in section.arguments.values():
        if isinstance(value, Mapping) and isinstance(value.get("_target_"), str):
            yield value["_target_"]


def _expression(value: Any) -> str:
    """Python for plain data; a mapping with ``_target_`` is the name or the call that it stands for."""
    if isinstance(value, Mapping):
        target = value.get("_target_")
        if not isinstance(target, str):
            return "{" + ", ".join(f"{key!r}: {_expression(item)}" for key, item in value.items()) + "}"
        if value.get("_call_") is False:
            return target
        inner = ", ".join(_argument(key, _expression(item)) for key, item in value.items() if key != "_target_")
        return f"{target}({inner})"
    if isinstance(value, list):
        return "[" + ", ".join(map(_expression, value)) + "]"
    if isinstance(value, float) and not math.isfinite(value):
        return f"float({str(value)!r})"
    return repr(value)
