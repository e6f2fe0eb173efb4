"""What a codec writes, it reads: each alone, and those of every family on configurations of its models."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.models.proofs import PROOFS
from tests.models.random_configs import configs

from anyckpt import models
from anyckpt.config import hugging_face, nemo2
from anyckpt.config.codecs import (
    Fixed,
    Implied,
    Multiple,
    Noted,
    OfClass,
    Power,
    Present,
    Times,
    Words,
    Written,
    negated,
    same_as,
)
from anyckpt.config.fields import Codec, Field, as_many_as_heads, share_of_a_head
from anyckpt.config.model import ModelConfig
from anyckpt.config.reader import Reader
from anyckpt.config.windows import AllBut, From, Layers, LayerWindow, Window, windowed_layers
from anyckpt.errors import MappingError

CONFIG = ModelConfig("", 6, 64, 128, 8, 8, 8)
WHAT = "config.json"


def read(codec: Codec, values: Mapping[str, Any], defaults: Mapping[str, Any] | None = None, **found: Any) -> Any:
    """Hub fields from keys that went through a file."""
    stated = json.loads(json.dumps(values))
    return codec.read(Reader(stated, WHAT), defaults or {}, {**vars(CONFIG), **found})


def check_both_ways(codec: Codec, config: ModelConfig, defaults: Mapping[str, Any] | None = None) -> Mapping[str, Any]:
    written = codec.write(config, [])
    found = read(codec, written, defaults, **vars(config))
    assert {hub: found[hub] for hub in codec.hubs} == {hub: getattr(config, hub) for hub in codec.hubs}
    assert written.keys() <= set(codec.keys)
    return written


# -- each alone ----------------------------------------------------------------------------------------------


@given(value=st.none() | st.integers(1, 1 << 39))
def test_field(value: int | None) -> None:
    """Also where null, or what is written for None, means it."""
    config = replace(CONFIG, q_lora_rank=value)
    assert check_both_ways(Field("q_lora_rank", "rank", default=None), config) == {"rank": value}
    assert check_both_ways(Field("q_lora_rank", "rank", default=None, null=True), config, {"rank": 3})
    assert check_both_ways(Field("q_lora_rank", "rank", "count", None, unset=0), config) == {"rank": value or 0}


@given(width=st.integers(1, 300))
def test_field_that_is_written_where_it_is_unusual(width: int) -> None:
    row = Field("kv_channels", "head_dim", default=share_of_a_head, terse=True)
    written = check_both_ways(row, replace(CONFIG, kv_channels=width))
    assert written == ({} if width == 8 else {"head_dim": width})
    assert Field("mtp_num_layers", "layers", default=None, terse=True).write(CONFIG, []) == {}


@given(value=st.floats(0.01, 1e6) | st.integers(1, 1 << 30).map(float))
def test_field_that_is_whole(value: float) -> None:
    written = check_both_ways(Field("floor_scale", "scale", "number", whole=True), replace(CONFIG, floor_scale=value))
    assert isinstance(written["scale"], int) == value.is_integer()


def test_field_is_read_by_its_first_spelling() -> None:
    row = Field("num_moe_experts", "num_experts", aliases=("experts", "n_experts"))
    assert row.keys == ("num_experts", "experts", "n_experts")
    assert read(row, {"n_experts": 4, "experts": 3}) == {"num_moe_experts": 3}
    assert read(row, {}, {"num_experts": 2}) == {"num_moe_experts": 2}
    assert row.missing(read(row, {})) == "num_experts"


@given(table=st.dictionaries(st.text(max_size=6), st.integers(), min_size=1), data=st.data())
def test_words(table: Mapping[str, int], data: st.DataObject) -> None:
    value = data.draw(st.sampled_from(sorted(table.values())))
    row = Words("mtp_num_layers", "kind", table, next(iter(table)))
    check_both_ways(row, replace(CONFIG, mtp_num_layers=value))
    assert read(row, {}) == {"mtp_num_layers": next(iter(table.values()))}
    assert read(row, {}, {"kind": max(table)}) == {"mtp_num_layers": table[max(table)]}
    with pytest.raises(MappingError, match="config.json's kind is unknown"):
        read(row, {"kind": "".join(table) + "x"})
    with pytest.raises(MappingError, match="no kind says the model's mtp_num_layers"):
        row.write(replace(CONFIG, mtp_num_layers=sum(map(abs, table.values())) + 1), [])


@given(groups=st.sampled_from([1, 2, 8]), heads=st.sampled_from([1, 8]))
def test_words_of_values_that_follow_from_others(groups: int, heads: int) -> None:
    row = Words("num_query_groups", "one", {True: 1, False: as_many_as_heads}, True, "flag", "no such groups")
    config = replace(CONFIG, num_query_groups=groups, num_attention_heads=heads)
    if groups in (1, heads):
        check_both_ways(row, config)
    else:
        with pytest.raises(MappingError, match="no such groups") as caught:
            row.write(config, [])
        assert caught.value.expected == f"1 or {heads}"


@given(activation=st.sampled_from(["relu", "gelu"]), gated=st.booleans())
def test_words_for_several_fields(activation: str, gated: bool) -> None:
    words = {"relu": ("relu", False), "gelu": ("gelu", False), "gated-gelu": ("gelu", True)}
    row = Words(("activation", "gated_linear_unit"), "proj", words, "relu")
    config = replace(CONFIG, activation=activation, gated_linear_unit=gated)
    if (activation, gated) in words.values():
        check_both_ways(row, config)
    else:
        with pytest.raises(MappingError, match="no proj says the model's activation and gated_linear_unit"):
            row.write(config, [])


@given(value=st.booleans(), default=st.booleans())
def test_negated(value: bool, default: bool) -> None:
    row = negated("add_bias_linear", "no_bias", default)
    assert check_both_ways(row, replace(CONFIG, add_bias_linear=value)) == {"no_bias": not value}
    assert read(row, {}) == {"add_bias_linear": not default}
    with pytest.raises(MappingError, match="no_bias is of the wrong type"):
        read(row, {"no_bias": 1})


@given(value=st.none() | st.floats(1e-3, 1e4))
def test_power(value: float | None) -> None:
    row = Power("query_pre_attn_scalar", "softmax_scale", -0.5)
    back = read(row, row.write(replace(CONFIG, query_pre_attn_scalar=value), []))["query_pre_attn_scalar"]
    assert back == value if value is None else math.isclose(back, value, rel_tol=1e-12)


@pytest.mark.parametrize("scale", [0, -0.125, 1e10])
def test_power_of_what_is_no_factor(scale: float) -> None:
    with pytest.raises(MappingError, match="softmax_scale is not possible"):
        read(Power("query_pre_attn_scalar", "softmax_scale", -0.5), {"softmax_scale": scale})


@given(value=st.integers(1, 1 << 30), factor=st.integers(2, 9))
def test_multiple(value: int, factor: int) -> None:
    row = Multiple("ffn_hidden_size", "both", factor, factor)
    check_both_ways(row, replace(CONFIG, ffn_hidden_size=value))
    assert read(row, {}) == {"ffn_hidden_size": 1}
    with pytest.raises(MappingError, match="both is not possible"):
        read(row, {"both": factor * value + 1})


@given(times=st.integers(1, 1 << 20), rest=st.integers(1, 63))
def test_times(times: int, rest: int) -> None:
    row = Times("ffn_hidden_size", "expansion", "hidden_size", default=4)
    assert check_both_ways(row, replace(CONFIG, ffn_hidden_size=64 * times)) == {"expansion": times}
    assert read(row, {}) == read(row, {"expansion": None}) == {"ffn_hidden_size": 256}
    with pytest.raises(MappingError, match="expansion is of the wrong type"):
        read(row, {"expansion": 1.5})
    with pytest.raises(MappingError, match="no expansion says the model's ffn_hidden_size .expected a multiple of 64"):
        row.write(replace(CONFIG, ffn_hidden_size=64 * times + rest), [])


@given(stated=st.none() | st.integers(0, 6) | st.text(max_size=3) | st.lists(st.integers(), max_size=2))
def test_fixed(stated: Any) -> None:
    row = Fixed({"width": 4, "rank": same_as("hidden_size"), "kinds": ["a", "b"]}, "that of the model")
    assert check_both_ways(row, CONFIG) == {"width": 4, "rank": 64, "kinds": ["a", "b"]}
    assert replace(row, written=False).write(CONFIG, []) == {}
    if stated in (None, 4):
        read(row, {"width": stated})
    else:
        with pytest.raises(MappingError, match="config.json's width is not that of the model"):
            read(row, {"width": stated})


@given(width=st.integers(1, 200))
def test_implied(width: int) -> None:
    row = Implied({"moe_ffn_hidden_size": same_as("ffn_hidden_size")}, "experts are as wide as the MLP")
    check_both_ways(row, replace(CONFIG, ffn_hidden_size=width, moe_ffn_hidden_size=width))
    with pytest.raises(MappingError, match="experts are as wide"):
        row.write(replace(CONFIG, moe_ffn_hidden_size=width + 128), [])


def test_written() -> None:
    row = Written({"dropout": same_as("hidden_dropout"), "length": same_as("max_position_embeddings")})
    assert check_both_ways(row, CONFIG) == {"dropout": 0.0}
    kept = replace(row, kept=True)
    assert kept.keys == ()
    assert kept.write(replace(CONFIG, extra={"hf": {"dropout": 0.5}}), []) == {}


@given(length=st.none() | st.integers(1, 99))
def test_present(length: int | None) -> None:
    row = Present("position_embedding_type", "length", there="rope", absent="alibi")
    kind = "alibi" if length is None else "rope"
    assert read(row, {"length": length}) == {"position_embedding_type": kind}
    told = row.write(replace(CONFIG, position_embedding_type=kind), [])
    assert read(row, {"length": length, **told}) == {"position_embedding_type": kind}


@given(language=st.booleans(), binary=st.booleans())
def test_of_class(language: bool, binary: bool) -> None:
    """Classes of the same fields are read; a class that says nothing of a field leaves it."""
    heads = {
        "Both": {"add_lm_head": True, "bert_binary_head": True},
        "Language": {"add_lm_head": True},
        "Causal": {"add_lm_head": True},
        "Binary": {"bert_binary_head": True},
        "Model": {},
    }
    row = OfClass("Some", heads, ("add_lm_head", "bert_binary_head"))
    written = row.write(replace(CONFIG, add_lm_head=language, bert_binary_head=binary), [])
    found = read(row, written)
    assert (found.get("add_lm_head", False), found.get("bert_binary_head", False)) == (language, binary)
    assert read(row, {"architectures": ["SomeCausal"]}) == {"add_lm_head": True}
    assert read(row, {"architectures": "Both"}) == read(row, {}) == {}


def test_noted() -> None:
    row, notes = Noted(lambda config: config.num_layers == 6, "six of them"), list[str]()
    assert row.write(CONFIG, notes) == row.write(replace(CONFIG, num_layers=5), notes) == {}
    assert notes == ["six of them"]


@given(length=st.none() | st.integers(1, 1 << 20), unset=st.none() | st.just(8192))
def test_window(length: int | None, unset: int | None) -> None:
    row = Window("window", unset)
    window = None if length is None else (length - 1, 0)
    if length is None and unset is not None:
        assert row.write(CONFIG, []) == {"window": unset}
    else:
        assert check_both_ways(row, replace(CONFIG, window_size=window), {"window": 77}) == {"window": length}
    absent, null = read(row, {}, {"window": 77}), read(row, {"window": None}, {"window": 77})
    assert absent == {"window_size": (76, 0)}
    assert null == (absent if unset is not None else {"window_size": None})


_KINDS = [Layers(), AllBut(2), AllBut(6, ("pattern", "_pattern")), From("first", 2, switch="on")]


@given(
    kind=st.sampled_from(_KINDS),
    windowed=st.lists(st.booleans(), min_size=1, max_size=12),
    length=st.integers(1, 1 << 20),
    unset=st.none() | st.just(4096),
    every=st.none() | st.integers(2, 7),
)
def test_window_of_some_layers(
    kind: Layers, windowed: list[bool], length: int, unset: int | None, every: int | None
) -> None:
    """Whichever way the hub has them: in all, in all but every n-th, or as a list."""
    pattern = every if every is not None else None if all(windowed) else tuple(map(int, windowed))
    config = replace(CONFIG, num_layers=len(windowed), window_size=(length - 1, 0), window_attn_skip_freq=pattern)
    layers = windowed_layers(config)
    row = LayerWindow(kind, unset)
    written = row.write(config, [])
    found = read(row, written, num_layers=len(layers))
    assert windowed_layers(replace(config, **found)) == layers
    assert found["window_size"] == ((length - 1, 0) if any(layers) else None)
    none = replace(config, window_size=None, window_attn_skip_freq=None)
    assert windowed_layers(replace(none, **read(row, row.write(none, []), num_layers=len(layers)))) == [False] * len(
        layers
    )
    del written["layer_types"]
    assert read(row, written, num_layers=len(layers)).keys() == {"window_size", "window_attn_skip_freq"}


@given(some=st.booleans(), length=st.integers(1, 99))
def test_window_of_some_layers_of_one_class_alone(some: bool, length: int) -> None:
    row = LayerWindow(Layers(), within=("ministral", "MinistralForCausalLM"))
    config = replace(CONFIG, window_size=(length - 1, 0), window_attn_skip_freq=2 if some else None)
    written = row.write(config, [])
    assert ("model_type" in written) == some
    assert read(row, written) == {"window_size": (length - 1, 0), "window_attn_skip_freq": 2 if some else None}
    assert read(row, {**written, "model_type": "mistral"})["window_attn_skip_freq"] is None


# -- of families ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(PROOFS))
@settings(max_examples=20, deadline=None)
@given(data=st.data())
def test_codecs_of_families(name: str, data: st.DataObject) -> None:
    """Every row reads from what the whole table writes the fields that it was written from."""
    family = models.known_families()[name]
    known = family.hugging_face
    config = hugging_face.parse(family, data.draw(configs(name)))
    _check_rows((*known.fields, *known.codecs), config, hugging_face.render(family, config, []), known.class_defaults)


@pytest.mark.parametrize("name", sorted(PROOFS))
@settings(max_examples=10, deadline=None)
@given(data=st.data())
def test_nemo2_s_codecs_of_families(name: str, data: st.DataObject) -> None:
    family = models.known_families()[name]
    if family.nemo2 is None:
        return
    config = replace(hugging_face.parse(family, data.draw(configs(name))), extra={})
    try:
        rendered = nemo2.render(family, config, [])["config"]
    except MappingError:
        return  # its classes have no such model
    defaults = family.nemo2.class_defaults(nemo2.nemo2_class({"config": rendered}) or "")
    _check_rows((*family.nemo2.fields, *family.nemo2.codecs), config, rendered, defaults)


def _check_rows(
    rows: tuple[Codec, ...], config: ModelConfig, rendered: Mapping[str, Any], defaults: Mapping[str, Any]
) -> None:
    """Each by itself, but for what a later row says of the same field."""
    reader = Reader(json.loads(json.dumps(rendered)), WHAT)
    settled: set[str] = set()
    for row in reversed(rows):
        found = row.read(reader, defaults, vars(config))
        assert set(row.hubs) <= vars(config).keys(), row
        for hub in {*row.hubs} & found.keys() - settled:
            value = getattr(config, hub)
            assert found[hub] == (pytest.approx(value) if isinstance(value, float) else value), (row, hub)
        settled |= found.keys()


def test_falcon_has_rope_or_alibi() -> None:
    """Of learned positions nothing was said, and rope was written."""
    family = models.known_families()["falcon"]
    config = hugging_face.parse(family, {"model_type": "falcon"})
    with pytest.raises(MappingError, match="has no such position embedding") as caught:
        hugging_face.render(family, replace(config, position_embedding_type="learned_absolute"), [])
    assert caught.value.expected == "rope or alibi"


def test_what_a_window_s_length_may_mean_is_told_once() -> None:
    family = models.known_families()["gemma3"]
    config = hugging_face.parse(family, {"model_type": "gemma3_text", "sliding_window": 129})
    notes: list[str] = []
    hugging_face.render(family, replace(config, extra={}), notes)
    assert len([note for note in notes if "window of (128, 0)" in note]) == 1
