"""GGUF files written and read back, their tokenizers, and what is refused or damaged."""

from __future__ import annotations

import json
import shutil
import struct
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.support import fixture_path

import anyckpt
from anyckpt.containers.safetensors import safetensors_parts
from anyckpt.engine.execute import execute
from anyckpt.engine.plan import OutputFile, Plan
from anyckpt.errors import FormatError, MappingError, MissingLibraryError, UnsafeError, UsageError
from anyckpt.formats.gguf.blocks import ENCODERS, decode, encode
from anyckpt.formats.gguf.byte_pairs import _EXPRESSIONS
from anyckpt.formats.gguf.container import ALIGNMENT, Typed, header_bytes, read_header
from anyckpt.formats.gguf.nodes import Decoded, Encoded
from anyckpt.formats.gguf.types import TYPES
from anyckpt.models.sentencepiece import read_model
from anyckpt.storage import MemorySource
from anyckpt.tensor import LazyTensor, from_array

FAMILIES = [
    "llama",
    "llama31_ropescale",
    "llama_tied_bf16",
    "mistral_swa",
    "mixtral",
    "qwen2",
    "qwen2_moe",
    "qwen3",
    "qwen3_moe",
    "gemma",
    "gemma3",
    "gpt_oss",
]
LLAMA = fixture_path("families/llama/hf")


def numbers(tensor: LazyTensor) -> np.ndarray[Any, Any]:
    return np.asarray(tensor.cast("float32"))


@pytest.mark.parametrize("family", FAMILIES)
def test_families_come_back(family: str, tmp_path: Path) -> None:
    source = fixture_path(f"families/{family}/hf")
    anyckpt.convert(source, tmp_path / "m.gguf")
    given, found = anyckpt.open(source), anyckpt.open(tmp_path / "m.gguf")
    assert found.format == "gguf"
    assert {*found} == {*given}
    for name, tensor in given.items():
        assert np.array_equal(numbers(found[name]), numbers(tensor)), name
        if tensor.ndim > 1 and not name.endswith(("gate.weight", "router.weight")):
            assert found[name].dtype == tensor.dtype
    same = ("hidden_size", "intermediate_size", "num_hidden_layers", "rms_norm_eps", "vocab_size")
    assert {key: found.config[key] for key in same} == {key: given.config[key] for key in same}
    assert found.config["tie_word_embeddings"] == given.config["tie_word_embeddings"]
    assert anyckpt.verify(tmp_path / "m.gguf").sound
    differences = anyckpt.diff(source, tmp_path / "m.gguf", atol=0).different
    assert {one.reason for one in differences} <= {"dtype"}  # norms are in float32


def test_llama3_frequencies_come_back(tmp_path: Path) -> None:
    source = fixture_path("families/llama31_ropescale/hf")
    anyckpt.convert(source, tmp_path / "m.gguf")
    given = anyckpt.open(source).config["rope_parameters"]
    found = anyckpt.open(tmp_path / "m.gguf").config
    assert {**found["rope_scaling"], "rope_theta": found["rope_theta"]} == given


@pytest.mark.parametrize("kind", ["f32", "f16", "bf16", *(name.lower() for name in ENCODERS)])
def test_matrices_are_of_the_type_asked_for(kind: str, tmp_path: Path) -> None:
    anyckpt.convert(LLAMA, tmp_path / "m.gguf", tensor_type=kind)
    header = read_header(MemorySource((tmp_path / "m.gguf").read_bytes()))
    kinds = {info.name: info.type.name for info in header.tensors}
    assert kinds["blk.0.attn_q.weight"] == kind.upper()
    assert {kinds[name] for name in kinds if name.endswith("norm.weight")} == {"F32"}
    assert header.metadata["general.file_type"] == TYPES[kind.upper()].file_type
    assert all(info.offset % ALIGNMENT == 0 for info in header.tensors)
    given, found = anyckpt.open(LLAMA), anyckpt.open(tmp_path / "m.gguf")
    for name, tensor in given.items():
        most = np.abs(numbers(tensor)).max()
        assert np.abs(numbers(found[name]) - numbers(tensor)).max() <= most / 6
    anyckpt.convert(LLAMA, tmp_path / "one.gguf", tensor_type=kind, workers=1)
    assert (tmp_path / "one.gguf").read_bytes() == (tmp_path / "m.gguf").read_bytes()


