"""Which checkpoints stay, decided from plain values."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from anyckpt.errors import UsageError
from anyckpt.operations.retention import Retention, Saved, deleted, kept

metrics = st.none() | st.floats(-5, 5) | st.just(math.nan) | st.sampled_from([0.0, 1.0, math.inf])
gaps = st.lists(st.tuples(st.integers(1, 40), st.floats(0, 5000), metrics), min_size=1, max_size=25)


@st.composite
def runs(draw: st.DrawFn) -> list[Saved]:
    """Checkpoints of a run in the order in which they were saved."""
    step, time, found = 0, 1e9, []
    for more, seconds, metric in draw(gaps):
        step, time = step + more, time + seconds
        found.append(Saved(f"step-{step:08d}", step, time, metric))
    return found


rules = st.builds(
    Retention,
    last=st.none() | st.integers(1, 5),
    best=st.integers(0, 4),
    mode=st.sampled_from(["min", "max"]),
    every_steps=st.none() | st.integers(1, 100),
    every_seconds=st.none() | st.floats(1, 20000),
    most=st.none() | st.integers(0, 4),
    forever_every=st.none() | st.integers(1, 200),
)


@given(runs(), rules, st.randoms())
def test_each_stays_or_goes_whatever_the_order(run: list[Saved], rule: Retention, random: object) -> None:
    stay, go = kept(run, rule), deleted(run, rule)
    assert sorted([*stay, *(one.name for one in go)]) == [one.name for one in run]
    assert run[-1].name in stay
    assert all(earlier.step < later.step for earlier, later in pairwise(go))
    shuffled = list(run)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    assert kept(shuffled, rule) == stay
    assert rule.last is not None or not go


@given(runs(), rules)
def test_what_stays_stays_when_it_is_asked_again(run: list[Saved], rule: Retention) -> None:
    stay = kept(run, rule)
    assert deleted([one for one in run if one.name in stay], rule) == []


@given(runs(), rules)
def test_deciding_after_each_save_keeps_what_deciding_at_the_end_keeps(run: list[Saved], rule: Retention) -> None:
    there: list[Saved] = []
    for one in run:
        stay = kept([*there, one], rule)
        there = [other for other in [*there, one] if other.name in stay]
    assert {one.name for one in there} == kept(run, rule).keys()


@given(runs(), rules)
def test_each_rule_keeps_what_it_says(run: list[Saved], rule: Retention) -> None:
    stay = kept(run, rule)
    assert len(stay) >= min(len(run), rule.last or len(run))
    judged = sorted(one.metric for one in run if one.metric is not None and not math.isnan(one.metric))
    best = judged[: rule.best] if rule.mode == "min" else judged[len(judged) - min(rule.best, len(judged)) :]
    there = [one.metric for one in run if one.name in stay and one.metric is not None and not math.isnan(one.metric)]
    assert all(there.count(metric) >= best.count(metric) for metric in best)
    for every in (rule.forever_every, rule.every_steps if rule.most is None else None):
        if every is not None:
            assert {one.step // every for one in run} == {one.step // every for one in run if one.name in stay}


def test_what_a_run_keeps() -> None:
    run = [Saved(f"{step}", step, step * 60.0, abs(step - 500) / 100) for step in range(100, 1300, 100)]
    assert kept(run, Retention()) == {"1200": "the newest"}
    assert kept(run, Retention(last=2, best=2)) == {
        "1200": "the newest",
        "1100": "one of the last 2",
        "500": "one of the best 2",
        "600": "one of the best 2",  # as good as 400, and newer
    }
    assert set(kept(run, Retention(best=1, mode="max"))) == {"1200"}
    assert set(kept(run, Retention(every_steps=500))) == {"100", "500", "1000", "1200"}
    assert set(kept(run, Retention(every_steps=500, most=1))) == {"1000", "1200"}
    assert set(kept(run, Retention(every_seconds=36000))) == {"100", "600", "1200"}
    assert set(kept(run, Retention(every_steps=200, most=0, forever_every=1000))) == {"100", "1000", "1200"}
    assert kept([], Retention()) == {}


@pytest.mark.parametrize(
    "given",
    [{"last": 0}, {"best": -1}, {"mode": "best"}, {"every_steps": -5}, {"every_seconds": math.nan}, {"most": -1}],
)
def test_rules_that_make_no_sense(given: dict[str, object]) -> None:
    with pytest.raises(UsageError, match="found"):
        Retention(**given)  # type: ignore[arg-type]
