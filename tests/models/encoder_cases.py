"""Small models that are no decoders, and the fixtures of such."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

from tests.models.cases import open_case, with_weights
from tests.models.proofs import Tiny

from anyckpt import models
from anyckpt.checkpoint import Checkpoint
from anyckpt.models import Model
from anyckpt.tensor import LazyTensor

FIXTURES = ("megatron_bert", "t5_v1_1", "clip_vision", "vit")
BERT = {
    "model_type": "bert", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "vocab_size": 60, "max_position_embeddings": 16,
}  # fmt: skip
T5 = {
    "model_type": "t5", "d_model": 32, "d_kv": 16, "d_ff": 48, "num_layers": 2, "num_decoder_layers": 3, "num_heads": 4,
    "vocab_size": 64, "feed_forward_proj": "gated-gelu",
}  # fmt: skip
IMAGES = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 16,
    "patch_size": 4,
}  # fmt: skip
CLIP, VIT = {"model_type": "clip_vision_model", **IMAGES}, {"model_type": "vit", **IMAGES}

case = cache(open_case)


def made(config: Mapping[str, Any]) -> tuple[Checkpoint, Model]:
    """A random model of such a configuration."""
    return Tiny(name="tiny", config=config).open()


def reidentified(checkpoint: Checkpoint, tensors: Mapping[str, LazyTensor], dialect: str | None = "hf") -> Model:
    """What the checkpoint is with these tensors in place of its own."""
    model = models.identify(with_weights(checkpoint, tensors, dialect))
    assert model is not None
    return model


def renamed(tensors: Mapping[str, LazyTensor], change: Callable[[str], str]) -> dict[str, LazyTensor]:
    """Tensors under other names."""
    return {change(name): tensor for name, tensor in tensors.items()}
