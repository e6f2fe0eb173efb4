"""``--names``: how weights are called where the target takes any names."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.support import fixture_path, sha256_of

from anyckpt.errors import MappingError, UsageError
from anyckpt.models.dialects.registration import registered_order
from anyckpt.operations.convert import convert
from anyckpt.operations.steps import renaming as naming
from anyckpt.operations.steps.joining import open_checkpoint
from anyckpt.operations.steps.layout_request import LayoutRequest

LLAMA = "families/llama/hf"


def digests(path: Path) -> dict[str, str]:
    return {name: sha256_of(tensor) for name, tensor in open_checkpoint(path).weights().items()}


@pytest.mark.parametrize("to", ["safetensors", "torch", "lightning", "dcp"])
def test_hugging_face_names_come_back(to: str, tmp_path: Path) -> None:
    source = fixture_path(LLAMA)
    convert(source, tmp_path / "ranks", to="megatron-lm", layout=LayoutRequest(tensor_parallel=2))
    suffix = {"safetensors": ".safetensors", "torch": ".pt", "lightning": ".ckpt"}.get(to, "")
    convert(tmp_path / "ranks", tmp_path / f"out{suffix}", to=to, names="hf")
    assert digests(tmp_path / f"out{suffix}") == digests(source)


def test_megatron_names_in_a_file_of_any_names(tmp_path: Path) -> None:
    convert(fixture_path(LLAMA), tmp_path / "out.safetensors", to="safetensors", names="hub")
    assert "decoder.layers.0.self_attention.linear_qkv.weight" in digests(tmp_path / "out.safetensors")


def test_a_target_with_names_of_its_own_says_so(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"megatron-core has names of its own.*leave --names out"):
        convert(fixture_path(LLAMA), tmp_path / "out", to="megatron-core", names="hf")
    convert(fixture_path(LLAMA), tmp_path / "out", to="hf", names="hf")


def test_state_by_number_needs_an_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """How transformers' modules register parameters is in no file of Megatron's; by name it is not needed."""
    source = fixture_path("legacy/megatron_gpt_tp2_pp2")
    convert(source, tmp_path / "known.ckpt", to="lightning", names="hf", optimizer="keep", family="qwen2")
    assert list(open_checkpoint(tmp_path / "known.ckpt").weights())[-1] == "model.norm.weight"
    monkeypatch.setattr(naming, "registered_order", lambda names, parts: None)  # as of a family that nobody looked at
    with pytest.raises(MappingError, match="nothing tells in which order.*hf names, and no order.*--optimizer drop"):
        convert(source, tmp_path / "out.ckpt", to="lightning", names="hf", optimizer="keep", family="qwen2")
    convert(source, tmp_path / "out", to="dcp", names="hf", optimizer="keep", family="qwen2")
    assert "optim.state.model.norm.weight.exp_avg" in open_checkpoint(tmp_path / "out").tensors


def test_state_by_number_has_the_order_of_megatrons_modules(tmp_path: Path) -> None:
    """Stacked layers are no parameters; under the names of modules they have that order, whatever the source's."""
    convert(fixture_path("legacy/megatron_gpt_tp2_pp2"), tmp_path / "core", to="megatron-core", optimizer="keep")
    with pytest.raises(MappingError, match="megatron-core names, and no order.*--optimizer drop"):
        convert(tmp_path / "core", tmp_path / "out.ckpt", to="lightning", optimizer="keep")
    convert(tmp_path / "core", tmp_path / "out.ckpt", to="lightning", names="hub", optimizer="keep")
    found = open_checkpoint(tmp_path / "out.ckpt")
    names = list(found.weights())
    assert names == registered_order(names)
    matrices = [name for name, tensor in found.weights().items() if tensor.ndim > 1 and not name.endswith(".bias")]
    for number, name in enumerate(matrices):
        moment = found.tensors[f"optimizer_states.0.optimizer.state.{number}.exp_avg"]
        assert moment.shape == found.weights()[name].shape
