"""Weights put into a module: what fits, what is missing, unexpected or of another shape, all told at once."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import field
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn

from anyckpt.data_classes import dataclass
from anyckpt.errors import MappingError, alike, few

_SHOWN = 20


@dataclass(frozen=True)
class Fitted:
    """How a state fits a module.

    Attributes:
        matched: names that both have, in the same shape.
        missing: names of the module of which the state has nothing.
        unexpected: names of the state that the module lacks.
        misshaped: name -> the shape in the state and the module's.
        cast: name -> the element type in the state and the module's, into which the elements are converted.
    """

    matched: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()
    misshaped: Mapping[str, tuple[tuple[int, ...], tuple[int, ...]]] = field(default_factory=dict)
    cast: Mapping[str, tuple[str, str]] = field(default_factory=dict)

    def __str__(self) -> str:
        told = [f"{len(self.matched)} matched"]
        if self.missing:
            told.append(f"{len(self.missing)} missing: {few(self.missing, _SHOWN)}")
        if self.unexpected:
            told.append(f"{len(self.unexpected)} unexpected: {few(self.unexpected, _SHOWN)}")
        if self.misshaped:
            shapes = [f"{name} {list(found)} for {list(own)}" for name, (found, own) in self.misshaped.items()]
            told.append(f"{len(self.misshaped)} of another shape: {few(shapes, _SHOWN)}")
        return "; ".join(told)


class StateMismatchError(MappingError):
    """A state does not fit a module.

    Attributes:
        fitted: every name that does not fit.
    """

    fitted: Fitted = Fitted()


def load_into(
    module: nn.Module,
    state: Mapping[str, Any],
    *,
    path: str,
    strict: bool = True,
    may_miss: Iterable[str] = (),
    may_be_left: Iterable[str] = (),
) -> Fitted:
    """Put a state into a module; nothing is changed if it does not fit.

    Names that the module ties together count as there if one of them is.  Parameters of the meta device become the
    state's tensors themselves; others get their elements.  Sharded parameters (``DTensor``) get their parts.

    Args:
        module: where to.
        state: name -> tensor or, for ``_extra_state``, whatever ``set_extra_state`` takes.
        path: where it comes from, for messages.
        strict: missing and unexpected names are an error.  Another shape always is.
        may_miss: globs of names that may be missing with ``strict``, too.
        may_be_left: globs of unexpected names that may be left out with ``strict``, too.

    Raises:
        StateMismatchError: it does not fit; lists all names.
    """
    hooked = any(inner._load_state_dict_pre_hooks for inner in module.modules())
    fitted = fit(module, state)
    if not hooked:  # hooks rename keys, so that torch itself has to tell what fits
        _check(fitted, path, strict, may_miss, may_be_left)
    own = dict(module.state_dict(keep_vars=True))
    taken = state if hooked else _restricted(state, fitted)
    if any(_is_distributed(value) for value in own.values()):
        _load_distributed(module, taken)
        return fitted
    on_meta = any(isinstance(value, torch.Tensor) and value.is_meta for value in own.values())
    try:
        told = module.load_state_dict(taken, strict=False, assign=on_meta)
    except RuntimeError as error:
        raise MappingError(f"does not fit {type(module).__name__}: {error}", path=path) from error
    if hooked:
        fitted = Fitted(
            tuple(name for name in own if name not in told.missing_keys),
            tuple(told.missing_keys),
            tuple(told.unexpected_keys),
            cast=fitted.cast,
        )
        _check(fitted, path, strict, may_miss, may_be_left)
    if on_meta:
        _check_made(module, path)
    return fitted


def fit(module: nn.Module, state: Mapping[str, Any]) -> Fitted:
    """How a state fits a module, by names and shapes; nothing is changed."""
    own = dict(module.state_dict(keep_vars=True))
    ties: dict[Any, bool] = {}
    for name, value in own.items():
        key = _identity(value)
        ties[key] = ties.get(key, False) or name in state
    matched: list[str] = []
    misshaped: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {}
    cast: dict[str, tuple[str, str]] = {}
    for name, value in own.items():
        given = state.get(name)
        if not isinstance(given, torch.Tensor) or not isinstance(value, torch.Tensor):
            if name in state:
                matched.append(name)
            continue
        if not _is_uninitialized(value) and given.shape != value.shape:
            misshaped[name] = tuple(given.shape), tuple(value.shape)
            continue
        matched.append(name)
        if given.dtype != value.dtype:
            cast[name] = _type(given), _type(value)
    missing = [name for name, value in own.items() if name not in state and not ties[_identity(value)]]
    unexpected = [name for name in state if name not in own]
    return Fitted(tuple(matched), tuple(missing), tuple(unexpected), misshaped, cast)


def _check(fitted: Fitted, path: str, strict: bool, may_miss: Iterable[str], may_be_left: Iterable[str]) -> None:
    wrong = Fitted(
        fitted.matched,
        tuple(_others(fitted.missing, may_miss)) if strict else (),
        tuple(_others(fitted.unexpected, may_be_left)) if strict else (),
        fitted.misshaped,
    )
    if not (wrong.missing or wrong.unexpected or wrong.misshaped):
        return
    hint = alike(wrong.missing[0], wrong.unexpected) if wrong.missing and wrong.unexpected else ""
    error = StateMismatchError(
        f"the weights do not fit the module: {wrong}",
        path=path,
        remedy=(f"perhaps {wrong.missing[0]!r} is {hint} there; " if hint else "")
        + (
            "check that it is the checkpoint of this model and configuration"
            + (", or pass strict=False to go on without the names" if not wrong.misshaped else "")
        ),
    )
    error.fitted = wrong
    raise error


def _others(names: Iterable[str], patterns: Iterable[str]) -> list[str]:
    known = tuple(patterns)
    return [name for name in names if not any(fnmatchcase(name, pattern) for pattern in known)]


def _restricted(state: Mapping[str, Any], fitted: Fitted) -> dict[str, Any]:
    """The part that goes into the module, with the versions of modules that torch's loading hooks ask for."""
    from collections import OrderedDict

    taken = OrderedDict((name, state[name]) for name in fitted.matched)
    versions = getattr(state, "_metadata", None)
    if versions is not None:
        taken._metadata = versions  # type: ignore[attr-defined]
    return taken


