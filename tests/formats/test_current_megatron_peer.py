"""The newest Megatron-Core loads what we write, and Megatron-Bridge's newest classes have the fields that it has."""

from __future__ import annotations

import ast
import contextlib
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from tests import current_megatron  # noqa: E402
from tests.models.proofs import samples  # noqa: E402
from tests.models.test_mtp import checkpoint as with_further_predictions  # noqa: E402
from tests.support import expected_of, fixture_path, write_plan  # noqa: E402

import anyckpt  # noqa: E402
from anyckpt.checkpoint import Checkpoint  # noqa: E402
from anyckpt.config.hybrid import hybrid_arguments  # noqa: E402
from anyckpt.config.megatron_bridge import Facts, run_config_of  # noqa: E402
from anyckpt.config.megatron_bridge_providers import HYBRID, provider_of  # noqa: E402
from anyckpt.errors import MappingError  # noqa: E402
from anyckpt.formats import registry  # noqa: E402
from anyckpt.formats.hf import FORMAT  # noqa: E402
from anyckpt.formats.registry import WriteOptions  # noqa: E402
from anyckpt.models import render_config  # noqa: E402
from anyckpt.operations.steps.layout_request import LayoutRequest  # noqa: E402

pytestmark = pytest.mark.peer

LEFT_OUT = {"llama-nemotron": {"scale_factor", "low_freq_factor", "high_freq_factor", "old_context_len"}}
"""Fields of Megatron-Bridge 0.3's class alone, which a later one drops with a warning."""
CASES = [
    ("llama", None, "gpt"),
    ("llama", "0.19", "gpt"),
    ("llama_tied_bf16", "0.19", "gpt"),
    ("mixtral", "0.19", "gpt"),
    ("llama", None, "hybrid"),
    ("llama_tied_bf16", "0.19", "hybrid"),
    ("mixtral", "0.19", "hybrid"),
    ("gpt2", "0.19", "hybrid"),
    ("qwen2", "0.19", "hybrid"),
    ("qwen3", "0.19", "hybrid"),
]
FSDP = [("llama", "gpt"), ("mixtral", "hybrid")]
RANKS = [("llama", "gpt", "rank"), ("llama", "hybrid", "rank"), ("gpt2", "hybrid", "rank")]
HALVES = {
    **dict.fromkeys(("qwen3.5", "qwen3-next-dense-layers", "qwen3.5-moe"), "gated delta nets"),
    **dict.fromkeys(("deepseek_v3", "glm-4.7-flash"), "latent attention"),
    **dict.fromkeys(("mistral_swa", "qwen2-window", "ministral", "starcoder2-window"), "windows"),
    **dict.fromkeys(("qwen3_moe", "qwen2_moe", "gpt_oss", "glm-4.5"), "experts"),
    **dict.fromkeys(("phi3", "nemotron-biased", "gpt_neox", "falcon_seq_mqa", "starcoder_gpt_bigcode"), "dense"),
    **dict.fromkeys(("internlm3", "seed-oss", "smollm3", "phi4-partial", "falcon-heads"), "dense"),
}
"""Models that are written as a HybridModel, by what their blocks are of."""
FURTHER = ["multi-token"]
FIXTURES = ["current_gpt_dense", "current_gpt_moe", "current_hybrid_dense", "current_hybrid_moe"]


