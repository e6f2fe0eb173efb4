"""The example package of the developer guide, installed as users install it, in processes of their own."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from tests.models.cases import facts, open_case, with_weights
from tests.support import fixture_path, write_plan

import anyckpt
from anyckpt.formats import safetensors
from anyckpt.formats.format import WriteOptions
from anyckpt.tensor import LazyTensor, from_array

ROOT = Path(__file__).resolve().parent.parent.parent
EXAMPLE = ROOT / "examples" / "anyckpt_more"
Run = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("site")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-index"]
    subprocess.run([*pip, "--no-deps", "--no-build-isolation", "--target", str(target), str(EXAMPLE)], check=True)
    return target


def beside(installed: Path) -> dict[str, str]:
    """The environment with the package on the path."""
    before = os.environ.get("PYTHONPATH")
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [str(installed), before]))}


@pytest.fixture
def run(installed: Path) -> Run:
    """``anyckpt`` with the package beside it."""

    def call(*arguments: object, fails: bool = False) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "anyckpt", *map(str, arguments)]
        done = subprocess.run(command, env=beside(installed), capture_output=True, text=True, check=False)
        assert done.returncode == (2 if fails else 0), done.stderr
        assert not fails or done.stderr.count("\n") == 1
        return done

    return call


def heron(folder: Path) -> Path:
    """The Llama fixture as Heron, which the example invents, stores such a model: wqkv is fused by query group."""
    case = open_case("llama")
    config = case.model.config
    plain = {"embed_tokens": "tok_embeddings", "input_layernorm": "attention_norm", "self_attn.o_proj": "attention.wo",
             "post_attention_layernorm": "ffn_norm", "mlp.gate_proj": "feed_forward.w1",
             "mlp.up_proj": "feed_forward.w3", "mlp.down_proj": "feed_forward.w2", "lm_head": "output"}  # fmt: skip
    tensors: dict[str, LazyTensor] = {}
    for name, tensor in case.checkpoint.tensors.items():
        if "q_proj" in name:
            rows = [case.checkpoint.tensors[name.replace("q_proj", f"{x}_proj")].numpy() for x in "qkv"]
            groups = [r.reshape(config.num_query_groups, -1, config.kv_channels, config.hidden_size) for r in rows]
            fused = np.concatenate(groups, axis=1).reshape(-1, config.hidden_size)
            tensors[name.replace("self_attn.q_proj", "attention.wqkv")] = from_array(fused)
        elif "k_proj" not in name and "v_proj" not in name:
            own = next((name.replace(theirs, ours) for theirs, ours in plain.items() if theirs in name), name)
            tensors[own] = tensor
    values = {
        "model_type": "heron", "architectures": ["HeronForCausalLM"], "bias": False, "hidden_act": "silu",
        "num_hidden_layers": config.num_layers, "hidden_size": config.hidden_size, "rms_norm_eps": 1e-5,
        "intermediate_size": config.ffn_hidden_size, "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_query_groups, "vocab_size": config.vocab_size, "rope_theta": 1e6,
        "max_position_embeddings": 4096, "tie_word_embeddings": False, "torch_dtype": "float32",
    }  # fmt: skip
    if config.kv_channels * config.num_attention_heads != config.hidden_size:
        values["head_dim"] = config.kv_channels
    folder.mkdir()
    assert safetensors.FORMAT.plan is not None
    plan = safetensors.FORMAT.plan(with_weights(case.checkpoint, tensors, "hf"), WriteOptions())
    write_plan(plan, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(values))
    return folder


def test_the_family(run: Run, tmp_path: Path) -> None:
    source = heron(tmp_path / "heron")
    assert json.loads(run("inspect", source, "--json").stdout)["family"] == "heron"
    run("convert", source, tmp_path / "core", "--to", "megatron-core")
    anyckpt.convert(fixture_path("families/llama/hf"), tmp_path / "llama", to="megatron-core")
    assert facts(anyckpt.open(tmp_path / "core").tensors) == facts(anyckpt.open(tmp_path / "llama").tensors)
    run("convert", source, tmp_path / "ranks", "--to", "megatron-lm", "--tp", "2")
    for there in ("core", "ranks"):
        run("convert", tmp_path / there, tmp_path / f"{there}-back", "--to", "hf")
        back = anyckpt.open(tmp_path / f"{there}-back")
        assert facts(back.tensors) == facts(anyckpt.open(source).tensors)
        config = json.loads((source / "config.json").read_text())
        assert {key: back.config[key] for key in config if key != "torch_dtype"} == {
            key: value for key, value in config.items() if key != "torch_dtype"
        }
    refused = run("convert", source, tmp_path / "no.nemo", "--to", "nemo", fails=True)
    assert "NeMo 1 has no models of family heron" in refused.stderr


def test_without_the_package_the_error_says_what_to_do(tmp_path: Path) -> None:
    source = heron(tmp_path / "heron")
    with pytest.raises(anyckpt.UsageError, match=r"model_type 'heron' is of none; .*python -m pydoc anyckpt\.extend"):
        anyckpt.convert(source, tmp_path / "core", to="megatron-core")


def test_a_tensor_that_the_family_has_not(run: Run, tmp_path: Path) -> None:
    source = heron(tmp_path / "heron")
    left = run("convert", source, tmp_path / "out", "--to", "megatron-core", "--exclude", "output.weight", fails=True)
    assert "1 tensors of the model are missing: output.weight" in left.stderr


def test_the_format(run: Run, tmp_path: Path) -> None:
    source = fixture_path("families/llama/hf")
    run("convert", source, tmp_path / "arrays", "--to", "npy")
    before = anyckpt.open(source).tensors
    for name, tensor in before.items():
        stored = np.load(tmp_path / "arrays" / f"{name}.npy", mmap_mode="r")
        assert stored.dtype == np.dtype("<f4")
        assert np.array_equal(stored, tensor.numpy())
    assert json.loads(run("inspect", tmp_path / "arrays", "--json").stdout)["format"] == "npy"
    run("convert", tmp_path / "arrays", tmp_path / "back", "--to", "hf", "--config", source / "config.json")
    assert facts(anyckpt.open(tmp_path / "back").tensors) == facts(before)
    assert json.loads(run("verify", tmp_path / "arrays", "--json").stdout)["sound"]


def test_arrays_that_numpy_wrote(run: Run, tmp_path: Path) -> None:
    folder = tmp_path / "arrays"
    folder.mkdir()
    square = np.arange(12, dtype="<f8").reshape(3, 4)
    np.save(folder / "rows.npy", square)
    np.save(folder / "columns.npy", np.asfortranarray(square))
    run("convert", folder, tmp_path / "out.safetensors", "--to", "safetensors")
    found = anyckpt.open(tmp_path / "out.safetensors").tensors
    assert np.array_equal(found["rows"].numpy(), square)
    assert np.array_equal(found["columns"].numpy(), square)


def test_the_tests_of_the_package(installed: Path) -> None:
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", str(EXAMPLE / "tests")]
    done = subprocess.run(command, env=beside(installed), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    assert "2 passed" in done.stdout


def test_the_package_is_built_of_public_names_alone() -> None:
    for path in EXAMPLE.rglob("*.py"):
        for module in re.findall(r"(?m)^(?:from|import) (anyckpt[.\w]*)", path.read_text(encoding="utf-8")):
            assert module in ("anyckpt", "anyckpt.extend", "anyckpt.testing") or module.startswith("anyckpt_more")
    told = set(re.findall(r"anyckpt\.(\w+)", (ROOT / "docs" / "extending.md").read_text(encoding="utf-8")))
    assert told <= {*anyckpt.__all__, "extend", "testing", "families", "formats", "dialects"}


@pytest.mark.parametrize("damage", ["magic", "header", "data", "object", "order"])
def test_arrays_that_are_none(run: Run, damage: str, tmp_path: Path) -> None:
    folder = tmp_path / "arrays"
    folder.mkdir()
    path = folder / "a.npy"
    np.save(path, np.zeros(64, ">f4" if damage == "order" else "<f4"))
    whole = path.read_bytes()
    if damage == "object":
        np.save(path, np.array([{}], dtype=object))
    elif damage != "order":
        path.write_bytes({"magic": b"\0" * 8 + whole[8:], "header": whole[:40], "data": whole[:-4]}[damage])
    assert "a.npy" in run("inspect", folder, fails=True).stderr


def test_what_numpy_has_no_word_for(run: Run, tmp_path: Path) -> None:
    source = fixture_path("families/llama_tied_bf16/hf")
    refused = run("convert", source, tmp_path / "arrays", "--to", "npy", fails=True)
    assert "numpy has no bfloat16" in refused.stderr
    assert "--dtype fp32" in refused.stderr
    run("convert", source, tmp_path / "arrays", "--to", "npy", "--dtype", "fp32")


def test_the_dialect(run: Run, tmp_path: Path) -> None:
    source = fixture_path("families/llama/hf")
    there = tmp_path / "there.pt"
    run("convert", source, there, "--to", "torch", "--names", "megatron-2022")
    names = set(anyckpt.open(there).tensors)
    assert "language_model.encoder.layers.1.self_attention.query_key_value.weight" in names
    assert all(name.startswith("language_model.") for name in names)
    assert "megatron-2022" in run("convert", source, tmp_path / "x", "--to", "torch", "--names", "y", fails=True).stderr
    run("convert", there, tmp_path / "back", "--to", "hf", "--config", source / "config.json")
    assert facts(anyckpt.open(tmp_path / "back").tensors) == facts(anyckpt.open(source).tensors)


def test_code_in_the_guide_is_the_package() -> None:
    text = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8")
    shown = re.findall(r"`(examples/\S+)`:\n\n```\w+\n(.*?)```\n", text, re.DOTALL)
    assert {path for path, _ in shown} == {
        str(path.relative_to(ROOT))
        for path in EXAMPLE.rglob("*")
        if path.suffix in (".py", ".toml") and path.name != "__init__.py"
    }
    for path, code in shown:
        assert code == (ROOT / path).read_text(encoding="utf-8"), f"{path} is not what docs/extending.md shows"
