"""Which headers are taken and which are refused: as the real library does, but for the stricter rules that are told."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

safetensors = pytest.importorskip("safetensors")
pytestmark = pytest.mark.peer

from anyckpt.containers.safetensors import read_safetensors  # noqa: E402
from anyckpt.errors import FormatError  # noqa: E402
from anyckpt.storage import MemorySource  # noqa: E402

GOOD = '{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"b":{"dtype":"U8","shape":[0,3],"data_offsets":[8,8]}}'
SPELLINGS = [
    "0", "-0", "1", "2", "8", "1.0", "1e2", "1e999", "-1", "18446744073709551616", "null", "true", "NaN", "Infinity",
    '"F32"', '"F6_E2M3"', '"F4"', '"X"', '"\\ud800"', '"\\ud83d\\ude00"', "[]", "[0,8]", "[2,1]", "[0,8,8]", "{}",
    '{"format":"pt","format":"tf"}', '{"a":1}', '{"a":"\\udc00"}', "[" * 130 + "]" * 130, "[" * 120 + "]" * 120,
]  # fmt: skip
KEYS = ['"__metadata__"', '"a"', '"dtype"', '"shape"', '"data_offsets"', '"other"', '"\\ud800"', '"é"']
PARTS = [*SPELLINGS, *KEYS, "{", "}", "[", "]", ":", ",", " ", "\n", "\t", "\f", "\ufeff", "\0", "//", '"', "'"]


def theirs(file: bytes) -> set[str] | None:
    try:
        return {name for name, _ in safetensors.deserialize(file)}
    except safetensors.SafetensorError:
        return None


def ours(file: bytes) -> tuple[set[str] | None, str]:
    try:
        return set(read_safetensors(MemorySource(file, "crafted"))[0]), ""
    except FormatError as error:
        return None, str(error)


STRICTER = ("occurs twice", "header entry is incomplete", "do not end with a byte", "impossible shape", "element type")
"""A tensor's name twice; an entry that is a list of its fields; rows of 4 or 6 bits that end inside a byte; shapes of
2**63 bytes that are empty; an element type as the key of an object."""


def check(header: bytes, data: bytes = bytes(8)) -> None:
    file = len(header).to_bytes(8, "little") + header + data
    expected, (found, why) = theirs(file), ours(file)
    if expected is not None and found is None:
        assert any(rule in why for rule in STRICTER), why
    else:
        assert found == expected, header


HEADERS = {
    "white space first": (b" \n\t\r" + GOOD.encode(), True),
    "six bits": (b'{"a":{"dtype":"F6_E3M2","shape":[1,4],"data_offsets":[0,3]}}', True),
    "no metadata": (b'{"__metadata__":null}', True),
    "a key twice in the metadata": (b'{"__metadata__":{"a":"1","a":"2"}}', True),
    "an unknown key": (b'{"a":{"dtype":"U8","shape":[],"data_offsets":[0,1],"x":1.5,"x":[2]}}', True),
    "NaN": (b'{"a":{"dtype":"U8","shape":[],"data_offsets":[0,1],"x":NaN}}', False),
    "infinite": (b'{"a":{"dtype":"U8","shape":[],"data_offsets":[0,1],"x":-Infinity}}', False),
    "beyond a double": (b'{"a":{"dtype":"U8","shape":[],"data_offsets":[0,1],"x":1e999}}', False),
    "minus zero": (b'{"a":{"dtype":"U8","shape":[],"data_offsets":[-0,1]}}', False),
    "half of a pair in the metadata": (b'{"__metadata__":{"a":"\\ud800"}}', False),
    "half of a pair in a name": (b'{"\\udfff":{"dtype":"U8","shape":[],"data_offsets":[0,1]}}', False),
    "a field twice": (b'{"a":{"dtype":"U8","dtype":"U8","shape":[],"data_offsets":[0,1]}}', False),
    "metadata twice": (b'{"__metadata__":{},"__metadata__":{}}', False),
}  # fmt: skip


@pytest.mark.parametrize("name", HEADERS)
def test_what_the_library_takes_is_taken_and_what_it_refuses_refused(name: str) -> None:
    header, good = HEADERS[name]
    length = next((n for n in (8, 3, 1) if b",%d]" % n in header), 0)
    data = bytes(length)
    file = len(header).to_bytes(8, "little") + header + data
    assert (theirs(file) is not None) == good
    assert (ours(file)[0] is not None) == good


@pytest.mark.parametrize("axes", [33, 40, 64])
def test_many_axes(axes: int) -> None:
    check(json.dumps({"a": {"dtype": "F32", "shape": [1] * (axes - 1) + [2], "data_offsets": [0, 8]}}).encode())


@pytest.mark.parametrize("levels", [2, 100, 123, 124, 125, 126, 127, 200])
def test_levels_of_nesting(levels: int) -> None:
    inner = b"[" * levels + b"]" * levels
    check(b'{"a":{"dtype":"U8","shape":[],"data_offsets":[0,1],"x":%s}}' % inner, b"\1")


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.integers(0, len(GOOD)), st.integers(0, 6), st.sampled_from(PARTS)), max_size=3))
@example([(1, 0, '"__metadata__":null,')])
def test_mutated_headers(changes: list[tuple[int, int, str]]) -> None:
    text = GOOD
    for at, length, part in changes:
        text = text[:at] + part + text[at + length :]
    check(text.encode("utf-8", "surrogatepass"))


VALUES: Any = st.recursive(
    st.sampled_from(SPELLINGS),
    lambda inner: (
        st.lists(inner, max_size=3).map(lambda items: "[" + ",".join(items) + "]")
        | st.lists(st.tuples(st.sampled_from(KEYS), inner), max_size=4).map(
            lambda items: "{" + ",".join(f"{key}:{value}" for key, value in items) + "}"
        )
    ),
    max_leaves=8,
)


@settings(max_examples=120, deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from(KEYS), VALUES), max_size=2),
    st.fixed_dictionaries({'"dtype"': st.sampled_from(['"F32"', '"F4"', '"U8"'])}, optional={'"x"': VALUES}),
    st.sampled_from(["[2]", "[8]", "[16]", "[1,2]"]),
)
def test_headers_of_other_values(others: list[tuple[str, str]], fields: dict[str, str], shape: str) -> None:
    fields = {**fields, '"shape"': shape, '"data_offsets"': "[0,8]"}
    entry = "{" + ",".join(f"{key}:{value}" for key, value in fields.items()) + "}"
    check(("{" + ",".join(f"{key}:{value}" for key, value in [*others, ('"t"', entry)]) + "}").encode())
