"""What a command imports: starting is most of what a short command takes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import anyckpt
from anyckpt.config import own_part
from anyckpt.models.families import built_in, by_name, each_family, of_config

_CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 8,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 32,
    "max_position_embeddings": 16,
    "rms_norm_eps": 1e-5,
}
_SHAPES = {
    "model.embed_tokens.weight": (32, 8),
    "lm_head.weight": (32, 8),
    "model.norm.weight": (8,),
    "model.layers.0.input_layernorm.weight": (8,),
    "model.layers.0.post_attention_layernorm.weight": (8,),
    "model.layers.0.self_attn.q_proj.weight": (8, 8),
    "model.layers.0.self_attn.k_proj.weight": (4, 8),
    "model.layers.0.self_attn.v_proj.weight": (4, 8),
    "model.layers.0.self_attn.o_proj.weight": (8, 8),
    "model.layers.0.mlp.gate_proj.weight": (16, 8),
    "model.layers.0.mlp.up_proj.weight": (16, 8),
    "model.layers.0.mlp.down_proj.weight": (8, 16),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("start") / "model"
    tensors = {name: np.zeros(shape, np.float32) for name, shape in _SHAPES.items()}
    anyckpt.save(tensors, path, to="hf", config=_CONFIG)
    return path


def _imported(*arguments: str) -> tuple[set[str], str]:
    """The modules that a command imports, and how many threads its OpenBLAS may start."""
    code = (
        "import json, os, sys\n"
        "from anyckpt.cli import main\n"
        "try:\n    main(sys.argv[1:])\n"
        "except SystemExit as done:\n    assert not done.code, done.code\n"
        "print(json.dumps([sorted(sys.modules), os.environ['OPENBLAS_NUM_THREADS']]))"
    )
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True)
    modules, threads = json.loads(done.stdout.splitlines()[-1])
    return set(modules), threads


def _families(modules: set[str]) -> set[str]:
    prefix = "anyckpt.models.families."
    return {name.removeprefix(prefix) for name in modules if name.startswith(prefix) and ".parts" not in name}


def _of_numpy(modules: set[str]) -> set[str]:
    """What is there of numpy when something of it was used; the package itself stands there before."""
    return {name for name in modules if name.startswith("numpy.")}


def test_inspecting_imports_one_family_and_nothing_that_writes(folder: Path) -> None:
    modules, threads = _imported("inspect", str(folder))
    assert _families(modules) == {"llama"}
    unneeded = ("engine.blocks", "layout", "optimizer", "containers.torch_file", "operations.steps.statistics")
    assert not {name for name in modules if name.removeprefix("anyckpt.") in unneeded}
    assert len({name for name in modules if name.startswith("anyckpt")}) < 190
    assert not _of_numpy(modules)
    assert threads == "1"


def test_a_dry_run_imports_one_family_and_no_client_of_stores(folder: Path, tmp_path: Path) -> None:
    modules, _ = _imported("convert", str(folder), str(tmp_path / "out"), "--to", "megatron-core", "--dry-run")
    assert _families(modules) == {"llama"}
    unneeded = ("storage.hub", "storage.remote", "optimizer.flat_buffers", "operations.steps.model_card")
    assert not {name for name in modules if name.removeprefix("anyckpt.") in unneeded}
    assert not modules & {"email", "logging", "socket", "obstore", "huggingface_hub"}
    assert len({name for name in modules if name.startswith("anyckpt")}) < 320


def test_the_version_needs_neither_numpy_nor_the_metadata_of_packages() -> None:
    modules, _ = _imported("--version")
    assert not modules & {"importlib.metadata", "dataclasses"}
    assert not _of_numpy(modules)


def test_a_type_of_model_is_of_one_family() -> None:
    types = [
        kind for family in built_in() for kind in (*family.hugging_face.model_types, *family.hugging_face.text_parts)
    ]
    assert len(types) == len(set(types))


@pytest.mark.parametrize("name", sorted(family.name for family in built_in()))
def test_the_family_of_a_configuration_is_the_first_that_knows_it(name: str) -> None:
    family = by_name(name)
    assert family.name == name
    for kind in family.hugging_face.model_types:
        for config in ({"model_type": kind}, {"model_type": kind, "text_config": {"model_type": "llama"}}):
            first = next((each for each in each_family() if own_part.is_known(each, config)), None)
            assert of_config(config) is first
