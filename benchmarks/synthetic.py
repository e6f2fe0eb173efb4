"""Synthetic checkpoints in Hugging Face layout: real names, real shapes, pseudo-random weights."""

from __future__ import annotations

import json
import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

_POOL_ELEMENTS = 16 << 20


_WIDTHS = {"BF16": 2, "F8_E4M3": 1, "F32": 4}


class Shape(ABC):
    """The dimensions of a model."""

    vocabulary: int

    @abstractmethod
    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Name -> shape, in the order of the model."""

    @abstractmethod
    def config(self) -> dict[str, Any]:
        """``config.json``."""

    def dtype(self, name: str) -> str:
        """A tensor's element type in safetensors' spelling."""
        return "BF16"

    def nbytes_of(self, name: str, dimensions: tuple[int, ...]) -> int:
        """A tensor's bytes."""
        return _WIDTHS[self.dtype(name)] * math.prod(dimensions)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(self.nbytes_of(name, dimensions) for name, dimensions in self.tensors().items())


def _config(model_type: str, architecture: str, **keys: Any) -> dict[str, Any]:
    """What ``config.json`` of every model here says, as transformers 4.x spells it, and what that of this one does."""
    return {
        "architectures": [architecture],
        "model_type": model_type,
        "max_position_embeddings": 4096,
        "hidden_act": "silu",
        "attention_bias": False,
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "initializer_range": 0.02,
        "torch_dtype": "bfloat16",
        **keys,
    }


@dataclass(frozen=True)
class LlamaShape(Shape):
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
            found.update({name + key: dimensions for key, dimensions in self.mlp().items()})
            found[name + "input_layernorm.weight"] = (self.hidden,)
            found[name + "post_attention_layernorm.weight"] = (self.hidden,)
        found["model.norm.weight"] = (self.hidden,)
        found["lm_head.weight"] = (self.vocabulary, self.hidden)
        return found

    def mlp(self) -> dict[str, tuple[int, ...]]:
        """A layer's MLP."""
        return {
            "mlp.gate_proj.weight": (self.intermediate, self.hidden),
            "mlp.up_proj.weight": (self.intermediate, self.hidden),
            "mlp.down_proj.weight": (self.hidden, self.intermediate),
        }

    def config(self) -> dict[str, Any]:
        return _config(
            "llama", "LlamaForCausalLM", hidden_size=self.hidden, intermediate_size=self.intermediate,
            num_hidden_layers=self.layers, num_attention_heads=self.heads, num_key_value_heads=self.kv_heads,
            head_dim=self.hidden // self.heads, vocab_size=self.vocabulary, rms_norm_eps=1e-05, rope_theta=500000.0,
            mlp_bias=False,
        )  # fmt: skip


@dataclass(frozen=True)
class MixtralShape(LlamaShape):
    """Dimensions, as in ``config.json``."""

    experts: int

    def mlp(self) -> dict[str, tuple[int, ...]]:
        found: dict[str, tuple[int, ...]] = {"block_sparse_moe.gate.weight": (self.experts, self.hidden)}
        for expert in range(self.experts):
            each = f"block_sparse_moe.experts.{expert}."
            found[each + "w1.weight"] = (self.intermediate, self.hidden)
            found[each + "w2.weight"] = (self.hidden, self.intermediate)
            found[each + "w3.weight"] = (self.intermediate, self.hidden)
        return found

    def config(self) -> dict[str, Any]:
        return _config(
            "mixtral", "MixtralForCausalLM", hidden_size=self.hidden, intermediate_size=self.intermediate,
            num_hidden_layers=self.layers, num_attention_heads=self.heads, num_key_value_heads=self.kv_heads,
            head_dim=self.hidden // self.heads, vocab_size=self.vocabulary, rms_norm_eps=1e-05, rope_theta=1e6,
            num_local_experts=self.experts, num_experts_per_tok=2, sliding_window=None,
        )  # fmt: skip


