"""Patterns in which a star is a number."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from anyckpt.config.starred import SEGMENT, filled, starred

PIECES = st.lists(st.text("ab.[+(\\_", max_size=6), min_size=1, max_size=4)
NUMBERS = st.lists(st.integers(0, 9_999_999).map(str), min_size=3, max_size=3)


@given(PIECES, NUMBERS)
def test_a_pattern_with_numbers_is_found_again_by_it(pieces: list[str], numbers: list[str]) -> None:
    pattern, wanted = "*".join(pieces), tuple(numbers[: len(pieces) - 1])
    if "**" in pattern:
        return  # where one number ends and the next begins is not to be told
    match = starred(pattern).fullmatch(filled(pattern, wanted))
    assert match is not None and match.groups() == wanted


def test_a_star_may_be_a_segment() -> None:
    assert starred("model.*.inv_freq", SEGMENT).fullmatch("model.rotary_emb.inv_freq")
    assert not starred("model.*.inv_freq", SEGMENT).fullmatch("model.layers.0.inv_freq")
    assert not starred("layers.*.weight").fullmatch("layers.x.weight")
