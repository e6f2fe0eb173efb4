"""One head of NeMo's hybrids, which have a transducer and a CTC head behind one encoder.

``asr_hybrid_v3_0_0`` was saved by NeMo 3.0.0: a Parakeet with durations and CTC; beside it is what both heads compute.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.formats.test_nemo_speech import arrays, changed, nemo, same
from tests.support import fixture_path

import anyckpt
from anyckpt import convert
from anyckpt.errors import MappingError, UsageError


def hybrid() -> Path:
    return fixture_path("nemo/asr_hybrid_v3_0_0/model.nemo")


@pytest.mark.parametrize(
    ("family", "kind", "gone"),
    [("parakeet-tdt", "EncDecRNNTBPEModel", "ctc_decoder."), ("parakeet-ctc", "EncDecCTCModelBPE", "joint.")],
)
def test_one_is_taken_by_its_family(family: str, kind: str, gone: str, tmp_path: Path) -> None:
    done = convert(hybrid(), tmp_path / "hf", to="hf", family=family)
    left = {name for name, reason in done.ignored.items() if reason == "the head that is not asked for"}
    assert {name for name in arrays(hybrid()) if name.startswith(gone)} <= left
    assert anyckpt.inspect(tmp_path / "hf").family == family
    assert (tmp_path / "hf/tokenizer.json").exists()
    done = convert(hybrid(), tmp_path / "one.nemo", family=family)
    assert not {"preprocessor.featurizer.window", "preprocessor.featurizer.fb"} & done.ignored.keys()
    opened = anyckpt.open(tmp_path / "one.nemo")
    assert opened.config["target"].endswith(kind) and "aux_ctc" not in opened.config
    assert opened.tokenizer is not None and len(opened.tokenizer.files) == 3
    assert anyckpt.diff(tmp_path / "one.nemo", tmp_path / "hf", weights_only=True).equal
    before, after = arrays(hybrid()), arrays(tmp_path / "one.nemo")
    assert all(np.array_equal(after[name], before[name]) for name in before if name.startswith("encoder."))
    head = {name.removeprefix("ctc_"): array for name, array in before.items() if name.startswith("ctc_decoder.")}
    if family == "parakeet-ctc":
        assert all(np.array_equal(after[name], array) for name, array in head.items())


def test_without_one_they_stay_as_they_are(tmp_path: Path) -> None:
    convert(hybrid(), tmp_path / "copy.nemo")
    assert same(arrays(hybrid()), arrays(tmp_path / "copy.nemo"))
    assert anyckpt.open(tmp_path / "copy.nemo").config == anyckpt.open(hybrid()).config
    with pytest.raises(UsageError, match="take one of its heads with --family parakeet-ctc or --family parakeet-tdt"):
        convert(hybrid(), tmp_path / "hf", to="hf")


def test_heads_that_it_has_not(tmp_path: Path) -> None:
    for family in ("parakeet-rnnt", "nemotron-asr-streaming", "canary", "llama"):
        with pytest.raises(UsageError, match=f"has no head of family {family} .expected parakeet-ctc or parakeet-tdt"):
            convert(hybrid(), tmp_path / "none", to="hf", family=family)
    with pytest.raises(UsageError, match="family"):
        convert(hybrid(), tmp_path / "none", to="hf", family="parakeet")


def test_settings_that_transformers_has_not_are_refused(tmp_path: Path) -> None:
    def change(config: dict[str, Any]) -> None:
        config["encoder"]["subsampling"] = "striding"

    other = changed(hybrid(), tmp_path / "other.nemo", change)
    for family in ("parakeet-tdt", "parakeet-ctc"):
        with pytest.raises(MappingError, match="encoder's subsampling"):
            convert(other, tmp_path / "none", to="hf", family=family)


@pytest.mark.parametrize(("name", "family"), [("streaming", "nemotron-asr-streaming"), ("prompted", "nemotron3.5-asr")])
def test_streaming_ones(name: str, family: str, tmp_path: Path) -> None:
    """As these were trained with a second head, which their own files have no more."""
    plain = {"streaming": "EncDecRNNTBPEModel", "prompted": "EncDecRNNTBPEModelWithPrompt"}[name]
    labels = len(anyckpt.open(nemo(name)).config["labels"])

    def change(config: dict[str, Any]) -> None:
        hybrid_class = plain.replace("RNNT", "HybridRNNTCTC")
        config["target"] = f"nemo.collections.asr.models.hybrid_rnnt_ctc_bpe_models.{hybrid_class}"
        head = {"_target_": "nemo.collections.asr.modules.ConvASRDecoder", "feat_in": 16, "num_classes": labels}
        config["aux_ctc"] = {"decoder": head}

    weight = np.ones((labels + 1, 16, 1), np.float32)
    more = {"ctc_decoder.decoder_layers.0.weight": weight, "ctc_decoder.decoder_layers.0.bias": weight[:, 0, 0]}
    source = changed(nemo(name), tmp_path / "hybrid.nemo", change, **more)
    convert(source, tmp_path / "hf", to="hf", family=family)
    convert(nemo(name), tmp_path / "plain", to="hf")
    assert same(arrays(tmp_path / "hf"), arrays(tmp_path / "plain"))
    for file in ("config.json", "processor_config.json"):
        assert json.loads((tmp_path / "hf" / file).read_text()) == json.loads((tmp_path / "plain" / file).read_text())
