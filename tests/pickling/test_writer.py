"""The pickle writer: Python reads what it writes, and what was read is written back unchanged."""

from __future__ import annotations

import collections
import copy
import datetime
import functools
import io
import pathlib
import pickle
import pickletools
import zipfile
from argparse import Namespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from anyckpt.dtypes import dtype
from anyckpt.errors import AnyckptError, FormatError, UsageError
from anyckpt.pickling import DictRecord, Filled, Global, PersistentId, Record, Template, dumps, load
from anyckpt.pickling import torch_objects as make

_ZOO = pathlib.Path(__file__).parents[1] / "fixtures" / "legacy" / "zoo_objects"
# What torch 2.13's weights_only machine executes.
_TORCH_OPCODES = (
    "GLOBAL NEWOBJ REDUCE BUILD APPEND APPENDS SETITEM SETITEMS MARK TUPLE TUPLE1 TUPLE2 TUPLE3 NONE NEWFALSE "
    "NEWTRUE EMPTY_TUPLE EMPTY_LIST EMPTY_DICT EMPTY_SET BININT BININT1 BININT2 BINFLOAT BINUNICODE "
    "SHORT_BINSTRING BINPERSID BINGET LONG_BINGET BINPUT LONG_BINPUT LONG1 PROTO STOP"
)
_ATOMS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.integers(min_value=-(1 << 2000), max_value=1 << 2000),
    st.floats(allow_nan=False),
    st.complex_numbers(allow_nan=False),
    st.text(max_size=300),
    st.binary(max_size=300),
    st.builds(bytearray, st.binary(max_size=8)),
    st.frozensets(st.integers(), max_size=4),
    st.sets(st.text(max_size=3), max_size=4),
    st.builds(range, st.integers(-9, 9)),
    st.builds(slice, st.integers(-9, 9), st.none()),
)
_DATA = st.recursive(
    _ATOMS,
    lambda inner: st.one_of(
        st.lists(inner, max_size=5),
        st.lists(inner, max_size=5).map(tuple),
        st.dictionaries(st.text(max_size=3), inner, max_size=4),
    ),
    max_leaves=20,
)


@settings(max_examples=80, deadline=None)
@given(value=_DATA, protocol=st.sampled_from([2, 4]))
def test_python_and_we_read_what_we_write(value: Any, protocol: int) -> None:
    raw = dumps(value, protocol=protocol)
    assert pickle.loads(raw) == value
    assert load(raw, name="t") == value
    if protocol == 2:
        assert {opcode.name for opcode, _, _ in pickletools.genops(raw)} <= set(_TORCH_OPCODES.split())


_OBJECTS = st.recursive(
    _ATOMS.filter(lambda one: not isinstance(one, (set, frozenset)) or len(one) < 2)  # others have no order to keep
    | st.builds(Global, st.sampled_from(["m", "n"]), st.text("ab", min_size=1, max_size=2)),
    lambda inner: st.one_of(
        st.lists(inner, max_size=5),
        st.lists(inner, max_size=5).map(tuple),
        st.dictionaries(st.text(max_size=3), inner, max_size=4),
        st.builds(PersistentId, inner),
        st.builds(
            Record,
            st.just(Global("m", "Class")),
            st.lists(inner, max_size=4).map(tuple),
            st.booleans(),
            state=inner,
            items=st.none() | st.lists(inner, max_size=3),
            pairs=st.none() | st.lists(st.tuples(st.text(max_size=2), inner), max_size=3),
            kwargs=st.none() | st.dictionaries(st.text(max_size=2), inner, max_size=2),
        ),
        inner.map(lambda value: [value, value, (value, {"again": value})]),
    ),
    max_leaves=20,
)


@settings(max_examples=150, deadline=None)
@given(value=_OBJECTS, protocol=st.sampled_from([2, 4]))
def test_objects_read_back_are_written_the_same(value: Any, protocol: int) -> None:
    raw = dumps(value, protocol=protocol)
    assert dumps(load(raw, name="t", persistent_load=PersistentId), protocol=protocol) == raw


_PLAIN = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(0, 1 << 40), st.floats(allow_nan=False), st.text(max_size=2)),
    lambda inner: st.one_of(
        st.lists(inner, max_size=5),
        st.lists(inner, max_size=5).map(tuple),
        st.dictionaries(st.text(max_size=2), inner, max_size=4),
        st.tuples(st.integers(999, 1002), inner).map(lambda many: [many[1]] + [None] * many[0]),
        inner.map(lambda value: [value, value, (value, {"again": value})]),
    ),
    max_leaves=20,
)


