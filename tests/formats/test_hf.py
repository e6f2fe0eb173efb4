"""Hugging Face folders: what is read, what is written, and what is refused."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.support import assert_tensors_equal_expected, file_bytes, fixture_path, sha256_of, write_plan

import anyckpt
from anyckpt.checkpoint import Checkpoint, Tokenizer
from anyckpt.errors import FormatError, UnsafeError, UsageError
from anyckpt.formats.format import WriteOptions
from anyckpt.formats.hf import FORMAT
from anyckpt.formats.registry import look_at
from anyckpt.storage import MemorySource
from anyckpt.tensor import LazyTensor, from_array

FAMILIES = ("llama", "llama_tied_bf16", "llama31_ropescale", "mistral_swa")


def plan_of(checkpoint: Checkpoint, **options: Any) -> Any:
    assert FORMAT.plan is not None
    return FORMAT.plan(checkpoint, WriteOptions(**options))


def read(path: Path) -> Checkpoint:
    return FORMAT.read(look_at(path))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The llama fixture in three shards with an index, as we write it."""
    source = read(fixture_path("families/llama/hf"))
    return write_plan(plan_of(source, max_shard_size=120_000), tmp_path / "sharded")


@pytest.mark.parametrize("family", FAMILIES)
def test_same_bytes_through_read_and_plan(family: str) -> None:
    path = fixture_path(f"families/{family}/hf")
    assert FORMAT.detect(look_at(path))
    checkpoint = read(path)
    assert (checkpoint.dialect, checkpoint.config_kind, checkpoint.warnings) == ("hf", "hf", [])
    files = {file.path: file for file in plan_of(checkpoint).files}
    assert set(files) == {entry.name for entry in path.iterdir()}
    for name, file in files.items():
        assert file_bytes(file) == (path / name).read_bytes(), name


def test_speech_model_with_unknown_family() -> None:
    expected = json.loads(fixture_path("nemo/speechlm2_v3_0_0/expected.json").read_text())
    checkpoint = read(fixture_path("nemo/speechlm2_v3_0_0/model"))
    assert_tensors_equal_expected(checkpoint.tensors, expected["tensors"])
    assert checkpoint.config == expected["config"]
    assert checkpoint.details["metadata"] == expected["safetensors_metadata"]
    assert list(checkpoint.artifacts) == ["README.md"]


def test_shards_and_index(folder: Path) -> None:
    names = sorted(path.name for path in folder.iterdir() if path.suffix == ".safetensors")
    assert names == [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    original = read(fixture_path("families/llama/hf"))
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in original.tensors.values())
    assert set(index["weight_map"]) == set(original.tensors)
    again = read(folder)
    assert {n: sha256_of(t) for n, t in again.tensors.items()} == {n: sha256_of(t) for n, t in original.tensors.items()}
    assert again.tokenizer is not None
    assert again.warnings == []


def test_a_tensor_above_the_limit_gets_its_own_shard() -> None:
    tensors = {name: from_array(np.zeros(size, "u1")) for name, size in [("a", 4), ("big", 50), ("b", 4), ("c", 4)]}
    plan = plan_of(Checkpoint("x", "hf", tensors), max_shard_size=10)
    shards = [[t.name for t in f.parts if hasattr(t, "name")] for f in plan.files if f.path.endswith(".safetensors")]
    assert shards == [["big"], ["a", "b"], ["c"]]


def test_a_folder_without_config_reads_with_a_warning(folder: Path) -> None:
    (folder / "config.json").unlink()
    checkpoint = read(folder)
    assert len(checkpoint.tensors) == 21
    assert checkpoint.config_kind is None
    assert any("no config.json" in text for text in checkpoint.warnings)


