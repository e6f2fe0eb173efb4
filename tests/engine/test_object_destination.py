"""Outputs in an object store: the bytes of a disk, whole or not at all, whenever a writer dies."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.engine.memory_objects import DeadError, MemoryObjects, Store
from tests.engine.sample import make_source, run_share, sample_plan, shrink_blocks
from tests.support import file_bytes

import anyckpt
from anyckpt.engine import claim, execute, growing, living, object_notes
from anyckpt.engine.destination import BusyError, Share
from anyckpt.engine.manifest import parse_manifest
from anyckpt.engine.names import MANIFEST_NAME, UNFINISHED_NAME
from anyckpt.engine.object_destination import ObjectDestination
from anyckpt.engine.plan import Literal, OutputFile, Plan, small_file
from anyckpt.engine.shared_run import SharedRun
from anyckpt.errors import OutputError, UsageError
from anyckpt.storage.objects import MOST_PARTS, PART_BYTES, part_bytes

OLD = {"old/weights": b"old weights", "metadata.json": b"the old marker", MANIFEST_NAME: b"the old manifest"}


@pytest.fixture(autouse=True)
def small_parts(restored_block_sizes: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Small blocks and parts, so that a small plan has many."""
    shrink_blocks(32768)
    monkeypatch.setattr(growing, "PART_BYTES", 50_000)
    monkeypatch.setattr(claim, "RENEWED_EVERY", 3600.0)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return make_source(tmp_path / "source.bin", 96 * 1024)


@pytest.fixture
def plan(source: Path) -> Plan:
    made = sample_plan(source)
    return Plan(made.format, made.files)


def written(store: Store, plan: Plan, **options: bool) -> MemoryObjects:
    overwrite = options.pop("overwrite", False)
    objects = MemoryObjects(store)
    execute.execute(plan, ObjectDestination(objects, "a/out", overwrite=overwrite), workers=2, **options)
    return objects


def assert_whole(store: Store, plan: Plan) -> None:
    assert store.uploads == 0
    manifest = store.objects["a/out/" + MANIFEST_NAME if plan.is_directory else "a/.out" + MANIFEST_NAME][0]
    names = {f"a/out/{file.path}" if file.path else "a/out": file_bytes(file) for file in plan.files}
    aside = f"a/out/{MANIFEST_NAME}" if plan.is_directory else f"a/.out{MANIFEST_NAME}"
    assert {key: data for key, (data, _) in store.objects.items()} == {**names, aside: manifest}
    parsed = parse_manifest(manifest, "manifest")
    assert parsed.files == {file.path: file.nbytes for file in plan.files}


def is_taken_for_whole(store: Store, plan: Plan) -> bool:
    """Whether a reader takes what is there for a checkpoint: the marker is there, and nothing says that it is none."""
    there = store.below("a/out")
    return "metadata.json" in there or (UNFINISHED_NAME not in there and bool(there))


def killed(objects: MemoryObjects, plan: Plan, *, overwrite: bool = False, resume: bool = False) -> bool:
    """Whether a writer dies before its end; what it would do on its way out never reaches the store."""
    place = ObjectDestination(objects, "a/out", overwrite=overwrite)
    try:
        execute.execute(plan, place, workers=1, resume=resume)
    except DeadError:
        return True
    return False