def test_from_a_nemo_checkpoint_and_on(tmp_path: Path) -> None:
    source = fixture_path("nemo/nemo1_mp_tp2_pp2")
    done = anyckpt.convert(next(source.glob("*.nemo")), tmp_path / "m.gguf", tensor_type="q8_0")
    assert any("no whole blocks of Q8_0" in note for note in done.notes)  # rows of 16
    assert any("40 tokens and the embedding 32 rows; llama.cpp" in note for note in done.notes)
    anyckpt.convert(tmp_path / "m.gguf", tmp_path / "back", to="megatron-core", dtype="bf16")
    found = anyckpt.diff(next(source.glob("*.nemo")), tmp_path / "back", atol=1e-2, rtol=1e-2)
    assert found.compared == 15
    assert not (found.different or found.only_in_a or found.only_in_b)


def test_what_cannot_be_written_is_refused(tmp_path: Path) -> None:
    def refused(text: str, kind: type[Exception], source: Any, **options: Any) -> None:
        with pytest.raises(kind, match=text):
            anyckpt.convert(source, tmp_path / "m.gguf", **options)

    refused("does not take query_pre_attn_scalar", MappingError, fixture_path("families/gemma2/hf"))
    refused("model_type nemotron", MappingError, fixture_path("families/nemotron/hf"))
    refused("hf has no such type of tensors", UsageError, LLAMA, to="hf", tensor_type="q8_0")
    refused("expected f32, f16, .*found q9", UsageError, LLAMA, tensor_type="q9")
    shutil.copytree(LLAMA, tmp_path / "source")
    config = json.loads((LLAMA / "config.json").read_text())
    (tmp_path / "source" / "config.json").write_text(json.dumps({**config, "hidden_act": "gelu"}))
    refused("does not take hidden_act|hidden_act", MappingError, tmp_path / "source")
    assert not list(tmp_path.glob("*.gguf"))
    done = anyckpt.convert(fixture_path("families/mistral_swa/hf"), tmp_path / "m.gguf")
    assert any("sliding_window 5" in note for note in done.notes)


# -- tokenizers ----------------------------------------------------------------------------------------------


