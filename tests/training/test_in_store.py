"""Saving in training to a bucket: what is whole there, what a kill leaves, what stays."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("obstore")
pytest.importorskip("moto")

from tests.servers import S3Server
from tests.training.ranks import on_ranks
from tests.training.test_saver import assert_is, changed, state_of

from anyckpt.errors import AnyckptError, OutputError, UsageError
from anyckpt.operations.retention import Retention
from anyckpt.operations.run_folder import latest
from anyckpt.operations.run_upkeep import clean

pytestmark = pytest.mark.peer

RUN = "s3://models/run"


@pytest.fixture
def bucket(s3: S3Server) -> S3Server:
    s3.bucket("models")
    return s3


def environment() -> dict[str, str]:
    """What leads a rank to the server, which was forked before there was any."""
    return {name: value for name, value in os.environ.items() if name.startswith("AWS_")}


def names(bucket: S3Server) -> set[str]:
    """What lies right in the run's folder."""
    return {key.split("/")[1] for key in bucket.files("models") if key.startswith("run/")}


def saved_and_loaded(told: dict[str, str], format: str) -> Any:
    import torch

    from anyckpt.torch import async_save, load, save

    os.environ.update(told)
    report = save(state_of(3), f"{RUN}/step-3", format=format)
    state = state_of(4)
    handle = async_save(state, f"{RUN}/step-4", format=format)
    changed(state)
    assert handle.wait() == f"{RUN}/step-4"
    for step in (3, 4):
        filled = state_of(0)
        load(filled, f"{RUN}/step-{step}", parallel_load=step == 4)
        full = getattr(filled["model"]["w"], "full_tensor", lambda one=filled["model"]["w"]: one)()
        assert torch.equal(full, torch.full((64, 6), float(step))) and filled["step"] == step
    return report.path, report.bytes_written > 0


@pytest.mark.parametrize("format", ["dcp", "megatron-core"])
def test_ranks_save_and_load(format: str, bucket: S3Server) -> None:
    found = on_ranks(2, saved_and_loaded, environment(), format)
    assert found == [(f"{RUN}/step-3", True)] * 2
    for step in (3, 4):
        assert_is(f"{RUN}/step-{step}", step)
    assert latest(RUN) == f"{RUN}/step-4"
    assert names(bucket) == {"step-3", "step-4"}, "and nothing beside them"


def steps_of_a_run(told: dict[str, str]) -> list[str]:
    from anyckpt.torch import Saver

    os.environ.update(told)
    deleted = Retention(last=2, best=1, forever_every=4)
    with Saver(RUN, keep=deleted, name="iter_{step:07d}") as saver:
        assert saver.latest() is None
        for step in range(1, 6):
            state = state_of(step)
            saver.save(state, step, metric=abs(step - 3))
            changed(state)
        saver.wait()
        return [saver.latest() or ""]


def test_a_saver_keeps_what_its_rules_keep(bucket: S3Server) -> None:
    assert on_ranks(2, steps_of_a_run, environment()) == [[f"{RUN}/iter_0000005"]] * 2
    kept = {f"iter_000000{step}" for step in (1, 3, 4, 5)}
    assert {one for one in names(bucket) if not one.startswith(".")} == {*kept, "latest_checkpointed_iteration.txt"}
    assert {one for one in names(bucket) if one.startswith(".")} == {f".{one}.anyckpt-save.json" for one in kept}
    assert bucket.files("models")["run/latest_checkpointed_iteration.txt"] == b"5"
    assert_is(latest(RUN), 5)


def failing(told: dict[str, str]) -> str:
    import torch
    import torch.distributed as dist

    from anyckpt.torch import save

    os.environ.update(told)
    if dist.get_rank() == 1:
        from anyckpt.engine.growing import Growing

        def refuse(*_: object) -> None:
            raise OutputError("is full", path="the store")

        Growing.write = refuse  # type: ignore[method-assign]
    try:
        save({"own": torch.ones(4), **state_of(7, rows=4096)}, f"{RUN}/step-7")
    except AnyckptError as error:
        return str(error)
    return ""


def test_a_rank_that_fails_leaves_nothing(bucket: S3Server) -> None:
    found = on_ranks(2, failing, environment())
    assert all("is full" in error for error in found), found
    assert not bucket.files("models")


def refused(told: dict[str, str]) -> list[str]:
    from anyckpt.torch import save

    os.environ.update(told)
    found = []
    for path, format in ((f"{RUN}/m.safetensors", "safetensors"), ("hf://org/model", "dcp"), (f"{RUN}/step-3", "dcp")):
        try:
            save({"w": state_of(1)["model"]["w"]}, path, format=format, overwrite=True)
            found.append("")
        except (UsageError, OutputError) as error:
            found.append(str(error))
    return found


def test_what_cannot_be_written_there_is_said(bucket: S3Server) -> None:
    on_ranks(2, saved_and_loaded, environment(), "dcp")
    for whole, hub, again in on_ranks(2, refused, environment()):
        assert "bytes of several ranks" in whole
        assert "no place to which ranks write together" in hub
        assert "replace nothing in an object store" in again
    assert_is(f"{RUN}/step-3", 3)


ENDLESS = """
import sys, time
import torch
from anyckpt.torch import Saver

if __name__ == "__main__":
    saver = Saver(sys.argv[1], keep=None, in_flight=2)
    step = 0
    while True:
        step += 1
        state = {"model": {"w": torch.full((700_000,), float(step)), "alike": torch.full((5,), step)}, "step": step}
        saver.save(state, step)
        print(step, flush=True)
"""


def test_a_killed_trainer_leaves_whole_checkpoints_only(bucket: S3Server, tmp_path: Path) -> None:
    (tmp_path / "endless.py").write_text(ENDLESS)
    told = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    for seconds in (0.0, 0.13):
        with subprocess.Popen(
            [sys.executable, str(tmp_path / "endless.py"), RUN], stdout=subprocess.PIPE, env=told
        ) as job:
            assert job.stdout is not None
            for _ in range(3):
                assert job.stdout.readline()
            time.sleep(seconds)
            job.send_signal(signal.SIGKILL)
        found = latest(RUN)
        if found is not None:
            assert_is(found, int(found.rpartition("-")[2]))
        until = time.monotonic() + 20  # its writer ends within seconds
        while time.monotonic() < until:
            clean(RUN)
            left = [one for one in names(bucket) if "partial" in one]
            if not left:
                break
            time.sleep(0.3)
        assert not left
        for one in names(bucket):
            if one.startswith("step-"):
                assert_is(f"{RUN}/{one}", int(one.partition("-")[2]))
    assert not bucket.client().list_multipart_uploads(Bucket="models").get("Uploads", [])


def given_to_torch(told: dict[str, str]) -> str:
    import torch.distributed.checkpoint as torch_dcp

    from anyckpt.torch import dcp

    os.environ.update(told)
    try:
        torch_dcp.save(state_of(1), storage_writer=dcp.Writer(f"{RUN}/step-1"))
    except torch_dcp.CheckpointException as error:
        return str(error)
    return ""


def test_torchs_own_save_is_refused_there(bucket: S3Server) -> None:
    assert "anyckpt.torch.save" in on_ranks(1, given_to_torch, environment())[0]
    assert not Path("s3:").exists()
