"""The real torch loads what we write with its safe loader, and we read what it writes."""

from __future__ import annotations

import io
import zipfile
from typing import Any

import pytest

from anyckpt.dtypes import dtype
from anyckpt.pickling import PersistentId, Record, dumps, load
from anyckpt.pickling import torch_objects as make

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.peer


def _archive(obj: object, storages: dict[str, bytes]) -> io.BytesIO:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("archive/data.pkl", dumps(obj))
        for key, raw in storages.items():
            archive.writestr(f"archive/data/{key}", raw)
        archive.writestr("archive/version", "3\n")
    file.seek(0)
    return file


def test_torch_s_safe_loader_takes_our_state_dict() -> None:
    floats, bfloats, eights = dtype("float32"), dtype("bfloat16"), dtype("float8_e5m2")
    shared = make.storage(floats, "0", 6)
    tied = make.tensor(shared, 0, [2, 3], [3, 1], dtype=floats)
    state = make.ordered_dict(
        {
            "w": tied,
            "tied": tied,
            "transposed": make.tensor(shared, 0, [3, 2], [1, 3], dtype=floats, requires_grad=True),
            "b": make.tensor(make.storage(bfloats, "1", 2), 1, [1], [1], dtype=bfloats),
            "q": make.tensor(make.storage(eights, "2", 2), 1, [], [], dtype=eights),
        },
        metadata=make.ordered_dict({"": {"version": 1}}),
    )
    plain = {
        "bytes": b"\x00\xff",
        "empty": b"",
        "size": make.size([1, 2]),
        "dtype": make.dtype_global(bfloats),
        "int": 1 << 100,
        "set": {1},
        "complex": 1 + 2j,
        "bytearray": bytearray(b"x"),
        "tuple": ((), (1,), (1, 2, 3, 4)),
    }
    raw = torch.arange(6, dtype=torch.float32).numpy().tobytes()
    file = _archive({"state": state, "plain": plain}, {"0": raw, "1": b"\x80\x3f\x00\x40", "2": b"\x00\x3c"})
    loaded = torch.load(file, weights_only=True)
    weights = loaded["state"]
    assert weights["w"].tolist() == [[0, 1, 2], [3, 4, 5]]
    assert weights["w"] is weights["tied"]
    assert weights["transposed"].tolist() == [[0, 3], [1, 4], [2, 5]]
    assert weights["transposed"].requires_grad
    assert weights["transposed"].data_ptr() == weights["w"].data_ptr()
    assert weights["b"].tolist() == [2.0]
    assert (weights["q"].dtype, weights["q"].item()) == (torch.float8_e5m2, 1.0)
    assert weights._metadata == {"": {"version": 1}}
    assert loaded["plain"].pop("size") == torch.Size([1, 2])
    assert loaded["plain"].pop("dtype") is torch.bfloat16
    assert loaded["plain"] == {key: value for key, value in plain.items() if key not in ("size", "dtype")}


def _data(obj: Any, **options: Any) -> bytes:
    file = io.BytesIO()
    torch.save(obj, file, **options)
    with zipfile.ZipFile(file) as archive:
        return archive.read("archive/data.pkl")


def test_torch_loads_a_state_dict_that_we_read_and_wrote_back() -> None:
    module = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.BatchNorm1d(3))
    raw = _data({"model": module.state_dict(), "optimizer": torch.optim.Adam(module.parameters()).state_dict()})
    read = load(raw, persistent_load=PersistentId, name="t")
    assert list(read["model"]) == list(module.state_dict())
    assert read["model"].state["_metadata"]["0"] == {"version": 1}
    assert load(dumps(read), persistent_load=PersistentId, name="t")["optimizer"] == read["optimizer"]
    storages = {}
    for record in read["model"].values():
        _, kind, key, _, count = record.args[0].id
        storages[key] = b"\0" * count * (8 if kind.name == "LongStorage" else 4)
    loaded = torch.load(_archive(read, storages), weights_only=True)
    assert loaded["model"]._metadata == module.state_dict()._metadata
    assert loaded["optimizer"]["param_groups"][0]["betas"] == (0.9, 0.999)


@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_torch_pickles_of_every_protocol(protocol: int) -> None:
    value = {"p": torch.nn.Parameter(torch.ones(2)), "d": torch.bfloat16, "s": torch.Size([3])}
    read = load(_data(value, pickle_protocol=protocol), persistent_load=PersistentId, name="t")
    assert isinstance(read["p"], Record)
    assert read["p"].path == "torch._utils._rebuild_parameter"
    assert (read["d"].path, read["s"]) == ("torch.bfloat16", (3,))
