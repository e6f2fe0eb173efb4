"""Both heads of a hybrid in transformers: each computes what NeMo's does."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")
pytestmark = pytest.mark.peer

from tests.formats.test_nemo_speech_peer import logits  # noqa: E402
from tests.operations.test_one_head import hybrid  # noqa: E402
from tests.support import fixture_path  # noqa: E402

from anyckpt import convert  # noqa: E402


@pytest.mark.parametrize("head", ["tdt", "ctc"])
def test_it_computes_what_nemo_does(head: str, tmp_path: Path) -> None:
    convert(hybrid(), tmp_path / "hf", to="hf", family=f"parakeet-{head}")
    found = logits(tmp_path / "hf").numpy()
    expected = np.load(fixture_path("nemo/asr_hybrid_v3_0_0/outputs.npz"))[head]
    steps = min(found.shape[1], expected.shape[1]) - 1  # the last hears what is behind the signal's end
    assert np.allclose(found[:, :steps], expected[:, :steps], rtol=0, atol=5e-6)
