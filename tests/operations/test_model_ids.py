"""Models by name: full-size plans, shrunken models, and configurations that say otherwise."""

from __future__ import annotations

import json
import math
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tests.support import fixture_path

import anyckpt
from anyckpt import models
from anyckpt.checkpoint import Checkpoint
from anyckpt.config.model_ids import configuration_of, known
from anyckpt.dtypes import dtype
from anyckpt.engine.plan import TensorData
from anyckpt.errors import FormatError, MappingError, UsageError
from anyckpt.models import Hub, Model
from anyckpt.models.from_hub import from_hub
from anyckpt.operations.convert import planned
from anyckpt.operations.options import ConvertOptions
from anyckpt.operations.steps.user_files import read_tokenizer
from anyckpt.plain_yaml import load_yaml_mapping
from anyckpt.tensor import Constant

PARAMETERS = {
    "meta-llama/Llama-2-7b-hf": 6_738_415_616,
    "meta-llama/Llama-2-13b-hf": 13_015_864_320,
    "meta-llama/Llama-2-70b-hf": 68_976_648_192,
    "meta-llama/Meta-Llama-3-8B": 8_030_261_248,
    "meta-llama/Meta-Llama-3-70B": 70_553_706_496,
    "mistralai/Mixtral-8x7B-v0.1": 46_702_792_704,
    "mistralai/Mixtral-8x22B-v0.1": 140_620_634_112,
    "mistralai/Mistral-7B-v0.1": 7_241_732_096,
}
"""Of the models on the hub, as their pages count them."""
VOCABULARIES = {"Llama-2": 32000, "Llama-3": 128256, "Mi": 32000}
NEMO = fixture_path("nemo/nemo1_dist_tp1/model.nemo")


def model_of(model_id: str) -> Model:
    bare = Checkpoint("", "nemo2", {}, config=configuration_of(model_id), config_kind="nemo2")
    found = models.identify(bare)
    assert found is not None
    rows = next((size for part, size in VOCABULARIES.items() if part in model_id), 256000)
    return replace(found, config=replace(found.config, vocab_size=rows, padded_vocab_size=rows, dtype="bfloat16"))


def stored(model: Model, path: Path) -> Checkpoint:
    """The model's weights as a sharded ``.nemo`` has them, of the full size, of one value each."""
    kind = dtype("bfloat16")
    tensors = {item.hub: Constant(kind, item.shape) for item in model.definition.expected(model.config)}
    named = from_hub(Hub(model, dict(tensors), {}, []), "nemo-sharded", padded=False).tensors
    return Checkpoint(str(path), "megatron-core", dict(named), model_prefix="model.")


@pytest.mark.parametrize("model_id", known())
def test_the_full_size_is_planned_from_weights_alone(model_id: str, tmp_path: Path) -> None:
    model = model_of(model_id)
    checkpoint = stored(model, tmp_path)
    options = ConvertOptions(to="nemo2", model_id=model_id)
    plan = planned(checkpoint, options)
    elements = sum(math.prod(tensor.shape) for tensor in checkpoint.tensors.values())
    assert elements == PARAMETERS.get(model_id, elements)
    data = [file for file in plan.files if file.path.endswith(".distcp")]
    placed = sum(math.prod(part.tensor.shape) for file in data for part in file.parts if isinstance(part, TensorData))
    assert placed == elements and not [name for name in plan.ignored if not name.endswith("_extra_state")]
    written = sum(file.nbytes for file in data)
    assert 2 * elements <= written < 2 * elements * 1.001 + (64 << 20)


@pytest.mark.parametrize(
    "model_id",
    [
        "meta-llama/Llama-2-70b-hf",
        "meta-llama/Meta-Llama-3-8B",
        "mistralai/Mixtral-8x7B-v0.1",
        "mistralai/Mistral-7B-v0.1",
        "nvidia/nemotron-3-8b-base-4k",
        "nemotron4-15b",
        "nemotronh8b",
    ],
)
def test_a_shrunken_model_has_the_classes_of_its_name(model_id: str, tmp_path: Path) -> None:
    """The bytes of a small model of the same kind, written with a folder of NeMo 2 in place of the name."""
    model = model_of(model_id)
    small = replace(
        model.config,
        num_layers=3,
        hybrid_override_pattern=None if model.config.hybrid_override_pattern is None else "M-*",
        hidden_size=16,
        ffn_hidden_size=32,
        num_attention_heads=4,
        num_query_groups=2,
        kv_channels=4,
        vocab_size=128,
        padded_vocab_size=128,
        max_position_embeddings=64,
        num_moe_experts=None if model.config.num_moe_experts is None else 2,
        moe_ffn_hidden_size=None if model.config.moe_ffn_hidden_size is None else 32,
    )
    shrunken = replace(model, config=small)
    description = tmp_path / "described" / "context"
    description.mkdir(parents=True)
    rendered = models.render_config(shrunken, "nemo2")
    (description / "model.yaml").write_text(json.dumps(rendered))
    out, weights = tmp_path / "out", tmp_path / "weights"
    anyckpt.convert(stored(shrunken, description), weights, to="dcp")
    anyckpt.convert(weights, out, to="nemo2", model_id=tmp_path / "described")
    written = load_yaml_mapping((out / "context" / "model.yaml").read_bytes(), "model.yaml")
    assert written["_target_"] == configuration_of(model_id)["_target_"]
    assert written["config"]["num_layers"] == 3
    again = models.identify(anyckpt.open(out))
    assert again is not None and again.family == model.family
    assert again.config.num_query_groups == 2


