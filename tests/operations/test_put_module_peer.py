"""The encoder of a SALM, in transformers' Parakeet: it hears what NeMo's does."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.peer

from tests.formats.test_nemo_speech import nemo  # noqa: E402
from tests.formats.test_nemo_speech_peer import signal  # noqa: E402
from tests.support import fixture_path  # noqa: E402

import anyckpt  # noqa: E402


def test_a_salms_encoder_in_transformers_parakeet(tmp_path: Path) -> None:
    salm = fixture_path("nemo/salm_v3_0_0/model")
    anyckpt.convert(nemo("tdt"), tmp_path / "hf", to="hf", put={"encoder": salm, "preprocessor": salm})
    model, told = transformers.ParakeetForTDT.from_pretrained(tmp_path / "hf", output_loading_info=True)
    assert not any(told.values()), told
    inputs = transformers.AutoProcessor.from_pretrained(tmp_path / "hf")(signal().numpy(), sampling_rate=16000)
    with torch.no_grad():
        heard = model.eval().encoder(**inputs).last_hidden_state.numpy()
    expected = np.load(fixture_path("nemo/salm_v3_0_0/outputs.npz"))["encoder"]
    steps = min(heard.shape[1], expected.shape[1]) - 1  # the last hears what is behind the signal's end
    assert np.allclose(heard[:, :steps], expected[:, :steps], rtol=0, atol=5e-6)
