"""Which class a configuration's ``target`` stands for: only those that the program named, never an import."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from typing import TypeVar

from anyckpt.errors import MappingError, UsageError, alike

T = TypeVar("T", bound=type)
Classes = Iterable[type] | Mapping[str, type]

_registered: dict[str, type] = {}


def register_class(cls: T, *targets: str) -> T:
    """Allow archives to be restored as ``cls``: those whose ``target`` is its own name, or one of ``targets``.

    Args:
        cls: a class; used as a decorator, it is returned.
        targets: what archives call it, where that is not its present place
            (``nemo.collections.asr.models.ctc_models.EncDecCTCModel``).

    Raises:
        UsageError: another class has one of the names.
    """
    names = (class_path(cls), *targets)
    for target in names:
        known = _registered.get(target, cls)
        if class_path(known) != class_path(cls):  # a module that is loaded again makes its classes anew
            raise UsageError(
                f"{target!r} is registered for another class", expected=class_path(known), found=class_path(cls)
            )
    _registered.update(dict.fromkeys(names, cls))
    return cls


def class_path(cls: type) -> str:
    """Module and name, as ``target`` has them."""
    return f"{cls.__module__}.{cls.__qualname__}"


def names_of(cls: type) -> set[str]:
    """Every ``target`` that stands for a class."""
    return {class_path(cls), *(target for target, known in _registered.items() if known is cls)}


def class_for(calling: type, target: str | None, classes: Classes, *, path: str, any_class: type) -> type:
    """The class to build of an archive.

    Args:
        calling: whose ``restore_from`` was called.
        target: what the archive says.
        classes: further classes that are allowed, by their own names or by others.
        path: of the archive, for messages.
        any_class: the base that says nothing of what is asked for.

    Returns:
        The class that ``target`` stands for, if it is the calling class or one made from it; the calling class if that
        is made from what ``target`` stands for, or if nobody said what it stands for, which a warning tells.

    Raises:
        MappingError: it stands for a class that has nothing to do with the calling one.
        UsageError: nobody said what it stands for, and the calling class could be any.
    """
    known = dict(_registered)
    known.update(classes if isinstance(classes, Mapping) else {class_path(cls): cls for cls in classes})
    found = calling if target in names_of(calling) else known.get(target or "")
    if found is not None and issubclass(found, calling):
        return found
    if found is not None and not issubclass(calling, found):
        raise MappingError(
            "holds a model of another class",
            path=path,
            expected=class_path(calling),
            found=class_path(found),
            remedy=f"call {found.__name__}.restore_from",
        )
    if calling is any_class:
        raise UsageError(
            "the class that it names is not among those that may be built" if target else "names no class",
            path=path,
            expected=alike(target or "", known) or ", ".join(sorted(known)) or "a registered class",
            found=target or "no target",
            remedy="call restore_from of the model's class, or register it (anyckpt.torch.register_class)",
        )
    if target is not None and found is None:
        warnings.warn(
            f"{path} holds a {target}, which is not registered: it is built as {class_path(calling)}; "
            f"anyckpt.torch.register_class({calling.__name__}, {target!r}) says that this is meant",
            stacklevel=3,
        )
    return calling
