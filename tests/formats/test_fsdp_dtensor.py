"""What Megatron-FSDP's runs load: written from any model, and read again as what it was."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from tests.support import fixture_path

import anyckpt
from anyckpt.errors import MappingError, UsageError
from anyckpt.formats import registry
from anyckpt.operations.steps.layout_request import LayoutRequest

EXPERTS = ("mixtral", "qwen3_moe", "deepseek_v2_lite")


def written(source: Path, folder: Path, **layout: str) -> Path:
    request = LayoutRequest(**layout) if layout else None  # type: ignore[arg-type]
    anyckpt.convert(source, folder, to="megatron-core", backend="fsdp_dtensor", layout=request)
    return folder


@pytest.mark.parametrize("model", ["gpt", "hybrid"])
@pytest.mark.parametrize("implementation", ["local", "transformer_engine"])
@pytest.mark.parametrize("family", ["llama", "llama_tied_bf16", "gpt2", "mixtral", "qwen3_moe", "deepseek_v2_lite"])
def test_it_is_the_same_model(family: str, implementation: str, model: str, tmp_path: Path) -> None:
    source = fixture_path(f"families/{family}/hf")
    written(source, tmp_path / "fsdp", transformer_impl=implementation, megatron_model=model)
    assert not (tmp_path / "fsdp" / "metadata.json").exists(), "by which Megatron-LM tells the two"
    found = registry.read(tmp_path / "fsdp")
    assert found.format == "dcp" and (found.format_version or "").endswith("Megatron-FSDP (fsdp_dtensor)")
    assert found.config["ckpt_format"] == "fsdp_dtensor" and found.config["use_megatron_fsdp"] is True
    assert all(name.startswith("model.module.") for name in found.tensors)
    apart = any(".experts.local_experts.1." in name for name in found.tensors)
    assert apart is (implementation == "local" and family in EXPERTS), "only Transformer Engine groups them"
    gated = [name for name in found.tensors if re.search(r"linear_fc1\.weight\d*(_[wv])?$", name)]
    assert gated and all(name.endswith(("_w", "_v")) is (family != "gpt2") for name in gated)
    assert not anyckpt.diff(source, tmp_path / "fsdp")
    anyckpt.convert(tmp_path / "fsdp", tmp_path / "hf", to="hf")
    assert not anyckpt.diff(source, tmp_path / "hf")


def test_a_run_of_torch_dist_goes_on_with_it(tmp_path: Path) -> None:
    """What the source says of the run stays; random states are those of other ranks."""
    source = fixture_path("mcore/gpt_dense_tp2pp2/ckpt")
    done = anyckpt.convert(source, tmp_path / "fsdp", to="megatron-core", backend="fsdp_dtensor", optimizer="keep")
    found = registry.read(tmp_path / "fsdp")
    assert found.training.step == 10 and found.config["num_layers"] == 2
    assert any("ranks of another run" in reason for reason in done.ignored.values())
    assert "decoder.layers.1.input_layernorm.weight" in " ".join(found.tensors)
    difference = anyckpt.diff(source, tmp_path / "fsdp")
    assert not (difference.different or difference.only_in_a or difference.only_in_b)


@pytest.mark.parametrize("model", ["gpt", "hybrid"])
def test_megatron_bridge(model: str, tmp_path: Path) -> None:
    """The configuration says which kind it is, also when it becomes another; the tokenizer is read again."""
    source = fixture_path("families/llama/hf")
    layout = LayoutRequest(megatron_model=model)
    anyckpt.convert(source, tmp_path / "b", to="megatron-bridge", backend="fsdp_dtensor", layout=layout)
    found = registry.read(tmp_path / "b")
    assert found.details["backend"] == "fsdp_dtensor" and found.tokenizer is not None
    assert found.details["run_config"]["checkpoint"]["ckpt_format"] == "fsdp_dtensor"
    assert all(name.startswith("model.module.") for name in found.tensors) and set(found.artifacts) == set()
    assert not anyckpt.diff(source, tmp_path / "b")
    anyckpt.convert(tmp_path / "b", tmp_path / "torch_dist", to="megatron-bridge")
    other = registry.read(tmp_path / "torch_dist")
    assert other.details["run_config"]["checkpoint"]["ckpt_format"] == "torch_dist"
    assert not anyckpt.diff(source, tmp_path / "torch_dist")


def test_what_is_not_written_so(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="optimizer's state is not written"):
        anyckpt.convert(
            fixture_path("mcore/gpt_opt_plain/ckpt"),
            tmp_path / "a",
            to="megatron-core",
            backend="fsdp_dtensor",
            optimizer="keep",
        )
    with pytest.raises(MappingError, match="Mamba's layers"):
        written(fixture_path("families/nemotron_h/hf"), tmp_path / "b")
    with pytest.raises(UsageError, match="no such backend"):
        anyckpt.convert(fixture_path("families/llama/hf"), tmp_path / "c", to="megatron-core", backend="zarr")
    with pytest.raises(UsageError, match="the same for all releases"):
        written(fixture_path("families/llama/hf"), tmp_path / "d", megatron_version="0.19")