def in_megatron(jobs: list[dict[str, Any]], folder: Path) -> list[dict[str, Any]]:
    """What came of each job in one process of the newest Megatron-Core."""
    (folder / "jobs.json").write_text(json.dumps(jobs))
    command = [sys.executable, "-m", "tests.formats.current_megatron_worker", "0", "1", folder / "store"]
    done = subprocess.run(
        [*map(str, command), str(folder / "jobs.json"), str(folder / "out.json")],
        env=current_megatron.environment(),
        cwd=current_megatron.ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    results: list[dict[str, Any]] = json.loads((folder / "out.json").read_text())
    assert not [result["error"] for result in results if "error" in result]
    return [{**job, **result} for job, result in zip(jobs, results, strict=True)]


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> dict[Any, dict[str, Any]]:
    folder, jobs = tmp_path_factory.mktemp("current"), []
    for number, (family, version, model) in enumerate(CASES):
        layout = LayoutRequest(transformer_impl="local", megatron_version=version, megatron_model=model)
        out = folder / str(number)
        anyckpt.convert(fixture_path(f"families/{family}/hf"), out, to="megatron-core", layout=layout)
        tokens = np.load(fixture_path(f"families/{family}/expected.npz"))["input_ids"].tolist()
        jobs.append({"model": in_float32(out), "load": str(out), "tokens": tokens})
    for case in FIXTURES:
        out, other = folder / case, "hybrid" if "gpt" in case else "gpt"
        anyckpt.convert(
            fixture_path(f"mcore/{case}/ckpt"), out, to="megatron-core", layout=LayoutRequest(megatron_model=other)
        )
        jobs.append({"model": in_float32(out), "load": str(out), "tokens": expected_of(f"mcore/{case}")["tokens"]})
    for name in HALVES:
        jobs.append(in_halves(samples()[name].open()[0], folder / name))
    jobs.append(in_halves(with_further_predictions(), folder / FURTHER[0], tokens=False))
    for family, model in FSDP:
        out, layout = folder / f"fsdp-{family}", LayoutRequest(transformer_impl="local", megatron_model=model)
        source = fixture_path(f"families/{family}")
        anyckpt.convert(source / "hf", out, to="megatron-core", backend="fsdp_dtensor", layout=layout)
        tokens = np.load(source / "expected.npz")["input_ids"].tolist()
        jobs.append({"model": in_float32(out), "load_fsdp": str(out), "tokens": tokens})
    for family, model, _ in RANKS:
        out, layout = folder / f"rank-{family}-{model}", LayoutRequest(transformer_impl="local", megatron_model=model)
        source = fixture_path(f"families/{family}")
        anyckpt.convert(source / "hf", out, to="megatron-lm", layout=layout)
        tokens = np.load(source / "expected.npz")["input_ids"].tolist()
        file = str(out / "release" / "mp_rank_00" / "model_optim_rng.pt")
        jobs.append({"model": in_float32(out), "load_rank": file, "tokens": tokens})
    return dict(zip([*CASES, *FIXTURES, *HALVES, *FURTHER, *FSDP, *RANKS], in_megatron(jobs, folder), strict=True))


def in_halves(checkpoint: Checkpoint, folder: Path, *, tokens: bool = True) -> dict[str, Any]:
    """A job that loads a Hugging Face model as a HybridModel, and which outputs transformers computes for it."""
    assert FORMAT.plan is not None
    source = write_plan(FORMAT.plan(checkpoint, WriteOptions()), folder / "hf")
    layout = LayoutRequest(transformer_impl="local", megatron_model="hybrid")
    anyckpt.convert(source, folder / "hybrid", to="megatron-core", layout=layout)
    job = {"model": in_float32(folder / "hybrid"), "load": str(folder / "hybrid")}
    if not tokens:
        return job
    kind = transformers.AutoModelForCausalLM
    model = kind.from_pretrained(source, attn_implementation="eager", dtype=torch.float32).eval()
    ids = torch.randint(3, model.config.vocab_size, (2, 16), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        np.save(folder / "expected.npy", model(ids).logits.numpy())
    return {**job, "tokens": ids.tolist(), "expected": str(folder / "expected.npy")}


def in_float32(checkpoint: Path) -> dict[str, Any]:
    """Its model as the expected values were computed."""
    return {**registry.read(checkpoint).config, "params_dtype": "torch.float32"}


@pytest.mark.parametrize("case", CASES)
def test_it_loads_and_computes_the_same(case: tuple[str, str | None, str], loaded: Any) -> None:
    """With every key that either side has, wherever the common state is; outputs are the original model's."""
    result = loaded[case]
    assert result["missing"] == [] and result["unexpected"] == []
    assert result["common"]["checkpoint_version"] == "3.0" and "num_layers" in result["common"]["args"]
    expected = np.load(fixture_path(f"families/{case[0]}/expected.npz"))["logits"]
    found = np.array(result["logits"])[..., : expected.shape[-1]]
    assert np.abs(found - expected).max() < 2e-5


@pytest.mark.parametrize("case", FIXTURES)
def test_what_it_saved_computes_the_same_as_its_other_model(case: str, loaded: Any) -> None:
    """A GPTModel's checkpoint in a HybridModel, and the other way round; outputs are those of what was saved."""
    result = loaded[case]
    assert result["missing"] == [] and result["unexpected"] == []
    assert np.abs(np.array(result["logits"]) - np.array(expected_of(f"mcore/{case}")["logits"])).max() < 1e-6


@pytest.mark.parametrize("name", HALVES)
def test_a_hybrid_model_computes_what_transformers_does(name: str, loaded: Any) -> None:
    """With every key that either side has, whatever the blocks are of."""
    result = loaded[name]
    assert result["missing"] == [] and result["unexpected"] == []
    expected = np.load(result["expected"])
    found = np.array(result["logits"])[..., : expected.shape[-1]]
    assert np.abs(found - expected).max() < 1e-4 * np.abs(expected).max()


def test_a_hybrid_model_loads_further_predictions(loaded: Any) -> None:
    """Its step has a stack of two layers, and asks for each tensor by the name that it has there."""
    result = loaded[FURTHER[0]]
    assert result["missing"] == [] and result["unexpected"] == []
    step = "mtp.layers.0.mtp_model_layer.layers"
    assert f"{step}.0.self_attention.linear_proj.weight" in result["parameters"]
    assert any(key.startswith(f"{step}.1.mlp.experts.") for key in result["parameters"])
    assert not any(value == 7 for value in np.ravel(result["parameters"]["mtp.layers.0.eh_proj.weight"]))


@pytest.mark.parametrize("case", RANKS)
def test_the_only_ranks_file_is_the_modules_state_dict(case: tuple[str, str, str], loaded: Any) -> None:
    """Loaded strictly."""
    expected = np.load(fixture_path(f"families/{case[0]}/expected.npz"))["logits"]
    assert np.abs(np.array(loaded[case]["logits"])[..., : expected.shape[-1]] - expected).max() < 2e-5


@pytest.mark.parametrize("case", FSDP)
def test_the_module_that_megatron_fsdp_wraps_loads_it(case: tuple[str, str], loaded: Any) -> None:
    """Megatron-FSDP itself needs a GPU: its names are the module's, and PyTorch's own loader finds all of them."""
    expected = np.load(fixture_path(f"families/{case[0]}/expected.npz"))["logits"]
    assert np.abs(np.array(loaded[case]["logits"])[..., : expected.shape[-1]] - expected).max() < 2e-5


def classes_of(folder: Path) -> dict[str, tuple[list[str], set[str]]]:
    """Every class in the sources under a folder: its bases, and the names of the fields that its body has."""
    found = {}
    for path in sorted(folder.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ClassDef):
                bases = [base.id for base in node.bases if isinstance(base, ast.Name)]
                own = {
                    item.target.id
                    for item in node.body
                    if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name)
                }
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

    def check(arguments: dict[str, Any], rows: int, name: str) -> None:
        written = run_config_of(arguments, rows, Facts("bfloat16", False, False))["model"]
        module, _, kind = written.pop("_target_").rpartition(".")
        file = current_megatron.FOLDER / (module.replace(".", "/") + ".py")
        assert f"class {kind}(" in file.read_text(), name
        assert set(written) - set(fields(kind, bridge)) <= LEFT_OUT.get(name, set()), name

    for name in (
        "llama",
        "llama31_ropescale",
        "mixtral",
        "qwen3_moe",
        "deepseek_v3",
        "gpt_oss",
        "gemma",
        "gemma2",
        "gemma3",
        "nemotron_h",
        "llama-nemotron",
    ):
        model = samples()[name].open()[1]
        check(render_config(model, "megatron-args"), model.config.rows, name)
    for name in samples():
        model = samples()[name].open()[1]
        with contextlib.suppress(MappingError):
            arguments = hybrid_arguments(render_config(model, "megatron-args"), [])
            assert provider_of(arguments) == HYBRID
            check(arguments, model.config.rows, name)
