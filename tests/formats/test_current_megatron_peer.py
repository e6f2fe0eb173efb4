"""The newest Megatron-Core loads what we write, and Megatron-Bridge's newest classes have the fields that it has."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")

from tests import current_megatron
from tests.models.proofs import samples
from tests.support import fixture_path

import anyckpt
from anyckpt.config.megatron_bridge import Facts, run_config_of
from anyckpt.formats import registry
from anyckpt.models import render_config
from anyckpt.operations.steps.layout_request import LayoutRequest

pytestmark = pytest.mark.peer

LEFT_OUT = {"llama-nemotron": {"scale_factor", "low_freq_factor", "high_freq_factor", "old_context_len"}}
"""Fields of Megatron-Bridge 0.3's class alone, which a later one drops with a warning."""
CASES = [("llama", None), ("llama", "0.19"), ("llama_tied_bf16", "0.19"), ("mixtral", "0.19")]


def in_megatron(jobs: list[dict[str, Any]], folder: Path) -> list[dict[str, Any]]:
    """What came of each job in one process of the newest Megatron-Core."""
    (folder / "jobs.json").write_text(json.dumps(jobs))
    command = [sys.executable, "-m", "tests.formats.current_megatron_worker", "0", "1", folder / "store"]
    done = subprocess.run(
        [*map(str, command), str(folder / "jobs.json"), str(folder / "out.json")],
        env=current_megatron.environment(), cwd=current_megatron.ROOT, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    results: list[dict[str, Any]] = json.loads((folder / "out.json").read_text())
    assert not [result["error"] for result in results if "error" in result]
    return results


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str | None], dict[str, Any]]:
    folder, jobs = tmp_path_factory.mktemp("current"), []
    for number, (family, version) in enumerate(CASES):
        layout = LayoutRequest(transformer_impl="local", megatron_version=version)
        out = folder / str(number)
        anyckpt.convert(fixture_path(f"families/{family}/hf"), out, to="megatron-core", layout=layout)
        tokens = np.load(fixture_path(f"families/{family}/expected.npz"))["input_ids"].tolist()
        model = {**registry.read(out).config, "params_dtype": "torch.float32"}  # to compute as the expected values were
        jobs.append({"model": model, "load": str(out), "tokens": tokens})
    return dict(zip(CASES, in_megatron(jobs, folder), strict=True))


@pytest.mark.parametrize("case", CASES)
def test_it_loads_and_computes_the_same(case: tuple[str, str | None], loaded: Any) -> None:
    """With every key that either side has, wherever the common state is; outputs are the original model's."""
    result = loaded[case]
    assert result["missing"] == [] and result["unexpected"] == []
    assert result["common"]["checkpoint_version"] == "3.0" and "num_layers" in result["common"]["args"]
    expected = np.load(fixture_path(f"families/{case[0]}/expected.npz"))["logits"]
    found = np.array(result["logits"])[..., : expected.shape[-1]]
    assert np.abs(found - expected).max() < 2e-5


def classes_of(folder: Path) -> dict[str, tuple[list[str], set[str]]]:
    """Every class in the sources under a folder: its bases, and the names of the fields that its body has."""
    found = {}
    for path in sorted(folder.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ClassDef):
                bases = [base.id for base in node.bases if isinstance(base, ast.Name)]
                own = {item.target.id for item in node.body if isinstance(item, ast.AnnAssign)
                       and isinstance(item.target, ast.Name)}  # fmt: skip
                found[node.name] = (bases, own)
    return found


def test_bridges_classes_have_the_fields_that_are_written() -> None:
    """Read in their sources: importing them takes Transformer Engine and more."""
    current_megatron.environment()
    package = current_megatron.FOLDER / "megatron"
    core, bridge = classes_of(package / "core"), classes_of(package / "bridge" / "models")

    def fields(name: str, classes: dict[str, tuple[list[str], set[str]]]) -> Iterator[str]:
        if name.startswith("MCore"):  # as Megatron-Bridge imports those of Megatron-Core
            name, classes = name.removeprefix("MCore"), core
        bases, own = classes.get(name, ([], set()))
        yield from own
        for base in bases:
            yield from fields(base, classes if base in classes else core)

    for name in ("llama", "llama31_ropescale", "mixtral", "qwen3_moe", "deepseek_v3", "gpt_oss", "gemma", "gemma2",
                 "gemma3", "nemotron_h", "llama-nemotron"):  # fmt: skip
        model = samples()[name].open()[1]
        arguments = render_config(model, "megatron-args")
        written = run_config_of(arguments, model.config.rows, Facts("bfloat16", False, False))["model"]
        module, _, kind = written.pop("_target_").rpartition(".")
        file = current_megatron.FOLDER / (module.replace(".", "/") + ".py")
        assert f"class {kind}(" in file.read_text(), name
        assert set(written) - set(fields(kind, bridge)) <= LEFT_OUT.get(name, set()), name
