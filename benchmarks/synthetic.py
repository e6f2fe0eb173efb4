"""Synthetic Llama checkpoints in Hugging Face layout: real names, real shapes, pseudo-random weights."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

_POOL_ELEMENTS = 16 << 20


@dataclass(frozen=True)
class LlamaShape:
    """Dimensions, as in ``config.json``."""

    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    vocabulary: int

    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Name -> shape, in the order of the model."""
        head = self.hidden // self.heads
        found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (self.vocabulary, self.hidden)}
        for layer in range(self.layers):
            name = f"model.layers.{layer}."
            found[name + "self_attn.q_proj.weight"] = (self.heads * head, self.hidden)
            found[name + "self_attn.k_proj.weight"] = (self.kv_heads * head, self.hidden)
            found[name + "self_attn.v_proj.weight"] = (self.kv_heads * head, self.hidden)
            found[name + "self_attn.o_proj.weight"] = (self.hidden, self.heads * head)
            found[name + "mlp.gate_proj.weight"] = (self.intermediate, self.hidden)
            found[name + "mlp.up_proj.weight"] = (self.intermediate, self.hidden)
            found[name + "mlp.down_proj.weight"] = (self.hidden, self.intermediate)
            found[name + "input_layernorm.weight"] = (self.hidden,)
            found[name + "post_attention_layernorm.weight"] = (self.hidden,)
        found["model.norm.weight"] = (self.hidden,)
        found["lm_head.weight"] = (self.vocabulary, self.hidden)
        return found

    @property
    def nbytes(self) -> int:
        """Bytes in bfloat16."""
        return 2 * sum(math.prod(shape) for shape in self.tensors().values())

    def config(self) -> dict[str, Any]:
        """``config.json`` as transformers 4.x spells it."""
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_size": self.hidden,
            "intermediate_size": self.intermediate,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.hidden // self.heads,
            "vocab_size": self.vocabulary,
            "max_position_embeddings": 4096,
            "rms_norm_eps": 1e-05,
            "rope_theta": 500000.0,
            "hidden_act": "silu",
            "attention_bias": False,
            "mlp_bias": False,
            "tie_word_embeddings": False,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "initializer_range": 0.02,
            "torch_dtype": "bfloat16",
        }


SMALL = LlamaShape(layers=8, hidden=1024, intermediate=2816, heads=16, kv_heads=4, vocabulary=32000)
"""About 0.3 GB."""
TWO_GB = LlamaShape(layers=22, hidden=2048, intermediate=5632, heads=32, kv_heads=4, vocabulary=32000)
"""TinyLlama 1.1B: 2.2 GB."""
FOUR_GB = LlamaShape(layers=44, hidden=2048, intermediate=5632, heads=32, kv_heads=4, vocabulary=32000)
"""4.1 GB."""
LLAMA_405B = LlamaShape(layers=126, hidden=16384, intermediate=53248, heads=128, kv_heads=8, vocabulary=128256)
"""Llama 3.1 405B: 1,137 tensors with these names, 811 GB."""


def write_llama(folder: Path, shape: LlamaShape, *, shard_bytes: int = 1 << 30, sparse: bool = False) -> Path:
    """Write a checkpoint, or with ``sparse`` one whose files have the right sizes and no data on the disk."""
    folder.mkdir(parents=True, exist_ok=True)
    shards: list[list[tuple[str, tuple[int, ...]]]] = [[]]
    filled = 0
    for name, dimensions in shape.tensors().items():
        nbytes = 2 * math.prod(dimensions)
        if shards[-1] and filled + nbytes > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append((name, dimensions))
        filled += nbytes
    weight_map: dict[str, str] = {}
    generator = np.random.default_rng(7)
    pool = generator.integers(0x3B80, 0x3F80, _POOL_ELEMENTS, dtype=np.uint16)
    pool |= (generator.integers(0, 2, _POOL_ELEMENTS, dtype=np.uint16) << 15).astype(np.uint16)
    for number, tensors in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        weight_map.update({name: file for name, _ in tensors})
        _write_shard(folder / file, tensors, pool, generator, sparse)
    index = {"metadata": {"total_size": shape.nbytes}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
    (folder / "config.json").write_text(json.dumps(shape.config(), indent=2))
    _write_tokenizer(folder, shape.vocabulary)
    return folder


def _write_shard(
    path: Path, tensors: list[tuple[str, tuple[int, ...]]], pool: Any, generator: Any, sparse: bool
) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, dimensions in tensors:
        end = offset + 2 * math.prod(dimensions)
        header[name] = {"dtype": "BF16", "shape": list(dimensions), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        if sparse:
            file.truncate(8 + len(text) + offset)
            return
        for _, dimensions in tensors:
            left = math.prod(dimensions)
            start = int(generator.integers(0, _POOL_ELEMENTS))
            while left:
                part = pool[start : start + left]
                file.write(part.data)
                left -= len(part)
                start = 0


def _write_tokenizer(folder: Path, vocabulary: int) -> None:
    """A word-level tokenizer that the ``tokenizers`` library loads."""
    words = {"<unk>": 0, "<s>": 1, "</s>": 2}
    words.update({f"word{number}": number for number in range(3, vocabulary)})
    special = [
        {
            "id": number,
            "content": word,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": True,
        }
        for word, number in list(words.items())[:3]
    ]
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": special,
        "normalizer": None,
        "pre_tokenizer": {"type": "Whitespace"},
        "post_processor": None,
        "decoder": None,
        "model": {"type": "WordLevel", "vocab": words, "unk_token": "<unk>"},
    }
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2))