@dataclass(frozen=True)
class DeepSeekShape(Shape):
    """Dimensions, as in ``config.json``; with ``fp8`` in blocks of 128 by 128 with a scale each, as V3 is published."""

    layers: int
    dense: int
    hidden: int
    intermediate: int
    expert: int
    experts: int
    heads: int
    q_rank: int
    kv_rank: int
    nope: int
    rope: int
    value: int
    vocabulary: int
    predicting: int = 0
    fp8: bool = False

    def tensors(self) -> dict[str, tuple[int, ...]]:
        found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (self.vocabulary, self.hidden)}
        for layer in range(self.layers + self.predicting):
            name = f"model.layers.{layer}."
            attention, mlp = name + "self_attn.", name + "mlp."
            self._add(found, attention + "q_a_proj", self.q_rank, self.hidden)
            found[attention + "q_a_layernorm.weight"] = (self.q_rank,)
            self._add(found, attention + "q_b_proj", self.heads * (self.nope + self.rope), self.q_rank)
            self._add(found, attention + "kv_a_proj_with_mqa", self.kv_rank + self.rope, self.hidden)
            found[attention + "kv_a_layernorm.weight"] = (self.kv_rank,)
            self._add(found, attention + "kv_b_proj", self.heads * (self.nope + self.value), self.kv_rank)
            self._add(found, attention + "o_proj", self.hidden, self.heads * self.value)
            if layer < self.dense:
                self._add_mlp(found, mlp, self.intermediate)
            else:
                found[mlp + "gate.weight"] = (self.experts, self.hidden)
                found[mlp + "gate.e_score_correction_bias"] = (self.experts,)
                self._add_mlp(found, mlp + "shared_experts.", self.expert)
                for expert in range(self.experts):
                    self._add_mlp(found, f"{mlp}experts.{expert}.", self.expert)
            found[name + "input_layernorm.weight"] = (self.hidden,)
            found[name + "post_attention_layernorm.weight"] = (self.hidden,)
            if layer >= self.layers:
                found[name + "embed_tokens.weight"] = (self.vocabulary, self.hidden)
                found[name + "enorm.weight"] = found[name + "hnorm.weight"] = (self.hidden,)
                found[name + "eh_proj.weight"] = (self.hidden, 2 * self.hidden)
                found[name + "shared_head.norm.weight"] = (self.hidden,)
                found[name + "shared_head.head.weight"] = (self.vocabulary, self.hidden)
        found["model.norm.weight"] = (self.hidden,)
        found["lm_head.weight"] = (self.vocabulary, self.hidden)
        return found

    def _add_mlp(self, found: dict[str, tuple[int, ...]], name: str, width: int) -> None:
        self._add(found, name + "gate_proj", width, self.hidden)
        self._add(found, name + "up_proj", width, self.hidden)
        self._add(found, name + "down_proj", self.hidden, width)

    def _add(self, found: dict[str, tuple[int, ...]], name: str, rows: int, columns: int) -> None:
        found[f"{name}.weight"] = (rows, columns)
        if self.fp8:
            found[f"{name}.weight_scale_inv"] = (-(-rows // 128), -(-columns // 128))

    def dtype(self, name: str) -> str:
        if name.endswith(("_scale_inv", "e_score_correction_bias")):
            return "F32"
        quantized = name.endswith(("_proj.weight", "_mqa.weight")) and not name.endswith("eh_proj.weight")
        return "F8_E4M3" if self.fp8 and quantized else "BF16"

    def config(self) -> dict[str, Any]:
        facts = {
            "activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": [128, 128],
        }  # fmt: skip
        return _config(
            "deepseek_v3", "DeepseekV3ForCausalLM", hidden_size=self.hidden, intermediate_size=self.intermediate,
            moe_intermediate_size=self.expert, num_hidden_layers=self.layers, num_attention_heads=self.heads,
            num_key_value_heads=self.heads, n_routed_experts=self.experts, n_shared_experts=1, num_experts_per_tok=8,
            first_k_dense_replace=self.dense, moe_layer_freq=1, n_group=8, topk_group=4, q_lora_rank=self.q_rank,
            kv_lora_rank=self.kv_rank, qk_nope_head_dim=self.nope, qk_rope_head_dim=self.rope, v_head_dim=self.value,
            vocab_size=self.vocabulary, rms_norm_eps=1e-06, rope_theta=10000.0, routed_scaling_factor=2.5,
            norm_topk_prob=True, scoring_func="sigmoid", topk_method="noaux_tc",
            num_nextn_predict_layers=self.predicting, **({"quantization_config": facts} if self.fp8 else {}),
        )  # fmt: skip


SMALL = LlamaShape(layers=8, hidden=1024, intermediate=2816, heads=16, kv_heads=4, vocabulary=32000)
"""About 0.3 GB."""
TWO_GB = LlamaShape(layers=22, hidden=2048, intermediate=5632, heads=32, kv_heads=4, vocabulary=32000)
"""TinyLlama 1.1B: 2.2 GB."""
FOUR_GB = LlamaShape(layers=44, hidden=2048, intermediate=5632, heads=32, kv_heads=4, vocabulary=32000)
"""4.1 GB."""
LLAMA_405B = LlamaShape(layers=126, hidden=16384, intermediate=53248, heads=128, kv_heads=8, vocabulary=128256)
"""Llama 3.1 405B: 1,137 tensors with these names, 811 GB."""
MIXTRAL_SMALL = MixtralShape(
    layers=3, hidden=256, intermediate=832, heads=8, kv_heads=2, vocabulary=32000, experts=8
)  # fmt: skip
"""About 0.06 GB."""
MIXTRAL_TWO_GB = MixtralShape(
    layers=3, hidden=2048, intermediate=6656, heads=16, kv_heads=4, vocabulary=32000, experts=8
)  # fmt: skip
"""Eight experts of 41 million parameters in each layer: 2.3 GB."""
DEEPSEEK_SMALL = DeepSeekShape(
    layers=3, dense=1, hidden=256, intermediate=512, expert=64, experts=256, heads=4, q_rank=128, kv_rank=64, nope=32,
    rope=16, value=32, vocabulary=8192,
)  # fmt: skip
"""About 0.06 GB, with all 256 experts."""
DEEPSEEK_TWO_GB = DeepSeekShape(
    layers=5, dense=1, hidden=1024, intermediate=4096, expert=256, experts=256, heads=16, q_rank=384, kv_rank=256,
    nope=64, rope=32, value=64, vocabulary=129280,
)  # fmt: skip
"""256 experts in each layer, none of whose tensors is larger than 0.5 MB: 2.2 GB in 3,200 tensors."""
DEEPSEEK_V3 = DeepSeekShape(
    layers=61, dense=3, hidden=7168, intermediate=18432, expert=2048, experts=256, heads=128, q_rank=1536, kv_rank=512,
    nope=128, rope=64, value=128, vocabulary=129280, predicting=1, fp8=True,
)  # fmt: skip
"""DeepSeek-V3 as it is published: 91,991 tensors with these names, 688 GB."""
KIMI_K2 = DeepSeekShape(
    layers=61, dense=1, hidden=7168, intermediate=18432, expert=2048, experts=384, heads=64, q_rank=1536, kv_rank=512,
    nope=128, rope=64, value=128, vocabulary=163840,
)  # fmt: skip
"""Kimi-K2: 1.03 T parameters, 2.05 TB in bfloat16; with ``fp8=True`` as it is published."""


def write_model(folder: Path, shape: Shape, *, shard_bytes: int = 1 << 30, sparse: bool = False) -> Path:
    """Write a checkpoint, or with ``sparse`` one whose files have the right sizes and no data on the disk."""
    folder.mkdir(parents=True, exist_ok=True)
    shards: list[list[tuple[str, tuple[int, ...]]]] = [[]]
    filled = 0
    for name, dimensions in shape.tensors().items():
        nbytes = shape.nbytes_of(name, dimensions)
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
        _write_shard(folder / file, shape, tensors, pool, generator, sparse)
    index = {"metadata": {"total_size": shape.nbytes}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
    (folder / "config.json").write_text(json.dumps(shape.config(), indent=2))
    _write_tokenizer(folder, shape.vocabulary)
    return folder


def _write_shard(
    path: Path, shape: Shape, tensors: list[tuple[str, tuple[int, ...]]], pool: Any, generator: Any, sparse: bool
) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, dimensions in tensors:
        end = offset + shape.nbytes_of(name, dimensions)
        header[name] = {"dtype": shape.dtype(name), "shape": list(dimensions), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        if sparse:
            file.truncate(8 + len(text) + offset)
            return
        for name, dimensions in tensors:
            left = shape.nbytes_of(name, dimensions) // pool.itemsize
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
