"""What proves each family: the models that the generic tests run over, and that docs/families.md names.

A family that is added gets a line in ``PROOFS``.  ``test_proofs.py`` then takes each of its samples to the hub and
back, through every container, and tries each tensor missing, surplus and changed; ``test_proofs_peer.py`` compares
each ``Tiny`` with transformers' own model, names, shapes and outputs.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from tests.support import fixture_path

from anyckpt import models
from anyckpt.checkpoint import Checkpoint
from anyckpt.formats.hf import FORMAT
from anyckpt.formats.registry import look_at
from anyckpt.models import Model
from anyckpt.models.variants import stored_names
from anyckpt.tensor import LazyTensor, from_array

Opened = tuple[Checkpoint, Model]


@dataclass(frozen=True, kw_only=True)
class Sample:
    """A small model of a family.

    Attributes:
        name: of its own among all families' samples.
        refused: target format (``nemo2``, ``megatron-lm``, ...) -> pattern of the error, where the target has no such
            model.
    """

    name: str
    refused: Mapping[str, str] = field(default_factory=dict)

    def open(self) -> Opened:
        """The Hugging Face checkpoint and what it is identified as."""
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class Fixture(Sample):
    """``tests/fixtures/families/<name>``, made with transformers.

    It has the tensors of Megatron-Core that gave equal logits (``mcore_te.safetensors``) and these logits.
    """

    def open(self) -> Opened:
        return _identified(FORMAT.read(look_at(fixture_path(f"families/{self.name}") / "hf")))


@dataclass(frozen=True, kw_only=True)
class Tiny(Sample):
    """A random model of transformers' own class; without torch, tensors of the names and shapes that our rules say.

    Attributes:
        config: its ``config.json``, as the arguments of transformers' configuration class; with ``model_type``.
    """

    config: Mapping[str, Any]

    def open(self) -> Opened:
        family = next(f for f in models.known_families().values() if self._type in f.hugging_face.model_types)
        config = {"architectures": [family.hugging_face.architectures[0]], **self.config}
        empty = Checkpoint(self.name, "hf", {}, dialect="hf", config=config, config_kind="hf")
        model = _identified(empty)[1]
        tensors: dict[str, LazyTensor] = {}
        for item in model.definition.expected(model.config):
            shapes = item.rule.operation.source_shapes(item.shape, model.config)
            tensors.update({n: values(n, tuple(s)) for n, s in zip(item.sources, shapes, strict=True)})
        return _identified(replace(empty, tensors=stored_names(tensors, family.hugging_face.variants)))

    @property
    def _type(self) -> Any:
        return self.config["model_type"]


@dataclass(frozen=True, kw_only=True)
class Synthetic(Sample):
    """A state dict of given names and shapes, of a model that transformers has no class of.

    Attributes:
        config: its ``config.json``.
        shapes: stored name -> shape, written down independently of our rules.
        provenance: where names, shapes and keys were seen.
    """

    config: Mapping[str, Any]
    shapes: Mapping[str, tuple[int, ...]]
    provenance: str

    def open(self) -> Opened:
        tensors = {name: values(name, shape) for name, shape in self.shapes.items()}
        config = json.loads(json.dumps(self.config))
        return _identified(Checkpoint(self.name, "hf", tensors, dialect="hf", config=config, config_kind="hf"))


@dataclass(frozen=True)
class Proof:
    """How it is seen that a family is mapped right.

    Attributes:
        samples: models of the family, each a layout or a configuration of its own kind.
        outputs: who computes the same outputs from what we write: ``transformers`` (a peer test compares them), or
            "" where nobody does.
        note: what a reader of the table of families should know of it.
    """

    samples: tuple[Sample, ...]
    outputs: str = "transformers"
    note: str = ""


def values(name: str, shape: tuple[int, ...]) -> LazyTensor:
    """Random values that a name always gets."""
    return from_array(np.random.default_rng(zlib.crc32(name.encode())).standard_normal(shape).astype("<f4"))


def _identified(checkpoint: Checkpoint) -> Opened:
    model = models.identify(checkpoint)
    assert model is not None, checkpoint.path
    return checkpoint, model


def fixtures(*names: str, refused: Mapping[str, str] | None = None) -> tuple[Sample, ...]:
    """Fixtures that behave alike."""
    return tuple(Fixture(name=name, refused=refused or {}) for name in names)


NO_NEMO_1 = {"nemo": "NeMo 1 has no models of family"}
NO_NEMO_2 = {"nemo2": "NeMo 2 has no models of family"}

PROOFS: dict[str, Proof] = {
    "deepseek-v2": Proof(fixtures("deepseek_v2_lite", refused=NO_NEMO_1)),
    "deepseek-v3": Proof(fixtures("deepseek_v3", refused=NO_NEMO_1)),
    "falcon": Proof(fixtures("falcon_seq_mqa")),
    "gemma": Proof(fixtures("gemma")),
    "gemma2": Proof(fixtures("gemma2")),
    "gemma3": Proof(fixtures("gemma3")),
    "gpt2": Proof(fixtures("gpt2")),
    "gpt_bigcode": Proof(fixtures("starcoder_gpt_bigcode")),
    "gpt_neox": Proof(fixtures("gpt_neox")),
    "gpt-oss": Proof(fixtures("gpt_oss", refused=NO_NEMO_1)),
    "llama": Proof(fixtures("llama", "llama_tied_bf16", "llama31_ropescale")),
    "mistral": Proof(fixtures("mistral_swa")),
    "mixtral": Proof(fixtures("mixtral")),
    "nemotron": Proof(fixtures("nemotron")),
    "nemotron-h": Proof(fixtures("nemotron_h", refused=NO_NEMO_1)),
    "phi3": Proof(fixtures("phi3")),
    "qwen2": Proof(fixtures("qwen2")),
    "qwen2-moe": Proof(fixtures("qwen2_moe", refused=NO_NEMO_2)),
    "qwen3": Proof(fixtures("qwen3")),
    "qwen3-moe": Proof(fixtures("qwen3_moe")),
    "starcoder2": Proof(fixtures("starcoder2")),
}
"""By family's name."""


def samples() -> dict[str, Sample]:
    """Every sample of every family by its name."""
    return {sample.name: sample for proof in PROOFS.values() for sample in proof.samples}
