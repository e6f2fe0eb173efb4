"""Gemma as NeMo 1's own converter stores it: norms are gamma, and no key says so."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.models.cases import open_case
from tests.support import fixture_path

import anyckpt
from anyckpt import models
from anyckpt.checkpoint import Checkpoint, OptimizerState
from anyckpt.config import nemo1
from anyckpt.config.nemo1 import restated, unwrapped
from anyckpt.containers.safetensors import read_safetensors
from anyckpt.errors import UsageError
from anyckpt.formats import registry
from anyckpt.storage import LocalFile
from anyckpt.tensor import LazyTensor, from_array

NORM = "norm_weight", "norm.weight"


def as_converted_by_nemo(kind: str = "float32") -> Checkpoint:
    """What ``convert_gemma_hf_to_nemo.py`` makes of the fixture: adds one to norms, in the weights' type."""
    case = open_case("gemma")
    hub = models.to_hub(case.checkpoint, case.model)
    named = models.from_hub(hub, "nemo-flat").tensors
    tensors: dict[str, LazyTensor] = {}
    for name, tensor in named.items():
        array = tensor.cast(kind).numpy()
        tensors[name] = from_array((array + 1).astype(array.dtype) if name.endswith(NORM) else array)
    config: dict[str, Any] = dict(models.render_config(case.model, "nemo1"))
    del config["layernorm_zero_centered_gamma"], config["hf_model_type"]
    path = str(fixture_path("families/gemma/hf"))
    return Checkpoint(path, "nemo", tensors, dialect="nemo-flat", config=config, config_kind="nemo1")


def weights(path: Path) -> dict[str, LazyTensor]:
    return read_safetensors(LocalFile(path / "model.safetensors"))[0]


def test_one_is_taken_off_the_norms(tmp_path: Path) -> None:
    """Exactly what the converter back to Hugging Face takes off, in float32."""
    source = as_converted_by_nemo()
    done = anyckpt.convert(source, tmp_path / "hf", to="hf")
    assert any("norms are stored as gamma" in note for note in done.notes)
    original, found = open_case("gemma").checkpoint.tensors, weights(tmp_path / "hf")
    assert found.keys() == original.keys()
    shifted = 0
    for name, tensor in found.items():
        array = original[name].cast("float32").numpy()
        if name.endswith("norm.weight"):
            array = (array + np.float32(1)) - np.float32(1)
            shifted += 1
        assert tensor.numpy().tobytes() == array.tobytes(), name
    assert shifted == 2 * 2 + 1


def test_other_types_round_once(tmp_path: Path) -> None:
    source = as_converted_by_nemo("bfloat16")
    anyckpt.convert(source, tmp_path / "hf", to="hf")
    stored = source.tensors["model.decoder.final_layernorm.weight"].numpy()
    found = weights(tmp_path / "hf")["model.norm.weight"].numpy()
    np.testing.assert_array_equal(found, (stored.astype(np.float32) - 1).astype(stored.dtype))


def test_written_is_what_nemo_reads_exactly(tmp_path: Path) -> None:
    """``MegatronGPTModel`` obeys the key, so nothing needs to be computed; and so it comes back."""
    case = open_case("gemma")
    source = tmp_path / "source"
    anyckpt.convert(case.checkpoint, source.with_suffix(".nemo"), to="nemo")
    written = registry.read(str(source.with_suffix(".nemo")))
    assert written.config["layernorm_zero_centered_gamma"] is True
    assert written.config["normalization"] == "rmsnorm"
    model = models.identify(written)
    assert model is not None
    assert models.to_hub(written, model).restated == {}
    anyckpt.convert(source.with_suffix(".nemo"), tmp_path / "back", to="hf")
    back = weights(tmp_path / "back")
    assert {n: t.numpy().tobytes() for n, t in back.items()} == {
        n: t.numpy().tobytes() for n, t in case.checkpoint.tensors.items()
    }


def test_its_configuration_says_what_the_norms_are_now(tmp_path: Path) -> None:
    source = as_converted_by_nemo()
    source.config["of NeMo alone"] = 1
    anyckpt.convert(source, tmp_path / "sharded.nemo", to="nemo", sharded=True)
    sharded = registry.read(str(tmp_path / "sharded.nemo"))
    assert sharded.config["layernorm_zero_centered_gamma"] is True
    assert sharded.config["of NeMo alone"] == 1
    anyckpt.convert(tmp_path / "sharded.nemo", tmp_path / "one", to="hf")
    anyckpt.convert(source, tmp_path / "two", to="hf")
    one, two = weights(tmp_path / "one"), weights(tmp_path / "two")
    assert {n: t.numpy().tobytes() for n, t in one.items()} == {n: t.numpy().tobytes() for n, t in two.items()}
    wrapped = restated({"cfg": source.config, "trainer": {}}, {"a": 1})
    assert unwrapped(wrapped)["a"] == 1
    assert wrapped["trainer"] == {}


def test_only_gemmas_are_taken_for_such() -> None:
    """A model of someone's own with RMSNorm and gated tanh GELU does not scale its embeddings."""
    source = as_converted_by_nemo()
    config = {key: value for key, value in source.config.items() if key != "apply_embedding_scaling"}
    assert models.identify(replace(source, config=config)) is None
    gemma2 = {**source.config, "window_size": [5, 0], "mcore_customization_config": {}}
    found = models.identify(replace(source, config=gemma2))
    assert found is None, "Gemma 2's converter copies norms and says so"
    assert nemo1.parse(source.config).layernorm_zero_centered_gamma is False
    chosen = models.identify(source, family="gemma")
    assert chosen is not None
    assert chosen.config.layernorm_zero_centered_gamma


def test_moments_do_not_go_with_them(tmp_path: Path) -> None:
    source = replace(as_converted_by_nemo(), optimizer=lambda: OptimizerState())
    with pytest.raises(UsageError, match=r"computed on the way.*--optimizer drop"):
        anyckpt.convert(source, tmp_path / "out", to="megatron-core", optimizer="keep")


def test_a_mean_with_another_checkpoint_says_what_its_norms_are(tmp_path: Path) -> None:
    """Both meet in the hub, whose norms the mean has: its configuration must say so."""
    anyckpt.convert(as_converted_by_nemo(), tmp_path / "nvidia.nemo", to="nemo")
    assert "layernorm_zero_centered_gamma" not in registry.read(str(tmp_path / "nvidia.nemo")).config
    anyckpt.convert(open_case("gemma").checkpoint, tmp_path / "hf", to="hf", dtype="fp32")
    anyckpt.average([tmp_path / "nvidia.nemo", tmp_path / "hf"], tmp_path / "mean.nemo")
    mean = registry.read(str(tmp_path / "mean.nemo"))
    assert mean.config["layernorm_zero_centered_gamma"] is True
    anyckpt.convert(tmp_path / "mean.nemo", tmp_path / "back", to="hf")
    back, original = weights(tmp_path / "back"), open_case("gemma").checkpoint.tensors
    for name, tensor in back.items():
        np.testing.assert_allclose(tensor.numpy(), original[name].cast("float32").numpy(), atol=1e-6, rtol=0)
