"""A plan carried out by a Ray cluster: the bytes of one process, also when a node is lost on the way."""

from __future__ import annotations

import logging
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.support import fixture_path

import anyckpt
from anyckpt.engine import ray_engine
from anyckpt.errors import FormatError

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
        head_node_args={"num_cpus": 0, "include_dashboard": False, "object_store_memory": 80 << 20},
    )
    made.add_node(num_cpus=1, object_store_memory=80 << 20)
    ray.init(address=made.address, log_to_driver=False, logging_level=logging.ERROR)
    patch.setattr(ray_engine, "_SMALLEST_SHARE", 20_000)
    yield made
    ray.shutdown()
    made.shutdown()
    patch.undo()


def contents(path: Path) -> dict[str, bytes]:
    return {str(file.relative_to(path)): file.read_bytes() for file in path.rglob("*") if file.is_file()}


def slowed(log: Path) -> Callable[..., None]:
    """A task that says where it has begun, and takes a moment, so that a node can be lost meanwhile."""
    write = ray_engine._write_share

    def task(plan: Any, place_at: Any, share: Any, *others: Any) -> None:
        import ray

        node = ray.get_runtime_context().get_node_id()
        (log / f"{share.number}.{node}.{time.time_ns()}").touch()
        time.sleep(0.3)
        write(plan, place_at, share, *others)

    return task


def test_a_node_that_is_lost(cluster: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options: dict[str, Any] = {"to": "hf", "max_shard_size": "60KB"}
    anyckpt.convert(LLAMA, tmp_path / "one", **options)
    second = cluster.add_node(num_cpus=1, object_store_memory=80 << 20)
    log = tmp_path / "log"
    log.mkdir()
    monkeypatch.setattr(ray_engine, "_write_share", slowed(log))

    def lose() -> None:
        until = time.monotonic() + 60
        while not any(second.node_id in file.name for file in log.iterdir()) and time.monotonic() < until:
            time.sleep(0.02)
        cluster.remove_node(second, allow_graceful=False)

    losing = threading.Thread(target=lose)
    losing.start()
    told: list[tuple[int, int]] = []
    done = anyckpt.convert(LLAMA, tmp_path / "out", engine="ray", progress=lambda *two: told.append(two), **options)
    losing.join()
    assert contents(tmp_path / "out") == contents(tmp_path / "one")
    assert (done.share, done.missing_shares) == (None, ()) and done.tensors
    assert told == sorted(told) and told[-1][0] > 0.9 * told[-1][1]
    begun = [file.name.split(".") for file in log.iterdir()]
    assert {number for number, *_ in begun} == {str(number) for number in range(1, 9)}
    assert len({node for _, node, _ in begun}) == 2 and len(begun) > 8  # what the lost node had was begun again
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
