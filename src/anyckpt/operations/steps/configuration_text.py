"""Calls with their arguments as YAML or as Python, each argument with where it comes from."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from anyckpt.escaping import printable
from anyckpt.plain_yaml import dump_yaml

_PRECEDES = {
    "trainer": ("strategy", "precision", "early_stopping", "overlap", "garbage_collection", "profiling"),
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
            lines.append(f"  {first}  # {printable(origin)}")
            lines += [f"  {line}" for line in more]
    return "\n".join([*lines, *(f"# {line}".rstrip() for line in below)]) + "\n"


def python_text(sections: Sequence[Section], below: Iterable[str]) -> str:
    """The calls as statements, in an order in which each finds what it is given."""
    ordered = _in_order(sections)
    modules = {target.rpartition(".")[0] for section in ordered for target in _targets(section)}
    lines = [f"import {module}" for module in sorted(modules)]
    for section in ordered:
        lines += ["", f"{section.name} = {section.target}("]
        lines += [
            f"    {name}={_expression(value)},  # {printable(origin)}"
            for name, (value, origin) in section.arguments.items()
        ]
        lines += [f"    {line}" for line in _given(section.name, {other.name for other in ordered})]
        lines.append(")")
    return "\n".join([*lines, *(f"# {line}".rstrip() for line in below)]) + "\n"


def _in_order(sections: Sequence[Section]) -> list[Section]:
    last = [section for section in sections if section.name in _PRECEDES]
    return [section for section in sections if section.name not in _PRECEDES] + last


def _given(name: str, there: set[str]) -> list[str]:
    """Arguments that are other calls."""
    if name == "logger" and "checkpoint" in there:
        return ["ckpt=checkpoint,"]
    if name == "saver":
        return [
            f"{argument}={other},"
            for argument, other in (("options", "options"), ("keep", "retention"))
            if other in there
        ]
    if name != "trainer":
        return []
    lines = ["strategy=strategy,"] if "strategy" in there else []
    if "precision" in there:
        lines.append("plugins=[precision],")
    callbacks = [other for other in _PRECEDES["trainer"][2:] if other in there]
    return [*lines, f"callbacks=[{', '.join(callbacks)}],"] if callbacks else lines


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
        inner = ", ".join(f"{key}={_expression(item)}" for key, item in value.items() if key != "_target_")
        return f"{target}({inner})"
    if isinstance(value, list):
        return "[" + ", ".join(map(_expression, value)) + "]"
    return repr(value)
