"""Only work that would write the same bytes is the same work; what cannot tell is not continued."""

from __future__ import annotations

import importlib
import inspect
import os
import pickle
import pkgutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import anyckpt
from anyckpt.dtypes import dtype
from anyckpt.engine import execute, run
from anyckpt.engine.fingerprint import fingerprint
from anyckpt.engine.plan import Computed, Literal, OutputFile, Plan, SourceData, TensorData
from anyckpt.errors import UsageError
from anyckpt.identity import ElementWise, Identity
from anyckpt.storage.local_file import LocalFile
from anyckpt.storage.source import ByteSource, MemorySource
from anyckpt.tensor import Constant, LazyTensor, Mapped, Stored, from_array

FLOAT32 = dtype("float32")
ONES = from_array(np.ones(16, np.float32))


@dataclass(frozen=True)
class Times(ElementWise):
    factor: float

    def __call__(self, array: Any) -> Any:
        return array * np.float32(self.factor)


@dataclass(frozen=True)
class Told(ElementWise):
    values: Any

    def __call__(self, array: Any) -> Any:
        return array


class TimesUntold:
    """A function that keeps to itself what it computes."""

    def __init__(self, factor: float, calls: int | None = None) -> None:
        self.factor, self.left = factor, calls

    def __call__(self, array: Any) -> Any:
        if self.left is not None:
            self.left -= 1
            if self.left < 0:
                raise KeyboardInterrupt
        return array * np.float32(self.factor)


class Bucket(ByteSource):
    """What a reader of an object store would be; ``tag`` None for one that does not say what it reads."""

    __slots__ = ("_tag",)

    def __init__(self, tag: str | None) -> None:
        self.name, self.path, self.size, self._tag = "weights.bin", None, 64, tag

    def _read_into(self, offset: int, buffer: memoryview) -> None:
        buffer[:] = bytes(len(buffer))

    def identity(self) -> Identity | None:
        return None if self._tag is None else (self._tag,)


def plan(tensor: LazyTensor) -> Plan:
    return Plan("torch", (OutputFile("", (TensorData("w", tensor),)),))


def mapped(function: Any) -> LazyTensor:
    return Mapped((ONES,), FLOAT32, function)


def bucket(tag: str | None) -> LazyTensor:
    return Stored(Bucket(tag), 0, FLOAT32, (16,))


def with_default(factor: float) -> Any:
    def times(array: Any, by: float = factor) -> Any:
        return array * by

    return times


TOLD = {
    "functions with other fields": (mapped(Times(2.0)), mapped(Times(3.0))),
    "functions of numpy": (mapped(np.exp), mapped(np.log)),
    "casts": (ONES.cast("float16").cast("float32"), ONES.cast("bfloat16").cast("float32")),
    "objects of a store": (bucket("step 100"), bucket("step 200")),
    "small arrays": (ONES, from_array(np.zeros(16, np.float32))),
}
UNTOLD = {
    "an object that is called": (mapped(TimesUntold(2.0)), mapped(TimesUntold(3.0)), "TimesUntold"),
    "a default argument": (mapped(with_default(2.0)), mapped(with_default(3.0)), "times"),
    "lambdas": (mapped(lambda x: x + 1), mapped(lambda x: x * 5), "lambda"),
    "a store that does not say": (bucket(None), bucket(None), "Bucket weights.bin"),
    "live state": (from_array(np.ones(4096, np.float32)), from_array(np.ones(4096, np.float32)), "MemorySource"),
}


@pytest.mark.parametrize("case", TOLD)
def test_other_work_is_other_work(case: str) -> None:
    one, other = TOLD[case]
    assert fingerprint(plan(one), ()) == fingerprint(plan(one), ())
    assert fingerprint(plan(one), ()).obstacle is None
    assert fingerprint(plan(one), ()) != fingerprint(plan(other), ())


@pytest.mark.parametrize("case", UNTOLD)
def test_what_does_not_tell_is_never_the_same(case: str) -> None:
    one, other, named = UNTOLD[case]
    found = [fingerprint(plan(tensor), ()) for tensor in (one, one, other)]
    assert len({each.value for each in found}) == 3
    assert all(named in (each.obstacle or "") for each in found)