def _with_texts_once(value: Any, texts: dict[str, str]) -> Any:
    """The same with one object for equal texts, as Python shares objects and not what is equal."""
    if isinstance(value, str):
        return texts.setdefault(value, value)
    if isinstance(value, dict):
        return {_with_texts_once(key, texts): _with_texts_once(one, texts) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        again: dict[int, Any] = {}
        return type(value)([again.setdefault(id(one), _with_texts_once(one, texts)) for one in value])
    return value


@settings(max_examples=150, deadline=None)
@given(value=_PLAIN)
def test_plain_data_is_written_byte_for_byte_as_python_writes_it(value: Any) -> None:
    value = _with_texts_once(value, {})
    theirs = io.BytesIO()
    pickle._Pickler(theirs, 2).dump(value)  # type: ignore[attr-defined]
    assert dumps(value) == theirs.getvalue()


def test_an_object_is_called_filled_and_given_its_state_in_this_order() -> None:
    shared = [1]
    inner = Record(Global("m", "Inner"), (shared, {}), True)
    value = Record(
        Global("m", "Outer"),
        (inner, b"x", PersistentId(("p",))),
        items=[2],
        pairs=[("a", inner), ("b", DictRecord(Global("m", "D")))],
        state={"s": shared},
    )
    opcodes = " ".join(opcode.name for opcode, _, _ in pickletools.genops(dumps(value)) if "PUT" not in opcode.name)
    assert opcodes == (
        "PROTO GLOBAL GLOBAL EMPTY_LIST BININT1 APPEND EMPTY_DICT TUPLE2 NEWOBJ "
        "GLOBAL BINUNICODE BINUNICODE TUPLE2 REDUCE BINUNICODE TUPLE1 BINPERSID TUPLE3 REDUCE "
        "BININT1 APPEND MARK BINUNICODE BINGET BINUNICODE GLOBAL EMPTY_TUPLE REDUCE SETITEMS "
        "EMPTY_DICT BINUNICODE BINGET SETITEM BUILD STOP"
    )


def test_no_nesting_is_too_deep() -> None:
    value: Any = None
    for number in range(30_000):
        value = ([value], (value,), {"in": value}, Record(Global("m", "n"), (value,)))[number % 4]
    assert dumps(value).endswith(b".")


def _read(value: Any, protocol: int) -> Any:
    return load(pickle.dumps(value, protocol), name="t")


@pytest.mark.parametrize("written", [2, 4])
@pytest.mark.parametrize("read", range(6))
def test_objects_come_back_from_records(read: int, written: int) -> None:
    ordered = collections.OrderedDict(b=1, a=2)
    ordered._metadata = {"": 1}  # type: ignore[attr-defined]
    default: Any = collections.defaultdict(list, {"x": [1]})
    value = {
        "namespace": Namespace(lr=0.1, deeper=Namespace(x=[1, 2])),
        "ordered": ordered,
        "default": default,
        "counter": collections.Counter("aab"),
        "deque": collections.deque([1, 2], 5),
        "path": pathlib.PurePosixPath("/a/b"),
        "when": datetime.datetime(2020, 1, 2, 3, tzinfo=datetime.timezone.utc),
        "array": np.arange(6).reshape(2, 3),
        "scalar": np.float32(1.5),
        "function": pathlib.Path,
        "buffer": io.BytesIO(b"abc").getvalue(),
        "big": 1 << 3000,
    }
    back = pickle.loads(dumps(_read(value, read), protocol=written))
    assert back["ordered"]._metadata == {"": 1}
    assert isinstance(back["ordered"], collections.OrderedDict)
    assert back["default"].default_factory is list
    assert type(back["counter"]) is collections.Counter
    assert np.array_equal(back.pop("array"), value.pop("array"))  # type: ignore[arg-type]
    assert back == value


class WithKeywords:
    def __new__(cls, a: int = 0, *, b: int = 0) -> WithKeywords:
        made = super().__new__(cls)
        made.given = (a, b)
        return made

    given: tuple[int, int]

    def __getnewargs_ex__(self) -> tuple[tuple[int], dict[str, int]]:
        return (self.given[0],), {"b": self.given[1]}


class WithContent(dict[Any, Any]):
    pass


@settings(max_examples=80, deadline=None)
@given(value=_DATA, parts=st.lists(st.tuples(_DATA, _DATA), min_size=1, max_size=5), protocol=st.sampled_from([2, 4]))
def test_what_fills_a_template_is_as_if_it_was_made_each_time(
    value: Any, parts: list[tuple[Any, Any]], protocol: int
) -> None:
    shared = ("shared",)

    def make(first: Any, second: Any) -> Any:
        return Record(Global("a", "B"), (copy.deepcopy(value), first, shared), state={"value": [second, 1.5]})

    def swapped(first: Any, second: Any) -> Any:
        return [second, copy.deepcopy(value), first, second]

    def without() -> Any:
        return copy.deepcopy(value)

    templates = Template(make), Template(swapped), Template(without)
    filled = [[Filled(templates[0], *two), Filled(templates[1], *two), Filled(templates[2])] for two in parts * 2]
    made = [[make(*two), swapped(*two), without()] for two in parts * 2]
    assert dumps([shared, *filled, {"k": [*filled[0]]}], protocol=protocol) == dumps(
        [shared, *made, {"k": [make(*parts[0]), swapped(*parts[0]), without()]}], protocol=protocol
    )


@pytest.mark.parametrize("protocol", [2, 4])
def test_templates_fill_templates(protocol: int) -> None:
    def pair(first: Any, second: Any) -> Any:
        return {"first": first, "second": second}

    template, shared = Template(pair), (1, 2)
    filled = [Filled(template, Filled(template, f"text {n}", "second"), shared) for n in range(300)]
    made = [pair(pair(f"text {n}", "second"), shared) for n in range(300)]
    assert dumps(filled, protocol=protocol) == dumps(made, protocol=protocol)


def test_a_template_is_gone_through_until_it_is_written_twice_alike() -> None:
    made: list[Record] = []

    def make(number: Any) -> Record:
        made.append(Record(Global("a", "B"), ("text", number)))
        return made[-1]

    template = Template(make)
    back = load(dumps([Filled(template, number) for number in range(1000)], protocol=4), name="t")
    assert [one.args for one in back] == [("text", number) for number in range(1000)]
    assert len({id(one) for one in back}) == 1000
    assert len(made) == 3  # with new texts, with known ones, and the same again


@pytest.mark.parametrize("protocol", [2, 4])
def test_constructor_keywords_survive(protocol: int, monkeypatch: pytest.MonkeyPatch) -> None:
    record = _read(WithKeywords(1, b=2), 4)
    assert (record.args, record.kwargs) == ((1,), {"b": 2})
    again = load(dumps(record, protocol=protocol), name="t")
    assert (again.path, again.args, again.kwargs) == (record.path, (1,), {"b": 2})
    assert pickle.loads(dumps(record, protocol=protocol)).given == (1, 2)


def test_dictionary_subclasses_nobody_knows_survive() -> None:
    value = WithContent({1: 2, "a": [3]})
    value.extra = 5  # type: ignore[attr-defined]
    back = pickle.loads(dumps(_read(value, 2)))
    assert (type(back), back, back.extra) == (WithContent, value, 5)


def test_callables_with_arguments_survive() -> None:
    back = pickle.loads(dumps(_read(functools.partial(int, base=2), 2)))
    assert back("101") == 5


@pytest.mark.parametrize("name", ["zip.pt", "zip_proto4.pt"])
@pytest.mark.parametrize("protocol", [2, 4])
def test_a_second_round_trip_changes_nothing(name: str, protocol: int) -> None:
    with zipfile.ZipFile(_ZOO / name) as archive:
        raw = next(archive.read(entry) for entry in archive.namelist() if entry.endswith("data.pkl"))
    once = dumps(load(raw, persistent_load=PersistentId, name=name), protocol=protocol)
    assert dumps(load(once, persistent_load=PersistentId, name=name), protocol=protocol) == once


def test_what_is_shared_is_written_once() -> None:
    shared = [1, Record(Global("argparse", "Namespace"), (), True, state={"x": 1})]
    back = pickle.loads(dumps({"a": shared, "b": (shared, shared[1]), "text": ["long" * 50] * 100}))
    assert back["a"] is back["b"][0]
    assert back["a"][1] is back["b"][1]
    assert len(dumps(["long" * 50 for _ in range(100)])) < 1000


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("width", [1, 2, 5])
def test_cycles(protocol: int, width: int) -> None:
    inner: list[Any] = []
    value = (inner,) * width
    inner.append(value)
    mapping: dict[str, Any] = {"t": value}
    mapping["me"] = mapping
    back = pickle.loads(dumps(mapping, protocol=protocol))
    assert back["me"] is back
    direct = pickle.loads(dumps(value, protocol=protocol))
    assert direct[0][0] is direct


def test_many_items_are_written_in_batches() -> None:
    value = {"list": list(range(2500)), "dict": dict.fromkeys(range(2001))}
    for protocol in (2, 4):
        assert pickle.loads(dumps(value, protocol=protocol)) == value


def test_what_cannot_be_written_is_said() -> None:
    loop = Record(Global("m", "C"))
    loop.args = ([loop],)
    bad: list[tuple[Any, type[AnyckptError], str]] = [
        ({"a": np.float32(1)}, UsageError, "numpy.float32"),
        (loop, FormatError, "among its own arguments"),
        (Global("a\nb", "c"), FormatError, "line break"),
    ]
    for value, kind, message in bad:
        with pytest.raises(kind, match=message):
            dumps(value, name="out.pt")
    with pytest.raises(UsageError, match="protocol 3"):
        dumps(1, protocol=3)


def test_torch_objects_read_back() -> None:
    metadata = make.ordered_dict({"": {"version": 1}})
    weight = make.tensor(make.storage(dtype("float8_e4m3fn"), "0", 6), 1, [2], [1], dtype=dtype("float8_e4m3fn"))
    state = make.ordered_dict({"w": weight}, metadata=metadata)
    raw = dumps({"model": state, "size": make.size([2, 3]), "args": make.namespace({"x": 1})})
    read = load(raw, persistent_load=lambda key: key, name="t")
    assert read["size"] == (2, 3)
    assert read["args"].fields() == {"x": 1}
    assert isinstance(read["model"], DictRecord)
    assert read["model"].state == {"_metadata": {"": {"version": 1}}}
    again = read["model"]["w"]
    assert again.path == "torch._utils._rebuild_tensor_v3"
    assert again.args[0] == ("storage", make.UNTYPED_STORAGE, "0", "cpu", 6)
    assert again.args[-1] == Global("torch", "float8_e4m3fn")
