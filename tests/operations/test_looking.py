"""Verifying, comparing and inspecting in shares: the answer of one process, given by one of them."""

from __future__ import annotations

import json
import os
import pickle
import random
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
from tests.support import fixture_path

import anyckpt
from anyckpt.engine import shared_run
from anyckpt.errors import AnyckptError, OutputError, UsageError
from anyckpt.operations.diff import diff
from anyckpt.operations.inspect import inspect
from anyckpt.operations.steps.looking import Looking, Unit
from anyckpt.operations.verify import verify

LLAMA = fixture_path("families/llama/hf")


@pytest.fixture
def written(tmp_path: Path) -> Path:
    """A checkpoint with a manifest."""
    anyckpt.convert(LLAMA, tmp_path / "written", to="hf", max_shard_size="100KB")
    return tmp_path / "written"


@pytest.fixture
def unproved(tmp_path: Path) -> Path:
    """One with a container's checksums and no manifest."""
    anyckpt.convert(LLAMA, tmp_path / "one.pt", to="torch")
    (tmp_path / ".one.pt.anyckpt-manifest.json").unlink()
    return tmp_path / "one.pt"


@pytest.fixture
def damaged(written: Path) -> Path:
    """One in which a byte is another."""
    target = shutil.copytree(written, written.with_name("damaged"))
    file = next(iter(sorted(target.glob("*.safetensors"))))
    data = bytearray(file.read_bytes())
    data[-1] ^= 0x7F
    file.write_bytes(data)
    return target


