"""Speech models in transformers: what we write computes what NeMo 3.0 does, and tokenizes as its converters' does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.peer

from tests.formats.test_nemo_speech import MODELS, converted, nemo  # noqa: E402
from tests.support import fixture_path  # noqa: E402

import anyckpt  # noqa: E402
from anyckpt import convert  # noqa: E402

TEXTS = ("the quick brown fox", "  many   people, déjà vu 42! <pad> naïve <|endoftext|>ﬁne Ünï", "")


def signal() -> Any:
    """Two seconds of a rising tone in noise, of which NeMo's outputs are in the fixtures."""
    time = torch.arange(32000) / 16000.0
    noise = torch.randn(32000, generator=torch.Generator().manual_seed(3))
    return 0.3 * torch.sin(2 * torch.pi * 440 * time * (1 + 0.2 * time)) + 0.05 * noise


def logits(folder: Path) -> Any:
    config = transformers.AutoConfig.from_pretrained(folder)
    kind = getattr(transformers, config.architectures[0])
    model, told = kind.from_pretrained(folder, output_loading_info=True)
    assert not any(told.values()), told
    inputs = transformers.AutoProcessor.from_pretrained(folder)(signal().numpy(), sampling_rate=16000)
    with torch.no_grad():
        if "CTC" in config.architectures[0]:
            return model.eval()(**inputs).logits
        if config.model_type == "canary":
            return model.eval()(**inputs, decoder_input_ids=torch.tensor([[7, 4, 9, 20]])).logits
        tokens = torch.tensor([[config.blank_token_id, 5, 9, 20]])
        heard = model.eval()(**inputs, decoder_input_ids=tokens).pooler_output
        return model.joint(
            encoder_hidden_states=heard[:, :, None], decoder_hidden_states=model.decoder(tokens)[:, None]
        )


@pytest.mark.parametrize("name", MODELS)
def test_it_computes_what_nemo_does(name: str, tmp_path: Path) -> None:
    convert(nemo(name), tmp_path / "hf", to="hf")
    stored = np.load(fixture_path(f"nemo/asr_fastconformer_v3_0_0/{name}/outputs.npz"))
    found, expected = logits(tmp_path / "hf").numpy(), stored["logits"]
    assert found.shape[0] == expected.shape[0] and found.shape[2:] == expected.shape[2:]
    heard = name != "canary"
    steps = min(found.shape[1], expected.shape[1]) - heard  # the last hears what is behind the signal's end
    assert np.allclose(found[:, :steps], expected[:, :steps], rtol=0, atol=5e-6)
    tokenizer = transformers.AutoProcessor.from_pretrained(tmp_path / "hf").tokenizer
    if stored["ids"].size:
        assert tokenizer("the quick brown fox, déjà vu 42! naïve").input_ids == stored["ids"].tolist()


@pytest.mark.parametrize("name", MODELS)
def test_tokenizers_of_transformers_own_converter(name: str, tmp_path: Path) -> None:
    """``ParakeetConverter``, or ``CanaryConverter``, of the same sentencepiece model cuts texts in the same way."""
    from transformers.convert_slow_tokenizer import CanaryConverter, ParakeetConverter

    tokenizer = anyckpt.open(nemo(name)).tokenizer
    assert tokenizer is not None and tokenizer.model_file is not None
    (tmp_path / "t.model").write_bytes(tokenizer.files[tokenizer.model_file].read_all(1 << 24))
    converter = CanaryConverter if name == "canary" else ParakeetConverter
    theirs = converter(str(tmp_path / "t.model")).converted()
    convert(nemo(name), tmp_path / "hf", to="hf")
    ours = transformers.AutoProcessor.from_pretrained(tmp_path / "hf").tokenizer
    for text in TEXTS:
        if "<" not in text:
            assert ours(text).input_ids == theirs.encode(text, add_special_tokens=False).ids
    assert ours.decode(ours(TEXTS[0]).input_ids, group_tokens=False) == TEXTS[0]


@pytest.mark.parametrize("name", MODELS)
def test_files_load_as_the_converters(name: str, tmp_path: Path) -> None:
    convert(nemo(name), tmp_path / "hf", to="hf")
    configs = [transformers.AutoConfig.from_pretrained(path).to_dict() for path in (tmp_path / "hf", converted(name))]
    for config in configs:
        config.pop("_name_or_path", None)
    assert configs[0] == configs[1]
    generation = [
        transformers.GenerationConfig.from_pretrained(path).to_diff_dict()
        for path in (tmp_path / "hf", converted(name))
    ]
    for settings in generation:
        settings.pop("transformers_version", None)
    assert generation[0] == generation[1]


def test_prompts_of_canary(tmp_path: Path) -> None:
    convert(nemo("canary"), tmp_path / "hf", to="hf")
    prompts = [
        transformers.AutoProcessor.from_pretrained(path).apply_transcription_request(
            [np.zeros(1600, np.float32)], source_language="de", target_language="en", tokenize=False
        )
        for path in (tmp_path / "hf", converted("canary"))
    ]
    assert prompts[0] == prompts[1]
    assert prompts[0][0].startswith(
        "<|startofcontext|><|startoftranscript|><|emo:undefined|><|de|><|en|><|pnc|><|noitn|>"
    )
