"""The family fixtures, opened."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from tests.support import fixture_path, sha256_of

from anyckpt import models
from anyckpt.checkpoint import Checkpoint
from anyckpt.containers.safetensors import read_safetensors
from anyckpt.formats.hf import FORMAT
from anyckpt.formats.registry import look_at
from anyckpt.layout import experts
from anyckpt.layout.partition import Rules
from anyckpt.models import Hub, Model
from anyckpt.storage import LocalFile
from anyckpt.tensor import LazyTensor

FAMILIES = (
    "llama", "llama_tied_bf16", "llama31_ropescale", "mistral_swa", "qwen2", "qwen3", "gemma", "gemma2", "gemma3",
    "phi3", "starcoder2", "nemotron", "gpt2", "starcoder_gpt_bigcode", "gpt_neox", "falcon_seq_mqa",
)  # fmt: skip
MEGATRON_DIALECTS = ("hub", "megatron-core", "nemo-flat", "nemo-sharded", "nemo2")


@dataclass
class Case:
    """A fixture: the Hugging Face checkpoint, its model, and what its author found it to be in Megatron-Core."""

    checkpoint: Checkpoint
    model: Model
    meta: dict[str, Any]
    megatron: dict[str, LazyTensor]

    def padded(self) -> Model:
        """The model with the vocabulary padding that the fixture's Megatron tensors have."""
        return replace(
            self.model, config=replace(self.model.config, padded_vocab_size=self.meta.get("padded_vocab_size"))
        )

    def hub(self) -> Hub:
        return models.to_hub(self.checkpoint, self.model)


def open_case(name: str) -> Case:
    path = fixture_path(f"families/{name}")
    checkpoint = FORMAT.read(look_at(path / "hf"))
    model = models.identify(checkpoint)
    assert model is not None
    meta = json.loads((path / "meta.json").read_text())
    return Case(checkpoint, model, meta, read_safetensors(LocalFile(path / "mcore_te.safetensors"))[0])


def facts(tensors: Mapping[str, LazyTensor]) -> dict[str, tuple[str, tuple[int, ...], str]]:
    """Names, element types, shapes and digests."""
    return {name: (tensor.dtype.name, tensor.shape, sha256_of(tensor)) for name, tensor in tensors.items()}


def with_weights(checkpoint: Checkpoint, tensors: Mapping[str, LazyTensor], dialect: str | None = None) -> Checkpoint:
    return replace(checkpoint, tensors=dict(tensors), dialect=dialect)


def partition_of(hub: str) -> str | None:
    """What the layouts' table says of a hub name with ``*`` for its numbers; None if nothing."""
    name = hub.replace("*", "0")
    expert = experts.parse(name)
    kind = Rules().kind(name) if expert is None else Rules().kind(expert.base, of_expert=True)
    return None if kind is None else kind.name


def model_of(config: dict[str, Any]) -> Model:
    """The model that a configuration is of."""
    model = models.identify(Checkpoint("x", "x", {}, config=config, config_kind=models.config_kind(config)))
    assert model is not None
    return model


def notes_of(model: Model, kind: str) -> str:
    """What is told where a model's configuration is written."""
    notes: list[str] = []
    models.render_config(model, kind, notes=notes)
    return "; ".join(notes)