def test_live_state_is_not_read_to_tell_it_apart() -> None:
    class Unread(np.ndarray):  # type: ignore[type-arg]
        def tobytes(self, *_: Any, **__: Any) -> bytes:
            raise AssertionError("the state was copied")

    state = np.zeros(1 << 20, np.float32).view(Unread)
    assert fingerprint(plan(from_array(state)), ()).obstacle is not None


def test_a_later_release_knows_the_work_of_this_one() -> None:
    """Everything that a digest is made of, as it always was: what is interrupted can be continued after an update."""
    ones = Constant(FLOAT32, (2, 3), b"\0\0\x80?")
    sums = Mapped((ones, ones), FLOAT32, np.add)
    told = Told((1, -2, "\udc80", None, True, 2.5, b"raw", (), (3,), [4], {"k": 5}, np.arange(3)))
    parts = (
        Literal(b"abc"),
        TensorData("t", sums, "a piece"),
        SourceData(MemorySource(b"xyz")),
        Computed(4, (0,), bytes),
    )
    files = (OutputFile("a", (*parts, TensorData("u", Mapped((ones,), FLOAT32, told)))), OutputFile("b", (), 1))
    found = fingerprint(Plan("made", files, links={"l": "a"}), ())
    assert found.value == "2f6dd9da6f65f5e60bcf9ac722bbdbafdbf27e7148f0d5af6d532597411dd580"


def test_fixed_bytes_are_told_by_their_contents() -> None:
    found = [
        fingerprint(Plan("t", (OutputFile("", (SourceData(MemorySource(data)),)),)), ()) for data in (b"a", b"b", b"a")
    ]
    assert found[0] == found[2] != found[1]
    assert found[0].obstacle is None


def test_a_plan_with_a_cast_can_be_sent_to_another_process(tmp_path: Path) -> None:
    (tmp_path / "data").write_bytes(np.arange(16, dtype="<f4").tobytes())
    made = plan(Stored(LocalFile(tmp_path / "data"), 0, FLOAT32, (16,)).cast("bfloat16"))
    again = pickle.loads(pickle.dumps(made))
    assert fingerprint(again, ()) == fingerprint(made, ())
    assert again.files[0].parts[0].tensor.numpy().tolist() == list(range(16))


def test_work_that_does_not_tell_is_not_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Interrupted while it computed x 2, and gone on with by a run that computes x 3: half of each was the outcome."""
    count = (24 << 20) // 4
    np.ones(count, np.float32).tofile(tmp_path / "source")
    data = Stored(LocalFile(tmp_path / "source"), 0, FLOAT32, (count,))
    monkeypatch.setattr(run, "_SYNC_EVERY", 4 << 20)
    output = str(tmp_path / "out")

    def work(function: Any) -> Plan:
        return plan(Mapped((data,), FLOAT32, function))

    with pytest.raises(KeyboardInterrupt):
        execute.execute(work(TimesUntold(2.0, 3)), output, workers=1, source_paths=[str(tmp_path / "source")])
    assert os.listdir(tmp_path) == ["source"]
    with pytest.raises(UsageError, match=r"cannot be continued.*TimesUntold.*without --resume"):
        execute.execute(work(TimesUntold(3.0)), output, resume=True, source_paths=[str(tmp_path / "source")])
    execute.execute(work(TimesUntold(3.0)), output, source_paths=[str(tmp_path / "source")])
    assert np.unique(np.fromfile(output, np.float32)).tolist() == [3.0]


def kinds_of(kind: type) -> set[type]:
    return {each for below in kind.__subclasses__() for each in (below, *kinds_of(below))}


@pytest.mark.parametrize("kind", [LazyTensor, ByteSource])
def test_every_source_and_tensor_of_the_package_says_what_it_is(kind: type) -> None:
    for module in pkgutil.walk_packages(anyckpt.__path__, "anyckpt."):
        if not module.name.endswith("__main__") and not module.name.startswith("anyckpt.torch."):  # which need torch
            importlib.import_module(module.name)
    ours = [each for each in kinds_of(kind) if each.__module__.startswith("anyckpt.") and not inspect.isabstract(each)]
    assert len(ours) > 5
    silent = getattr(kind, "identity")  # noqa: B009 - a type of either sort
    assert [each.__name__ for each in ours if each.identity is silent] == []  # type: ignore[attr-defined]
