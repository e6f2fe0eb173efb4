"""Plain views: what people and configuration see of the objects in a pickle."""

from __future__ import annotations

import collections
import io
import json
import math
import pathlib
import pickle
import zipfile
from argparse import Namespace
from typing import Any

import numpy as np
import pytest

from anyckpt.errors import FormatError
from anyckpt.pickling import Global, PersistentId, Record, load
from anyckpt.pickling.plain import simplify, to_plain, view
from anyckpt.pickling.walk import find_leaves

_ZOO = pathlib.Path(__file__).parents[1] / "fixtures" / "legacy" / "zoo_objects"
_EXPECTED = json.loads((_ZOO / "expected.json").read_text())


def _read(value: Any, protocol: int = 2) -> Any:
    return load(pickle.dumps(value, protocol), name="t")


def _zoo(name: str) -> Any:
    with zipfile.ZipFile(_ZOO / name) as archive:
        raw = next(archive.read(entry) for entry in archive.namelist() if entry.endswith("data.pkl"))
    return load(raw, persistent_load=PersistentId, name=name)


@pytest.mark.parametrize("name", ["zip.pt", "zip_proto4.pt"])
def test_the_zoo_of_objects(name: str) -> None:
    zoo = _zoo(name)
    plain = simplify(zoo)
    expected = _EXPECTED["plain"]
    assert plain["big"] == int(expected["big"])
    assert to_plain(zoo)["big"] == expected["big"]
    assert plain["bytes"].hex() == expected["bytes_hex"]
    assert plain["complex"] == complex(*expected["complex"])
    assert plain["device"] == expected["device"]
    assert plain["dtype"] == Global("torch", expected["dtype"])
    assert plain["np_arr"].tolist() == expected["np_arr"]
    assert list(plain["odict"].items()) == [tuple(pair) for pair in expected["odict"]]
    assert list(plain["size"]) == expected["size"]
    for key in ("f", "neg", "none", "np_f64", "np_i64", "unicode"):
        assert plain[key] == expected[key]
    for key in ("lr", "name", "num_layers"):
        assert plain["namespace"][key] == expected["namespace"][key]
    assert to_plain(zoo)["namespace"]["__type__"] == "argparse.Namespace"
    for key, path in _EXPECTED["opaque"].items():
        # One object is made by a class method, and one of the files was pickled by a script.
        assert zoo[key].path in (path, f"{path}._make", "__main__.WithReduce._make")
    rebuilt = {"torch._utils._rebuild_tensor_v2", "torch._utils._rebuild_tensor_v3"}
    found = find_leaves(zoo, lambda leaf: isinstance(leaf, Record) and leaf.path in rebuilt)
    assert {".".join(map(str, path)) for path, _ in found} == set(_EXPECTED["tensors"])
    json.dumps(to_plain(zoo))


@pytest.mark.parametrize("protocol", [0, 1, 2, 3, 4, 5])
@pytest.mark.parametrize(
    "value",
    [
        np.arange(6, dtype="<i4").reshape(2, 3),
        np.asfortranarray(np.arange(6.0).reshape(2, 3)),
        np.arange(3, dtype=">f8"),
        np.zeros((0, 4), np.float16),
        np.array([True, False]),
        np.array(["ab", "c"]),
        np.array(3, np.uint8),
    ],
)
def test_numpy_arrays(value: np.ndarray[Any, Any], protocol: int) -> None:
    seen = view(_read(value, protocol))
    assert isinstance(seen, np.ndarray)
    assert seen.shape == value.shape
    assert np.array_equal(seen, value)
    assert seen.dtype == value.dtype.newbyteorder("=")


@pytest.mark.parametrize("value", [np.float64(1.5), np.int8(-3), np.bool_(True), np.complex64(1j), np.str_("é")])
def test_numpy_scalars(value: np.generic) -> None:
    assert simplify(_read([value])) == [value.item()]


def test_numpy_arrays_that_are_not_plain_numbers_stay_records() -> None:
    for value in (np.array([object], object), np.zeros(2, [("a", "f4")]), np.datetime64("2020-01-01")):
        assert isinstance(view(_read(value)), Record)
    good = _read(np.arange(6))
    version, _, dtype, order, data = good.state
    for shape in ((7,), (-6,), (1 << 60, 0), ("x",), [6], (6,) * 40):
        good.state = (version, shape, dtype, order, data)
        assert view(good) is good
    dtype.args = ("O8", False, True)
    good.state = (version, (6,), dtype, order, data)
    assert view(good) is good


def test_well_known_records_have_plain_views() -> None:
    value = [pathlib.PurePosixPath("/a/b"), pathlib.PureWindowsPath("c:/x"), io.BytesIO(b"ab"), Namespace(a=1)]
    assert simplify(_read(value)) == ["/a/b", "c:\\x", b"ab", {"a": 1}]
    assert simplify(_read(collections.deque([1, 2]))) == [1, 2]
    assert view(Record(Global("torch", "device"), ("cpu",))) == "cpu"
    assert view(Record(Global("torch.serialization", "_get_layout"), ("torch.strided",))) == "torch.strided"
    for odd in (Record(Global("torch", "device"), ()), Record(Global("pathlib", "PosixPath"), (1,))):
        assert view(odd) is odd


