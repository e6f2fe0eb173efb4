"""What errors say, and in which words."""

from __future__ import annotations

import pytest

from anyckpt.config.model import ModelConfig, check
from anyckpt.config.possible import layers_of
from anyckpt.errors import AnyckptError, FormatError, MappingError, few


@pytest.mark.parametrize(
    ("count", "most", "told"),
    [(0, 3, ""), (1, 3, "0"), (3, 3, "0, 1, 2"), (4, 3, "0, 1, 2 and 1 more"), (9000, 1, "0 and 8,999 more")],
)
def test_a_few_of_many(count: int, most: int, told: str) -> None:
    assert few(range(count), most) == told


def test_an_error_is_told_as_another_with_all_its_facts() -> None:
    known = MappingError("is odd", path="a", tensor="w", expected=1, found=2, remedy="mend it")
    other = known.told_as(FormatError, "is odd here", path="b")
    assert type(other) is FormatError
    assert str(other) == "b: tensor 'w': is odd here (expected 1, found 2); mend it"
    assert str(known.told_as(AnyckptError, remedy=None)) == "a: tensor 'w': is odd (expected 1, found 2)"


@pytest.mark.parametrize(
    ("field", "value", "told"),
    [
        ("hidden_size", 0, "hidden_size is not possible"),
        ("kv_channels", 1 << 40, "kv_channels is not possible"),
        ("vocab_size", -1, "vocab_size is not possible"),
        ("make_vocab_size_divisible_by", 0, "make_vocab_size_divisible_by is not possible"),
        ("num_layers", 10_001, "too many layers"),
        ("encoder_num_layers", 10_001, "too many layers"),
        ("num_tokentypes", -1, "num_tokentypes is not possible"),
        ("rotary_base", 0.0, "rotary_base is not possible .expected a positive number"),
        ("window_attn_skip_freq", 0, "window_attn_skip_freq is not possible"),
        ("moe_ffn_hidden_size", -2, "moe_ffn_hidden_size is not possible"),
    ],
)
def test_what_no_model_has_is_named(field: str, value: object, told: str) -> None:
    plain = {**vars(ModelConfig("", 2, 8, 32, 2, 2, 4)), field: value}
    with pytest.raises(MappingError, match=told):
        check(ModelConfig(**plain))


@pytest.mark.parametrize(("stated", "count"), [(-3, 0), (0, 0), (7, 7), (1 << 60, 10_000)])
def test_layers_of_what_nobody_checked_are_not_endless(stated: int, count: int) -> None:
    assert len(layers_of(stated)) == count
