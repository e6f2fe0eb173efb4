"""PEFT's folders: what is read, what is refused, what is written."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from tests.support import fixture_path, sha256_of, write_plan

from anyckpt.checkpoint import AdapterSettings, Checkpoint
from anyckpt.containers.torch_file import zip_parts
from anyckpt.engine.plan import OutputFile, Plan
from anyckpt.errors import FormatError, UsageError
from anyckpt.formats import registry
from anyckpt.formats.format import WriteOptions
from anyckpt.formats.hf import FORMAT as HF
from anyckpt.formats.peft import FORMAT, settings_from
from anyckpt.formats.registry import detect, look_at, read


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    target = tmp_path / "adapter"
    shutil.copytree(fixture_path("families/lora_llama/hf_adapter"), target)
    return target


def test_fixture(folder: Path) -> None:
    checkpoint = read(folder)
    assert (checkpoint.format, checkpoint.dialect, checkpoint.config_kind) == ("peft", "peft", None)
    assert checkpoint.format_version == "peft 0.21.2"
    assert len(checkpoint.tensors) == 28
    settings = checkpoint.adapter
    assert settings is not None
    assert (settings.kind, settings.rank, settings.alpha) == ("lora", 4, 12)
    assert set(settings.targets) == {"up_proj", "v_proj", "down_proj", "k_proj", "q_proj", "gate_proj", "o_proj"}
    assert settings.base is not None and settings.base.endswith("llama/hf")
    assert not checkpoint.warnings


def test_bin_files_are_read(folder: Path) -> None:
    whole = read(folder)
    (folder / "adapter_model.safetensors").unlink()
    parts = zip_parts(dict(whole.tensors), tensor_name=lambda path: ".".join(map(str, path)))
    write_plan(Plan("torch", (OutputFile("adapter_model.bin", tuple(parts)),)), folder)
    again = read(folder)
    assert {name: sha256_of(tensor) for name, tensor in again.tensors.items()} == {
        name: sha256_of(tensor) for name, tensor in whole.tensors.items()
    }
    (folder / "adapter_model.bin").write_bytes(b"no")
    with pytest.raises(FormatError):
        read(folder)


def test_a_folder_of_a_trainer(folder: Path) -> None:
    (folder / "trainer_state.json").write_text('{"global_step": 7, "epoch": 1}')
    (folder / "optimizer.pt").write_bytes(b"x")
    (folder / "tokenizer.json").write_text("{}")
    checkpoint = read(folder)
    assert (checkpoint.training.step, checkpoint.training.has_optimizer) == (7, True)
    assert checkpoint.tokenizer is not None
    assert "optimizer.pt" in checkpoint.warnings[0]


def test_without_settings(folder: Path) -> None:
    (folder / "adapter_config.json").unlink()
    checkpoint = read(folder)
    assert checkpoint.adapter == AdapterSettings()
    assert "scale is not known" in checkpoint.warnings[0]


def test_a_model_beside_an_adapter_is_a_model(folder: Path) -> None:
    shutil.copy(folder / "adapter_model.safetensors", folder / "model.safetensors")
    assert detect(look_at(folder)) is HF
    assert not FORMAT.detect(look_at(folder / "adapter_model.safetensors"))


@pytest.mark.parametrize("text", ["", "[]", "{", "\x00", '{"r": 1'])
def test_settings_that_are_no_object(text: str, folder: Path) -> None:
    (folder / "adapter_config.json").write_text(text)
    with pytest.raises(FormatError, match=r"adapter_config\.json"):
        read(folder)


@pytest.mark.parametrize(
    "config",
    [
        {"r": 0}, {"r": -1}, {"r": True}, {"r": "8"}, {"r": 1.5}, {"r": 2**40}, {"lora_alpha": "x"},
        {"lora_alpha": float("nan")}, {"lora_alpha": 1e300}, {"rank_pattern": [1]}, {"rank_pattern": {"q": 0}},
        {"alpha_pattern": {"q": None, "k": []}}, {"lora_dropout": {}},
    ],
)  # fmt: skip
def test_settings_that_are_not_possible(config: dict[str, Any], folder: Path) -> None:
    (folder / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(FormatError, match=r"adapter_config\.json.*is not possible"):
        read(folder)


def test_kinds_that_are_not_low_rank_updates_are_named() -> None:
    def kind(**config: Any) -> str:
        return settings_from(config, "x").kind

    assert kind() == kind(use_rslora=True) == kind(init_lora_weights="gaussian") == "lora"
    assert kind(use_dora=True) == "dora"
    assert kind(peft_type="IA3") == "ia3"
    assert kind(use_qalora=True, layer_replication=[[0, 1]]) == "lora with use_qalora, layer_replication"
    assert kind(init_lora_weights="pissa_niter_4") == "lora with init_lora_weights pissa_niter_4"
    assert kind(target_parameters=["mlp.experts.gate_up_proj"]) == "lora"


def test_written_as_it_was(folder: Path, tmp_path: Path) -> None:
    checkpoint = read(folder)
    assert FORMAT.plan is not None
    write_plan(FORMAT.plan(checkpoint, WriteOptions()), tmp_path / "out")
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "out" / name).read_bytes().strip() == (folder / name).read_bytes().strip()


def test_a_model_is_not_written_as_an_adapter() -> None:
    assert FORMAT.plan is not None
    with pytest.raises(UsageError, match="is a model, not an adapter"):
        FORMAT.plan(Checkpoint("x", "hf", {}), WriteOptions())
    with pytest.raises(UsageError, match="the adapter has no settings"):
        FORMAT.plan(Checkpoint("x", "torch", {}, adapter=AdapterSettings()), WriteOptions())
    assert registry.by_name("peft") is FORMAT
