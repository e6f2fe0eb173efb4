"""The pickle reader against Python's own pickler, malformed streams, and a moving buffer."""

from __future__ import annotations

import collections
import gc
import pickle
import pickletools
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from anyckpt.errors import AnyckptError, FormatError, UnsafeError
from anyckpt.pickling import DictRecord, Global, PersistentId, Record, load, load_prefix

_KEYS = st.one_of(
    st.text(max_size=8),
    st.integers(),
    st.booleans(),
    st.none(),
    st.binary(max_size=4),
    st.tuples(st.integers(), st.text(max_size=3)),
)
_ATOMS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.integers(min_value=-(1 << 3000), max_value=1 << 3000),
    st.floats(allow_nan=False),
    st.text(max_size=300),
    st.binary(max_size=300),
    st.builds(bytearray, st.binary(max_size=8)),
    st.complex_numbers(allow_nan=False),
    st.frozensets(st.integers(), max_size=4),
    st.sets(st.text(max_size=3), max_size=4),
    st.builds(range, st.integers(-9, 9), st.integers(-9, 9)),
)
_DATA = st.recursive(
    _ATOMS,
    lambda inner: st.one_of(
        st.lists(inner, max_size=5),
        st.lists(inner, max_size=5).map(tuple),
        st.dictionaries(_KEYS, inner, max_size=5),
        st.dictionaries(st.text(max_size=3), inner, max_size=4).map(collections.OrderedDict),
    ),
    max_leaves=20,
)


@settings(max_examples=60, deadline=None)
@given(value=_DATA, protocol=st.integers(0, 5))
def test_reads_what_python_writes(value: Any, protocol: int) -> None:
    assert load(pickle.dumps(value, protocol), name="t") == value


@settings(max_examples=30, deadline=None)
@given(value=_DATA, protocol=st.integers(0, 5))
def test_reads_the_same_without_memoization_of_unused_entries(value: Any, protocol: int) -> None:
    assert load(pickletools.optimize(pickle.dumps(value, protocol)), name="t") == value


class _Source:
    def __init__(self, data: bytes) -> None:
        self.data = data
        self.largest = 0

    @property
    def size(self) -> int:
        return len(self.data)

    def read(self, offset: int, length: int) -> bytes:
        assert 0 <= offset <= offset + length <= len(self.data)
        self.largest = max(self.largest, length)
        return self.data[offset : offset + length]


@pytest.mark.parametrize("protocol", range(6))
def test_pickles_back_to_back_in_a_file_that_is_not_read_whole(protocol: int) -> None:
    first = {"name": "x" * 300_000, "numbers": list(range(1000)), "long": 1 << 100, "text": "é\n'" * 10}
    second = [("a", 1.5), b"raw" * 1000]
    head = pickle.dumps(first, protocol)
    both = head + pickle.dumps(second, protocol)
    source = _Source(both + b"\0" * 4_000_000)
    value, end = load_prefix(source, name="t")
    assert (value, end) == (first, len(head))
    assert load_prefix(source, end, name="t") == (second, len(both))
    assert load_prefix(both, end, name="t") == (second, len(both))
    assert source.largest < 2_000_000


def test_the_pickles_at_the_head_of_a_file_of_the_old_torch_format() -> None:
    path = Path(__file__).parents[1] / "fixtures" / "legacy" / "zoo_objects" / "legacy.pt"
    source = _Source(path.read_bytes())
    at = 0
    read = []
    for _ in range(5):
        value, at = load_prefix(source, at, persistent_load=PersistentId, name=path.name)
        read.append(value)
    assert read[:2] == [0x1950A86A20F9469CFC6C, 1001]
    assert read[2]["little_endian"] is True
    assert read[3]["namespace"].get("num_layers") == 2
    assert all(isinstance(key, str) for key in read[4])


