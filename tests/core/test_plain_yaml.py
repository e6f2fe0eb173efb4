"""YAML as OmegaConf reads and writes it, and documents that must be refused."""

from __future__ import annotations

import math
from typing import Any

import pytest

from anyckpt.errors import FormatError, OutputError, UnsafeError
from anyckpt.plain_yaml import dump_yaml, load_yaml, load_yaml_mapping

VALUES: dict[str, Any] = {
    "number": 1e-05,
    "whole": 4294967296,
    "negative": -0.5,
    "infinite": -math.inf,
    "none": None,
    "flag": False,
    "looks like a number": ["1e-5", "1_000", "0x10", "1.0", "nan", "010", "+1", ".5"],
    "looks like a flag": ["yes", "Off", "true", "n"],
    "looks like nothing": ["null", "~", ""],
    "looks like a date": "2024-01-01",
    "text": "two\nlines: here # and there",
    "letters": ["'", '"', "▁", "ü", " ", "-", "{}", "*a", "&b", "!c"],
    "nested": {"list": [[1, 2], {"a": []}], "empty": {}},
    "uri": "nemo:0123_tokenizer.model",
}


def test_what_is_written_is_read() -> None:
    text = dump_yaml(VALUES)
    assert load_yaml(text.encode(), "c.yaml") == VALUES
    assert list(load_yaml(text.encode(), "c.yaml")) == list(VALUES)


def test_numbers_and_dates_as_omegaconf_reads_them() -> None:
    data = b"a: 1e-5\nb: 2024-01-01\nc: 1.5e3\nd: .5\ne: -.inf\nf: 12\ng: 1e5x\n"
    expected = {"a": 1e-5, "b": "2024-01-01", "c": 1500.0, "d": 0.5, "e": -math.inf, "f": 12, "g": "1e5x"}
    assert load_yaml(data, "c.yaml") == expected


def test_aliases_become_separate_values() -> None:
    value = load_yaml(b"a: &x {k: [1]}\nb: *x\nc:\n  <<: *x\n  m: 2\n", "c.yaml")
    assert value == {"a": {"k": [1]}, "b": {"k": [1]}, "c": {"k": [1], "m": 2}}
    assert value["a"] is not value["b"] and value["a"]["k"] is not value["c"]["k"]


@pytest.mark.peer
def test_agrees_with_omegaconf() -> None:
    omegaconf = pytest.importorskip("omegaconf")
    assert dump_yaml(VALUES) == omegaconf.OmegaConf.to_yaml(omegaconf.OmegaConf.create(VALUES))
    assert omegaconf.OmegaConf.to_container(omegaconf.OmegaConf.create(dump_yaml(VALUES))) == VALUES


LAUGHS = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 10)
)
MERGES = "a0: &a0 {x: 1, y: 2}\n" + "".join(
    f"a{i}: &a{i}\n  <<: [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 12)
)


@pytest.mark.parametrize(
    "text",
    [
        LAUGHS,
        MERGES,
        "a: &a [*a]",
        "a: &a {b: *a}",
        "[" * 5000 + "]" * 5000,
        "".join(" " * i + "a:\n" for i in range(2000)),
        "a: !!python/object/apply:os.system ['true']",
        "a: !!python/name:os.system",
        "!!python/object/new:os.system [x]",
        "a: !custom 1",
        "a: !!binary aGk=",
        "a: !!timestamp 2024-01-01",
        "x: " + "a" * (9 << 20),
    ],
    ids=range(13),
)
def test_bombs_and_objects_are_refused(text: str) -> None:
    with pytest.raises(UnsafeError, match=r"^c\.yaml: ") as caught:
        load_yaml(text.encode(), "c.yaml")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "data",
    [
        b"a: [1, 2",
        b"a: 1\na: 2\n",
        b"a: *nothing",
        b"\xff\xfe\x00",
        b"a: \x00",
        b"--- 1\n--- 2\n",
        b"a: " + b"9" * 5000,
        b"? [a, b]\n: 1\n",
        b"a: 0x_",
        b"key: value\n\tbad: tab",
        b"{a: b",
    ],
    ids=range(11),
)
def test_invalid_documents(data: bytes) -> None:
    with pytest.raises(FormatError, match=r"^c\.yaml: ") as caught:
        load_yaml(data, "c.yaml")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("data", [b"", b"- a", b"1", b"1: 2"])
def test_configuration_must_be_a_mapping(data: bytes) -> None:
    with pytest.raises(FormatError, match="mapping"):
        load_yaml_mapping(data, "c.yaml")


def test_objects_are_not_written() -> None:
    with pytest.raises(OutputError):
        dump_yaml({"a": object()})
    loop: dict[str, Any] = {}
    loop["loop"] = loop
    with pytest.raises(OutputError):
        dump_yaml(loop)
