"""Weights under names that a user gives them by patterns, before anything is concluded from names."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeVar

from anyckpt.checkpoint import Checkpoint, CompositeTensor
from anyckpt.data_classes import dataclass
from anyckpt.errors import UsageError
from anyckpt.models.complete import some
from anyckpt.operations.steps.beside_weights import objects_in_modules
from anyckpt.operations.steps.renaming import Renamed

Value = TypeVar("Value")

_REGEX = "re:"
_HOW = "'PATTERN=REPLACEMENT', such as 'module.*=*' or 're:^h[.](\\d+)=layers.\\1'"


@dataclass(frozen=True)
class Rename:
    """A pattern and what names that match it become.

    Attributes:
        said: as the user wrote it.
        pattern: what is looked for; a glob matches whole names.
        replacement: in the words of ``re``.
    """

    said: str
    pattern: re.Pattern[str]
    replacement: str

    def __call__(self, name: str) -> str | None:
        """The new name, None if the pattern does not match."""
        new, count = self.pattern.subn(self.replacement, name)
        return new if count else None


def parse_renames(said: str | Sequence[str] | None) -> tuple[Rename, ...]:
    """The renames that a user asks for, in their order.

    A pattern is a glob of a whole name, and each ``*`` or ``?`` of the replacement stands for what the pattern's
    next wildcard matched; after ``re:`` it is a regular expression that is looked for anywhere in a name.

    Raises:
        UsageError: one cannot be understood.
    """
    return tuple(_parsed(text) for text in ([said] if isinstance(said, str) else said or ()))


def _parsed(text: str) -> Rename:
    pattern, equals, replacement = text.rpartition("=")
    if not equals or not pattern.removeprefix(_REGEX):
        raise UsageError("--rename cannot be understood", expected=_HOW, found=text)
    if not pattern.startswith(_REGEX):
        pattern, replacement = _of_glob(text, pattern, replacement)
    try:
        found = re.compile(pattern.removeprefix(_REGEX))
        re.compile(found.pattern + "|").sub(replacement, "")  # what it refers to is there
    except (re.error, IndexError) as error:
        raise UsageError(f"--rename has no regular expression: {error}", expected=_HOW, found=text) from None
    return Rename(text, found, replacement)


def _of_glob(text: str, pattern: str, replacement: str) -> tuple[str, str]:
    """A glob and its replacement as a regular expression and its."""
    made, count = [], 0
    for literal, wildcard in _GLOB.findall(pattern):
        made.append(re.escape(literal) if literal else "(" + _WILDCARDS.get(wildcard, _class(wildcard)) + ")")
        count += not literal
    numbers = iter(range(1, count + 1))
    try:
        parts = [
            f"\\g<{next(numbers)}>" if part in ("*", "?") else part.replace("\\", r"\\")
            for part in re.split(r"([*?])", replacement)
        ]
    except StopIteration:
        raise UsageError(
            "the replacement has more wildcards than the pattern", expected=f"at most {count}", found=text
        ) from None
    return r"\A" + "".join(made) + r"\Z", "".join(parts)


_IN_CLASS = r"(?:\][^\]]*|[^\]]+)"
_CLASS = rf"\[(?:!{_IN_CLASS}|(?!!){_IN_CLASS})\]"
_GLOB = re.compile(rf"([^*?\[]+|(?!{_CLASS})\[)|(\*|\?|{_CLASS})")
"""As ``fnmatch`` has it: a bracket first in a class is of it, and one that nothing closes is itself."""
_WILDCARDS = {"*": ".*", "?": "."}


def _class(wildcard: str) -> str:
    inner = wildcard[1:-1]
    negated = inner.startswith("!")
    return f"[{'^' * negated}{re.sub(r'([^-0-9A-Za-z_])', _ESCAPED, inner[negated:])}]"


_ESCAPED = r"\\\1"


@dataclass(frozen=True)
class Called:
    """A checkpoint whose weights have the names that a user gives them.

    Attributes:
        checkpoint: it, with all that is beside the weights as it was.
        stored: own name of every weight -> the one that it had.
        notes: what a user should know.
    """

    checkpoint: Checkpoint
    stored: Mapping[str, str]
    notes: tuple[str, ...]

    def told(self, renamed: Renamed, source: Checkpoint) -> Renamed:
        """What was then made of it, told of the checkpoint as it was."""
        return replace(
            renamed,
            ignored=self.ignored(renamed.ignored),
            notes=(*self.notes, *renamed.notes),
            renaming=renamed.renaming.after(self.stored, source.weights()),
        )

    def ignored(self, names: Mapping[str, str]) -> dict[str, str]:
        """What was left out later, with the reason, by the names that it had."""
        prefix = self.checkpoint.model_prefix
        shown = {prefix + new: prefix + name for new, name in self.stored.items()} | dict(self.stored)
        return {shown.get(name, name): reason for name, reason in names.items()}

    def keeps_state(self, source: Checkpoint) -> bool:
        """Whether what is stored beside the weights stays true, because it names none that has another name now."""
        changed = {name for new, name in self.stored.items() if new != name}
        own = {source.model_prefix + name for name in source.weights()}
        beside = (name for name in (*source.tensors, *source.objects) if name not in own)
        return not any(part in changed for name in beside for part in _parts(name))


def _parts(name: str) -> Iterator[str]:
    """Every run of the steps of a dotted name."""
    steps = name.split(".")
    for first in range(len(steps)):
        for last in range(first + 1, len(steps) + 1):
            yield ".".join(steps[first:last])


def new_name(name: str, prefix: str, renames: Sequence[Rename]) -> str:
    """What a weight's own name becomes by all renames together."""
    for rename in renames:
        new = _once(rename, name, prefix)
        name = name if new is None else new
    return name