@pytest.mark.peer
def test_omegaconf_is_data() -> None:
    omegaconf = pytest.importorskip("omegaconf")
    data = {"a": 1, "b": {"c": "${a}", "l": [1, None, "x", {"q": 2.5}]}, "missing": "???", "nothing": None}
    read = _read({"cfg": omegaconf.OmegaConf.create(data)})
    assert simplify(read) == {"cfg": data}
    assert to_plain(read) == {"cfg": data}


def test_simplify_keeps_sharing_cycles_and_unknown_records() -> None:
    shared = [Namespace(x=1)]
    value: dict[str, Any] = {"one": shared, "two": (shared, 3)}
    value["self"] = value
    plain = simplify(_read(value))
    assert plain["one"] == [{"x": 1}]
    assert plain["one"] is plain["two"][0]
    assert plain["self"] is plain
    odd = simplify(Record(Global("m", "C"), (Record(Global("pathlib", "PosixPath"), ("/", "p")),)))
    assert (odd.path, odd.args) == ("m.C", ("/p",))
    loop = Record(Global("omegaconf.nodes", "AnyNode"), (), True)
    loop.state = {"_val": loop}
    json.dumps(to_plain([loop, simplify(loop)]))


def test_display_is_json_whatever_is_inside() -> None:
    class Tensor:
        dtype, shape, nbytes = "bfloat16", (2, 3), 12

    record = Record(Global("m", "C"), (1,), state={"x": [Tensor()]}, items=[1], pairs=[(2, 3)])
    cycle: list[Any] = []
    cycle.append(cycle)
    value = {
        "record": record,
        "cycle": cycle,
        1: math.inf,
        "1": -math.inf,
        (1, (2, 3)): math.nan,
        record: 1 << 100_000,
        Global("m", "f"): b"\x00" * 20,
        "range": range(1 << 90),
        "slice": slice(1, None),
        "set": {1},
        "surrogate": "\ud800",
        "complex": 1 - 2j,
        "long": "x" * 20_000,
        "array": Record(Global("numpy._core.multiarray", "_reconstruct")),
        "object": PersistentId(1),
        "values": np.arange(3),
        "many": np.zeros(1000),
    }
    shown = json.loads(json.dumps(to_plain(value), allow_nan=False))
    assert shown["record"] == {
        "__type__": "m.C",
        "x": ["tensor([2, 3], bfloat16)"],
        "args": [1],
        "items": [1],
        "pairs": [[2, 3]],
    }
    assert shown["cycle"] == ["<cycle>"]
    assert shown["1"] == "Infinity"
    assert "-Infinity" in shown.values()
    assert shown["(1, (...))"] == "NaN"
    assert shown["m.C"] == "int(100001 bits)"
    assert shown["m.f"].startswith("bytes(20): 0000")
    assert shown["range"] == {"__type__": "builtins.range", "args": [0, str(1 << 90), 1]}
    assert shown["surrogate"] == "\\ud800"
    assert shown["long"].endswith("(10000 more characters)")
    assert shown["values"] == [0, 1, 2]
    assert shown["many"] == "tensor([1000], float64)"


def test_display_has_a_budget() -> None:
    assert to_plain([[1, 2], [3]], max_nodes=5) == [[1, 2], "..."]
    wide = to_plain(list(range(10_000)), max_nodes=10)
    assert len(wide) == 11
    assert wide[-1] == "... (9990 more)"
    assert to_plain({"a": {"b": {"c": 1}}}, max_depth=2) == {"a": {"b": "..."}}
    assert len(json.dumps(to_plain([{"k" * 500: ["y" * 5000] * 1000}] * 1000))) < 30_000_000


def test_leaves_are_found_in_order_with_their_paths() -> None:
    tensor, other = object(), object()
    shared = {"t": other}
    value = {
        "a": [tensor, {"b": (tensor,)}],
        "r": Record(Global("m", "C"), (tensor,), state=({"f": tensor}, {"s": shared}), items=[other]),
        "again": shared,
        "odd": Record(Global("m", "D"), state=(tensor,), pairs=[("k", other)]),
    }
    found = [path for path, _ in find_leaves(value, lambda leaf: leaf is tensor or leaf is other)]
    assert found == [
        ("a", 0),
        ("a", 1, "b", 0),
        ("r", "f"),
        ("r", "s", "t"),
        ("r", "args", 0),
        ("r", "items", 0),
        ("odd", "state", 0),
        ("odd", "pairs", 0, 1),
    ]
    assert list(find_leaves(tensor, lambda leaf: leaf is tensor)) == [((), tensor)]


def test_leaves_beyond_a_thousand_levels_are_refused() -> None:
    deep: list[Any] = [{"leaf": {1}}]
    for _ in range(2000):
        deep = [deep]
    with pytest.raises(FormatError, match="nested too deep"):
        list(find_leaves(deep, lambda leaf: isinstance(leaf, set)))
