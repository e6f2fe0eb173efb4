"""Samples of transformers' own classes: the same names and shapes, and the same outputs through every framework."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.peer

from tests.models.cases import facts, with_weights  # noqa: E402
from tests.models.proofs import PROOFS, Tiny, near_one  # noqa: E402
from tests.support import write_plan  # noqa: E402

from anyckpt import models  # noqa: E402
from anyckpt.checkpoint import Checkpoint  # noqa: E402
from anyckpt.config.codecs import Implied  # noqa: E402
from anyckpt.errors import MappingError  # noqa: E402
from anyckpt.formats.format import WriteOptions  # noqa: E402
from anyckpt.formats.hf import FORMAT  # noqa: E402
from anyckpt.formats.registry import look_at  # noqa: E402
from anyckpt.tensor import from_array  # noqa: E402

SAMPLES = {
    sample.name: sample
    for proof in PROOFS.values()
    if proof.outputs == "transformers"
    for sample in proof.samples
    if isinstance(sample, Tiny)
}
THROUGH = (
    ("megatron-core", "megatron-core", "megatron-args"),
    ("nemo", "nemo-flat", "nemo1"),
    ("nemo2", "nemo2", "nemo2"),
)
"""Format, naming, and kind of configuration."""


def _has_variants(sample: Tiny) -> bool:
    return bool(sample.open()[1].definition.hugging_face.variants)


def saved(sample: Tiny, folder: Path, original: bool = True) -> Path:
    """A random model of transformers', saved by it: in its published format, or named as it is in memory."""
    values = dict(sample.config)
    config = transformers.AutoConfig.for_model(values.pop("model_type"), **values)
    torch.manual_seed(0)
    kind = getattr(transformers, sample.open()[0].config["architectures"][0])
    theirs = kind._from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            parameter.normal_(std=0.2)
            if name.endswith(sample.near_one or ("\n",)):
                parameter.copy_(torch.from_numpy(near_one(parameter.numpy())))
    theirs.save_pretrained(folder, **({} if original else {"save_original_format": False}))
    return folder


def computed(path: Path, architecture: str) -> Any:
    """What transformers computes for inputs that are always the same."""
    model = getattr(transformers, architecture).from_pretrained(path, attn_implementation="eager").eval()
    generator = torch.Generator().manual_seed(1)
    config = model.config
    seeing, reading = getattr(config, "vision_config", config), getattr(config, "text_config", config)
    inputs = {}
    if model.main_input_name == "pixel_values" or seeing is not config:
        shape = (2, seeing.num_channels, seeing.image_size, seeing.image_size)
        inputs["pixel_values"] = torch.randn(shape, generator=generator)
    if hasattr(config, "encoder_config"):
        inputs["input_features"] = torch.randn((2, 64, config.encoder_config.num_mel_bins), generator=generator)
        inputs["attention_mask"] = torch.arange(64)[None] < torch.tensor([[64], [40]])
        if config.is_encoder_decoder:
            inputs["decoder_input_ids"] = torch.randint(3, config.vocab_size, (2, 12), generator=generator)
    elif model.main_input_name == "input_features":
        shape = (2, config.num_mel_bins, 2 * config.max_source_positions)
        inputs["input_features"] = torch.randn(shape, generator=generator)
        inputs["decoder_input_ids"] = torch.randint(3, config.vocab_size, (2, 12), generator=generator)
    elif model.main_input_name != "pixel_values":
        tokens = torch.randint(3, reading.vocab_size, (2, 24), generator=generator)
        inputs["input_ids"] = tokens
        if config.is_encoder_decoder:
            inputs["decoder_input_ids"] = tokens[:, :12]
        if hasattr(config, "cross_attention_layers"):
            inputs["cross_attention_states"] = torch.randn((2, 5, config.hidden_size), generator=generator)
    with torch.no_grad():
        found = model(**inputs)
    outputs = [value.flatten() for value in found.to_tuple() if isinstance(value, torch.Tensor)]
    return torch.cat(outputs)


def written(checkpoint: Checkpoint, folder: Path) -> Path:
    assert FORMAT.plan is not None
    return write_plan(FORMAT.plan(checkpoint, WriteOptions()), folder)


@pytest.mark.parametrize("name", SAMPLES)
def test_it_computes_the_same(name: str, tmp_path: Path) -> None:
    sample = SAMPLES[name]
    source = FORMAT.read(look_at(saved(sample, tmp_path / "theirs")))
    architecture = source.config["architectures"][0]
    model = models.identify(source)
    assert model is not None
    ours = sample.open()[0]
    assert {key: t.shape for key, t in source.tensors.items()} == {key: t.shape for key, t in ours.tensors.items()}
    expected = computed(tmp_path / "theirs", architecture)
    assert expected.isfinite().all()
    hub = models.to_hub(source, model)
    for target, dialect, kind in THROUGH:
        if target in sample.refused:
            continue
        rendered = models.render_config(model, kind)
        named = models.from_hub(hub, dialect).tensors
        between = replace(with_weights(source, named), config=rendered, config_kind=kind, artifacts={}, details={})
        again = models.identify(between)
        assert again is not None
        assert again.family == model.family
        out = models.from_hub(models.to_hub(between, again), "hf").tensors
        assert facts(out) == facts(source.tensors)
        config = models.render_config(again, "hf")
        final = replace(between, tensors=out, dialect="hf", config=config, config_kind="hf")
        assert torch.equal(computed(written(final, tmp_path / target), architecture), expected), target


@pytest.mark.parametrize("name", SAMPLES)
def test_the_comparison_can_fail(name: str, tmp_path: Path) -> None:
    """With a tensor rolled, or another epsilon, the outputs are others."""
    source = FORMAT.read(look_at(saved(SAMPLES[name], tmp_path / "theirs")))
    architecture = source.config["architectures"][0]
    model = models.identify(source)
    assert model is not None
    expected = computed(tmp_path / "theirs", architecture)
    matrices = [
        key
        for key, tensor in source.tensors.items()
        if tensor.ndim == 2 and tensor.shape[0] > 1 and ".experts." not in key
    ]
    changed = matrices[len(matrices) // 2]
    rolled = from_array(np.roll(source.tensors[changed].numpy(), 1, axis=0))
    other = with_weights(source, {**source.tensors, changed: rolled}, "hf")
    assert not torch.equal(computed(written(other, tmp_path / "rolled"), architecture), expected), changed
    blurred = replace(model, config=replace(model.config, layernorm_epsilon=0.1))
    if any(
        isinstance(row, Implied) and "layernorm_epsilon" in row.values for row in model.definition.hugging_face.codecs
    ):
        with pytest.raises(MappingError, match="epsilon"):
            models.render_config(blurred, "hf")  # the class has one for all models
        return
    other = replace(source, config=models.render_config(blurred, "hf"))
    assert not torch.equal(computed(written(other, tmp_path / "epsilon"), architecture), expected)


@pytest.mark.parametrize("name", [name for name, sample in SAMPLES.items() if _has_variants(sample)])
def test_names_in_memory_are_read(name: str, tmp_path: Path) -> None:
    """What transformers' conversion of a family renames or stacks on loading is the same model in either spelling."""
    stored, in_memory = (saved(SAMPLES[name], tmp_path / str(kind), kind) for kind in (True, False))
    hubs = []
    for path in (stored, in_memory):
        source = FORMAT.read(look_at(path))
        model = models.identify(source)
        assert model is not None
        hubs.append(models.to_hub(source, model))
    assert facts(hubs[0].tensors) == facts(hubs[1].tensors)
