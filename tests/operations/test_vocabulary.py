"""The vocabulary's size and its padding rows: what is asked for, what is refused, what is said afterwards."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from tests.support import file_bytes, fixture_path

from anyckpt.cli import run
from anyckpt.containers.safetensors import safetensors_parts
from anyckpt.engine.plan import OutputFile
from anyckpt.errors import MappingError, UsageError
from anyckpt.formats import registry
from anyckpt.operations.convert import convert
from anyckpt.operations.inspect import inspect
from anyckpt.operations.reshard import reshard
from anyckpt.operations.steps.joining import open_checkpoint
from anyckpt.operations.steps.layout_request import LayoutRequest
from anyckpt.tensor import from_array

LLAMA, TRUE = "families/llama/hf", 151
MEGATRON = "legacy/megatron_gpt_tp2_pp2"  # 61 tokens in 64 rows
EMBEDDING = "embedding.word_embeddings.weight"


def rows(path: Path) -> np.ndarray:
    return open_checkpoint(path).weights()[EMBEDDING].numpy()


def test_rows_are_padded_to_what_is_asked_for_and_the_rule_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = str(fixture_path(LLAMA))
    stored = registry.read(source).weights()["model.embed_tokens.weight"].numpy()
    for rule, words in (("zeros", "zeros"), ("repeat-last-row", "copies of the last row")):
        out = tmp_path / rule
        options = ["--to", "megatron-lm", "--tp", "2", "--make-vocab-size-divisible-by", "8", "--vocab-padding", rule]
        assert run(["convert", source, str(out), *options]) == 0
        note = f"note: the vocabulary of 151 tokens has 160 rows: 9 new padding rows are filled with {words}"
        assert note in capsys.readouterr().err
        found = rows(out)
        assert found.shape[0] == 160 and np.array_equal(found[:TRUE], stored)
        assert np.array_equal(found[TRUE:], np.broadcast_to(stored[-1] if rule == "repeat-last-row" else 0, (9, 64)))
        config = registry.read(out).config
        assert (config["vocab_size"], config["padded_vocab_size"]) == (151, 160)
        assert config["make_vocab_size_divisible_by"] == 8
        # and afterwards, from what was written
        assert run(["inspect", str(out)]) == 0
        assert note in capsys.readouterr().err
        assert run(["inspect", str(out), "--json"]) == 0
        assert note.removeprefix("note: ") in json.loads(capsys.readouterr().out)["notes"]


@pytest.mark.parametrize("to", ["megatron-core", "nemo", "nemo2"])
def test_other_megatron_formats_pad_alike(to: str, tmp_path: Path) -> None:
    layout = LayoutRequest(make_vocab_size_divisible_by=40)
    done = convert(fixture_path(LLAMA), tmp_path / "out", to=to, layout=layout)
    assert "embedding.word_embeddings.weight: 9 zero rows pad the vocabulary to 160" in done.notes
    opened = registry.read(tmp_path / "out")
    (embedding,) = (tensor for name, tensor in opened.tensors.items() if name.endswith(EMBEDDING))
    assert embedding.shape[0] == 160 and not embedding.numpy()[TRUE:].any()
    assert list(done.notes) == inspect(tmp_path / "out").notes
    layout = LayoutRequest(make_vocab_size_divisible_by=40, padding="repeat-last-row")
    done = convert(fixture_path(LLAMA), tmp_path / "repeated", to=to, layout=layout)
    assert "embedding.word_embeddings.weight: 9 copies of the last row pad the vocabulary to 160" in done.notes
    opened = registry.read(tmp_path / "repeated")
    (embedding,) = (tensor.numpy() for name, tensor in opened.tensors.items() if name.endswith(EMBEDDING))
    assert np.array_equal(embedding[TRUE:], np.broadcast_to(embedding[TRUE - 1], (9, 64)))


def test_exports_trim_exactly(tmp_path: Path) -> None:
    source = fixture_path(LLAMA)
    layout = LayoutRequest(tensor_parallel=2, make_vocab_size_divisible_by=64, padding="repeat-last-row")
    convert(source, tmp_path / "ranks", to="megatron-lm", layout=layout)
    assert rows(tmp_path / "ranks").shape[0] == 256
    convert(tmp_path / "ranks", tmp_path / "back", to="hf", family="llama")
    expected, found = registry.read(source).weights(), registry.read(tmp_path / "back").weights()
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        assert np.array_equal(found[name].numpy(), expected[name].numpy())
    # fewer, if the user says so; the configuration says so, too
    for to, options in (("hf", {}), ("megatron-lm", {"tensor_parallel": 1})):
        convert(source, tmp_path / to, to=to, layout=LayoutRequest(vocab_size=100, **options))
        opened = open_checkpoint(tmp_path / to)
        name = "model.embed_tokens.weight" if to == "hf" else EMBEDDING
        assert opened.config["vocab_size"] == 100
        assert np.array_equal(opened.weights()[name].numpy(), expected["model.embed_tokens.weight"].numpy()[:100])


@pytest.mark.parametrize("to", ["torch", "safetensors", "dcp", "lightning"])
def test_containers_that_keep_names_trim_too(to: str, tmp_path: Path) -> None:
    source = fixture_path(LLAMA)
    convert(source, tmp_path / "out", to=to, layout=LayoutRequest(vocab_size=140))
    found, stored = open_checkpoint(tmp_path / "out").weights(), open_checkpoint(source).weights()
    assert set(found) == set(stored)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        assert np.array_equal(found[name].numpy(), stored[name].numpy()[:140])


@pytest.mark.parametrize("to", ["torch", "lightning", "hf", "nemo"])
def test_a_vocabulary_of_no_known_model_is_refused(to: str, tmp_path: Path) -> None:
    """It was not cut, and nothing said so."""
    path = tmp_path / "model.safetensors"
    tensors = {"trunk.embed.weight": from_array(np.ones((8, 4), "<f4"))}
    path.write_bytes(file_bytes(OutputFile(path.name, safetensors_parts(tensors))))
    with pytest.raises(UsageError, match=r"the model's family|family is known"):
        convert(path, tmp_path / "out", to=to, layout=LayoutRequest(vocab_size=6))
    assert not (tmp_path / "out").exists()


def test_padding_that_is_there_is_kept_as_far_as_it_reaches(tmp_path: Path) -> None:
    source = fixture_path(MEGATRON)
    stored = rows(source)
    for tensor_parallel, wanted, said in (
        (1, 64, "the vocabulary of 61 tokens has 64 rows: 3 padding rows are kept as stored"),
        (4, 96, "3 padding rows are kept as stored, 32 new padding rows are filled with zeros"),
    ):
        layout = LayoutRequest(
            tensor_parallel=tensor_parallel, make_vocab_size_divisible_by=24 if tensor_parallel == 4 else None
        )
        done = reshard(source, tmp_path / str(tensor_parallel), layout=layout, optimizer="drop")
        assert any(said in note for note in done.notes), done.notes
        found = rows(tmp_path / str(tensor_parallel))
        assert found.shape[0] == wanted and np.array_equal(found[:64], stored) and not found[64:].any()


@pytest.mark.parametrize(("tensor_parallel", "expert_tensor_parallel"), [(2, 1), (4, 2), (2, 2)])
def test_expert_ranks_do_not_change_what_is_said_of_the_rows(
    tmp_path: Path, tensor_parallel: int, expert_tensor_parallel: int
) -> None:
    layout = LayoutRequest(
        tensor_parallel=tensor_parallel,
        expert_tensor_parallel=expert_tensor_parallel,
        expert_parallel=2,
        make_vocab_size_divisible_by=128 // tensor_parallel,
    )
    done = convert(fixture_path("families/mixtral/hf"), tmp_path / "out", to="megatron-lm", layout=layout)
    said = [note for note in done.notes if "rows" in note]
    assert said == ["the vocabulary of 96 tokens has 128 rows: 32 new padding rows are filled with zeros"]
    assert rows(tmp_path / "out").shape[0] == 128


@pytest.mark.parametrize("to", ["hf", "megatron-lm", "megatron-core", "nemo"])
def test_a_vocabulary_larger_than_the_stored_rows_is_refused(
    to: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert run(["convert", str(fixture_path(LLAMA)), str(out), "--to", to, "--vocab-size", "200"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "200" in error and "151" in error and "--vocab-size" in error
    assert list(tmp_path.iterdir()) == []


def test_more_rows_than_a_hugging_face_configuration_has_tokens_must_be_explained(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """transformers would not load such a folder; what the rows beyond are only the user knows."""
    source = tmp_path / "hf"
    source.mkdir()
    opened = registry.read(fixture_path(LLAMA))
    tensors = dict(opened.weights())
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        tensors[name] = tensors[name].pad(0, 160)
    (source / "model.safetensors").write_bytes(file_bytes(OutputFile("", safetensors_parts(tensors, {"format": "pt"}))))
    (source / "config.json").write_text(json.dumps(opened.config))
    for to in ("megatron-core", "megatron-lm"):
        assert run(["convert", str(source), str(tmp_path / "out"), "--to", to]) == 2
        error = capsys.readouterr().err
        assert "has more rows than the vocabulary of the configuration" in error
        assert "expected 151 rows (vocab_size), found 160 rows" in error and "--vocab-size" in error
        assert not (tmp_path / "out").exists()
    with pytest.raises(MappingError, match="expected 151 rows"):
        convert(source, tmp_path / "out", to="nemo")
    for size, note in ((151, "9 padding rows"), (160, "")):
        layout = LayoutRequest(vocab_size=size, tensor_parallel=2, make_vocab_size_divisible_by=1)
        done = convert(source, tmp_path / str(size), to="megatron-lm", layout=layout)
        assert registry.read(tmp_path / str(size)).config["vocab_size"] == size
        assert rows(tmp_path / str(size)).shape[0] == {151: 152, 160: 160}[size]
        assert bool(note) == any("padding rows" in text for text in done.notes)