def with_tokenizer(folder: Path, content: dict[str, Any]) -> Path:
    shutil.copytree(LLAMA, folder)
    (folder / "tokenizer.json").write_text(json.dumps(content))
    settings = {"bos_token": "<s>", "eos_token": "</s>", "add_bos_token": True, "chat_template": "{{ messages }}"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def byte_pairs(kind: str) -> dict[str, Any]:
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": kind == "gpt-2"}
    split = {"type": "Split", "pattern": {"Regex": _EXPRESSIONS.get(kind, kind)}, "behavior": "Isolated"}
    return {
        "added_tokens": [
            {"id": 0, "content": "<s>", "special": True},
            {"id": 1, "content": "</s>", "special": True},
            {"id": 6, "content": "<tool>", "special": False},
        ],
        "pre_tokenizer": level if kind == "gpt-2" else {"type": "Sequence", "pretokenizers": [split, level]},
        "model": {
            "type": "BPE",
            "vocab": {"<s>": 0, "</s>": 1, "a": 2, "b": 3, "ab": 4, "Ġ": 5},
            "merges": [["a", "b"]],
        },
    }


@pytest.mark.parametrize("kind", ["gpt-2", *_EXPRESSIONS])
def test_byte_pairs_travel(kind: str, tmp_path: Path) -> None:
    source = with_tokenizer(tmp_path / "source", byte_pairs(kind))
    done = anyckpt.convert(source, tmp_path / "m.gguf")
    assert not {"tokenizer.json", "tokenizer_config.json"} & {*done.ignored}
    said = read_header(MemorySource((tmp_path / "m.gguf").read_bytes())).metadata
    assert (said["tokenizer.ggml.model"], said["tokenizer.ggml.pre"]) == ("gpt2", kind)
    assert said["tokenizer.ggml.tokens"][:8] == ["<s>", "</s>", "a", "b", "ab", "Ġ", "<tool>", "[PAD7]"]
    assert said["tokenizer.ggml.token_type"][:8] == [3, 3, 1, 1, 1, 1, 4, 5]
    assert len(said["tokenizer.ggml.tokens"]) == anyckpt.open(source).config["vocab_size"]
    assert said["tokenizer.ggml.merges"] == ["a b"]
    assert (said["tokenizer.ggml.bos_token_id"], said["tokenizer.ggml.eos_token_id"]) == (0, 1)
    assert said["tokenizer.chat_template"] == "{{ messages }}"
    anyckpt.convert(tmp_path / "m.gguf", tmp_path / "back", to="hf")
    back = json.loads((tmp_path / "back" / "tokenizer.json").read_text())
    assert back["model"]["vocab"] == {"<s>": 0, "</s>": 1, "a": 2, "b": 3, "ab": 4, "Ġ": 5, "<tool>": 6}
    assert [token["content"] for token in back["added_tokens"]] == ["<s>", "</s>", "<tool>"]
    assert back["post_processor"]["special_tokens"]["<s>"]["ids"] == [0]
    settings = json.loads((tmp_path / "back" / "tokenizer_config.json").read_text())
    assert (settings["bos_token"], settings["chat_template"]) == ("<s>", "{{ messages }}")


def test_other_tokenizers_are_told(tmp_path: Path) -> None:
    done = anyckpt.convert(with_tokenizer(tmp_path / "source", byte_pairs(r"\w+")), tmp_path / "m.gguf")
    assert any("none of the ways of llama.cpp's" in note for note in done.notes)
    assert "tokenizer.json" in done.ignored
    assert anyckpt.open(tmp_path / "m.gguf").tokenizer is None
    assert any("WordLevel" in note for note in anyckpt.convert(LLAMA, tmp_path / "words.gguf").notes)
    small = byte_pairs("qwen2")
    small["added_tokens"][2]["id"] = 5_000
    done = anyckpt.convert(with_tokenizer(tmp_path / "large", small), tmp_path / "large.gguf")
    assert any("5,001 tokens and the embedding 151 rows" in note for note in done.notes)


def test_sentencepiece_models_travel(tmp_path: Path) -> None:
    model = next(fixture_path("nemo/nemo2_llama_spm/model/context").glob("*.model"))
    done = anyckpt.convert(LLAMA, tmp_path / "m.gguf", tokenizer=model)
    said = read_header(MemorySource((tmp_path / "m.gguf").read_bytes())).metadata
    pieces = read_model(model.read_bytes(), "model")
    count = len(pieces.tokens)
    assert said["tokenizer.ggml.model"] == "llama"
    assert tuple(said["tokenizer.ggml.tokens"][:count]) == pieces.tokens, done.notes
    anyckpt.convert(tmp_path / "m.gguf", tmp_path / "back", to="hf")
    assert read_model((tmp_path / "back" / "tokenizer.model").read_bytes(), "back") == pieces


PIECES = {
    "added_tokens": [
        {"id": 0, "content": "<unk>", "special": True},
        {"id": 1, "content": "<s>", "special": True},
        {"id": 9, "content": "<tool>", "special": False},
    ],
    "normalizer": {"type": "Sequence", "normalizers": [
        {"type": "Prepend", "prepend": "▁"},
        {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
    ]},
    "pre_tokenizer": None,
    "model": {
        "type": "BPE",
        "unk_token": "<unk>",
        "byte_fallback": True,
        "vocab": {"<unk>": 0, "<s>": 1, "<0x0A>": 2, "▁": 3, "a": 4, "b": 5, "ab": 6, "▁ab": 7, "▁a": 8},
        "merges": [["a", "b"], ["▁", "ab"], ["▁a", "b"], ["▁", "a"]],
    },
}  # fmt: skip


def test_pieces_that_only_json_has_left_travel(tmp_path: Path) -> None:
    done = anyckpt.convert(with_tokenizer(tmp_path / "source", PIECES), tmp_path / "m.gguf")
    assert not {"tokenizer.json", "tokenizer_config.json"} & {*done.ignored}
    said = read_header(MemorySource((tmp_path / "m.gguf").read_bytes())).metadata
    assert said["tokenizer.ggml.model"] == "llama" and said["tokenizer.ggml.add_space_prefix"] is True
    assert said["tokenizer.ggml.tokens"][:11] == [*PIECES["model"]["vocab"], "<tool>", "[PAD10]"]
    assert said["tokenizer.ggml.token_type"][:11] == [2, 3, 6, 1, 1, 1, 1, 1, 1, 4, 5]
    scores = said["tokenizer.ggml.scores"]
    assert scores[6] > scores[7] > scores[8] > scores[4]
    anyckpt.convert(tmp_path / "m.gguf", tmp_path / "back", to="hf")
    assert read_model((tmp_path / "back" / "tokenizer.model").read_bytes(), "back").tokens[6:8] == ("ab", "▁ab")


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"normalizer": {"type": "NFKC"}}, "not what sentencepiece models do"),
        ({"normalizer": None}, "not what sentencepiece models do"),
        ({"pre_tokenizer": {"type": "Digits"}}, "not what sentencepiece models do"),
        ({"model": {**PIECES["model"], "merges": [["▁", "ab"], ["a", "b"], ["▁a", "b"]]}}, "in the order of scores"),
        ({"added_tokens": [{"id": 4000, "content": "<x>"}]}, "4,001 tokens and the embedding 151 rows"),
    ],
)
def test_pieces_that_would_be_cut_otherwise_are_told(change: dict[str, Any], why: str, tmp_path: Path) -> None:
    done = anyckpt.convert(with_tokenizer(tmp_path / "source", {**PIECES, **change}), tmp_path / "m.gguf")
    assert any(why in note for note in done.notes), done.notes
    assert "tokenizer.json" in done.ignored


