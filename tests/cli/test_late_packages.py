"""A package that is imported when something of it is first used."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

BEGIN = "import sys\nfrom anyckpt.cli.late_packages import later\nlater('slow')\nimport slow\n"
SLOW = """
import time
before = sorted(name for name in globals() if not name.startswith('__'))
time.sleep(0.2)
from slow import inner
from slow.inner import deep
value = deep + 1

def __getattr__(name):
    if name == "made":
        return 7
    raise AttributeError(name)
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "slow").mkdir()
    (tmp_path / "slow" / "__init__.py").write_text(SLOW)
    (tmp_path / "slow" / "inner.py").write_text("deep = 1\n")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "__init__.py").write_text("raise ValueError('no')\n")
    return tmp_path


def run(folder: Path, code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, check=True)
    return done.stdout.strip()


@pytest.mark.parametrize(
    "use",
    [
        "found = slow.value",
        "from slow import value as found",
        "import slow.inner; found = slow.inner.deep + 1",
        "from slow.inner import deep; found = deep + 1",
        "found = slow.made - 5",
        "found = getattr(slow, 'none', 2)",
    ],
)
def test_it_is_imported_by_its_first_use(folder: Path, use: str) -> None:
    code = f"{BEGIN}assert 'slow.inner' not in sys.modules\n{use}\nassert 'slow.inner' in sys.modules\nprint(found)"
    assert run(folder, code) == "2"


def test_then_it_is_as_any_other(folder: Path) -> None:
    told = run(folder, BEGIN + "slow.value\nprint(type(slow), slow is sys.modules['slow'], slow.before, slow.__name__)")
    assert told == "<class 'module'> True ['time'] slow"


def test_threads_wait_for_the_first(folder: Path) -> None:
    code = (
        "from concurrent.futures import ThreadPoolExecutor\n"
        "with ThreadPoolExecutor(8) as pool:\n"
        "    print(sum(pool.map(lambda number: slow.value + slow.made, range(8))))"
    )
    assert run(folder, BEGIN + code) == "72"


def test_one_that_is_there_none_and_one_that_fails(folder: Path) -> None:
    code = (
        "import json\nlater('json')\nassert type(json).__name__ == 'module'\nlater('nowhere')\nlater('broken')\n"
        "assert 'nowhere' not in sys.modules\nimport broken\n"
        "for _ in range(2):\n    try:\n        broken.x\n    except ValueError as error:\n        print(error)"
    )
    assert run(folder, BEGIN + code) == "no\nno"