def test_a_lost_index_is_replaced_by_the_names_of_the_shards(folder: Path) -> None:
    (folder / "model.safetensors.index.json").unlink()
    checkpoint = read(folder)
    assert len(checkpoint.tensors) == 21
    assert any("there is no index" in text for text in checkpoint.warnings)
    (folder / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(FormatError, match=r"1 of 3 weight files are missing, such as model-00002-of-00003"):
        read(folder)


def test_missing_shard(folder: Path) -> None:
    (folder / "model-00003-of-00003.safetensors").unlink()
    with pytest.raises(FormatError, match=r"1 of 3 weight files are missing: model-00003-of-00003.safetensors"):
        read(folder)


def edit_index(folder: Path, change: Any) -> None:
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    change(index)
    path.write_text(json.dumps(index))


def test_index_with_a_name_in_another_file(folder: Path) -> None:
    edit_index(folder, lambda i: i["weight_map"].update({"lm_head.weight": "model-00002-of-00003.safetensors"}))
    with pytest.raises(FormatError, match=r"'lm_head.weight': the index and the weight files disagree"):
        read(folder)


def test_index_that_does_not_list_a_tensor(folder: Path) -> None:
    edit_index(folder, lambda index: index["weight_map"].pop("model.norm.weight"))
    with pytest.raises(FormatError, match=r"'model.norm.weight': the index .*expected a tensor that the index lists"):
        read(folder)


def test_index_with_a_tensor_that_no_file_has(folder: Path) -> None:
    file = "model-00001-of-00003.safetensors"
    edit_index(folder, lambda index: index["weight_map"].update({"model.extra": file}))
    with pytest.raises(FormatError, match=r"1 tensors of the index are not in the weight files: model.extra"):
        read(folder)


@pytest.mark.parametrize("name", ["../model.safetensors", "/etc/passwd", "a/b.safetensors", "..", ""])
def test_index_that_leads_outside(folder: Path, name: str) -> None:
    edit_index(folder, lambda index: index["weight_map"].update({"x": name}))
    with pytest.raises(UnsafeError, match="outside its own folder"):
        read(folder)


@pytest.mark.parametrize(
    "content",
    [b"", b"[]", b"{", b'{"weight_map": 3}', b'{"weight_map": {"a": 1}}', b"[" * 100_000, b'{"a": "\xff"}'],
)
def test_damaged_index(folder: Path, content: bytes) -> None:
    (folder / "model.safetensors.index.json").write_bytes(content)
    with pytest.raises(FormatError, match=r"index\.json"):
        read(folder)


def test_damaged_config(folder: Path) -> None:
    (folder / "config.json").write_text("")
    with pytest.raises(FormatError, match=r"config\.json: is not valid JSON"):
        read(folder)


def test_several_loose_files_are_ambiguous(tmp_path: Path) -> None:
    model = fixture_path("nemo/speechlm2_v3_0_0/model")
    for name in ("one.safetensors", "two.safetensors"):
        shutil.copy(model / "model.safetensors", tmp_path / name)
    shutil.copy(model / "config.json", tmp_path)
    with pytest.raises(FormatError, match="several weight files but no index"):
        read(tmp_path)
    (tmp_path / "two.safetensors").unlink()
    assert len(read(tmp_path).tensors) == 3


def test_step_of_a_training_run(folder: Path) -> None:
    (folder / "trainer_state.json").write_text('{"global_step": 1200, "epoch": 1.5}')
    for name in ("optimizer.pt", "scheduler.pt", "rng_state_0.pth", "training_args.bin"):
        (folder / name).write_bytes(b"never read")
    checkpoint = read(folder)
    training = checkpoint.training
    assert (training.step, training.epoch) == (1200, 1)
    assert (training.has_optimizer, training.has_scheduler, training.has_rng) == (True, True, True)
    assert any("optimizer.pt" in text for text in checkpoint.warnings)
    assert set(checkpoint.artifacts) == {"generation_config.json", "trainer_state.json"}


def test_tokenizer_files(folder: Path) -> None:
    for name in ("tokenizer.model", "special_tokens_map.json", "chat_template.jinja", "vocab.json", "merges.txt"):
        (folder / name).write_text("x")
    (folder / "preprocessor_config.json").write_text("{}")
    checkpoint = read(folder)
    assert checkpoint.tokenizer is not None
    assert set(checkpoint.tokenizer.files) == {
        "tokenizer.model", "special_tokens_map.json", "chat_template.jinja", "vocab.json", "merges.txt",
        "tokenizer.json", "tokenizer_config.json",
    }  # fmt: skip
    assert (checkpoint.tokenizer.library, checkpoint.tokenizer.model_file) == ("huggingface", "tokenizer.model")
    assert set(checkpoint.artifacts) == {"generation_config.json", "preprocessor_config.json"}
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()
    tokenizer = read(folder).tokenizer
    assert tokenizer is not None
    assert tokenizer.library == "sentencepiece"


def test_a_sentencepiece_model_gets_the_name_and_class_that_transformers_needs() -> None:
    source = read(fixture_path("families/llama/hf"))
    tokenizer = Tokenizer("sentencepiece", {"0f_tiny.model": MemorySource(b"model")}, "0f_tiny.model")
    files = {file.path: file_bytes(file) for file in plan_of(replace(source, tokenizer=tokenizer)).files}
    assert files["tokenizer.model"] == b"model"
    assert json.loads(files["tokenizer_config.json"])["tokenizer_class"] == "LlamaTokenizer"


def test_a_missing_generation_config_is_derived() -> None:
    source = read(fixture_path("families/llama/hf"))
    files = {file.path: file_bytes(file) for file in plan_of(replace(source, artifacts={})).files}
    derived = json.loads(files["generation_config.json"])
    assert derived == {"_from_model_config": True, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}


def test_names_that_lead_outside_are_not_written() -> None:
    source = read(fixture_path("families/llama/hf"))
    with pytest.raises(UnsafeError):
        plan_of(replace(source, artifacts={"../x": MemorySource(b"")}))


def test_options_and_configurations_that_cannot_be() -> None:
    source = read(fixture_path("families/llama/hf"))
    with pytest.raises(UsageError, match="shard size must be positive"):
        plan_of(source, max_shard_size=-1)
    with pytest.raises(UsageError, match="cannot be written as JSON"):
        plan_of(replace(source, config={"x": {1, 2}}))
    notes = plan_of(replace(source, config={}, config_kind=None)).notes
    assert any("no configuration" in note for note in notes)


@pytest.mark.parametrize("value", [3, True, "x", {}, [], [None], None])
def test_a_configuration_may_say_anything_of_its_architectures(value: Any, tmp_path: Path) -> None:
    weights: dict[str, LazyTensor] = {"a": from_array(np.zeros(2, np.float32))}
    checkpoint = Checkpoint("x", "hf", weights, config={"architectures": value, "eos_token_id": 1}, config_kind="hf")
    assert FORMAT.plan is not None
    written = {file.path for file in FORMAT.plan(checkpoint, WriteOptions()).files}
    assert written == {"model.safetensors", "config.json"}


def test_folders_that_belong_to_a_model_go_along(tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(fixture_path("families/llama/hf"), source)
    for name in ("1_Pooling/config.json", "llm_backbone/config.json", "checkpoint-500/config.json"):
        (source / name).parent.mkdir()
        (source / name).write_text(name)
    done = anyckpt.convert(source, tmp_path / "copy", to="hf")
    assert not done.ignored
    for name in ("1_Pooling/config.json", "llm_backbone/config.json"):
        assert (tmp_path / "copy" / name).read_text() == name
    assert not (tmp_path / "copy" / "checkpoint-500").exists()
    told = anyckpt.convert(source, tmp_path / "weights.safetensors")
    assert {"1_Pooling/config.json", "llm_backbone/config.json"} <= told.ignored.keys()
    anyckpt.convert(source, tmp_path / "model.nemo")
    anyckpt.convert(source, tmp_path / "bridge", to="megatron-bridge")
    anyckpt.convert(source, tmp_path / "nemo2", to="nemo2")
    anyckpt.convert(source, tmp_path / "trtllm", to="trtllm")