@pytest.mark.parametrize(
    ("change", "space"),
    [
        ({"normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
          "pre_tokenizer": {"type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious"}}, False),
        ({"normalizer": None, "pre_tokenizer":
          {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": False}}, True),
        ({"normalizer": None, "pre_tokenizer":
          {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "never", "split": False}}, False),
    ],
)  # fmt: skip
def test_a_space_in_front_is_as_the_tokenizer_has_it(change: dict[str, Any], space: bool, tmp_path: Path) -> None:
    anyckpt.convert(with_tokenizer(tmp_path / "source", {**PIECES, **change}), tmp_path / "m.gguf")
    said = read_header(MemorySource((tmp_path / "m.gguf").read_bytes())).metadata
    assert said["tokenizer.ggml.add_space_prefix"] is space


# -- what is said of the model ---------------------------------------------------------------------------------

CARD = """---
license: other
license_name: llama3
license_link: https://example.org/licence
language: [en, no]
pipeline_tag: text-generation
tags: [chat]
base_model: meta-llama/Llama-3-8B
datasets: [org/some-data, "https://example.org/data"]
---
# A model
"""


def test_the_model_card_is_carried(tmp_path: Path) -> None:
    source = tmp_path / "my-llama-2-tuned"
    shutil.copytree(LLAMA, source)
    (source / "README.md").write_text(CARD)
    (source / "generation_config.json").write_text(json.dumps({"temperature": 0.5, "top_k": 40, "do_sample": True}))
    anyckpt.convert(source, tmp_path / "m.gguf")
    said = read_header(MemorySource((tmp_path / "m.gguf").read_bytes())).metadata
    expected = {
        "name": "My Llama 2 Tuned", "size_label": "75K", "license": "other", "license.name": "llama3",
        "license.link": "https://example.org/licence", "tags": ["chat", "text-generation"], "languages": ["en", "no"],
        "base_model.count": 1, "base_model.0.name": "Llama 3 8B", "base_model.0.organization": "Meta Llama",
        "base_model.0.repo_url": "https://huggingface.co/meta-llama/Llama-3-8B", "dataset.count": 2,
        "dataset.0.name": "Some Data", "dataset.0.organization": "Org",
        "dataset.0.repo_url": "https://huggingface.co/org/some-data", "dataset.1.repo_url": "https://example.org/data",
        "sampling.temp": 0.5, "sampling.top_k": 40,
    }  # fmt: skip
    made = {key.removeprefix("general."): value for key, value in said.items() if key.startswith("general.")}
    assert {key: made[key] for key in expected} == expected
    assert made.keys() - expected.keys() == {"architecture", "type", "file_type", "quantization_version"}


@pytest.mark.parametrize(
    "card", ["", "no front matter", "---\nunfinished: yes\n", "---\n- a list\n---\n", "---\n\x00\n---\n"]
)
def test_cards_that_say_nothing(card: str, tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(LLAMA, source)
    (source / "README.md").write_text(card)
    done = anyckpt.convert(source, tmp_path / "m.gguf")
    assert any("front matter cannot be read" in note for note in done.notes) == card.endswith("---\n")


# -- files ---------------------------------------------------------------------------------------------------

SMALL = {
    "general.architecture": "llama",
    "llama.block_count": 1,
    "llama.embedding_length": 64,
    "llama.context_length": 8,
    "llama.feed_forward_length": 32,
    "llama.attention.head_count": 2,
}


def write(path: Path, metadata: dict[str, Any], kinds: dict[str, tuple[str, tuple[int, ...]]]) -> Path:
    listed = [(name, TYPES[kind], shape) for name, (kind, shape) in kinds.items()]
    sizes = [int(np.prod(shape)) // kind.block * kind.nbytes for _, kind, shape in listed]
    path.write_bytes(header_bytes(metadata, listed) + bytes(sum(-(-size // ALIGNMENT) * ALIGNMENT for size in sizes)))
    return path


@pytest.mark.parametrize(
    ("metadata", "kinds", "error", "text"),
    [
        ({}, {}, FormatError, "does not say of which architecture"),
        ({**SMALL, "general.architecture": "rwkv7"}, {}, MappingError, "not known here.*found rwkv7"),
        (
            {**SMALL, "split.count": 3, "split.no": 1},
            {},
            FormatError,
            "one of 3 parts.*model-00002-of-00003.gguf, found part 2",
        ),
        ({**SMALL, "llama.block_count": "two"}, {}, FormatError, "block_count is no number"),
        ({**SMALL, "llama.attention.head_count": 2.5}, {}, FormatError, "head_count is no count"),
        ({"general.architecture": "llama"}, {}, FormatError, "lacks llama.embedding_length"),
        ({**SMALL, "llama.attention.head_count": Typed(4, [2, 4])}, {}, MappingError, "layers differ in attention"),
        (SMALL, {"blk.0.other.weight": ("F32", (2, 64))}, MappingError, "blk.0.other.weight.*not one of the tensors"),
        (SMALL, {"blk.0.attn_q.weight": ("F32", (3, 64))}, MappingError, "heads do not divide"),
        ({**SMALL, "general.alignment": 3}, {}, FormatError, "no power of two"),
        (
            {**SMALL, "tokenizer.ggml.model": "llama", "tokenizer.ggml.tokens": Typed(4, [1])},
            {},
            FormatError,
            "no list",
        ),
    ],
)
def test_files_that_hold_no_model(
    metadata: dict[str, Any],
    kinds: dict[str, tuple[str, tuple[int, ...]]],
    error: type[Exception],
    text: str,
    tmp_path: Path,
) -> None:
    path = write(tmp_path / "m.gguf", metadata, kinds)
    with pytest.raises(error, match=text) as caught:
        anyckpt.open(path)
    assert str(path) in str(caught.value)


def in_parts(folder: Path) -> list[Path]:
    anyckpt.convert(LLAMA, folder, to="gguf", max_shard_size="100KB")
    return sorted(folder.glob("model-*.gguf"))


def test_a_model_in_parts_is_one_from_any_of_them(tmp_path: Path) -> None:
    parts = in_parts(tmp_path / "parts")
    assert [part.name for part in parts] == [f"model-0000{number}-of-00004.gguf" for number in (1, 2, 3, 4)]
    whole = {name: tensor.numpy().tobytes() for name, tensor in anyckpt.open(LLAMA).items()}
    for path in (tmp_path / "parts", parts[0], parts[2]):
        opened = anyckpt.open(path)
        assert opened.format == "gguf" and opened.details["parts"] == 4
        assert {name: tensor.numpy().tobytes() for name, tensor in opened.items()} == whole
    assert not anyckpt.verify(tmp_path / "parts").problems
    headers = [read_header(MemorySource(part.read_bytes())) for part in parts]
    assert max(sum(4 * int(np.prod(info.shape)) for info in header.tensors) for header in headers) <= 100_000
    anyckpt.convert(LLAMA, tmp_path / "one.gguf", max_shard_size="1GB")
    assert (tmp_path / "one.gguf").is_file()


def test_parts_that_are_no_model(tmp_path: Path) -> None:
    parts = in_parts(tmp_path / "parts")
    second, contents = parts[1], parts[1].read_bytes()
    second.unlink()
    for path in (tmp_path / "parts", parts[0]):
        with pytest.raises(FormatError, match="1 of 4 parts of the model are missing: model-00002-of-00004.gguf"):
            anyckpt.open(path)
    second.write_bytes(parts[2].read_bytes())
    with pytest.raises(FormatError, match="not the part that its name says.*split.no 2"):
        anyckpt.open(parts[0])
    second.write_bytes(contents)
    other = write(tmp_path / "other", {"split.no": Typed(2, 1), "split.count": Typed(2, 4)}, {})
    second.write_bytes(other.read_bytes())
    with pytest.raises(FormatError, match="not of one model.*expected 21 tensors"):
        anyckpt.open(parts[0])
    first = read_header(MemorySource(parts[0].read_bytes())).tensors[0]
    other = write(
        tmp_path / "other", {"split.no": Typed(2, 1), "split.count": Typed(2, 4)}, {first.name: ("F32", (2,))}
    )
    second.write_bytes(other.read_bytes())
    with pytest.raises(FormatError, match="is in two parts"):
        anyckpt.open(parts[0])
    (tmp_path / "parts" / "b-00001-of-00001.gguf").write_bytes(contents)
    with pytest.raises(FormatError, match="the parts of several models"):
        anyckpt.open(tmp_path / "parts")


@pytest.mark.parametrize(
    ("data", "error", "text"),
    [
        (b"GGUF" + struct.pack("<IQQ", 1, 0, 0), FormatError, "unknown version of GGUF.*found 1"),
        (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), FormatError, "big-endian"),
        (b"GGUF" + struct.pack("<IQQ", 3, 1 << 60, 0), UnsafeError, "more tensors"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 1 << 60), UnsafeError, "more values"),
        (b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 1 << 60) + bytes(99), UnsafeError, "more characters"),
        (b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 1) + b"k" + struct.pack("<IIQ", 9, 4, 1 << 61), UnsafeError, "a list"),
        (
            b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 1) + b"k" + struct.pack("<IIQ", 9, 9, 1) + bytes(12),
            FormatError,
            "list of lists",
        ),
        (b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 1) + b"k" + struct.pack("<IQ", 99, 1), FormatError, "unknown type"),
        (b"GGUF\x03\0\0\0", UnsafeError, "more bytes"),
        (
            b"GGUF" + struct.pack("<IQQQ", 3, 1, 0, 1) + b"t" + struct.pack("<IQIQ", 1, 4, 77, 0) + bytes(64),
            FormatError,
            "unknown type.*found type 77",
        ),
        (
            b"GGUF" + struct.pack("<IQQQ", 3, 1, 0, 1) + b"t" + struct.pack("<IQIQ", 1, 1 << 40, 0, 0) + bytes(64),
            FormatError,
            "m.gguf",
        ),
        (
            b"GGUF" + struct.pack("<IQQQ", 3, 1, 0, 1) + b"t" + struct.pack("<IQIQ", 1, 33, 8, 0) + bytes(64),
            FormatError,
            "no whole blocks of Q8_0",
        ),
    ],
)
def test_damaged_headers(data: bytes, error: type[Exception], text: str, tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_bytes(data)
    with pytest.raises(error, match=text):
        anyckpt.open(tmp_path / "m.gguf")


def test_k_quants_need_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gguf.quants", None)
    path = write(tmp_path / "m.gguf", SMALL, {"token_embd.weight": ("Q4_K", (2, 256))})
    with pytest.raises(MissingLibraryError, match=r"type Q4_K need the package gguf.*pip install 'anyckpt\[gguf\]'"):
        anyckpt.open(path)


# -- blocks --------------------------------------------------------------------------------------------------


@given(
    st.sampled_from(sorted(ENCODERS)),
    st.integers(1, 4),
    st.integers(1, 3),
    st.integers(0, 2**32 - 1),
    st.data(),
)
def test_any_box_of_blocks(name: str, rows: int, columns: int, seed: int, data: st.DataObject) -> None:
    kind = TYPES[name]
    values = np.random.default_rng(seed).standard_normal((2, rows, columns * 32)).astype(np.float32)
    coded = Encoded(from_array(values), kind)
    whole = encode(name, values.reshape(-1, 32))
    assert np.array_equal(np.asarray(coded).ravel(), whole.ravel())
    back = Decoded(coded, kind)
    expected = decode(name, whole).reshape(values.shape)
    for tensor, array in ((coded, whole.reshape(coded.shape)), (back, expected)):
        box = tuple(
            slice(low, data.draw(st.integers(low + 1, size)))
            for size in tensor.shape
            for low in [data.draw(st.integers(0, size - 1))]
        )
        assert np.array_equal(np.asarray(tensor[box]), array[box])
        turned = tensor.permute((1, 0, 2)).reshape((2 * rows, tensor.shape[2]))
        assert np.array_equal(np.asarray(turned), array.transpose(1, 0, 2).reshape(turned.shape))
        assert np.array_equal(np.asarray(tensor.permute((2, 0, 1))), array.transpose(2, 0, 1))


@pytest.mark.parametrize("name", sorted(ENCODERS))
def test_codes_are_near_their_numbers(name: str) -> None:
    values = np.random.default_rng(3).standard_normal((256, 32)).astype(np.float32)
    values[0], values[1], values[2] = 0, 1, -2
    steps = {"Q8_0": 254, "Q5_0": 31, "Q5_1": 31, "Q4_0": 15, "Q4_1": 15}[name]
    reach = 2 * np.abs(values).max(axis=1) if name.endswith("_0") else np.ptp(values, axis=1)
    error = np.abs(decode(name, encode(name, values)) - values).max(axis=1)
    assert (error <= reach / steps * 1.1 + 1e-3).all()
    assert not error[0]


def test_large_rows_are_computed_in_parts(tmp_path: Path) -> None:
    values = np.random.default_rng(4).standard_normal((300, 4096)).astype(np.float32)
    coded = Encoded(from_array(values), TYPES["Q8_0"])
    execute(Plan("t", (OutputFile("", safetensors_parts({"w": coded})),)), str(tmp_path / "out"))
    written = (tmp_path / "out").read_bytes()
    assert written.endswith(encode("Q8_0", values.reshape(-1, 32)).tobytes())