def _once(rename: Rename, name: str, prefix: str) -> str | None:
    new = rename(name)
    if new is None and prefix:
        new = rename(prefix + name)
        return None if new is None else new.removeprefix(prefix)
    return new


def called(checkpoint: Checkpoint, renames: Sequence[Rename]) -> Called:
    """The checkpoint with its weights renamed, each rename applied to what those before it gave.

    A pattern meets a weight's own name, or else its stored name, with the prefix that all weights have.

    Raises:
        UsageError: two weights would have one name, or one would have none.
    """
    prefix, weights = checkpoint.model_prefix, checkpoint.weights()
    names = {name: name for name in weights}
    notes = []
    for rename in renames:
        changes = {}
        for old, name in names.items():
            new = _once(rename, name, prefix)
            if new is not None:
                changes[old] = new
        notes.append(_note(rename, {names[old]: new for old, new in changes.items()}))
        names.update(changes)
    _check(names, checkpoint)
    new_names = {prefix + old: prefix + new for old, new in names.items()}
    new_names |= _beside(checkpoint, new_names, renames)
    objects = {
        new_names.get(name, _renamed_part(name, names, prefix) if isinstance(value, CompositeTensor) else name): value
        for name, value in checkpoint.objects.items()
    }
    paths = dict(_new_path(checkpoint, name, new_names) for name in checkpoint.key_paths)
    return Called(
        replace(
            with_modules(checkpoint, names),
            tensors={new_names.get(name, name): tensor for name, tensor in checkpoint.tensors.items()},
            objects=objects,
            key_paths=paths,
            dialect=checkpoint.dialect
            if checkpoint.config_kind is not None or checkpoint.adapter is not None
            else None,
        ),
        {new: old for old, new in names.items()},
        tuple(notes),
    )


def with_modules(checkpoint: Checkpoint, names: Mapping[str, str]) -> Checkpoint:
    """An adapter that names the modules that it adapts as its tensors are called now; a model as it is.

    Args:
        checkpoint: with what was said before.
        names: own name of a weight -> its new one.
    """
    settings = checkpoint.adapter
    if settings is None:
        return checkpoint
    modules = {_FACTOR.split(old)[0]: _FACTOR.split(new)[0] for old, new in names.items()}

    def called_now(said: str) -> list[str]:
        steps = said.count(".") + 1
        hits = [new for old, new in modules.items() if f".{old}".endswith(f".{said}")]
        return list(dict.fromkeys(".".join(new.split(".")[-steps:]) for new in hits)) or [said]

    config = dict(checkpoint.config)
    for key in ("target_modules", "modules_to_save"):
        if isinstance(config.get(key), list):
            said = [name for entry in config[key] for name in called_now(str(entry))]
            config[key] = list(dict.fromkeys(said))
    for key in ("rank_pattern", "alpha_pattern"):
        if isinstance(config.get(key), Mapping):
            config[key] = _patterns(config[key], modules)
    settings = replace(
        settings,
        ranks=_patterns(settings.ranks, modules),
        alphas=_patterns(settings.alphas, modules),
        token_indices=_patterns(settings.token_indices, modules),
        targets=tuple(dict.fromkeys(name for entry in settings.targets for name in called_now(entry))),
    )
    return replace(checkpoint, config=config, adapter=settings)