@given(st.integers(0, 60 << 40))
def test_parts_are_as_stores_take_them(nbytes: int) -> None:
    part = part_bytes(nbytes)
    count = nbytes // part
    assert -(-nbytes // part) <= MOST_PARTS
    assert nbytes - count * part < MOST_PARTS, "an upload that waits keeps this in memory"
    assert part >= PART_BYTES or count <= 1
    assert part >= 5 << 20 or nbytes <= part


@pytest.mark.parametrize("directory", [True, False])
def test_the_bytes_are_those_of_a_disk(source: Path, tmp_path: Path, directory: bool) -> None:
    made = sample_plan(source, directory=directory)
    plan = Plan(made.format, made.files)
    store = Store()
    written(store, plan)
    assert_whole(store, plan)
    execute.execute(plan, str(tmp_path / "out"))
    aside = f"a/out/{MANIFEST_NAME}" if directory else f"a/.out{MANIFEST_NAME}"
    local = tmp_path / "out" / MANIFEST_NAME if directory else tmp_path / f".out{MANIFEST_NAME}"
    assert store.objects[aside][0] == local.read_bytes()


def test_what_marks_a_checkpoint_comes_last(plan: Plan) -> None:
    requests = written(Store(), plan).requests
    puts = [what.split()[1] for what in requests if what.split()[0] in ("put", "finish") and "partial" not in what]
    assert puts[0] == f"a/out/{UNFINISHED_NAME}"
    assert puts[-3:] == ["a/out/config.yaml", f"a/out/{MANIFEST_NAME}", "a/out/metadata.json"]


@pytest.mark.parametrize("directory", [True, False])
@pytest.mark.parametrize("resume", [True, False])
def test_a_writer_may_die_at_any_request(
    source: Path, monkeypatch: pytest.MonkeyPatch, directory: bool, resume: bool
) -> None:
    monkeypatch.setattr(object_notes, "_WRITTEN_EVERY", 0.0)
    monkeypatch.setattr(claim, "_lives_here", lambda claim: False)
    made = sample_plan(source, directory=directory)
    plan = Plan(made.format, made.files)
    continued = 0
    for number in range(10_000):
        store = Store()
        if not killed(MemoryObjects(store, dies_at=number), plan):
            break
        if directory and is_taken_for_whole(store, plan):
            finished = {key.removeprefix("a/out/"): data for key, (data, _) in store.objects.items()}
            assert all(finished[file.path] == file_bytes(file) for file in plan.files)
        store.uploads = 0  # nobody can finish those of a dead process
        place = ObjectDestination(MemoryObjects(store), "a/out")
        try:
            continued += execute.execute(plan, place, workers=1, resume=resume).resumed_bytes > 0
        except OutputError as error:
            assert "already exists" in str(error)
        ObjectDestination(MemoryObjects(store), "a/out").discard()
        assert_whole(store, plan)
    else:
        raise AssertionError("it never ends")
    assert number > 20 or not directory
    assert bool(continued) == (directory and resume) or not directory


def test_until_the_end_what_is_replaced_stays_and_then_no_mixture_is_taken_for_whole(
    plan: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(claim, "_lives_here", lambda claim: False)
    old = killed_in_between = 0
    for number in range(10_000):
        store = Store()
        for name, data in OLD.items():
            store.put(f"a/out/{name}", data)
        if not killed(MemoryObjects(store, dies_at=number), plan, overwrite=True):
            break
        there = store.below("a/out")
        if UNFINISHED_NAME not in there and OLD.keys() <= there.keys():
            assert there == OLD
            old += 1
        elif "metadata.json" in there and there["metadata.json"] != OLD["metadata.json"]:
            assert all(there[file.path] == file_bytes(file) for file in plan.files)
        else:
            assert UNFINISHED_NAME in there
            killed_in_between += 1
        store.uploads = 0
        written(store, plan, overwrite=True, resume=True)
        assert_whole(store, plan)
    assert old > 10
    assert killed_in_between > 3


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_store_that_fails_once_leaves_nothing_half(plan: Plan, overwrite: bool) -> None:
    for number in range(10_000):
        store = Store()
        if overwrite:
            for name, data in OLD.items():
                store.put(f"a/out/{name}", data)
        objects = MemoryObjects(store, fails_at=number)
        try:
            execute.execute(plan, ObjectDestination(objects, "a/out", overwrite=overwrite), workers=1)
        except OutputError:
            there = store.below("a/out")
            if not overwrite and "metadata.json" in there:
                assert all(there[file.path] == file_bytes(file) for file in plan.files)
            written(store, plan, resume=True, overwrite=True)
        assert_whole(store, plan)
        if len(objects.requests) <= number:
            break
    else:
        raise AssertionError("it never ends")


def test_what_is_there_is_replaced_only_on_request(plan: Plan) -> None:
    store = Store()
    store.put("a/out/metadata.json", b"other")
    with pytest.raises(OutputError, match="already exists.*--overwrite"):
        written(store, plan)
    assert store.below("a/out") == {"metadata.json": b"other"}
    assert [key for key in store.objects if "partial" in key] == []
    written(store, plan, overwrite=True)
    assert_whole(store, plan)


def test_a_file_takes_the_place_of_a_folder_and_back(source: Path) -> None:
    store = Store()
    for directory in (True, False, True):
        made = sample_plan(source, directory=directory)
        plan = Plan(made.format, made.files)
        written(store, plan, overwrite=True)
        assert_whole(store, plan)


def test_two_writers_of_one_output_do_not_meet(plan: Plan) -> None:
    store, other = Store(), ObjectDestination(MemoryObjects(Store()), "a/out")
    other._objects = MemoryObjects(store)  # type: ignore[assignment]
    at_work = ObjectDestination(MemoryObjects(store), "a/out")
    at_work.begin(plan, "x", share=None, resume=False)
    with pytest.raises(BusyError, match="another process"):
        written(store, plan)
    at_work.discard()
    assert store.objects == {}
    written(store, plan)
    assert_whole(store, plan)


def test_of_writers_at_the_same_moment_one_publishes(plan: Plan) -> None:
    store = Store()
    ends: list[BaseException | None] = []

    def write() -> None:
        try:
            written(store, plan)
            ends.append(None)
        except BaseException as error:
            ends.append(error)

    threads = [threading.Thread(target=write) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert ends.count(None) == 1
    assert all(isinstance(end, OutputError) for end in ends if end is not None)
    assert_whole(store, plan)


def test_a_writer_that_was_thought_dead_does_not_publish(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store()
    slow = ObjectDestination(MemoryObjects(store), "a/out")
    slow.begin(plan, "x", share=None, resume=False)
    monkeypatch.setattr(claim, "_lives_here", lambda claim: False)
    quick = ObjectDestination(MemoryObjects(store), "a/out")
    quick.begin(plan, "x", share=None, resume=False)
    with pytest.raises(OutputError, match="taken over"):
        slow.publish(b"{}")
    slow.close()
    quick.discard()
    assert store.objects == {}


def test_a_writer_on_another_machine_lives_as_long_as_it_says_so(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(living, "_machine", lambda: "")
    monkeypatch.setattr(claim, "RENEWED_EVERY", 0.02)
    monkeypatch.setattr(claim, "WATCHED_FOR", 0.3)
    store = Store()
    at_work = ObjectDestination(MemoryObjects(store), "a/out")
    at_work.begin(plan, "x", share=None, resume=False)
    with pytest.raises(BusyError):
        written(store, plan)
    assert at_work._claim is not None
    at_work._claim._ended.set()  # it says nothing any more
    written(store, plan)
    assert_whole(store, plan)


def test_marked_last_as_unfinished_and_yet_whole(plan: Plan) -> None:
    store = Store()
    written(store, plan)
    store.put(f"a/out/{UNFINISHED_NAME}", b"{}")
    report = execute.execute(plan, ObjectDestination(MemoryObjects(store), "a/out"), resume=True)
    assert (report.published, report.resumed_bytes) == (False, plan.nbytes)
    assert_whole(store, plan)


def test_others_files_in_an_unfinished_folder_are_not_removed(plan: Plan) -> None:
    store = Store()
    store.put(f"a/out/{UNFINISHED_NAME}", json.dumps({"files": ["data/0.bin"]}).encode())
    store.put("a/out/data/0.bin", b"half")
    store.put("a/out/mine.txt", b"keep")
    with pytest.raises(OutputError, match=r"holds files.*mine\.txt"):
        written(store, plan)
    assert store.below("a/out")["mine.txt"] == b"keep"


def test_a_file_that_has_changed_meanwhile_is_written_again(source: Path, plan: Plan) -> None:
    store = Store()
    with pytest.raises(OutputError):
        execute.execute(plan, ObjectDestination(MemoryObjects(store, fails_at=30), "a/out"), workers=1)
    store.put("a/out/data/0.bin", b"of somebody else")
    written(store, plan, resume=True)
    assert_whole(store, plan)


def test_work_of_another_plan_is_not_continued(source: Path, plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(claim, "_lives_here", lambda claim: False)
    monkeypatch.setattr(object_notes, "_WRITTEN_EVERY", 0.0)
    store = Store()
    assert killed(MemoryObjects(store, dies_at=40), plan)
    other = Plan(plan.format, (*plan.files, small_file("more", b"x", 0)))
    with pytest.raises(OutputError, match="another conversion"):
        written(store, other, resume=True)
    written(store, other)
    store.uploads = 0
    assert_whole(store, other)


def test_processes_of_another_version_or_plan_are_told(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store()

    def share(number: int, of: Plan = plan) -> None:
        run_share(of, ObjectDestination(MemoryObjects(store), "a/out"), Share(number, 2))

    share(1)
    other = Plan(plan.format, (*plan.files, small_file("more", b"x", 0)))
    with pytest.raises(
        OutputError, match=r"found plan [0-9a-f]+ of share 1 of 2, process \d+ on .*anyckpt clean \S+a/out to"
    ):
        share(2, other)
    monkeypatch.setattr(anyckpt, "__version__", "9.9")
    for changed in (plan, other):
        with pytest.raises(
            OutputError, match=r"another version of anyckpt \(expected anyckpt 9.9, .*share 1 of 2, process"
        ):
            share(2, changed)


def test_small_files_that_wait_do_not_fill_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(growing, "_HELD_BYTES", 1000)
    outputs = [OutputFile(f"{number}", (Literal(b"x" * 400),), 0) for number in range(12)]
    plan = Plan("sample", (*outputs, small_file("metadata.json", "{}", stage=2)))
    store = Store()
    store.put("a/out/metadata.json", b"old")
    requests = written(store, plan, overwrite=True).requests
    assert sum(what.startswith("begin ") for what in requests) == 10
    assert_whole(store, plan)


def test_processes_write_their_shares(plan: Plan) -> None:
    for of in (1, 2, 3):
        store = Store()
        for number in range(1, of + 1):
            run_share(plan, ObjectDestination(MemoryObjects(store), "a/out"), Share(number, of))
            assert UNFINISHED_NAME in store.below("a/out")
        SharedRun(plan, ObjectDestination(MemoryObjects(store), "a/out"), of).finish()
        assert_whole(store, plan)


def test_a_share_that_failed_is_named(plan: Plan) -> None:
    store = Store()
    run_share(plan, ObjectDestination(MemoryObjects(store), "a/out"), Share(1, 2))
    with pytest.raises(OutputError):
        run_share(plan, ObjectDestination(MemoryObjects(store, fails_at=20), "a/out"), Share(2, 2), workers=1)
    whole = SharedRun(plan, ObjectDestination(MemoryObjects(store), "a/out"), 2)
    with pytest.raises(OutputError, match="share 2 of 2 .*the store fails"):
        whole.finish()
    run_share(plan, ObjectDestination(MemoryObjects(store), "a/out"), Share(2, 2))
    whole.finish()
    assert_whole(store, plan)


def test_what_cannot_be_divided_is_refused(source: Path, plan: Plan) -> None:
    store = Store()
    single = sample_plan(source, directory=False)
    with pytest.raises(UsageError, match="--share"):
        run_share(single, ObjectDestination(MemoryObjects(store), "a/out"), Share(1, 2))
    assert store.objects == {}
    written(store, plan)
    with pytest.raises(UsageError, match="several processes"):
        run_share(
            Plan("other", plan.files), ObjectDestination(MemoryObjects(store), "a/out", overwrite=True), Share(1, 2)
        )
    assert_whole(store, plan)


def test_links_and_whole_buckets_are_refused(source: Path) -> None:
    with pytest.raises(UsageError, match="links"):
        written(Store(), sample_plan(source))
    with pytest.raises(UsageError, match="whole bucket"):
        ObjectDestination(MemoryObjects(Store()), "")
