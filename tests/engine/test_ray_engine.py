"""``--engine ray`` where there is no Ray, and what it cannot be asked with."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tests.support import fixture_path

import anyckpt
from anyckpt.engine import ray_engine
from anyckpt.engine.ray_engine import Size
from anyckpt.errors import UsageError

LLAMA = fixture_path("families/llama/hf")


def test_without_ray_it_says_how_to_get_it(anyckpt_without_ray: None, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"pip install 'anyckpt\[ray\]'"):
        anyckpt.convert(LLAMA, tmp_path / "out", to="hf", engine="ray")
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def anyckpt_without_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"engine": "dask"}, "no such engine"),
        ({"engine": "ray", "share": "1/2"}, "makes shares of its own"),
        ({"engine": "ray", "to": "nemo", "gzip": True}, "--engine means nothing with --gzip"),
    ],
)
def test_what_it_cannot_be_asked_with(options: dict[str, Any], text: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=text):
        anyckpt.convert(LLAMA, tmp_path / "out", **{"to": "hf", **options})


def test_ray_is_imported_for_nothing_else(tmp_path: Path) -> None:
    program = "import sys, anyckpt; anyckpt.convert(*sys.argv[1:], to='hf'); print('ray' in sys.modules)"
    command = [sys.executable, "-c", program, str(LLAMA), str(tmp_path / "out")]
    assert subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout == "False\n"


class _Ray:
    """What is asked of Ray about a cluster."""

    def __init__(self, *processors: int) -> None:
        self._processors = processors

    def nodes(self) -> list[dict[str, Any]]:
        return [{"Alive": True, "Resources": {"CPU": float(count)} if count else {}} for count in self._processors]


def test_how_many_tasks() -> None:
    assert ray_engine.size_of(_Ray(0, 16, 64), None, 8) == Size(8, 10)
    assert ray_engine.size_of(_Ray(2, 4), None, 8) == Size(2, 3)
    assert ray_engine.size_of(_Ray(2, 4), 4, 8) == Size(4, 1)
    with pytest.raises(UsageError, match="--workers up to 4"):
        ray_engine.size_of(_Ray(2, 4), 5, 8)
    with pytest.raises(UsageError, match="no processors"):
        ray_engine.size_of(_Ray(0), None, 8)


def test_a_node_of_another_version() -> None:
    assert ray_engine._of_one_version(anyckpt.__version__, divmod, 7, 2) == (3, 1)
    with pytest.raises(
        UsageError, match=rf"another version of anyckpt \(expected 0.0.1, found {anyckpt.__version__}\)"
    ):
        ray_engine._of_one_version("0.0.1", divmod, 7, 2)
