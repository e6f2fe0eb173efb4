"""Test functions on several ranks, cheaply: one process imports torch, and the ranks are forked from it.

    def part(folder: str) -> float: ...                  # at the top of a test module; runs on every rank

    assert on_ranks(2, part, str(tmp_path)) == [1.0, 1.0]

Ranks are in a gloo group of their own, wait for one another at the end, and part.  What a rank raises fails the test
with that rank's traceback and output; ``outcomes`` gives what became of each rank instead, also of one that was killed.
"""

from __future__ import annotations

import atexit
import importlib
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, BinaryIO

TORCH = (
    "torch",
    "torch.distributed.tensor.parallel",
    "torch.distributed.checkpoint.state_dict",
    "torch.distributed.fsdp",
    "torch._dynamo",  # which optimizers and fully_shard import when they are first used
    "anyckpt.torch.loading",
    "anyckpt.torch.saving",
    "pytest",
)
"""What is imported before ranks are forked."""

_SECONDS = 60.0
_SERVER = (
    "import sys; sys.path[:] = sys.argv[1].split(':'); from tests.training import ranks; ranks.serve(sys.argv[2:])"
)


@dataclass(frozen=True)
class Outcome:
    """What became of a rank.

    Attributes:
        value: what the function returned, None if it did not.
        error: what it raised, None if it did not.
        told: the error's traceback.
        status: of the process: 0, or the negative number of the signal that ended it.
        output: what it printed.
    """

    value: Any = None
    error: BaseException | None = None
    told: str = ""
    status: int = 0
    output: str = ""


def on_ranks(world: int, function: Callable[..., Any], *arguments: Any, imported: Sequence[str] = ()) -> list[Any]:
    """What a function returns on each rank.

    Args:
        world: number of ranks.
        function: at the top of a module.
        arguments: picklable, the same for all ranks.
        imported: modules besides torch that are worth importing once for all tests that ask for the same ones.
    """
    found = outcomes(world, function, *arguments, imported=imported)
    failed = [
        f"rank {rank}: {one.told or one.status}\n{one.output}"
        for rank, one in enumerate(found)
        if one.told or one.status
    ]
    assert not failed, "\n".join(failed)
    return [one.value for one in found]


def outcomes(
    world: int, function: Callable[..., Any], *arguments: Any, imported: Sequence[str] = (), seconds: float = _SECONDS
) -> list[Outcome]:
    """What becomes of each rank of a function; a rank that is not done after so many seconds is killed."""
    name = f"{function.__module__}:{function.__qualname__}"
    return _server((*TORCH, *imported)).ask((world, name, arguments, seconds))


# -- the process that imports torch --------------------------------------------------------------------------

_servers: dict[tuple[str, ...], _Server] = {}


def _server(modules: tuple[str, ...]) -> _Server:
    found = _servers.get(modules)
    if found is None or not found.is_alive():
        found = _servers[modules] = _Server(modules)
    return found


class _Server:
    def __init__(self, modules: tuple[str, ...]) -> None:
        quiet = {"OMP_NUM_THREADS": "1", "TORCH_CPP_LOG_LEVEL": "ERROR"}
        self._process = subprocess.Popen(
            [sys.executable, "-c", _SERVER, ":".join(sys.path), *modules],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, **quiet},
            cwd=Path(__file__).parents[2],
        )
        atexit.register(self._process.kill)

    def is_alive(self) -> bool:
        return self._process.poll() is None

    def ask(self, request: Any) -> list[Outcome]:
        assert self._process.stdin is not None and self._process.stdout is not None
        _send(self._process.stdin, request)
        found: list[Outcome] | str = _receive(self._process.stdout)
        assert not isinstance(found, str), found
        return found


def _send(stream: BinaryIO, value: Any) -> None:
    data = pickle.dumps(value)
    stream.write(len(data).to_bytes(8, "little") + data)
    stream.flush()


def _receive(stream: BinaryIO) -> Any:
    head = stream.read(8)
    if len(head) < 8:
        raise EOFError
    return pickle.loads(stream.read(int.from_bytes(head, "little")))


def serve(modules: Sequence[str]) -> None:
    """Be the process from which ranks are forked, as long as somebody asks."""
    requests, answers = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # nothing that is printed gets among the answers
    for module in modules:
        importlib.import_module(module)
    while True:
        try:
            world, name, arguments, seconds = _receive(requests)
        except EOFError:
            return
        try:
            answer: Any = _run(world, _function(name), arguments, seconds)
        except Exception:
            answer = traceback.format_exc()
        _send(answers, answer)


def _function(name: str) -> Callable[..., Any]:
    module, _, inner = name.partition(":")
    found: Any = importlib.import_module(module)
    for part in inner.split("."):
        found = getattr(found, part)
    return found


def _run(world: int, function: Callable[..., Any], arguments: Any, seconds: float) -> list[Outcome]:
    with tempfile.TemporaryDirectory(prefix="anyckpt-ranks-") as folder:
        children: list[int] = []
        for rank in range(world):
            child = os.fork()
            if child == 0:
                _be(rank, world, function, arguments, folder, seconds)
            children.append(child)
        statuses = _wait(children, time.monotonic() + seconds)
        return [_outcome(folder, rank, status) for rank, status in enumerate(statuses)]


def _wait(children: Sequence[int], deadline: float) -> list[int]:
    statuses: dict[int, int] = {}
    while len(statuses) < len(children):
        for child in children:
            if child not in statuses:
                done, status = os.waitpid(child, os.WNOHANG)
                if done:
                    statuses[child] = os.waitstatus_to_exitcode(status)
        if time.monotonic() > deadline:
            for child in children:
                if child not in statuses:
                    os.kill(child, signal.SIGKILL)
        time.sleep(0.002)
    return [statuses[child] for child in children]


def _outcome(folder: str, rank: int, status: int) -> Outcome:
    output = Path(folder, f"output{rank}").read_text(errors="replace")
    try:
        value, error, told = pickle.loads(Path(folder, f"result{rank}").read_bytes())
    except FileNotFoundError:
        value, error, told = None, None, ""
    return Outcome(value, error, told, status, output)


def _be(rank: int, world: int, function: Callable[..., Any], arguments: Any, folder: str, seconds: float) -> None:
    """The life of a rank; does not return."""
    status = 1
    try:
        output = os.open(os.path.join(folder, f"output{rank}"), os.O_WRONLY | os.O_CREAT, 0o644)
        os.dup2(output, 1)
        os.dup2(output, 2)
        os.close(0)
        _take_part(rank, world, function, arguments, folder, seconds)
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        for left in multiprocessing.active_children():  # Megatron-Core's manager, which only an exit would end
            left.kill()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _take_part(
    rank: int, world: int, function: Callable[..., Any], arguments: Any, folder: str, seconds: float
) -> None:
    import torch
    import torch.distributed as dist

    torch.manual_seed(0)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(world))
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/rendezvous",
        rank=rank,
        world_size=world,
        timeout=timedelta(seconds=seconds / 2),
    )
    result: tuple[Any, BaseException | None, str]
    try:
        result = function(*arguments), None, ""
    except Exception as error:
        result = None, error, traceback.format_exc()
    try:
        data = pickle.dumps(result)
        pickle.loads(data)
    except Exception:
        data = pickle.dumps((None, None, result[2] or f"the result cannot be pickled: {result[0]!r:.200}"))
    Path(folder, f"result{rank}.new").write_bytes(data)
    os.rename(Path(folder, f"result{rank}.new"), Path(folder, f"result{rank}"))
    with suppress(RuntimeError):  # of a rank that is gone
        dist.barrier()
        dist.destroy_process_group()
