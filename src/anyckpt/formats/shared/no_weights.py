"""Why some stored entries of Megatron's models are no weights."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from anyckpt.checkpoint.grouping import grouped
from anyckpt.pickling.plain import view
from anyckpt.tensor import LazyTensor

EXTRA_STATE_REASON = "Transformer Engine's own state (FP8 scaling); carries no weights"
PLACEHOLDER_REASON = "an empty placeholder for Transformer Engine's own state; nothing is lost with it"
FREQUENCIES_REASON = "computed from the configuration"

_FEW = 64


def extra_state_reason(state: Any) -> str:
    """Why a module's own state is no weight: it holds something else, or nothing."""
    return EXTRA_STATE_REASON if _holds_something(state) else PLACEHOLDER_REASON


def note_extra_state(ignored: dict[str, str], name: str, state: Any) -> None:
    """Enter a module's own state, of one rank of several, among what carries no weights."""
    if ignored.get(name) != EXTRA_STATE_REASON:
        ignored[name] = extra_state_reason(state)


def why_ignored(ignored: Mapping[str, str], hold_something: Callable[[], bool] | None) -> dict[str, str]:
    """What carries no weights and why, states that are only read when asked for looked at: most are placeholders.

    Args:
        ignored: names, and the reasons that are known without looking.
        hold_something: ``Checkpoint.holds_states``.

    Raises:
        FormatError: one is damaged.
    """
    if hold_something is None or EXTRA_STATE_REASON not in ignored.values() or hold_something():
        return dict(ignored)
    return {name: PLACEHOLDER_REASON if why == EXTRA_STATE_REASON else why for name, why in ignored.items()}


def lost(ignored: Mapping[str, str], hold_something: Callable[[], bool] | None = None) -> dict[str, str]:
    """What carries no weights and why, but for placeholders, with which nothing is lost: they are no news.

    Args:
        ignored: names, and the reasons that are known without looking.
        hold_something: ``Checkpoint.holds_states``.

    Raises:
        FormatError: a state is damaged.
    """
    told = why_ignored(ignored, hold_something)
    return {name: reason for name, reason in told.items() if reason != PLACEHOLDER_REASON}


def some_hold_something(states: Mapping[str, Any], names: Iterable[str]) -> bool:
    """Whether modules' own states of these names hold anything.

    Of many, those of the first, the middle and the last layer are read, for each kind of module: a run trains in FP8
    or does not, its outer layers perhaps not, and there may be one for every expert.
    """
    names = list(names)
    if len(names) > _FEW:
        kinds = [list(group) for group in grouped(dict.fromkeys(names))]
        names = [kind[at] for kind in kinds for at in sorted({0, len(kind) // 2, len(kind) - 1})]
    return any(_holds_something(states[name]) for name in names)


def _holds_something(state: Any) -> bool:
    seen = view(state)
    return bool(seen.size) if isinstance(seen, LazyTensor) else seen is not None and seen != b""
