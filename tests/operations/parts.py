"""A larger model around a fixture's: its text part is of a known family, and no rule knows its other parts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from tests.support import fixture_path, write_plan

from anyckpt.checkpoint import Checkpoint
from anyckpt.formats import registry
from anyckpt.formats.format import WriteOptions
from anyckpt.tensor import LazyTensor, from_array

PARTS = {
    "vision_tower.encoder.layers.0.fc1.weight": (3, 2),
    "vision_tower.embed_tokens.weight": (5, 2),
    "multi_modal_projector.linear_1.weight": (2, 2),
}
RELEASE_4 = ("language_model.model.", "language_model.", "")
RELEASE_5 = ("model.language_model.", "", "model.")
"""How releases of transformers spell them: the text, its head, and before the other parts."""


def parts(seed: int = 0) -> dict[str, LazyTensor]:
    numbers = np.random.default_rng(seed)
    return {name: from_array(numbers.standard_normal(shape).astype("<f4")) for name, shape in PARTS.items()}


def seeing(
    path: Path, family: str = "llama", spelling: tuple[str, str, str] = RELEASE_4, seed: int = 0, factor: float = 1.0
) -> Path:
    """A Hugging Face folder of such a model; its text is the fixture's times a factor."""
    source = registry.read(fixture_path(f"families/{family}/hf"))
    text, head, eyes = spelling
    tensors = {}
    for name, tensor in source.tensors.items():
        scaled = tensor if factor == 1 else from_array(tensor.numpy() * np.float32(factor))
        tensors[text + name.removeprefix("model.") if name.startswith("model.") else head + name] = scaled
    tensors.update({eyes + name: tensor for name, tensor in parts(seed).items()})
    return folder(path, tensors, seeing_config(source.config))


def seeing_config(text: dict[str, Any]) -> dict[str, Any]:
    return {
        "model_type": "seeing",
        "architectures": ["SeeingForConditionalGeneration"],
        "text_config": {key: value for key, value in text.items() if key != "architectures"},
        "vision_config": {"model_type": "eyes", "hidden_size": 2},
        "tie_word_embeddings": text.get("tie_word_embeddings", False),
    }


def folder(path: Path, tensors: dict[str, LazyTensor], config: dict[str, Any]) -> Path:
    plan = registry.by_name("hf").plan
    assert plan is not None
    made = Checkpoint("made", "hf", tensors, config=config, config_kind="hf", dialect="hf")
    write_plan(plan(made, WriteOptions()), path)
    assert json.loads((path / "config.json").read_text()) == config
    return path
