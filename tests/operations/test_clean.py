"""What dead runs left is removed, and nothing else."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.cli.runner import Runner
from tests.engine.memory_objects import DeadError, MemoryObjects, Store
from tests.engine.sample import make_source, sample_plan
from tests.places import files_below
from tests.support import fixture_path

import anyckpt
from anyckpt.engine import claim, execute, leftovers, object_notes
from anyckpt.engine.names import UNFINISHED_NAME
from anyckpt.engine.object_destination import ObjectDestination
from anyckpt.engine.plan import Plan
from anyckpt.engine.staging import StagingDirectory
from anyckpt.errors import UsageError

LLAMA = "families/llama/hf"


@pytest.fixture
def plan(tmp_path: Path) -> Plan:
    made = sample_plan(make_source(tmp_path / "source.bin", 64 * 1024))
    return Plan(made.format, made.files)


@pytest.fixture
def runner(capsys: pytest.CaptureFixture[str]) -> Runner:
    return Runner(capsys)


def interrupted(path: Path, plan: Plan) -> None:
    staging = StagingDirectory(str(path))
    staging.begin(plan, "x", share=None, resume=False)
    staging.seal([0])
    staging.close()


def test_directories_of_dead_runs_are_removed(plan: Plan, tmp_path: Path, runner: Runner) -> None:
    runs = tmp_path / "runs"
    runs.mkdir()
    anyckpt.convert(fixture_path(LLAMA), runs / "whole", to="hf")
    whole = files_below(runs)
    (runs / "notes.txt").write_text("mine")
    interrupted(runs / "dead", plan)
    living = StagingDirectory(str(runs / "living"))
    living.begin(plan, "x", share=None, resume=False)
    shown = runner("clean", str(runs), "--dry-run")
    assert ".dead.anyckpt-partial" in shown.out
    assert "living is being written" in shown.err
    assert "add --yes" in runner("clean", str(runs)).err
    assert (runs / ".dead.anyckpt-partial").is_dir()
    done = runner("clean", str(runs), "--yes", "--json").json
    assert [one["output"] for one in done["found"]] == [str(runs / "dead")]
    assert done["busy"] == [str(runs / "living")]
    assert sorted(path.name for path in runs.iterdir()) == [".living.anyckpt-partial", "notes.txt", "whole"]
    living.discard()
    assert {name: data for name, data in files_below(runs).items() if name != "notes.txt"} == whole
    assert "nothing is left" in runner("clean", str(runs)).out


def test_an_output_is_named_itself(plan: Plan, tmp_path: Path) -> None:
    interrupted(tmp_path / "dead", plan)
    assert len(anyckpt.clean(tmp_path / "dead").found) == 1
    assert not (tmp_path / ".dead.anyckpt-partial").exists()


def test_where_no_run_leaves_anything() -> None:
    with pytest.raises(UsageError, match="disk or an object store"):
        anyckpt.clean("https://example.org/x")


def test_whatever_a_writer_to_a_store_dies_in_is_removed(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(claim, "RENEWED_EVERY", 3600.0)
    monkeypatch.setattr(object_notes, "_WRITTEN_EVERY", 0.0)
    single = Plan("sample", (plan.files[1].__class__("", plan.files[1].parts),))
    for made in (plan, single):
        for number in range(10_000):
            store = Store()
            store.put("a/out2/mine", b"1")
            store.put("a/mine", b"1")
            with monkeypatch.context() as patch:
                patch.setattr(claim, "_lives_here", lambda claim: False)
                try:
                    place = ObjectDestination(MemoryObjects(store, dies_at=number), "a/out")
                    execute.execute(made, place, workers=1)
                    break
                except DeadError:
                    pass
                published = "a/out/metadata.json" in store.objects or "a/out" in store.objects
                for key in ("a/out", "a", ""):
                    objects = MemoryObjects(store)
                    for one in list(leftovers.in_store(objects, key)):
                        assert one.output == "mem://bucket/a/out"
                        assert not one.busy
                        one.remove()
            left = {key for key in store.objects if "mine" not in key}
            if published:
                names = {f"a/out/{file.path}" if file.path else "a/out" for file in made.files}
                assert names < left
                assert not any("partial" in key or UNFINISHED_NAME in key for key in left)
            else:
                assert left == set()
            assert len(store.objects) - len(left) == 2
        else:
            raise AssertionError("it never ends")


def test_a_living_writer_to_a_store_is_not_touched(plan: Plan) -> None:
    store = Store()
    place = ObjectDestination(MemoryObjects(store), "a/out")
    place.begin(plan, "x", share=None, resume=False)
    before = dict(store.objects)
    (found,) = leftovers.in_store(MemoryObjects(store), "a")
    assert found.busy
    with pytest.raises(anyckpt.OutputError):
        found.remove()
    assert store.objects == before
    place.discard()
