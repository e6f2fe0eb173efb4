"""``anyckpt diff``: verdicts, exit codes, JSON contract."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from tests.cli.runner import Runner
from tests.support import fixture_path, write_plan

import anyckpt as api
from anyckpt import models
from anyckpt.checkpoint import Checkpoint
from anyckpt.containers.safetensors import safetensors_parts
from anyckpt.engine.execute import execute
from anyckpt.engine.plan import OutputFile, Plan
from anyckpt.formats.registry import WriteOptions, by_name
from anyckpt.tensor import LazyTensor, from_array

LLAMA = "families/llama/hf"


def written(path: Path, **arrays: np.ndarray) -> Path:
    tensors: dict[str, LazyTensor] = {name: from_array(array) for name, array in arrays.items()}
    plan = by_name("safetensors").plan
    assert plan is not None
    execute(plan(Checkpoint("made", "torch", tensors), WriteOptions()), str(path))
    return path


def test_equal_is_exit_code_0(anyckpt: Runner) -> None:
    path = fixture_path(LLAMA)
    found = anyckpt("diff", path, path, "--json")
    assert found.code == 0
    assert found.json == {
        "equal": True, "complete": True, "compared": 15, "only_in_a": [], "only_in_b": [], "different": [],
        "configuration": [], "state": [], "names": "hub", "notes": [],
        "not_compared": [
            "files besides weights and configuration: generation_config.json, tokenizer.json, tokenizer_config.json"
        ],
    }  # fmt: skip
    assert "equal: 15 of 15" in anyckpt("diff", path, path).out


def test_different_is_exit_code_1_with_names_reasons_and_sizes(anyckpt: Runner, tmp_path: Path) -> None:
    a = written(tmp_path / "a", same=np.ones(3), value=np.array([1.0, 2.0]), shape=np.ones(2), gone=np.ones(1))
    b = written(tmp_path / "b", same=np.ones(3), value=np.array([1.0, 2.5]), shape=np.ones((2, 1)), new=np.ones(1))
    found = anyckpt("diff", a, b, "--json")
    assert found.code == 1
    shown = found.json
    assert shown["equal"] is False
    assert shown["compared"] == 3
    assert (shown["only_in_a"], shown["only_in_b"]) == (["gone"], ["new"])
    different = {entry["name"]: entry for entry in shown["different"]}
    assert set(different) == {"value", "shape"}
    assert (different["value"]["reason"], different["value"]["max_abs"]) == ("values", 0.5)
    assert different["value"]["max_rel"] == pytest.approx(0.2)
    assert (different["shape"]["reason"], different["shape"]["max_abs"]) == ("shape", None)
    text = anyckpt("diff", a, b)
    assert text.code == 1
    assert "only in A: gone" in text.out
    assert "only in B: new" in text.out
    assert "different: 1 of 3" in text.out


def test_only_a_missing_tensor_is_different_too(anyckpt: Runner, tmp_path: Path) -> None:
    a = written(tmp_path / "a", x=np.ones(3), y=np.ones(3))
    b = written(tmp_path / "b", x=np.ones(3))
    assert anyckpt("diff", a, b).code == 1
    assert anyckpt("diff", b, a).code == 1


def test_tolerances(anyckpt: Runner, tmp_path: Path) -> None:
    a = written(tmp_path / "a", x=np.array([1.0, 100.0]))
    b = written(tmp_path / "b", x=np.array([1.01, 101.0]))
    assert anyckpt("diff", a, b).code == 1
    assert anyckpt("diff", a, b, "--rtol", "0.02").code == 0
    assert anyckpt("diff", a, b, "--atol", "0.5").code == 1
    assert anyckpt("diff", a, b, "--atol", "1").code == 0


def test_a_type_is_a_difference_unless_a_tolerance_is_given(anyckpt: Runner, tmp_path: Path) -> None:
    a = written(tmp_path / "a", x=np.array([1.0, 2.0], dtype=np.float32))
    b = written(tmp_path / "b", x=np.array([1.0, 2.0], dtype=np.float16))
    found = anyckpt("diff", a, b, "--json")
    assert found.code == 1
    assert found.json["different"][0]["reason"] == "dtype"
    assert found.json["different"][0]["max_abs"] == 0
    assert anyckpt("diff", a, b, "--rtol", "1e-9").code == 0


@pytest.mark.parametrize("words", [("--rtol", "-1"), ("--atol", "nan")])
def test_impossible_tolerances_are_exit_code_2(anyckpt: Runner, words: tuple[str, str]) -> None:
    path = fixture_path(LLAMA)
    assert "tolerance" in anyckpt("diff", path, path, *words).error


def test_nothing_in_common_is_exit_code_2(anyckpt: Runner, tmp_path: Path) -> None:
    a, b = written(tmp_path / "a", x=np.ones(3)), written(tmp_path / "b", y=np.ones(3))
    assert "no tensor name in common" in anyckpt("diff", a, b).error


def test_raw_compares_stored_names(anyckpt: Runner, tmp_path: Path) -> None:
    path = fixture_path(LLAMA)
    assert anyckpt("diff", path, path, "--raw", "--json").json["names"] == "stored"
    assert anyckpt("convert", path, tmp_path / "nemo", "--to", "nemo").code == 0
    assert anyckpt("diff", path, tmp_path / "nemo").code == 0
    assert "no tensor name in common" in anyckpt("diff", path, tmp_path / "nemo", "--raw").error


def test_rows_that_pad_the_vocabulary_are_not_compared(anyckpt: Runner, tmp_path: Path) -> None:
    path, padded = fixture_path(LLAMA), tmp_path / "padded"
    checkpoint = api.open(path)
    model = models.identify(checkpoint)
    assert model is not None
    model = replace(model, config=replace(model.config, make_vocab_size_divisible_by=128))
    named = models.from_hub(models.to_hub(checkpoint, model), "megatron-core").tensors
    config = models.render_config(model, "megatron-args")
    target = by_name("megatron-core")
    assert target.plan is not None
    made = replace(checkpoint, tensors=named, config=config, config_kind="megatron-args", dialect="megatron-core")
    execute(target.plan(made, WriteOptions()), str(padded))
    assert api.open(padded).tensors["output_layer.weight"].shape == (256, 64)
    found = anyckpt("diff", path, padded, "--json")
    assert found.code == 0, found.out
    assert any("105" in note and "padding" in note for note in found.json["notes"])


def test_training_state_is_compared_with_raw_only(anyckpt: Runner) -> None:
    path = fixture_path("mcore/gpt_opt_plain/ckpt")
    weights = anyckpt("diff", path, path, "--json").json["compared"]
    everything = anyckpt("diff", path, path, "--raw", "--json").json["compared"]
    assert 0 < weights < everything


def test_vocabularies_of_two_sizes_differ_though_all_shared_rows_are_equal(anyckpt: Runner, tmp_path: Path) -> None:
    path, smaller = fixture_path(LLAMA), tmp_path / "smaller"
    smaller.mkdir()
    config = json.loads((path / "config.json").read_text())
    (smaller / "config.json").write_text(json.dumps({**config, "vocab_size": 96}))
    tensors = api.open(path).tensors
    cut = {name: t.narrow(0, 0, 96) if t.shape[:1] == (151,) else t for name, t in tensors.items()}
    write_plan(Plan("safetensors", (OutputFile("model.safetensors", safetensors_parts(cut)),)), smaller)
    found = anyckpt("diff", path, smaller, "--json")
    assert found.code == 1
    assert {row["reason"] for row in found.json["different"]} == {"shape"}
    assert any("96 and 151" in note for note in found.json["notes"])


@pytest.mark.parametrize("same", [True, False])
def test_a_tied_model_is_compared_with_one_that_keeps_its_head(same: bool, anyckpt: Runner, tmp_path: Path) -> None:
    tied = api.open(fixture_path("families/llama_tied_bf16/hf"))
    embedding = tied.tensors["model.embed_tokens.weight"]
    head = from_array(embedding.numpy() * (1 if same else 2)).cast(embedding.dtype)
    untied = replace(
        tied,
        tensors={**tied.tensors, "lm_head.weight": head},
        config={**tied.config, "tie_word_embeddings": False},
    )
    plan = by_name("hf").plan
    assert plan is not None
    write_plan(plan(untied, WriteOptions()), tmp_path / "untied")
    for words in ((tied.path, tmp_path / "untied"), (tmp_path / "untied", tied.path)):
        found = anyckpt("diff", *words, "--json")
        assert found.code == (0 if same else 1)
        assert [entry["name"] for entry in found.json["different"]] == ([] if same else ["output_layer.weight"])
        assert not found.json["only_in_a"] + found.json["only_in_b"]
        assert any("tied to its embedding" in note for note in found.json["notes"])
