"""Fuzzes the readers, and the conversion of what was read, for as long as one likes.

    python tools/fuzz.py [--seconds 180] [--seed-checkpoint NAME ...] [--engine atheris|random] [--keep FOLDER]

The targets are those of ``tests/fuzz``: small checkpoints of every format, mutated in their structure.  ``atheris``
(coverage-guided, ``pip install atheris``) chooses what to change, or else a random generator.  What ends in anything
but a result or an ``AnyckptError`` is written to FOLDER, and the exit code is 1.  docs/peer_suites.md has the last
outcome.
"""

from __future__ import annotations

import argparse
import collections
import hashlib
import importlib
import pkgutil
import random
import sys
import time
import traceback
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "src")]


class Random:
    def __init__(self, number: int) -> None:
        self._random = random.Random(number)

    def number(self, low: int, high: int) -> int:
        return self._random.randint(low, high)


class Provided:
    """Choices out of atheris's bytes."""

    def __init__(self, provider: Any) -> None:
        self._provider = provider

    def number(self, low: int, high: int) -> int:
        return int(self._provider.ConsumeIntInRange(low, high))


class Fuzzing:
    """Runs examples until the time is over, and keeps what went wrong, once for each place."""

    def __init__(self, names: list[str], keep: Path, seconds: float) -> None:
        self.names, self.keep, self.end = names, keep, time.monotonic() + seconds
        self.runs: collections.Counter[str] = collections.Counter()
        self.worked = 0
        self.defects: dict[str, str] = {}

    def one(self, choices: Any) -> None:
        from tests.fuzz.exercise import exercise
        from tests.fuzz.mutate import mutated
        from tests.fuzz.seeds import seed, written

        name = self.names[choices.number(0, len(self.names) - 1)]
        tree = mutated(seed(name), choices)
        self.runs[name] += 1
        try:
            self.worked += exercise(tree) > 0
        except Exception as error:
            last = traceback.extract_tb(error.__traceback__)[-1]
            place = f"{type(error).__name__} in {Path(last.filename).name}:{last.lineno} {last.name}"
            if place not in self.defects:
                folder = self.keep / hashlib.sha256(place.encode()).hexdigest()[:12]
                folder.mkdir(parents=True, exist_ok=True)
                if not any(folder.iterdir()):
                    written(tree, folder, lambda path: ".." not in path)
                    (folder / "traceback.txt").write_text(traceback.format_exc(), errors="backslashreplace")
                self.defects[place] = f"{name}: {str(error)[:200]!r}, kept in {folder}"

    def report(self) -> int:
        print(f"{sum(self.runs.values())} checkpoints, {self.worked} of them read: {dict(self.runs)}")
        for place, where in self.defects.items():
            print(f"defect: {place}: {where}")
        sys.stdout.flush()
        return int(bool(self.defects))


def main() -> int:
    parser = argparse.ArgumentParser(description="Fuzz the readers and convert.")
    parser.add_argument("--seconds", type=float, default=180)
    parser.add_argument("--engine", choices=["atheris", "random"], default="atheris")
    parser.add_argument(
        "--seed-checkpoint", nargs="+", metavar="NAME", help="names in tests/fuzz/seeds.py; all if not given"
    )
    parser.add_argument("--keep", type=Path, default=Path("fuzz-defects"))
    parser.add_argument("--start", type=int, default=0, help="first number of the random generator")
    given = parser.parse_args()
    if given.engine == "atheris":
        import atheris

        with atheris.instrument_imports():
            package = importlib.import_module("anyckpt")
            for module in pkgutil.walk_packages(package.__path__, "anyckpt."):
                if not module.name.endswith("__main__"):
                    importlib.import_module(module.name)
    from tests.fuzz.seeds import SEEDS

    fuzzing = Fuzzing(given.seed_checkpoint or list(SEEDS), given.keep, given.seconds)
    if given.engine == "random":
        number = given.start
        while time.monotonic() < fuzzing.end:
            fuzzing.one(Random(number))
            number += 1
        return fuzzing.report()

    def target(data: bytes) -> None:
        if time.monotonic() > fuzzing.end:
            import os

            os._exit(fuzzing.report())
        fuzzing.one(Provided(atheris.FuzzedDataProvider(data)))

    atheris.Setup([sys.argv[0], "-max_len=512", "-len_control=0", "-rss_limit_mb=0"], target)
    atheris.Fuzz()
    return fuzzing.report()


if __name__ == "__main__":
    sys.exit(main())
