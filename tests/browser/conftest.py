"""One browser for all tests, and folders of models to make pages of."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from tests.browser.chromium import Chromium
from tests.quantization.quantized import Arrays, write_folder

import anyckpt
from anyckpt.operations.report import Report


@pytest.fixture(scope="session")
def browser() -> Iterator[Chromium]:
    made = Chromium()
    yield made
    made.close()


def model(folder: Path, *, layers: int = 6, moved: float = 0.0, extra: Arrays | None = None) -> Path:
    """A small Llama with an outlier, a NaN, and a norm of ones."""
    random = np.random.default_rng(0)
    shapes = {
        "self_attn.q_proj": (32, 32), "self_attn.k_proj": (16, 32), "self_attn.v_proj": (16, 32),
        "self_attn.o_proj": (32, 32), "mlp.gate_proj": (64, 32), "mlp.up_proj": (64, 32), "mlp.down_proj": (32, 64),
        "input_layernorm": (32,), "post_attention_layernorm": (32,),
    }  # fmt: skip
    arrays: Arrays = {"model.embed_tokens.weight": random.standard_normal((96, 32)).astype(np.float32)}
    for layer in range(layers):
        for name, shape in shapes.items():
            array = random.standard_normal(shape).astype(np.float32)
            arrays[f"model.layers.{layer}.{name}.weight"] = array + np.float32(moved * layer)
    arrays["model.layers.3.mlp.down_proj.weight"][1, 2] = 900
    arrays["model.layers.2.mlp.up_proj.weight"][0, 0] = np.nan
    arrays["model.norm.weight"] = np.ones(32, np.float32)
    arrays["lm_head.weight"] = random.standard_normal((96, 32)).astype(np.float32)
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 32, "intermediate_size": 64,
        "num_hidden_layers": layers, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 96,
        "hidden_act": "silu", "rms_norm_eps": 1e-5, "max_position_embeddings": 128, "tie_word_embeddings": False,
        "rope_theta": 10000.0 + moved,
    }  # fmt: skip
    return write_folder(folder, config, {**arrays, **(extra or {})})


def hollow(folder: Path, tensors: dict[str, tuple[str, list[int]]], shards: int) -> Path:
    """A folder of safetensors with these types and shapes and no bytes on the disk."""
    folder.mkdir()
    where: dict[str, str] = {}
    names = list(tensors)
    for number in range(shards):
        file = f"model-{number + 1:05d}-of-{shards:05d}.safetensors"
        header, end = {}, 0
        for name in names[number * len(names) // shards : (number + 1) * len(names) // shards]:
            dtype, shape = tensors[name]
            size = int(np.prod(shape)) * {"BF16": 2, "F32": 4, "F8_E4M3": 1}[dtype]
            header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + size]}
            end += size
            where[name] = file
        text = json.dumps(header).encode()
        with open(folder / file, "wb") as stream:
            stream.write(len(text).to_bytes(8, "little") + text)
            stream.truncate(8 + len(text) + end)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return folder


@pytest.fixture(scope="session")
def pages(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Report]:
    """A page with everything: statistics, and another checkpoint to compare with."""
    folder = tmp_path_factory.mktemp("pages")
    first, second = model(folder / "first"), model(folder / "second", moved=0.01)
    done = anyckpt.report(first, folder / "all.html", stats=True, against=second)
    return folder / "all.html", done
