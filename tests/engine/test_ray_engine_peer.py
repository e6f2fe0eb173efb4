"""What a Ray cluster does: the bytes and the answers of one process, also when a node is lost on the way."""

from __future__ import annotations

import logging
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from tests.cli.runner import Runner
from tests.support import fixture_path

import anyckpt
from anyckpt.engine import ray_engine
from anyckpt.errors import FormatError
from anyckpt.operations.inspect import inspect
from anyckpt.operations.steps import ray_looking

pytestmark = pytest.mark.peer
LLAMA = fixture_path("families/llama/hf")


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """Two nodes on this machine, of which the driver's does not run tasks."""
    patch = pytest.MonkeyPatch()
    patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    import ray
    from ray.cluster_utils import Cluster

    made = Cluster(
        initialize_head=True,
        head_node_args={
            "num_cpus": 0,
            "include_dashboard": False,
            "object_store_memory": 80 << 20,
            "_system_config": {"health_check_period_ms": 200},  # a node that is lost is soon known to be
        },
    )
    made.add_node(num_cpus=1, object_store_memory=80 << 20)
    ray.init(address=made.address, log_to_driver=False, logging_level=logging.ERROR)
    patch.setattr(ray_engine, "_SMALLEST_SHARE", 20_000)
    patch.setattr(ray_looking, "_SMALLEST_SHARE", 200_000)
    yield made
    ray.shutdown()
    made.shutdown()
    patch.undo()


def contents(path: Path) -> dict[str, bytes]:
    return {str(file.relative_to(path)): file.read_bytes() for file in path.rglob("*") if file.is_file()}


@contextmanager
def losing_a_node(cluster: Any, log: Path, module: ModuleType, work: str, name: Callable[..., str]) -> Iterator[None]:
    """A second node, which is removed while it does its first task; the log has a file for each task that was begun.

    Args:
        cluster: which gets it.
        log: an empty folder.
        module: that has the work of a task.
        work: its name there.
        name: of a task, from its arguments.
    """
    second = cluster.add_node(num_cpus=1, object_store_memory=80 << 20)
    original, lost = getattr(module, work), second.node_id

    def task(*arguments: Any) -> Any:
        import ray

        node = ray.get_runtime_context().get_node_id()
        (log / f"{name(*arguments)} {node} {time.time_ns()}").touch()
        time.sleep(60 if node == lost else 0.3)  # so that both nodes have some of it
        return original(*arguments)

    def lose() -> None:
        until = time.monotonic() + 60
        while not any(lost in file.name for file in log.iterdir()) and time.monotonic() < until:
            time.sleep(0.02)
        cluster.remove_node(second, allow_graceful=False)

    losing = threading.Thread(target=lose)
    losing.start()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, work, task)
        yield
    losing.join()


def begun(log: Path) -> tuple[set[str], set[str], int]:
    """Which tasks were begun, by which nodes, and how often."""
    words = [name.split(" ") for name in os.listdir(log)]
    return {name for name, *_ in words}, {node for _, node, _ in words}, len(words)


def test_a_node_that_is_lost(cluster: Any, tmp_path: Path) -> None:
    options: dict[str, Any] = {"to": "hf", "max_shard_size": "60KB"}
    anyckpt.convert(LLAMA, tmp_path / "one", **options)
    log = tmp_path / "log"
    log.mkdir()
    told: list[tuple[int, int]] = []
    with losing_a_node(cluster, log, ray_engine, "_write_share", lambda plan, place_at, share, *_: str(share.number)):
        done = anyckpt.convert(LLAMA, tmp_path / "out", engine="ray", progress=lambda *two: told.append(two), **options)
    assert contents(tmp_path / "out") == contents(tmp_path / "one")
    assert (done.share, done.missing_shares) == (None, ()) and done.tensors
    assert told == sorted(told) and told[-1][0] > 0.9 * told[-1][1]
    tasks, nodes, count = begun(log)
    assert tasks == {str(number) for number in range(1, 9)}
    assert len(nodes) == 2 and count > 8  # what the lost node had was begun again
    assert [name for name in os.listdir(tmp_path) if name.endswith("-partial")] == []


def test_an_error_of_a_task_is_the_error(cluster: Any, tmp_path: Path) -> None:
    source = shutil.copytree(LLAMA, tmp_path / "source")
    opened = anyckpt.open(source)
    (file,) = source.glob("*.safetensors")
    os.truncate(file, file.stat().st_size - 1000)
    with pytest.raises(FormatError):
        anyckpt.convert(opened, tmp_path / "out", to="hf", engine="ray")
    assert not (tmp_path / "out").exists()


def test_other_commands(cluster: Any, tmp_path: Path) -> None:
    anyckpt.average([LLAMA, LLAMA], tmp_path / "one")
    anyckpt.average([LLAMA, LLAMA], tmp_path / "out", engine="ray")
    assert contents(tmp_path / "out") == contents(tmp_path / "one")


def test_looking_while_a_node_is_lost(cluster: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = Runner(capsys)
    written = tmp_path / "written"
    anyckpt.convert(LLAMA, written, to="hf", max_shard_size="60KB")
    damaged = shutil.copytree(written, tmp_path / "damaged")
    file = min(damaged.glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:-1] + b"\x7e")
    commands: tuple[tuple[str | Path, ...], ...] = (
        ("verify", damaged, "--deep", "--json"),
        ("verify", written, "--deep"),
        ("diff", LLAMA, damaged, "--stats"),
        ("inspect", written, "--stats", "--digest", "--json"),
    )
    log = tmp_path / "log"
    log.mkdir()
    with losing_a_node(cluster, log, ray_looking, "_look_at", lambda own, threads: own[0].key.replace("/", "-")):
        found = [command(*commands[0], "--engine", "ray")]
    tasks, nodes, count = begun(log)
    assert len(nodes) == 2 and count > len(tasks)
    found += [command(*words, "--engine", "ray") for words in commands[1:]]
    alone = [command(*words) for words in commands]
    assert [(result.code, result.out) for result in found] == [(result.code, result.out) for result in alone]
    assert [result.code for result in alone] == [1, 0, 1, 0]


def test_looking_tells_progress_once(cluster: Any) -> None:
    told: list[tuple[int, int]] = []
    found = inspect(LLAMA, stats=True, engine="ray", progress=lambda *two: told.append(two))
    assert found == inspect(LLAMA, stats=True)
    assert len(told) > 1 and told == sorted(told) and told[-1][0] == told[-1][1]


def test_a_file_that_a_node_sees_otherwise(cluster: Any, tmp_path: Path) -> None:
    source = shutil.copytree(LLAMA, tmp_path / "source")
    opened = anyckpt.open(source)
    (file,) = source.glob("*.safetensors")
    os.utime(file, (1, 1))
    with pytest.raises(FormatError, match="changed while it was being read"):
        inspect(opened, digest=True, engine="ray")
