"""The Python API: what ``import anyckpt`` gives, and what it costs."""

from __future__ import annotations

import gc
import json
import pickle
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import numpy as np
import pytest

import anyckpt
from anyckpt.checkpoint import Checkpoint
from anyckpt.pickling import load
from anyckpt.storage import read_count
from anyckpt.tensor import from_array
from tests.support import fixture_path, sha256_of

LLAMA = "families/llama/hf"

FORBIDDEN = """
import sys

FRAMEWORKS = {"torch", "megatron", "nemo", "transformers", "lightning", "omegaconf", "safetensors"}

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in FRAMEWORKS:
            raise ImportError(f"the core must not import {name}")

sys.meta_path.insert(0, Refuse())
"""


def python(code: str, *arguments: str | Path) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_importing_the_package_imports_nothing_else() -> None:
    heavy = "('numpy', 'click', 'torch', 'rich', 'yaml')"
    assert python(f"import sys; import anyckpt; print([m for m in {heavy} if m in sys.modules])") == "[]\n"


def test_every_public_name_is_there() -> None:
    for name in anyckpt.__all__:
        assert getattr(anyckpt, name) is not None
        assert name in dir(anyckpt)
    assert anyckpt.__version__ == metadata.version("anyckpt")
    with pytest.raises(AttributeError, match="nonsense"):
        anyckpt.nonsense  # noqa: B018


def test_operations_are_functions_and_not_the_modules_of_their_names() -> None:
    for name in ("open", "convert", "diff", "inspect", "verify", "unpack", "pack", "edit"):
        assert callable(getattr(anyckpt, name)), name


def test_every_error_has_one_base() -> None:
    for name in ("FormatError", "UnsafeError", "MappingError", "OutputError", "UsageError"):
        assert issubclass(getattr(anyckpt, name), anyckpt.AnyckptError)


def test_opening_and_slicing_reads_only_the_bytes_of_the_slice() -> None:
    checkpoint = anyckpt.open(fixture_path(LLAMA))
    tensor = checkpoint.tensors["model.embed_tokens.weight"]
    before = read_count.bytes_read()
    rows = tensor[3:5].numpy()
    assert rows.shape == (2, 64)
    assert read_count.bytes_read() - before == rows.nbytes
    assert np.array_equal(rows, tensor.numpy()[3:5])


def test_nothing_of_the_core_imports_a_framework(tmp_path: Path) -> None:
    code = f"""{FORBIDDEN}
import anyckpt
source, folder = sys.argv[1:]
for name in ("torch", "safetensors", "lightning", "dcp", "megatron-core", "nemo", "nemo2", "hf"):
    anyckpt.convert(source, f"{{folder}}/{{name}}", to=name)
    anyckpt.inspect(f"{{folder}}/{{name}}", stats=True)
    assert anyckpt.verify(f"{{folder}}/{{name}}", deep=True)
    assert not anyckpt.diff(source, f"{{folder}}/{{name}}", weights_only=True)
"""
    python(code, fixture_path(LLAMA), tmp_path)


def test_the_repr_says_what_it_is() -> None:
    checkpoint = anyckpt.open(fixture_path(LLAMA))
    assert "format='hf', 21 tensors, 74,944 parameters" in repr(checkpoint)
    assert repr(checkpoint.tensors["model.norm.weight"]) == "LazyTensor(float32, shape=(64,), 256 bytes)"


def test_notebook_html_lists_tensors() -> None:
    checkpoint = anyckpt.open(fixture_path(LLAMA))
    html = checkpoint._repr_html_()
    assert "<td" in html
    assert "model.embed_tokens.weight" in html
    assert "[151, 64]" in html
    assert "float32" in checkpoint.tensors["model.norm.weight"]._repr_html_()
    assert "llama" in anyckpt.inspect(checkpoint)._repr_html_()


def test_notebook_html_escapes_names_from_files() -> None:
    evil = "<script>alert(1)</script>"
    checkpoint = Checkpoint(evil, "hf", {evil: from_array(np.zeros(2))}, warnings=[evil])
    assert "<script" not in checkpoint._repr_html_()
    assert "<script" not in anyckpt.inspect(checkpoint)._repr_html_()


def test_notebook_html_of_a_large_checkpoint_stays_small() -> None:
    tensor = from_array(np.zeros(2))
    checkpoint = Checkpoint("large", "dcp", {f"layer.{i}": tensor for i in range(10_000)})
    html = checkpoint._repr_html_()
    assert len(html) < 20_000
    assert "more" in html


def test_an_open_checkpoint_can_be_inspected_compared_and_verified() -> None:
    checkpoint = anyckpt.open(fixture_path(LLAMA))
    found = anyckpt.inspect(checkpoint, tensors="model.norm.weight", digest=True)
    assert found.tensors is not None
    assert found.tensors[0].sha256 == sha256_of(checkpoint.tensors["model.norm.weight"])
    assert not anyckpt.diff(checkpoint, fixture_path(LLAMA))
    assert anyckpt.verify(checkpoint)
    json.dumps(found.to_json(), allow_nan=False)


def test_absurd_counters_from_a_file_are_not_shown() -> None:
    training = anyckpt.TrainingState(step=10**5000, epoch=3)
    found = anyckpt.inspect(Checkpoint("x", "torch", {}, training=training))
    assert (found.step, found.epoch) == (None, 3)
    json.dumps(found.to_json())


def test_the_collector_of_a_program_is_left_to_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def touched(*arguments: object) -> None:
        raise AssertionError("the whole process's collector was switched")

    for name in ("disable", "enable", "freeze", "set_threshold"):
        monkeypatch.setattr(gc, name, touched)
    for target in ("megatron-core", "hf", "nemo"):
        anyckpt.convert(fixture_path(LLAMA), tmp_path / target, to=target)
    assert load(pickle.dumps([[number] for number in range(300_000)], 4), name="t")[7] == [7]