def _load_distributed(module: nn.Module, state: Mapping[str, Any]) -> None:
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

    set_model_state_dict(module, dict(state), options=StateDictOptions(full_state_dict=True, strict=False))


def _check_made(module: nn.Module, path: str) -> None:
    left = [name for name, value in [*module.named_parameters(), *module.named_buffers()] if value.is_meta]
    if left:
        raise MappingError(
            f"after loading, {len(left)} tensors of the module are still of the meta device",
            path=path,
            found=few(left, _SHOWN),
            remedy="build the module on a real device, or give it what they are",
        )


def full_state(module: nn.Module) -> Mapping[str, Any]:
    """The state of a whole module, whichever part of it this rank has; collective where it is sharded."""
    state: Mapping[str, Any] = module.state_dict()
    if not any(_is_distributed(value) for value in state.values()):
        return state
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    return get_model_state_dict(module, options=StateDictOptions(full_state_dict=True, cpu_offload=True))


def _identity(value: Any) -> Any:
    """Equal for tensors that are one: tied parameters."""
    if not isinstance(value, torch.Tensor) or value.is_meta or _is_uninitialized(value) or _is_distributed(value):
        return id(value)
    if not value.numel():
        return id(value)
    return value.device, value.data_ptr(), value.shape, value.stride(), value.dtype


def _is_uninitialized(value: Any) -> bool:
    return isinstance(value, (nn.parameter.UninitializedParameter, nn.parameter.UninitializedBuffer))


def _is_distributed(value: Any) -> bool:
    return hasattr(value, "full_tensor") and hasattr(value, "placements")


def _type(tensor: torch.Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")