def _patterns(said: Mapping[str, Value], modules: Mapping[str, str]) -> dict[str, Value]:
    """What is said of modules by patterns of the ends of their names, said of those with other names by these."""
    result: dict[str, Value] = {}
    for pattern, value in said.items():
        hits = {old: new for old, new in modules.items() if pattern and re.fullmatch(rf"(?:.*\.)?(?:{pattern})", old)}
        moved = any(old != new for old, new in hits.items())
        for name in [new.removeprefix(_WRAPPER) for new in hits.values()] if moved else [pattern]:
            result.setdefault(name, value)
    return result


_WRAPPER = "base_model.model."
_FACTOR = re.compile(r"\.(?:lora_|modules_to_save|base_layer|original_module)")


def _beside(checkpoint: Checkpoint, new_names: Mapping[str, str], renames: Sequence[Rename]) -> dict[str, str]:
    """New names of objects in the modules that weights are in, such as an extra state, by the same patterns.

    One whose name a weight would get keeps its own.
    """
    prefix = checkpoint.model_prefix
    taken, found = {*new_names.values()}, {}
    for name in objects_in_modules(checkpoint):
        new = prefix + new_name(name.removeprefix(prefix), prefix, renames)
        if new not in taken and new != prefix:
            found[name] = new
            taken.add(new)
    return found


def _note(rename: Rename, changes: Mapping[str, str]) -> str:
    changed = [(old, new) for old, new in changes.items() if old != new]
    if not changed:
        return f"--rename '{rename.said}' " + ("matches no weight" if not changes else "changes no name")
    old, new = changed[0]
    return f"--rename '{rename.said}' renames {len(changed)} weights, such as {old} to {new}"


def _check(names: Mapping[str, str], checkpoint: Checkpoint) -> None:
    """Raise UsageError unless every weight has a name of its own."""
    holders: dict[str, list[str]] = {}
    for old, new in names.items():
        holders.setdefault(new, []).append(old)
    if "" in holders:
        raise UsageError(
            "--rename leaves no name", path=checkpoint.path, tensor=holders[""][0], remedy="give it a replacement"
        )
    clash = next(((new, olds) for new, olds in holders.items() if len(olds) > 1), None)
    if clash is not None:
        raise UsageError(
            f"--rename gives {len(clash[1])} weights the same name",
            path=checkpoint.path,
            tensor=clash[0],
            expected="a name for each",
            found=some(clash[1]),
            remedy="make the pattern match fewer names, or leave the others out with --exclude",
        )


def _renamed_part(name: str, names: Mapping[str, str], prefix: str) -> str:
    own = name.removeprefix(prefix)
    return prefix + names[own] if own in names else name


def _new_path(checkpoint: Checkpoint, name: str, new_names: Mapping[str, str]) -> tuple[str, tuple[Any, ...]]:
    """A stored name as it is now, and where it lies: in what held it, under its own new name.

    Where the weights alone are left of a file, its names still have before them what held the weights.
    """
    path, prefix = checkpoint.key_paths[name], checkpoint.model_prefix
    gone = name not in new_names and name not in checkpoint.tensors and name not in checkpoint.objects
    above = f"{path[0]}." if gone and len(path) > 1 and name.startswith(f"{path[0]}.") else ""
    new = new_names.get(name.removeprefix(above))
    if new is None or above + new == name:
        return name, path
    new, prefix = above + new, above or prefix
    holder = [step for step in prefix.split(".") if step]
    inside = len(holder) if [*path[: len(holder)]] == holder else 0
    own = new.removeprefix(prefix) if inside else new
    below = "".join(f".{step}" for step in path[inside + 1 :])  # in a mapping that is one of the entries
    head = own.removesuffix(below) if below else own
    return new, (*path[:inside], own) if not head or head == own else (*path[:inside], head, *path[inside + 1 :])
