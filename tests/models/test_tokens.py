"""What tokenizer files say, without the tokenizer's library."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.models.cases import open_case, with_weights
from tests.support import fixture_path

from anyckpt import models
from anyckpt.checkpoint import Checkpoint, Tokenizer
from anyckpt.config.model import ModelConfig
from anyckpt.formats.nemo import FORMAT as NEMO
from anyckpt.formats.registry import look_at
from anyckpt.models.tokens import TokenFacts, token_facts
from anyckpt.models.vocabulary import true_vocabulary
from anyckpt.storage import LocalFile, MemorySource


def hugging_face(**files: Any) -> Tokenizer:
    sources = {f"{name}.json": MemorySource(json.dumps(value).encode()) for name, value in files.items()}
    return Tokenizer("huggingface", sources)


def test_hugging_face_files() -> None:
    folder = fixture_path("families/llama/hf")
    names = ("tokenizer.json", "tokenizer_config.json")
    facts = token_facts(Tokenizer("huggingface", {name: LocalFile(folder / name) for name in names}))
    content = json.loads((folder / "tokenizer.json").read_text())
    assert facts.count == max(content["model"]["vocab"].values()) + 1


def test_special_tokens() -> None:
    tokenizer = hugging_face(
        tokenizer={"model": {"vocab": {"<s>": 1, "a": 2}}, "added_tokens": [{"id": 7, "content": "<end>"}]},
        tokenizer_config={"eos_token": {"content": "<end>"}, "bos_token": "<s>", "pad_token": None},
    )
    assert token_facts(tokenizer) == TokenFacts(8, {"bos_token_id": 1, "eos_token_id": 7})


def test_unigram_vocabularies_are_lists() -> None:
    assert token_facts(hugging_face(tokenizer={"model": {"vocab": [["a", -1.0], ["b", -2.0]]}})).count == 2


def test_a_sentencepiece_model() -> None:
    checkpoint = NEMO.read(look_at(fixture_path("nemo/nemo1_dist_tp1/model.nemo")))
    assert token_facts(checkpoint.tokenizer) == TokenFacts(40, {"bos_token_id": 1, "eos_token_id": 2})


@pytest.mark.parametrize(
    "tokenizer",
    [
        None,
        Tokenizer("huggingface", {}),
        Tokenizer("sentencepiece", {"m": MemorySource(b"\xff" * 40)}, "m"),
        Tokenizer("sentencepiece", {"m": MemorySource(b"\x0a\x7f")}, "m"),
        Tokenizer("sentencepiece", {"m": MemorySource(b"\x0b\x00")}, "m"),
        Tokenizer("huggingface", {"tokenizer.json": MemorySource(b"{")}),
        Tokenizer("huggingface", {"tokenizer.json": MemorySource(b"[" * 100_000)}),
        hugging_face(tokenizer=[]),
        hugging_face(tokenizer={"model": 3, "added_tokens": 4}),
        hugging_face(tokenizer={"model": {"vocab": {"a": "x"}}, "added_tokens": [3, {"content": 4}]}),
    ],
)
def test_unreadable_files_say_nothing(tokenizer: Tokenizer | None) -> None:
    assert token_facts(tokenizer) == TokenFacts()


@given(st.binary(max_size=60))
def test_any_bytes_are_a_sentencepiece_model_or_nothing(data: bytes) -> None:
    token_facts(Tokenizer("sentencepiece", {"m": MemorySource(data)}, "m"))


@pytest.mark.parametrize(
    ("rows", "tokens", "true"),
    [
        (32_000, 32_000, 32_000),
        (32_128, 32_001, 32_001),  # padded to 128
        (32_256, 32_001, 32_001),  # padded to 128 at tensor parallel size 2
        (40_000, 32_001, 40_000),  # no padding rule gives this
        (32_000, None, 32_000),
        (32_000, 32_001, 32_000),
    ],
)
def test_the_true_vocabulary(rows: int, tokens: int | None, true: int) -> None:
    config = ModelConfig("x", 1, 8, 8, 1, 1, 8)
    found, note = true_vocabulary(rows, config, tokens)
    assert found == true
    assert (note is None) == (rows == tokens)


def test_an_exported_vocabulary_is_that_of_the_tokenizer() -> None:
    case = open_case("llama")
    stored = models.from_hub(case.hub(), "nemo-flat").tensors
    padded = {name: t.pad(0, 256) if t.shape[0] == 151 else t for name, t in stored.items()}
    config = models.render_config(case.model, "nemo1")
    for key in ("vocab_size", "override_vocab_size", "eos_token_id"):
        del config[key]
    checkpoint: Checkpoint = with_weights(case.checkpoint, padded)
    checkpoint.config, checkpoint.config_kind = {**config, "make_vocab_size_divisible_by": 128}, "nemo1"
    checkpoint.tokenizer = hugging_face(
        tokenizer={"model": {"vocab": {f"t{i}": i for i in range(151)}}}, tokenizer_config={"eos_token": "t2"}
    )
    model = models.identify(checkpoint)
    assert model is not None
    assert (model.config.vocab_size, model.config.padded_vocab_size, model.config.eos_token_id) == (151, 256, 2)
    hub = models.to_hub(checkpoint, model)
    assert models.from_hub(hub, "hf").tensors["lm_head.weight"].shape == (151, 64)
    assert any("tokenizer's 151 tokens" in note for note in hub.notes)
