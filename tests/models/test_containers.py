"""Every family through every container of Megatron's and NeMo's, and cut for tensor and expert parallel ranks."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from tests.models.cases import facts
from tests.models.proofs import Fixture, Sample, in_training, samples
from tests.support import fixture_path, write_plan

import anyckpt
from anyckpt import models
from anyckpt.errors import AnyckptError
from anyckpt.formats import megatron_core
from anyckpt.formats.format import WriteOptions
from anyckpt.formats.hf import FORMAT
from anyckpt.models.dialects import spellings
from anyckpt.operations.steps.joining import open_checkpoint
from anyckpt.operations.steps.layout_request import LayoutRequest
from anyckpt.optimizer.read import with_optimizer
from anyckpt.tensor import LazyTensor

SAMPLES = samples()
TARGETS = ("nemo", "nemo2", "megatron-core", "megatron-core-zarr", "megatron-bridge", "megatron-lm")


@dataclass
class Written:
    """Samples as folders; those that are no fixtures are written once."""

    root: Path

    def path(self, sample: Sample) -> Path:
        if isinstance(sample, Fixture):
            return fixture_path(f"families/{sample.name}/hf")
        folder = self.root / sample.name
        if not folder.exists():
            assert FORMAT.plan is not None
            write_plan(FORMAT.plan(sample.open()[0], WriteOptions()), folder)
        return folder


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Written:
    return Written(tmp_path_factory.mktemp("samples"))


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", SAMPLES)
def test_there_and_back(name: str, target: str, written: Written, tmp_path: Path) -> None:
    sample = SAMPLES[name]
    source = written.path(sample)
    there = tmp_path / ("there.nemo" if target == "nemo" else "there")
    before = anyckpt.open(source)
    layout = None
    if target == "megatron-lm":
        model = models.identify(before)
        assert model is not None
        layout = LayoutRequest(tensor_parallel=2, expert_parallel=2 if model.config.num_moe_experts else None)
    if target in sample.refused:
        with pytest.raises(AnyckptError, match=sample.refused[target]):
            anyckpt.convert(source, there, to=target, layout=layout)
        assert not there.exists()
        return
    anyckpt.convert(source, there, to=target, layout=layout)
    anyckpt.convert(there, tmp_path / "back", to="hf")
    after = anyckpt.open(tmp_path / "back")
    assert facts(after.tensors) == facts(before.tensors)
    assert after.config["model_type"] == before.config["model_type"]


@pytest.mark.parametrize("name", [name for name in SAMPLES if "megatron-core" not in SAMPLES[name].refused])
def test_keys_of_each_layer(name: str, written: Written, tmp_path: Path) -> None:
    """Megatron-Core with ``non_homogeneous_layers`` keeps each layer's tensors apart; experts stay stacked."""
    source = written.path(SAMPLES[name])
    anyckpt.convert(source, tmp_path / "stacked", to="megatron-core")
    stacked = anyckpt.open(tmp_path / "stacked")
    apart = replace(stacked, tensors=of_each_layer(stacked.tensors))
    assert all(re.search(r"\.layers\.\d+\.", key) for key in apart.tensors if ".layers." in key)
    assert megatron_core.FORMAT.plan is not None
    write_plan(megatron_core.FORMAT.plan(apart, WriteOptions()), tmp_path / "apart")
    anyckpt.convert(tmp_path / "apart", tmp_path / "back", to="hf")
    assert facts(anyckpt.open(tmp_path / "back").tensors) == facts(anyckpt.open(source).tensors)


def of_each_layer(tensors: Mapping[str, LazyTensor]) -> dict[str, LazyTensor]:
    """Layers that are stacked, one by one."""
    found: dict[str, LazyTensor] = {}
    for key, tensor in tensors.items():
        match = re.fullmatch(r"((?:decoder|encoder)\.layers)\.(?!\d+\.)(.+)", key)
        if match is None:
            found[key] = tensor
        else:
            found.update({f"{match[1]}.{layer}.{match[2]}": tensor[layer] for layer in range(tensor.shape[0])})
    return found


@pytest.mark.parametrize(
    ("name", "through"),
    [
        *((name, through) for name in SAMPLES for through in ("megatron-core", "megatron-lm")),
        *((name, "megatron-bridge") for name in ("llama", "deepseek_v3", "nemotron_h")),  # the same payload
    ],
)
def test_the_optimizer_state_of_every_parameter(name: str, through: str, tmp_path: Path) -> None:
    """Padded, cut for ranks or not, and back, each slot of each parameter has the bytes that it had."""
    sample = SAMPLES[name]
    if through in sample.refused:
        return
    checkpoint, model = sample.open()
    (tmp_path / "source").mkdir()
    source = replace(in_training(checkpoint, model), path=str(tmp_path / "source"))
    layout = None
    if through == "megatron-lm":
        layout = LayoutRequest(tensor_parallel=2, expert_parallel=2 if model.config.num_moe_experts else None)
    anyckpt.convert(source, tmp_path / "there", to=through, optimizer="keep", layout=layout)
    kept = with_optimizer(open_checkpoint(tmp_path / "there"))
    assert kept.optimizer is not None
    assert source.optimizer is not None
    before, after = source.optimizer(), kept.optimizer()
    assert after.step == before.step
    assert after.slots.keys() == before.slots.keys()
    for slot, tensors in before.slots.items():
        found = spellings.to_hub_names(after.slots[slot])[0]
        rows = {key: t.narrow(0, 0, tensors[key].shape[0]) if t.ndim else t for key, t in found.items()}
        assert facts(rows) == facts(tensors), "but for rows that pad the vocabulary"
