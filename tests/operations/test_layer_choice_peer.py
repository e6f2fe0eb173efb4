"""Layers left out of an encoder-decoder, against transformers with them removed in memory."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.support import fixture_path

import anyckpt

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.peer


def test_what_is_left_of_t5_computes_what_transformers_does(tmp_path: Path) -> None:
    """The first layer of each stack goes, whose relative positions its next one then has."""
    source = fixture_path("families/t5_v1_1/hf")
    anyckpt.convert(source, tmp_path / "less", to="hf", drop_layers="encoder:0,decoder:0")
    whole = transformers.T5ForConditionalGeneration.from_pretrained(source, dtype=torch.float32).eval()
    for stack in (whole.encoder, whole.decoder):
        first, second = (block.layer[0].SelfAttention for block in stack.block)
        second.relative_attention_bias, second.has_relative_attention_bias = first.relative_attention_bias, True
        second.layer_idx = 0
        stack.block = stack.block[1:]
    less = transformers.T5ForConditionalGeneration.from_pretrained(tmp_path / "less", dtype=torch.float32).eval()
    inputs = torch.arange(12).reshape(2, 6)
    with torch.no_grad():
        expected, found = (
            model(input_ids=inputs, decoder_input_ids=inputs, use_cache=False).logits for model in (whole, less)
        )
    assert torch.equal(expected, found)