@pytest.mark.parametrize("protocol", range(6))
def test_any_buffer_size_gives_the_same(protocol: int, monkeypatch: pytest.MonkeyPatch) -> None:
    value = {"k": [1, 300, 70000, -1, 1 << 80, 2.5, "text", b"bytes", (1, 2, 3, 4), None, True]}
    value["self"] = value["k"]
    data = pickle.dumps(value, protocol)
    for step in range(1, 40):
        monkeypatch.setattr("anyckpt.pickling.buffered._STEP", step)
        assert load(_Source(data), name="t") == value
        for cut in range(0, len(data), 7):
            with pytest.raises(FormatError):
                load(_Source(data[:cut]), name="t")


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.data())
def test_mutations_raise_nothing_but_typed_errors(data: st.DataObject) -> None:
    value = {"a": [1, 2.5, {"b": (1, "x", b"y")}], "s": {1, 2}, "o": Namespace(lr=0.1), "l": [[]] * 3}
    protocol = data.draw(st.integers(0, 5))
    raw = bytearray(pickle.dumps(value, protocol))
    for _ in range(data.draw(st.integers(1, 4))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    raw = raw[: data.draw(st.integers(0, len(raw)))]
    for source in (bytes(raw), _Source(bytes(raw))):
        try:
            load(source, name="t", persistent_load=PersistentId)
        except AnyckptError as problem:
            assert str(problem).startswith("t: ")


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=60))
def test_noise_raises_nothing_but_typed_errors(raw: bytes) -> None:
    for prefix in (b"", b"\x80\x02", b"\x80\x04", b"(", b"}(", b"]("):
        with pytest.raises(AnyckptError):
            load(prefix + raw.replace(b".", b""), name="t", persistent_load=PersistentId)


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"", "ends before"),
        (b"\x80", "ends before"),
        (b"\x80\x06N.", "protocol"),
        (b"N", "ends before"),
        (b".", "stack"),
        (b"t.", "stack"),
        (b"h\x05.", "never stored"),
        (b"X\xff\xff\xff\xffab.", "expected 4294967299 bytes"),
        (b"\x8d" + b"\xff" * 8 + b".", "ends before"),
        (b"\x8b\xff\xff\xff\xff.", "negative"),
        (b"T\xff\xff\xff\xff.", "negative"),
        (b"\x95" + b"\xff" * 8 + b"N.", "frame"),
        (b"L" + b"9" * 5000 + b"L\n.", "digits"),
        (b"Iabc\n.", "decoded"),
        (b"Fabc\n.", "decoded"),
        (b"S'a\n.", "quotes"),
        (b"X\x01\0\0\0\xff.", "decoded"),
        (b"Vabc", "ends before"),
        (b"p-1\n.", "range"),
        (b"Np99999999999\n.", "range"),
        (b"\x82\x01.", "extension registry"),
        (b"\x97.", "buffer"),
        (b"\xfe.", "unknown opcode (found 0xfe)"),
        (b"}]Ns.", "list cannot be a dictionary key"),
        (b"}]\x85Ns.", "list cannot be a dictionary key"),
        (b"}(Nu.", "no value"),
        (b"}Na.", "not a list"),
        (b"]NNs.", "not a dictionary"),
        (b"N)R.", "called"),
        (b"cos\nsystem\nNR.", "tuple of arguments"),
        (b"cos\nsystem\n}b.", "os.system itself"),
        (b"]}b.", "plain value"),
        (b"cx\ny\n)R)b)b.", "twice"),
        (b"NQ.", "outside the pickle"),
        (b"\x8f(]\x90.", "list cannot"),
        (b"N(N\x90.", "not a set"),
        (b"NN\x93.", "not a string"),
        (b"(o.", "stack"),
        (b"0.", "mark"),
        (b"cx\ny\n)N\x92.", "keyword"),
    ],
)  # fmt: skip
def test_refusals_say_where_and_what(raw: bytes, message: str) -> None:
    for source in (raw, _Source(raw)):
        with pytest.raises(FormatError, match="pickle, byte") as caught:
            load(source, name="file.pkl")
        assert message in str(caught.value)
        assert caught.value.path == "file.pkl"
        assert caught.value.remedy


def test_keys_that_would_hash_forever_or_overflow_the_stack_are_unsafe() -> None:
    bomb = b"\x80\x02}N\x85" + b"q\x00h\x00\x86" * 100 + b"Ns."
    deep = b"\x80\x02}N" + b"\x85" * 100_000 + b"Ns."
    for raw in (bomb, deep, deep.replace(b"Ns.", b"\x85\x85\x91.").replace(b"}N", b"(N")):
        with pytest.raises(UnsafeError):
            load(raw, name="t")


def test_deep_nesting_is_no_problem() -> None:
    value = load(b"]" * 200_000 + b"a" * 199_999 + b".", name="t")
    depth = 0
    while value:
        value = value[0]
        depth += 1
    assert depth == 199_999


def test_calls_become_records_and_nothing_is_imported() -> None:
    sys.modules.pop("antigravity", None)
    record = load(b"\x80\x02cantigravity\nfly.now\n(K\x01X\x01\0\0\0atR}X\x01\0\0\0fK\x02sb.", name="t")
    assert (record.path, record.args, record.new) == ("antigravity.fly.now", (1, "a"), False)
    assert (record.get("f"), record.get("missing", 3)) == (2, 3)
    assert "antigravity" not in sys.modules
    assert repr(record) == "<Record antigravity.fly.now>"


