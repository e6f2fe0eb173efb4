"""Training jobs that are killed at random moments: ``python tools/soak_training.py --rounds 50``; needs torch.

Each round two ranks (processes of one gloo group) resume from ``latest()`` and save step after step into one folder,
until something happens to them: both are killed (SIGKILL), one is, the process that writes for one is, or the disk is
full for a while.  Then ``latest()`` must be a whole checkpoint whose every element is of one step that was saved, not
older than the one of the round before; every other visible checkpoint must be whole, too; no process may be left; and
what ranks could not do they must have said by an error of anyckpt, none of them hanging.

The disk is a tmpfs of 64 MB in a namespace of its own where the system allows that (``unshare``); elsewhere a full disk
is played by a limit on the size of files of one writer.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch
import torch.distributed as dist

import anyckpt
from anyckpt.errors import AnyckptError
from anyckpt.storage.local_file import close_open_files
from anyckpt.torch import Retention, Saver, latest

FAULTS = ("trainer", "rank", "writer", "disk", "nothing")
_DISK_MB = 64
_ROWS = 60_000  # of 16 float32: 3.8 MB
_STEPS = 12
_SECONDS = 90.0
_OWN_DISK = "ANYCKPT_SOAK_DISK"


# -- a rank ----------------------------------------------------------------------------------------------------


def state_of(step: int, world: int) -> dict[str, Any]:
    """A state whose every element is the step: rows over the ranks, and what all have alike."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Shard

    mesh = init_device_mesh("cpu", (world,))
    local = torch.full((_ROWS // world, 16), float(step))
    return {
        "model": {"w": DTensor.from_local(local, mesh, [Shard(0)]), "alike": torch.full((1000,), float(step))},
        "step": step,
    }


def train(rank: int, world: int, folder: str, notes: int, seed: int) -> None:
    """Resume, and save until the end; what happens is told by lines of JSON."""

    def tell(**facts: Any) -> None:
        os.write(notes, (json.dumps({"rank": rank, **facts}) + "\n").encode())

    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/.rendezvous",
        rank=rank,
        world_size=world,
        timeout=timedelta(seconds=_SECONDS / 3),
    )
    moments = random.Random(seed)
    try:
        saver = Saver(folder, keep=Retention(last=2, forever_every=200), timeout=_SECONDS / 3)
        tell(writer=saver._writer.pid)
        newest = saver.latest()
        begun = step_of(newest) if newest else 0
        for step in range(begun + 1, begun + 1 + _STEPS):
            tell(step=step)
            state = state_of(step, world)
            try:
                saver.save(state, step)
            except AnyckptError as error:
                tell(error=str(error))
                if "did not come" in str(error) or "rank" not in str(error):
                    raise
            tell(writer=saver._writer.pid)
            for tensor in state["model"].values():
                getattr(tensor, "_local_tensor", tensor).fill_(-1)
            time.sleep(moments.choice((0, 0, 0.01, 0.03)))
        saver.close()
    except AnyckptError as error:
        tell(error=str(error), end=True)


def step_of(path: str) -> int:
    """The step of a whole checkpoint, of which every element must be.

    Raises:
        AssertionError: it is not whole, or of two steps.
    """
    checked = anyckpt.verify(path)
    assert checked, f"{path}: {[problem.problem for problem in checked.problems]}"
    found = anyckpt.open(path)
    values = {float(value) for name in found for value in np.unique(np.asarray(found[name]))}
    close_open_files()  # what is deleted shall leave its place on the disk
    assert values == {float(found.training.step or 0)}, f"{path}: step {found.training.step}, elements {values}"
    return int(found.training.step or 0)


# -- a round ---------------------------------------------------------------------------------------------------


class Round:
    """A job of some ranks, and what happens to it."""

    def __init__(self, folder: str, world: int, fault: str, chance: random.Random) -> None:
        self.folder, self.world, self.fault, self.chance = folder, world, fault, chance
        self.ranks: dict[int, int] = {}
        self.writers: dict[int, int] = {}
        self.every_writer: set[int] = set()
        self.steps: set[int] = set()
        self.errors: list[str] = []
        self._text = b""

    def run(self) -> None:
        """Begin, wait for a random moment, do it, and wait for the end.

        Raises:
            AssertionError: a rank hangs, or ends otherwise than it should.
        """
        reading, writing = os.pipe()
        with suppress(FileNotFoundError):
            os.unlink(f"{self.folder}/.rendezvous")
        for rank in range(self.world):
            seed = self.chance.randrange(1 << 30)
            child = os.fork()
            if child == 0:
                status = 1
                try:
                    os.close(reading)
                    train(rank, self.world, self.folder, writing, seed)
                    status = 0
                except BaseException as error:
                    os.write(writing, (json.dumps({"rank": rank, "error": repr(error), "bad": True}) + "\n").encode())
                finally:
                    os._exit(status)
            self.ranks[child] = rank
        os.close(writing)
        os.set_blocking(reading, False)
        try:
            begun = self.chance.randrange(1, _STEPS)
            self._until(reading, lambda: len(self.writers) == self.world and len(self.steps) >= begun)
            moment = time.monotonic() + self.chance.uniform(0, 0.03)
            self._until(reading, lambda: time.monotonic() > moment)
            self._happen(reading)
            self._until(reading, lambda: not self.ranks)
        finally:
            for pid in self.ranks:
                os.kill(pid, signal.SIGKILL)
            os.close(reading)
        until = time.monotonic() + 20
        while any(is_alive(pid) for pid in self.every_writer):
            assert time.monotonic() < until, f"writers are left: {self.every_writer}"
            time.sleep(0.01)

    def _happen(self, reading: int) -> None:
        if self.fault == "trainer":
            for pid in list(self.ranks):
                os.kill(pid, signal.SIGKILL)
        elif self.fault == "rank" and self.ranks:
            os.kill(self.chance.choice(list(self.ranks)), signal.SIGKILL)
        elif self.fault == "writer":
            with suppress(ProcessLookupError):
                os.kill(self.chance.choice(list(self.writers.values())), signal.SIGKILL)
        elif self.fault == "disk":
            self._fill(reading)

    def _fill(self, reading: int) -> None:
        moment = time.monotonic() + self.chance.uniform(0.05, 0.5)
        if os.environ.get(_OWN_DISK):
            filler = os.path.join(self.folder, ".filler")
            room = os.statvfs(self.folder)
            leave = self.chance.randrange(1 << 20)
            descriptor = os.open(filler, os.O_WRONLY | os.O_CREAT, 0o600)
            with suppress(OSError):  # a writer was quicker: the disk is as full as it gets
                os.posix_fallocate(descriptor, 0, max(1, room.f_bavail * room.f_frsize - leave))
            os.close(descriptor)
            self._until(reading, lambda: time.monotonic() > moment or not self.ranks)
            os.unlink(filler)
        else:
            with suppress(ProcessLookupError):
                writer = self.chance.choice(list(self.writers.values()))
                _, hard = resource.prlimit(writer, resource.RLIMIT_FSIZE)
                resource.prlimit(writer, resource.RLIMIT_FSIZE, (self.chance.randrange(1 << 20), hard))
                self._until(reading, lambda: time.monotonic() > moment or not self.ranks)
                resource.prlimit(writer, resource.RLIMIT_FSIZE, (hard, hard))

    def _until(self, reading: int, condition: Any) -> None:
        """Listen to the ranks until something is so."""
        until = time.monotonic() + _SECONDS
        while True:
            self._listen(reading)
            for pid in list(self.ranks):
                done, status = os.waitpid(pid, os.WNOHANG)
                if done:
                    code = os.waitstatus_to_exitcode(status)
                    assert code in (0, -signal.SIGKILL), f"rank {self.ranks[pid]} ended with {code}: {self.errors}"
                    del self.ranks[pid]
            if condition() or (not self.ranks and self._listen(reading)):
                return
            assert time.monotonic() < until, f"ranks {sorted(self.ranks.values())} hang: {self.errors}"
            time.sleep(0.002)

    def _listen(self, reading: int) -> bool:
        """Take in what ranks say; whether all have said all."""
        ended = False
        with suppress(BlockingIOError):
            while True:
                data = os.read(reading, 1 << 16)
                if not data:
                    ended = True
                    break
                self._text += data
        *lines, self._text = self._text.split(b"\n")
        for line in lines:
            facts = json.loads(line)
            if facts.get("writer"):
                self.writers[facts["rank"]] = facts["writer"]
                self.every_writer.add(facts["writer"])
            if "step" in facts:
                self.steps.add(facts["step"])
            if "error" in facts:
                self.errors.append(facts["error"])
        return ended


def is_alive(pid: int) -> bool:
    """Whether a process runs; one that has ended and was not waited for does not."""
    try:
        with open(f"/proc/{pid}/stat", encoding="ascii", errors="replace") as status:
            return status.read().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def soak(folder: str, rounds: int, seed: int, world: int = 2, *, quiet: bool = False) -> Counter[str]:
    """Go through rounds in one folder; how many saw errors, by what happened.

    Raises:
        AssertionError: something that must not be.
    """
    chance = random.Random(seed)
    saved: set[int] = set()
    before = 0
    seen: Counter[str] = Counter()
    for number in range(rounds):
        fault = FAULTS[number % len(FAULTS)]
        one = Round(folder, world, fault, chance)
        one.run()
        saved |= one.steps
        newest = latest(folder)
        step = 0 if newest is None else step_of(newest)
        assert step in saved | {0}, f"step {step} was never saved"
        assert step >= before, f"the newest was of step {before}, and is of step {step}"
        for name in os.listdir(folder):
            if not name.startswith(".") and not os.path.islink(os.path.join(folder, name)):
                assert step_of(os.path.join(folder, name)) in saved
        before = step
        seen[fault] += bool(one.errors)
        if not quiet:
            told = one.errors[0][:140] if one.errors else ""
            print(f"round {number + 1:3} {fault:8} newest step {step:4}  {told}", flush=True)
    last = Round(folder, world, "nothing", chance)
    last.run()
    hidden = [name for name in os.listdir(folder) if name.endswith(("-partial", "-deleted"))]
    assert hidden == [], f"left: {hidden}"
    assert latest(folder) is not None
    return seen


# -- a disk that can be filled ---------------------------------------------------------------------------------


def on_a_small_disk(arguments: Sequence[str]) -> int | None:
    """Run this program again on a tmpfs of its own; None if the system does not allow that."""
    if os.environ.get(_OWN_DISK) or shutil.which("unshare") is None:
        return None
    with tempfile.TemporaryDirectory(prefix="anyckpt-soak-") as folder:
        namespace = ["unshare", "--user", "--map-root-user", "--mount", "--"]
        mount = f"mount -t tmpfs -o size={_DISK_MB}m anyckpt-soak {folder}"
        if subprocess.run([*namespace, "sh", "-c", mount], capture_output=True).returncode:
            return None
        again = [sys.executable, str(Path(__file__).resolve()), *arguments]
        return subprocess.call(
            [*namespace, "sh", "-c", f'{mount} && exec "$@"', "sh", *again], env={**os.environ, _OWN_DISK: folder}
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=50)
    parser.add_argument("--seed", type=int, default=None, help="of what happens when; printed if not given")
    parser.add_argument("--ranks", type=int, default=2)
    options = parser.parse_args()
    seed = random.randrange(1 << 20) if options.seed is None else options.seed
    if options.seed is None:
        sys.argv += ["--seed", str(seed)]
    status = on_a_small_disk(sys.argv[1:])
    if status is not None:
        sys.exit(status)
    own = os.environ.get(_OWN_DISK)
    print(f"seed {seed}, {'a full disk' if own else 'a limit on files'}", flush=True)
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="anyckpt-soak-", dir=own) as folder:
        seen = soak(folder, options.rounds, seed, options.ranks)
    told = ", ".join(f"{fault} {count}" for fault, count in sorted(seen.items()) if count)
    print(f"{options.rounds} rounds in {time.monotonic() - started:.0f} s: latest() was whole after each")
    print(f"rounds in which ranks were told of an error: {told or 'none'}")


if __name__ == "__main__":
    main()
