"""Which checkpoints of a training run stay: a decision about plain values, without looking at any disk.

What the rules keep once they keep as long as only newer checkpoints come, but for ``last`` and ``best``, which newer
ones replace.  Deciding after each save keeps the same as deciding once at the end.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence

from anyckpt.data_classes import dataclass
from anyckpt.errors import UsageError


@dataclass(frozen=True)
class Saved:
    """A whole checkpoint of a run.

    Attributes:
        name: of the file or directory.
        step: optimizer steps taken.
        time: when it was saved, seconds since 1970.
        metric: how good the model is, None if nobody said.
    """

    name: str
    step: int
    time: float
    metric: float | None = None


@dataclass(frozen=True)
class Retention:
    """What stays: whatever any of the rules keeps, and always the newest; ``Retention(last=None)`` keeps everything.

    A rule that keeps one of each period keeps the first of it, so that a later save never changes what is kept.

    Attributes:
        last: so many of the newest; all if None.
        best: so many with the best metric; of equal ones the newer.  One without a metric, or with NaN, is never best.
        mode: ``min`` if a lower metric is better, else ``max``.
        every_steps: the first of each so many steps, counted from step 0.
        every_seconds: the first of each so many seconds, counted from 1970 in UTC.
        most: of those that only ``every_steps`` or ``every_seconds`` keep, so many of the newest stay; all if None.
        forever_every: the first of each so many steps, counted from step 0, is kept for ever.

    Raises:
        UsageError: a number is not positive, or ``mode`` is another word.
    """

    last: int | None = 1
    best: int = 0
    mode: str = "min"
    every_steps: int | None = None
    every_seconds: float | None = None
    most: int | None = None
    forever_every: int | None = None

    def __post_init__(self) -> None:
        if self.mode not in ("min", "max"):
            raise UsageError("there is no such order of metrics", expected="min or max", found=repr(self.mode))
        for name in ("last", "every_steps", "every_seconds", "forever_every"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise UsageError(
                    f"{name} is not positive",
                    found=value,
                    remedy="give None to do without the rule" if name != "last" else "give None to keep all",
                )
        for name in ("best", "most"):
            value = getattr(self, name)
            if value is not None and value < 0:
                raise UsageError(f"{name} is negative", found=value)


def kept(checkpoints: Iterable[Saved], rules: Retention) -> dict[str, str]:
    """Names of the checkpoints that stay -> why, in words; the others may go.

    The order in which they are given does not matter.
    """
    ordered = sorted(checkpoints, key=_age)
    reasons: dict[str, str] = {}

    def keep(found: Iterable[Saved], why: str) -> None:
        for one in found:
            reasons.setdefault(one.name, why)

    keep(ordered[-1:], "the newest")
    if rules.forever_every is not None:
        every = rules.forever_every
        keep(_firsts(ordered, lambda one: one.step // every), f"the first of {every:,} steps, for ever")
    newest = len(ordered) if rules.last is None else rules.last
    keep(ordered[-newest:], "everything is kept" if rules.last is None else f"one of the last {newest:,}")
    keep(_best(ordered, rules), f"one of the best {rules.best:,}")
    keep(_spaced(ordered, rules), "the first of its period")
    return reasons


def deleted(checkpoints: Iterable[Saved], rules: Retention) -> list[Saved]:
    """The checkpoints that go, oldest first."""
    found = list(checkpoints)
    stay = kept(found, rules)
    return sorted((one for one in found if one.name not in stay), key=_age)


def _age(one: Saved) -> tuple[int, float, str]:
    return one.step, one.time, one.name


def _firsts(ordered: Sequence[Saved], period: Callable[[Saved], int]) -> Iterator[Saved]:
    seen: set[int] = set()
    for one in ordered:
        number = period(one)
        if number not in seen:
            seen.add(number)
            yield one


def _best(ordered: Sequence[Saved], rules: Retention) -> list[Saved]:
    sign = -1 if rules.mode == "min" else 1
    judged = [(sign * one.metric, one) for one in ordered if one.metric is not None and not math.isnan(one.metric)]
    judged.sort(key=lambda item: (item[0], _age(item[1])))
    return [one for _, one in judged[len(judged) - min(rules.best, len(judged)) :]]


def _spaced(ordered: Sequence[Saved], rules: Retention) -> list[Saved]:
    found: dict[str, Saved] = {}
    if rules.every_steps is not None:
        steps = rules.every_steps
        found.update((one.name, one) for one in _firsts(ordered, lambda one: one.step // steps))
    if rules.every_seconds is not None:
        seconds = rules.every_seconds
        found.update((one.name, one) for one in _firsts(ordered, lambda one: math.floor(one.time / seconds)))
    spaced = sorted(found.values(), key=_age)
    return spaced if rules.most is None else spaced[len(spaced) - min(rules.most, len(spaced)) :]
