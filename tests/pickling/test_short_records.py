"""Records that are written at once are written as all others are."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from anyckpt.pickling import Global, Record, dumps, writer

LEAVES = st.one_of(st.none(), st.booleans(), st.integers(-(1 << 40), 1 << 40), st.sampled_from(["a", "b", "é" * 200]))
TUPLES = st.lists(LEAVES, max_size=5).map(tuple)
TYPES = st.sampled_from([Global("torch", "Size"), Global("m", "C")])
ARGUMENTS = st.lists(st.one_of(LEAVES, TUPLES), max_size=4).map(tuple)
SMALL = st.builds(Record, TYPES, ARGUMENTS, st.booleans())
STATES = st.one_of(
    st.none(),
    LEAVES,
    st.dictionaries(st.sampled_from("abcdefgh"), st.one_of(LEAVES, SMALL, TUPLES, st.just([])), max_size=6),
)
RECORDS = st.builds(
    lambda kind, args, new, state: Record(kind, args, new, state=state), TYPES, ARGUMENTS, st.booleans(), STATES
)


@given(st.lists(st.one_of(RECORDS, SMALL, LEAVES), max_size=8), st.sampled_from([2, 4]), st.booleans())
def test_the_bytes_are_the_same(records: list[Any], protocol: int, keyed: bool) -> None:
    shared = [*records, *records]
    value: Any = {one: shared for one in records if isinstance(one, Record)} if keyed else shared
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(writer, "_is_short", lambda record: False)
        expected = dumps(value, protocol=protocol)
    assert dumps(value, protocol=protocol) == expected