CASES: dict[str, Callable[..., Any]] = {
    "verify": lambda written, unproved, damaged, **share: verify(written, deep=True, **share),
    "verify, no manifest": lambda written, unproved, damaged, **share: verify(unproved, deep=True, **share),
    "verify, damaged": lambda written, unproved, damaged, **share: verify(damaged, **share),
    "diff": lambda written, unproved, damaged, **share: diff(written, unproved, **share),
    "diff, different": lambda written, unproved, damaged, **share: diff(LLAMA, damaged, statistics=True, **share),
    "inspect": lambda written, unproved, damaged, **share: inspect(written, stats=True, digest=True, **share),
    "inspect, hub": lambda written, unproved, damaged, **share: inspect(
        written, digest=True, names="hub", tree=True, magnitudes=True, stats=True, **share
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_the_answer_of_one_process(name: str, written: Path, unproved: Path, damaged: Path, tmp_path: Path) -> None:
    call = CASES[name]
    alone = call(written, unproved, damaged)
    expected = alone.to_json()
    for of in (1, 2, 3, 7):
        numbers = list(range(1, of + 1))
        random.Random(f"{name}{of}").shuffle(numbers)
        read = 0
        for number in numbers:
            done = call(written, unproved, damaged, share=f"{number}/{of}", records=tmp_path / "records")
            if number == numbers[-1] or done.part is None:
                break
            assert done.part.share == f"{number}/{of}"
            assert set(done.part.missing_shares) <= {f"{n}/{of}" for n in numbers[numbers.index(number) + 1 :]}
            assert done.part.missing_shares and "missing_shares" in done.to_json()
            read += done.part.bytes_read
        assert done == alone and done.to_json() == expected
        assert of == 1 or read > 0
        assert not (tmp_path / "records").exists()


class _Travelling(Looking):
    """Units that are sent to another process, which looks."""

    def __init__(self) -> None:
        self.count = 0

    def look(self, units: Callable[[], Iterable[Unit]]) -> Mapping[str, Any]:
        sent = pickle.dumps(list(units()))
        there: list[Unit] = pickle.loads(sent)
        self.count += len(there)
        return json.loads(json.dumps({unit.key: unit.look(lambda _: None) for unit in there}))  # type: ignore[no-any-return]


@pytest.mark.parametrize("name", CASES)
def test_units_travel(name: str, written: Path, unproved: Path, damaged: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    alone = CASES[name](written, unproved, damaged)
    work = _Travelling()
    for module in ("verify", "diff", "inspect"):
        monkeypatch.setattr(f"anyckpt.operations.{module}.looking", lambda *_: nullcontext(work))
    assert CASES[name](written, unproved, damaged) == alone
    assert work.count > 3


def test_progress_is_told_once(written: Path, tmp_path: Path) -> None:
    told: list[tuple[int, int]] = []
    verify(written, share="1/1", records=tmp_path / "records", progress=lambda *two: told.append(two))
    assert told == sorted(told) and told[-1][0] == told[-1][1]


def test_a_part_is_no_answer(written: Path, tmp_path: Path) -> None:
    part = verify(written, share="1/2", records=tmp_path)
    with pytest.raises(UsageError, match="share 1/2 of the work, which is no answer"):
        bool(part)
    other = diff(written, written, share="1/2", records=tmp_path / "other")
    with pytest.raises(UsageError, match="no answer"):
        bool(other)
    looked = inspect(written, stats=True, share="1/2", records=tmp_path / "third")
    for one in (part, other, looked):
        assert ">1/2<" in one._repr_html_() and ">2/2<" in one._repr_html_()


def test_a_folder_that_was_there_stays(written: Path, tmp_path: Path) -> None:
    folder = tmp_path / "records"
    folder.mkdir()
    (folder / "log").write_text("mine")
    for number in (1, 2):
        verify(written, share=f"{number}/2", records=folder)
    assert os.listdir(folder) == ["log"]
    (folder / "log").unlink()
    verify(written, share="1/1", records=folder)
    assert os.listdir(folder) == []


def test_shares_that_never_come_are_named(written: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared_run, "_POLL_SECONDS", 0.02)
    with pytest.raises(OutputError, match=r"missing: share 2 of 3 \(not begun in .*share 3 of 3.*run the processes"):
        verify(written, share="1/3", wait=0.1, records=tmp_path / "records")
    assert verify(written, share="3/3", records=tmp_path / "records").part
    with pytest.raises(OutputError, match=r"missing: share 2 of 3 \(not begun in [^)]*\)\);"):
        verify(written, share="1/3", wait=0.1, records=tmp_path / "records")
    assert verify(written, share="2/3", records=tmp_path / "records").sound  # nobody waits any more
    assert not (tmp_path / "records").exists()


def test_the_first_that_waits_answers(written: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared_run, "_POLL_SECONDS", 0.02)
    found: list[Any] = []
    records = tmp_path / "records"
    first = threading.Thread(target=lambda: found.append(verify(written, share="1/2", wait=30, records=records)))
    first.start()
    while not (records / "anyckpt-share-1-of-2").exists():
        time.sleep(0.01)
    second = verify(written, share="2/2", records=records)
    first.join()
    assert second.part is not None and found[0].sound
    assert found[0] == verify(written)
    assert not records.exists()


def test_records_of_other_work_are_refused(written: Path, unproved: Path, tmp_path: Path) -> None:
    folder = tmp_path / "records"
    assert verify(written, share="1/2", records=folder).part

    def refused(call: Callable[..., Any], *words: Any, share: str = "2/2", **options: Any) -> str:
        with pytest.raises(OutputError) as error:
            call(*words, share=share, records=folder, **options)
        assert os.listdir(folder) == ["anyckpt-share-1-of-2"]
        return str(error.value)

    assert "of another path (expected" in refused(verify, unproved)
    assert "of another command" in refused(inspect, written, stats=True)
    assert "deep=True" in refused(verify, written, deep=True)
    assert "of another number of shares (expected 3, found 2)" in refused(verify, written, share="3/3")
    assert "of another path (expected" in refused(verify, unproved, share="1/2")
    config = written / "config.json"
    before = config.stat()
    os.utime(config, (1, 1))
    assert "of another state of what is read" in refused(verify, written)
    os.utime(config, ns=(before.st_atime_ns, before.st_mtime_ns))
    version = (anyckpt.__version__, "0.0.1")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(anyckpt, "__version__", version[1])
        assert f"of another version of anyckpt (expected 0.0.1, found {version[0]})" in refused(verify, written)
    assert verify(written, share="2/2", records=folder).sound


def test_an_answer_that_fails_leaves_the_records(
    written: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "records"
    inspect(written, stats=True, share="1/2", records=folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("anyckpt.operations.inspect.by_dtype", lambda tensors: 1 // 0)
        with pytest.raises(ZeroDivisionError):
            inspect(written, stats=True, share="2/2", records=folder)
    assert sorted(os.listdir(folder)) == ["anyckpt-share-1-of-2", "anyckpt-share-2-of-2"]
    monkeypatch.setattr("anyckpt.operations.steps.statistics.scan", lambda *_, **__: 1 // 0)  # nothing is read again
    assert inspect(written, stats=True, share="1/2", records=folder).tensors
    assert not folder.exists()


def test_what_cannot_be_shared_out(written: Path, tmp_path: Path) -> None:
    for options, text in (
        ({"share": "1/2"}, "--records DIR"),
        ({"records": tmp_path}, "--records is for"),
        ({"wait": 3.0}, "--wait is for"),
        ({"share": "1/2", "records": "s3://bucket/x"}, "in a folder of a file system"),
        ({"engine": "dask"}, "no such engine"),
        ({"engine": "ray", "share": "1/2"}, "shares of its own; leave out --share"),
        ({"engine": "ray", "records": tmp_path}, "shares of its own; leave out --records"),
        ({"engine": "ray", "wait": 3.0}, "shares of its own; leave out --wait"),
        ({"share": "3/2", "records": tmp_path}, "no such share"),
    ):
        with pytest.raises(UsageError, match=text):
            verify(written, **options)
    with pytest.raises(UsageError, match="nothing to share out"):
        inspect(written, share="1/2", records=tmp_path)
    with pytest.raises(UsageError, match="nothing to share out; leave out --engine"):
        inspect(written, engine="ray")
    with pytest.raises(AnyckptError, match="no such|does not|No such"):
        verify(written, share="1/2", records=tmp_path / "none" / "deeper")


def test_processes_at_once_of_which_one_is_killed(written: Path, tmp_path: Path) -> None:
    words = [sys.executable, "-m", "anyckpt", "inspect", str(written), "--stats", "--json", "--records"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "WORLD_SIZE": "3"}
    folder = str(tmp_path / "records")

    def run(rank: int) -> subprocess.Popen[str]:
        command = [*words, folder, "--share", "auto"]
        return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**environment, "RANK": str(rank)})

    processes = [run(rank) for rank in range(3)]
    processes[1].kill()
    processes[1].wait()
    processes[1] = run(1)
    told = [process.communicate()[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0, 0]
    alone = subprocess.run(words[:-1], stdout=subprocess.PIPE, text=True, check=True, env=environment).stdout
    assert told[0] == alone and all('"share"' in one for one in told[1:])
    assert not os.path.exists(folder)
