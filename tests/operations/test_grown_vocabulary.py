"""Vocabularies that grow: the embedding, the output layer and the optimizer's state, in any format."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.support import fixture_path, sha256_of

import anyckpt
from anyckpt import LayoutRequest
from anyckpt.errors import AnyckptError, UsageError
from anyckpt.formats.registry import read
from anyckpt.operations.steps.grown_vocabulary import grow_vocabulary
from anyckpt.operations.steps.joining import open_checkpoint
from anyckpt.operations.steps.mean_rows import mean_rows
from anyckpt.optimizer.read import with_optimizer
from anyckpt.tensor import from_array, reduction

LLAMA = fixture_path("families/llama/hf")
TRAINED = fixture_path("legacy/megatron_distopt_tp2_dp2")


def grown(size: int, fill: Any) -> LayoutRequest:
    return LayoutRequest(vocab_size=size, new_rows=fill)


@pytest.mark.parametrize("fill", ["mean", "zeros"])
def test_embedding_and_output_layer(fill: str, tmp_path: Path) -> None:
    done = anyckpt.convert(LLAMA, tmp_path / "out", to="hf", layout=grown(160, fill))
    before, after = read(LLAMA), read(tmp_path / "out")
    assert after.config["vocab_size"] == 160
    for name, tensor in before.tensors.items():
        if name not in ("lm_head.weight", "model.embed_tokens.weight"):
            assert sha256_of(after[name]) == sha256_of(tensor)
            continue
        array = tensor.numpy()
        row = array.mean(axis=0, dtype=np.float64).astype(array.dtype) if fill == "mean" else np.zeros_like(array[0])
        assert np.array_equal(after[name].numpy(), np.concatenate([array, np.tile(row, (9, 1))]))
    assert done.notes[0].startswith("the vocabulary grows from 151 tokens to 160: new rows are ")
    assert done.notes[1] == "the tokenizer has 151 tokens"


@pytest.mark.parametrize("target", ["nemo", "nemo2", "megatron-core", "megatron-bridge", "megatron-lm", "torch", "dcp"])
def test_any_format_there_and_back(target: str, tmp_path: Path) -> None:
    """Rows that only pad the vocabulary are no tokens, and padding is made anew."""
    anyckpt.convert(LLAMA, tmp_path / "expected", to="hf", layout=grown(200, "mean"))
    anyckpt.convert(LLAMA, tmp_path / "source", to=target)
    config = LLAMA if target in ("torch", "dcp") else None
    anyckpt.convert(tmp_path / "source", tmp_path / "more", to=target, config=config, layout=grown(200, "mean"))
    again = tmp_path / "expected" if config is not None else None
    anyckpt.convert(tmp_path / "more", tmp_path / "out", to="hf", config=again)
    assert anyckpt.diff(tmp_path / "expected", tmp_path / "out", weights_only=True).equal


@pytest.mark.parametrize("target", ["megatron-core", "megatron-lm", "dcp"])
def test_the_optimizer_has_zeros_for_what_was_never_trained(target: str, tmp_path: Path) -> None:
    anyckpt.convert(TRAINED, tmp_path / "out", to=target, optimizer="keep", layout=grown(70, "mean"))
    before, after = (with_optimizer(open_checkpoint(path)) for path in (TRAINED, tmp_path / "out"))
    assert before.optimizer is not None and after.optimizer is not None
    old, new = before.optimizer().slots, after.optimizer().slots
    name = next(name for name in new["exp_avg"] if "word_embeddings" in name)
    moment, source = new["exp_avg"][name].numpy(), old["exp_avg"][name].numpy()
    assert np.array_equal(moment[:61], source[:61]) and not moment[61:].any()
    master, source = new["master"][name].numpy(), old["master"][name].numpy()
    assert np.array_equal(master[:61], source[:61])
    np.testing.assert_allclose(master[61:70], np.tile(source[:61].mean(axis=0), (9, 1)), rtol=1e-5, atol=1e-7)


def test_tied_weights_stay_one(tmp_path: Path) -> None:
    source = fixture_path("families/llama_tied_bf16/hf")
    anyckpt.convert(source, tmp_path / "nemo2", to="nemo2", layout=grown(128, "mean"))
    anyckpt.convert(tmp_path / "nemo2", tmp_path / "out", to="hf")
    assert "lm_head.weight" not in read(tmp_path / "out") and read(tmp_path / "out").config["vocab_size"] == 128
    own = read(source)
    both = own.with_weights({**own.tensors, "lm_head.weight": own["model.embed_tokens.weight"]})
    found = grow_vocabulary(both, 128, "mean", None, None).checkpoint.tensors
    assert found["lm_head.weight"] is found["model.embed_tokens.weight"]


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        ({"new_rows": "mean"}, "say --vocab-size"),
        ({"new_rows": "ones", "vocab_size": 200}, "mean or zeros"),
        ({"new_rows": "mean", "vocab_size": 151}, "there are none"),
        ({"vocab_size": 200}, "--new-rows mean"),
    ],
)
def test_what_cannot_be_done(layout: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(AnyckptError, match=message):
        anyckpt.convert(LLAMA, tmp_path / "out", to="hf", layout=LayoutRequest(**layout))


def test_a_model_without_tokens_has_no_vocabulary_to_grow(tmp_path: Path) -> None:
    """Rather than a configuration that speaks of one."""
    with pytest.raises(UsageError, match="family vit has no tensor with a row for each"):
        anyckpt.convert(fixture_path("families/vit/hf"), tmp_path / "out", to="hf", layout=grown(100, "mean"))


def test_of_an_unknown_family_rows_are_not_known(tmp_path: Path) -> None:
    anyckpt.convert(LLAMA, tmp_path / "x.pt", to="torch")
    with pytest.raises(UsageError, match="not known without the model's family"):
        anyckpt.convert(tmp_path / "x.pt", tmp_path / "y.pt", to="torch", layout=grown(200, "zeros"))


@given(st.integers(1, 9), st.integers(1, 5), st.integers(1, 8))
@settings(max_examples=50, deadline=None)
def test_means_do_not_depend_on_runs(rows: int, width: int, step: int) -> None:
    array = np.random.default_rng(rows * 8 + width).integers(-9, 9, (rows, width)).astype(np.float32)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reduction, "SCRATCH_BYTES", 4 * step)
        found = mean_rows(from_array(array), 3)
        assert np.array_equal(found.numpy(), np.tile(array.mean(axis=0, dtype=np.float64).astype(np.float32), (3, 1)))
        assert np.array_equal(found[1:, width // 2 :].numpy(), found.numpy()[1:, width // 2 :])