def test_every_way_to_make_an_instance() -> None:
    as_inst = load(b"(K\x01ia\nb\n.", name="t")
    as_obj = load(b"(ca\nb\nK\x01o.", name="t")
    with_keywords = load(b"\x80\x04\x8c\x01a\x8c\x01b\x93K\x01\x85}\x8c\x01kK\x02s\x92.", name="t")
    for record in (as_inst, as_obj, with_keywords):
        assert (record.type, record.args) == (Global("a", "b"), (1,))
    assert with_keywords.kwargs == {"k": 2}
    content = load(b"ca\nb\n)R(K\x01K\x02e(]K\x03u.", name="t")
    assert (content.items, content.pairs) == ([1, 2], [([], 3)])


@pytest.mark.parametrize("protocol", range(6))
def test_plain_instances_read_the_same_from_every_protocol(protocol: int) -> None:
    record = load(pickle.dumps(Namespace(lr=0.5, sizes=[1, 2]), protocol), name="t")
    assert (record.path, record.new, record.fields()) == (
        "argparse.Namespace",
        True,
        {"lr": 0.5, "sizes": [1, 2]},
    )


def test_state_of_slots() -> None:
    assert Record(Global("a", "b"), state=(None, {"x": 1})).fields() == {"x": 1}
    assert Record(Global("a", "b"), state=({"y": 2}, {"x": 1})).fields() == {"y": 2, "x": 1}
    assert Record(Global("a", "b"), state=(1, 2)).fields() == {}


def test_known_dictionaries_are_dictionaries() -> None:
    default: Any = collections.defaultdict(list, {"a": [1]})
    read = load(pickle.dumps([default, collections.Counter("aab")], 2), name="t")
    assert read == [{"a": [1]}, {"a": 2, "b": 1}]
    assert isinstance(read[0], DictRecord)
    assert read[0].args == (Global("builtins", "list"),)
    ordered = collections.OrderedDict(w=1)
    ordered._metadata = {"": {"version": 1}}  # type: ignore[attr-defined]
    assert load(pickle.dumps(ordered, 2), name="t").state == {"_metadata": {"": {"version": 1}}}


def test_arguments_that_no_pickler_writes_stay_records() -> None:
    for raw in (b"c__builtin__\nbytes\nJ\0\0\0\x7f\x85R.", b"c__builtin__\nbytearray\nJ\0\0\0\x7f\x85R."):
        assert isinstance(load(raw, name="t"), Record)


def test_cycles_survive() -> None:
    value: list[Any] = [1]
    value.append({"me": value})
    value.append((value,))
    for protocol in range(6):
        read = load(pickle.dumps(value, protocol), name="t")
        assert read[1]["me"] is read
        assert read[2][0] is read


def test_persistent_ids_and_the_caller_s_constructors() -> None:
    raw = b"\x80\x02(K\x07Qctorch\nSize\nK\x01K\x02\x86\x85Rcm\nPoint\n)\x81}X\x01\0\0\0xK\x03sbt."

    class Point:
        x = None

        def set_state(self, state: Any) -> None:
            self.x = state["x"]

    tagged, size, point = load(
        raw, persistent_load=lambda key: ("id", key), constructors={"m.Point": lambda args: Point()}, name="t"
    )
    assert (tagged, size, point.x) == (("id", 7), (1, 2), 3)
    kept = load(raw, persistent_load=int, constructors={"m.Point": lambda args: NotImplemented}, name="t")
    assert isinstance(kept[2], Record)
    with pytest.raises(ZeroDivisionError):
        load(raw, persistent_load=lambda key: 1 // 0, name="t")


def test_a_big_index_keeps_every_entry_that_is_read_back() -> None:
    shared = [("key", number) for number in range(1000)]
    value = [[shared[number % 1000], f"text{number}", number] for number in range(50_000)]
    raw = pickle.dumps(value, 4)
    assert len(raw) > 1 << 20
    assert load(raw, name="t") == value
    assert gc.isenabled()
    mixed = raw[:-1] + b"q\x01h\x01\x86."
    assert load(mixed, name="t")[1] == value


def test_python_2_names_and_strings() -> None:
    raw = b"(U\x02\xff\x00S'it\\'s'\nccopy_reg\n_reconstructor\n(cm\nC\nc__builtin__\nobject\nNtRt."
    first, second, made = load(raw, name="t")
    assert (first, second) == (b"\xff\x00", "it's")
    assert (made.path, made.new, made.args) == ("m.C", True, ())
