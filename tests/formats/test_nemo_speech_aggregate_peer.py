"""Aggregate tokenizers in transformers: texts, prompts and outputs are NeMo's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.peer

from tests.formats.test_nemo_speech import changed  # noqa: E402
from tests.formats.test_nemo_speech_aggregate import HOME, aggregate, expected  # noqa: E402
from tests.formats.test_nemo_speech_peer import signal  # noqa: E402
from tests.support import fixture_path  # noqa: E402

from anyckpt import convert  # noqa: E402


def test_ids_become_the_texts_that_nemo_makes(tmp_path: Path) -> None:
    convert(aggregate(), tmp_path / "hf", to="hf")
    tokenizer = transformers.AutoProcessor.from_pretrained(tmp_path / "hf").tokenizer
    for case in expected()["texts"]:
        assert tokenizer.decode(case["ids"]) == case["text"].removeprefix(" ")
    for case in expected()["encoded"]:
        assert tokenizer.decode(case["ids"]) == case["back"].removeprefix(" ")
        assert (tokenizer(case["text"]).input_ids == case["ids"]) == (case["lang"] == "en")


@pytest.mark.parametrize("form", ["canary2", "canary"])
def test_prompts_are_those_of_nemos_formatter(form: str, tmp_path: Path) -> None:
    def change(config: dict[str, Any]) -> None:
        config["prompt_format"] = form

    convert(changed(aggregate(), tmp_path / "model.nemo", change), tmp_path / "hf", to="hf")
    processor = transformers.AutoProcessor.from_pretrained(tmp_path / "hf")
    for case in (case for case in expected()["prompts"] if case["format"] == form):
        found = processor.apply_transcription_request(
            [np.zeros(1600, np.float32)],
            source_language=case["source"],
            target_language=case["target"],
            punctuation=case["punctuation"],
        )
        assert found["decoder_input_ids"].tolist() == [case["ids"]]


def test_it_computes_what_nemo_does(tmp_path: Path) -> None:
    convert(aggregate(), tmp_path / "hf", to="hf")
    model, told = transformers.CanaryForConditionalGeneration.from_pretrained(tmp_path / "hf", output_loading_info=True)
    assert not any(told.values()), told
    inputs = transformers.AutoProcessor.from_pretrained(tmp_path / "hf")(signal().numpy(), sampling_rate=16000)
    prompt = torch.tensor([expected()["prompts"][0]["ids"]])
    with torch.no_grad():
        found = model.eval()(**inputs, decoder_input_ids=prompt).logits.numpy()
    assert np.allclose(found, np.load(fixture_path(f"{HOME}/outputs.npz"))["logits"], rtol=0, atol=5e-6)