def test_an_id_that_is_not_the_models() -> None:
    with pytest.raises(MappingError, match=r"not that of meta-llama/Llama-2-7b-hf .*num_layers 32.*num_layers 2"):
        anyckpt.convert(NEMO, "out", to="nemo2", model_id="meta-llama/Llama-2-7b-hf", dry_run=True)


def test_weights_that_are_not_the_ids(tmp_path: Path) -> None:
    anyckpt.unpack(NEMO, tmp_path / "unpacked")
    weights = tmp_path / "unpacked" / "model_weights"
    with pytest.raises(MappingError, match="is missing"):
        anyckpt.convert(weights, tmp_path / "out", to="nemo2", model_id="meta-llama/Llama-2-7b-hf")


def test_weights_alone_with_a_folder_in_place_of_an_id(tmp_path: Path) -> None:
    whole, alone = tmp_path / "whole", tmp_path / "alone"
    anyckpt.convert(NEMO, whole, to="nemo2")
    anyckpt.unpack(NEMO, tmp_path / "unpacked")
    spm = next((tmp_path / "unpacked").glob("*.model"))
    anyckpt.convert(
        tmp_path / "unpacked" / "model_weights",
        alone,
        to="nemo2",
        model_id=whole,
        tokenizer=spm,
        tokenizer_library="sentencepiece",
    )
    found = anyckpt.diff(whole, alone, raw=True)
    assert found.equal and not found.configuration
    for name in ("context/model.yaml", f"context/{spm.name}"):
        assert (whole / name).read_bytes() == (alone / name).read_bytes()


def test_an_unknown_id_lists_those_that_are_known() -> None:
    with pytest.raises(UsageError, match=r"did you mean meta-llama/Meta-Llama-3-8B\?.*nemotronh56b"):
        configuration_of("meta-llama/Meta-Llama-3-8b")
    with pytest.raises(UsageError, match="give one of them"):
        ConvertOptions(to="nemo2", model_id="nemotron4-15b", config={})


@pytest.mark.parametrize("said", ["e4m3", "hybrid"])
def test_training_in_eight_bits_goes_along(said: str, tmp_path: Path) -> None:
    anyckpt.unpack(NEMO, tmp_path / "old")
    words = f"fp8: true\nfp8_e4m3: {str(said == 'e4m3').lower()}\nfp8_hybrid: true\nfp8_margin: 0\n"
    with open(tmp_path / "old" / "model_config.yaml", "a") as file:
        file.write(words + "fp8_amax_history_len: 1024\nfp8_amax_compute_algo: max\n")
    anyckpt.convert(tmp_path / "old", tmp_path / "new", to="nemo2")
    written = load_yaml_mapping((tmp_path / "new/context/model.yaml").read_bytes(), "")["config"]
    assert (written["fp8"], written["fp8_amax_history_len"], written["fp8_amax_compute_algo"]) == (said, 1024, "max")
    back = anyckpt.open(anyckpt.convert(tmp_path / "new", tmp_path / "back.nemo", to="nemo").output).config
    assert (back["fp8"], back["fp8_e4m3"], back["fp8_margin"]) == (True, said == "e4m3", 0)


def test_tokenizers_by_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    assert read_tokenizer("nvidia/some-model", "huggingface").hub_name == "nvidia/some-model"
    with pytest.raises(FormatError):
        read_tokenizer("nvidia/some-model")
    table = tmp_path / "vocab.json"
    table.write_text(json.dumps([{"rank": 0, "token_bytes": "IQ==", "token_str": "!"}]))
    anyckpt.convert(NEMO, tmp_path / "out", to="nemo2", tokenizer=table, tokenizer_library="tiktoken")
    written = load_yaml_mapping((tmp_path / "out/context/model.yaml").read_bytes(), "")["tokenizer"]
    assert written["_target_"].endswith("TiktokenTokenizer") and written["vocab_file"] == "vocab.json"
    assert (tmp_path / "out/context/vocab.json").read_bytes() == table.read_bytes()
    tokenizer: Any = anyckpt.open(tmp_path / "out").tokenizer
    assert tokenizer.library == "tiktoken" and list(tokenizer.files) == ["vocab.json"]
    with pytest.raises(UsageError, match="another library"):
        read_tokenizer(str(fixture_path("families/llama/hf")), "sentencepiece")
    with pytest.raises(UsageError, match="is no vocabulary of tiktoken"):
        read_tokenizer(str(NEMO), "tiktoken")
    with pytest.raises(UsageError, match="give one with --tokenizer"):
        ConvertOptions(to="nemo2", tokenizer_library="tiktoken")


def test_a_tokenizer_of_another_vocabulary_is_told(tmp_path: Path) -> None:
    """The three sizes are compared: tokens, rows and what the configuration says."""
    other = fixture_path("families/llama/hf")
    done = anyckpt.convert(NEMO, tmp_path / "out", to="nemo2", tokenizer=other)
    assert any("the tokenizer has 151 tokens and the embedding 32 rows" in note for note in done.notes), done.notes
    fitting = anyckpt.convert(other, tmp_path / "fits.nemo", to="nemo")
    again = anyckpt.convert(tmp_path / "fits.nemo", tmp_path / "fits", to="nemo2")
    assert not any("another model's tokenizer" in note for note in (*fitting.notes, *again.notes))


def test_a_name_on_the_hub_is_recorded_without_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    done = anyckpt.convert(NEMO, tmp_path / "out", to="nemo2", tokenizer="org/name", tokenizer_library="huggingface")
    assert any("install anyckpt[hub]" in note for note in done.notes)
    tokenizer: Any = anyckpt.open(tmp_path / "out").tokenizer
    assert tokenizer.hub_name == "org/name" and not tokenizer.files
