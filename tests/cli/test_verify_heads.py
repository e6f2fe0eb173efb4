"""``verify`` of models of a known family with another head, or none: the trunk must be whole, the head is told."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from tests.cli.runner import Runner
from tests.support import fixture_path, write_plan

import anyckpt as api
from anyckpt.checkpoint import Checkpoint
from anyckpt.formats.format import WriteOptions
from anyckpt.formats.registry import by_name
from anyckpt.tensor import LazyTensor, from_array

Edit = Callable[[dict[str, LazyTensor]], dict[str, LazyTensor]]


def edited(folder: Path, kind: str, edit: Edit, family: str = "llama") -> Path:
    """A model of a fixture whose class is called ``kind``, with other tensors."""
    source = fixture_path(f"families/{family}/hf")
    shutil.copytree(source, folder)
    for file in folder.glob("*.safetensors*"):
        file.unlink()
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "architectures": [kind]}))
    plan = by_name("safetensors").plan
    assert plan is not None
    tensors = edit(dict(api.open(source).tensors))
    write_plan(plan(Checkpoint("made", "torch", tensors), WriteOptions()), folder / "model.safetensors")
    return folder


def with_head(name: str, hidden: int = 48) -> Edit:
    head = from_array(np.ones((2, hidden), dtype=np.float32))
    return lambda tensors: {**{key: t for key, t in tensors.items() if key != "lm_head.weight"}, name: head}


def bare(tensors: dict[str, LazyTensor]) -> dict[str, LazyTensor]:
    return {name.removeprefix("model."): t for name, t in tensors.items() if name != "lm_head.weight"}


@pytest.mark.parametrize(
    ("kind", "edit", "told"),
    [
        ("LlamaForSequenceClassification", with_head("score.weight"), "score.weight"),
        ("LlamaForTokenClassification", with_head("score.weight"), "score.weight"),
        ("LlamaForQuestionAnswering", with_head("qa_outputs.weight"), "qa_outputs.weight"),
        ("LlamaForRewardModel", with_head("v_head.weight"), "v_head.weight"),
        ("LlamaForCausalLM", lambda tensors: {**tensors, **with_head("v_head.summary.weight")({})}, "v_head.summary"),
        ("LlamaModel", bare, ""),
        ("LlamaForCausalLM", bare, ""),
    ],
)
def test_another_head_is_no_damage(anyckpt: Runner, tmp_path: Path, kind: str, edit: Edit, told: str) -> None:
    found = anyckpt("verify", edited(tmp_path / "m", kind, edit), "--json")
    assert found.code == 0, found.json["problems"]
    assert found.json["checked"]["model"] is True
    unchecked = [text for text in found.json["unchecked"] if not text.startswith("the contents of")]
    assert told in " ".join(unchecked)
    assert bool(told) == bool(unchecked)


def lacking(part: str, edit: Edit) -> Edit:
    return lambda tensors: {name: t for name, t in edit(tensors).items() if part not in name}


@pytest.mark.parametrize(
    ("kind", "edit", "problem"),
    [
        ("LlamaForSequenceClassification", lacking("score", with_head("score.weight")), "the head of"),
        (
            "LlamaForSequenceClassification",
            lacking("layers.1.mlp.up", with_head("score.weight")),
            "missing: model.layers.1.mlp",
        ),
        ("LlamaForSequenceClassification", lacking("model.norm", with_head("score.weight")), "missing: model.norm"),
        ("LlamaModel", lacking("layers.1.", bare), "layer 1 is missing"),
        ("LlamaForCausalLM", lacking("lm_head", dict), "missing: lm_head.weight"),
        (
            "LlamaForSequenceClassification",
            lambda tensors: {**with_head("score.weight")(tensors), **with_head("model.layers.9.x")({})},
            "no rule of family llama covers 1 tensors: model.layers.9.x",
        ),
    ],
)
def test_a_trunk_or_head_that_is_not_whole_is_damage(
    anyckpt: Runner, tmp_path: Path, kind: str, edit: Edit, problem: str
) -> None:
    found = anyckpt("verify", edited(tmp_path / "m", kind, edit))
    assert found.code == 1
    assert problem in found.out


@pytest.mark.peer
def test_what_transformers_writes_with_any_head_is_sound(anyckpt: Runner, tmp_path: Path) -> None:
    import transformers as hf

    small = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "pad_token_id": 0}
    llama = hf.LlamaConfig(**small, num_attention_heads=4, num_key_value_heads=2)
    bert = hf.BertConfig(**small, num_attention_heads=4)
    gpt2 = hf.GPT2Config(vocab_size=64, n_embd=32, n_layer=1, n_head=4, pad_token_id=0, bos_token_id=1, eos_token_id=2)
    t5 = hf.T5Config(
        vocab_size=64, d_model=32, d_ff=48, num_layers=1, num_heads=4, d_kv=8, feed_forward_proj="gated-gelu"
    )
    models = [
        hf.LlamaModel(llama), hf.LlamaForSequenceClassification(llama), hf.LlamaForQuestionAnswering(llama),
        hf.BertForTokenClassification(bert), hf.BertForMaskedLM(bert), hf.BertModel(bert),
        hf.GPT2ForSequenceClassification(gpt2), hf.GPT2ForTokenClassification(gpt2), hf.T5EncoderModel(t5),
        hf.T5ForTokenClassification(t5), hf.T5ForSequenceClassification(t5),
    ]  # fmt: skip
    for model in models:
        path = tmp_path / type(model).__name__
        model.save_pretrained(path)
        found = anyckpt("verify", path, "--json").json
        assert (found["problems"], found["checked"]["model"]) == ([], True), path
