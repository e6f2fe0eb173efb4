"""The folder of a model that NeMo Automodel's own checkpointer saved, and what it consolidates of it.

Facts: ``Checkpointer.save_model`` of nemo-automodel 0.7.0 with ``save_consolidated``, on two ranks of gloo with FSDP2;
its ``load_model`` was seen to load what is written of it, with equal parameters.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.support import fixture_path

import anyckpt
from anyckpt.formats import registry
from anyckpt.operations.steps.joining import open_checkpoint


def test_its_shards_are_whole_tensors() -> None:
    """Joined by the offsets in their headers; the configuration is in the folder of its own that it keeps."""
    found, expected = registry.read(fixture_path("automodel/model")), fixture_path("automodel/consolidated.safetensors")
    whole = open_checkpoint(expected).tensors
    assert found.format == "hf" and found.config["model_type"] == "llama"
    assert found.tensors.keys() == whole.keys()
    for name, tensor in whole.items():
        assert found.tensors[name].shape == tensor.shape
        assert found.tensors[name].numpy().tobytes() == tensor.numpy().tobytes()


@pytest.mark.parametrize("to", ["hf", "megatron-core"])
def test_it_is_converted(to: str, tmp_path: Path) -> None:
    source = fixture_path("automodel/model")
    anyckpt.convert(source, tmp_path / to, to=to)
    found = anyckpt.diff(source, tmp_path / to)
    assert found.compared and not (found.different or found.only_in_a or found.only_in_b)
