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
from anyckpt.formats.format import WriteOptions
from anyckpt.formats.registry import by_name
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
        "configuration": [], "state": [], "files": [], "names": "hub", "notes": [], "movements": None, "layers": None,
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


def test_training_state_is_compared_unless_weights_only_are_asked_for(anyckpt: Runner) -> None:
    path = fixture_path("mcore/gpt_opt_plain/ckpt")
    everything = anyckpt("diff", path, path, "--json").json
    weights = anyckpt("diff", path, path, "--weights-only", "--json").json
    assert 0 < weights["compared"] < everything["compared"]
    assert (weights["complete"], everything["complete"]) == (False, True)
    assert "the weights are equal" in anyckpt("diff", path, path, "--weights-only").out


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


def test_which_layers_moved_most(anyckpt: Runner, tmp_path: Path) -> None:
    one = {f"l.{number}.{name}": np.ones(4) for number in range(3) for name in ("w", "b")}
    other = {**one, "l.1.w": np.full(4, 5.0), "l.2.b": np.array([1, 1, 1, np.nan]), "l.0.w": np.full(4, 1.5)}
    a, b = written(tmp_path / "a", **one), written(tmp_path / "b", **other)
    layers = anyckpt("diff", a, b, "--layers", "--top", "2")
    assert layers.code == 1
    lines = layers.out.splitlines()
    assert lines[0].split() == "layer relative cosine max abs mean abs differ".split()
    assert [line.split()[:4] for line in lines[1:3]] == [
        ["l.2", "nan", "nan", "nan"],
        ["l.1", "2.828", "0.832050", "4"],
    ]
    assert lines[3] == "1 more differ less"
    tensors = anyckpt("diff", a, b, "--sort", "mean").out.splitlines()
    assert [line.split()[0] for line in tensors[1:4]] == ["l.2.b", "l.1.w", "l.0.w"]
    shown = anyckpt("diff", a, b, "--stats", "--json").json
    assert {row["name"]: row["relative"] for row in shown["layers"]} == {
        "l.0": pytest.approx(0.35355339), "l.1": pytest.approx(2.8284271), "l.2": "NaN"
    }  # fmt: skip
    assert len(shown["movements"]) == 6
    assert [row["name"] for row in anyckpt("diff", a, b, "--top", "1", "--json").json["movements"]] == ["l.2.b"]


def test_nan_is_shown_as_nan(anyckpt: Runner, tmp_path: Path) -> None:
    a = written(tmp_path / "a", x=np.ones(2), y=np.ones(2))
    b = written(tmp_path / "b", x=np.array([1, np.nan]), y=np.array([1, np.inf]))
    rows = [line.split() for line in anyckpt("diff", a, b).out.splitlines()[1:3]]
    assert [(row[0], *row[-2:]) for row in rows] == [("x", "nan", "nan"), ("y", "inf", "inf")]
    assert [(row["nonfinite"], row["nan"]) for row in anyckpt("diff", a, b, "--json").json["different"]] == [
        (1, 1),
        (1, 0),
    ]


def test_tolerances_by_type(anyckpt: Runner, tmp_path: Path) -> None:
    a = written(tmp_path / "a", x=np.ones(1, "<f2"), y=np.ones(1, "<f4"))
    b = written(tmp_path / "b", x=np.array([1.01], "<f2"), y=np.array([1.01], "<f4"))
    assert anyckpt("diff", a, b, "--atol", "fp16=0.1").code == 1
    assert anyckpt("diff", a, b, "--atol", "fp16=0.1,fp32=0.1").code == 0
    assert anyckpt("diff", a, b, "--atol", "fp16=0.1", "--atol", "0.1").code == 0
    assert "bf16=1e-2" in anyckpt("diff", a, b, "--atol", "fp16").error
    assert "element type" in anyckpt("diff", a, b, "--atol", "fp61=1").error
    assert "no number" in anyckpt("diff", a, b, "--atol", "=1").error


def test_some_tensors_alone(anyckpt: Runner, tmp_path: Path) -> None:
    a = written(tmp_path / "a", x=np.ones(1), y=np.ones(1))
    b = written(tmp_path / "b", x=np.ones(1), y=np.zeros(1))
    assert anyckpt("diff", a, b, "--tensors", "x").code == 0
    assert anyckpt("diff", a, b, "--tensors", "x", "--tensors", "y").code == 1
    assert "no tensor matches" in anyckpt("diff", a, b, "--tensors", "z").error
