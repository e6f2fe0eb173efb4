"""What torch makes of the rank folders that we write into a ``.nemo``."""

from __future__ import annotations

import hashlib
import tarfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from tests.support import expected_of, fixture_path  # noqa: E402

from anyckpt.engine.execute import execute  # noqa: E402
from anyckpt.formats.format import WriteOptions  # noqa: E402
from anyckpt.formats.nemo import FORMAT  # noqa: E402
from anyckpt.layout import cut  # noqa: E402
from anyckpt.operations.steps.joining import geometry_of, open_checkpoint, parallelism_of  # noqa: E402

pytestmark = pytest.mark.peer


def digest(tensor: Any) -> str:
    return hashlib.sha256(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()).hexdigest()


@pytest.mark.parametrize("name", ["nemo1_mp_tp2", "nemo1_mp_tp2_pp2"])
def test_torch_loads_every_rank(name: str, tmp_path: Path) -> None:
    whole = open_checkpoint(fixture_path(f"nemo/{name}/model.nemo"))
    ranks = tuple(cut(whole.tensors, parallelism_of(whole), geometry_of(whole)))
    assert FORMAT.plan is not None
    execute(FORMAT.plan(replace(whole, ranks=ranks), WriteOptions(layout=whole.layout)), str(tmp_path / "m.nemo"))
    with tarfile.open(tmp_path / "m.nemo", "r:") as tar:  # as NeMo's connector does
        tar.extractall(tmp_path / "x", filter="data")
    expected = expected_of(f"nemo/{name}")
    for rank in expected["per_rank_state_dict"]:
        wide = f"tp_rank_{rank['tp']:02d}_pp_rank_{rank['pp']:03d}"
        folder = wide if expected["pp"] > 1 else f"mp_rank_{rank['tp']:02d}"
        state = torch.load(tmp_path / "x" / folder / "model_weights.ckpt", weights_only=True, mmap=True)
        tensors = {key: value for key, value in state.items() if value is not None}
        assert sorted(set(state) - set(tensors)) == sorted(rank["non_tensor"])
        assert {key: (digest(value), list(value.shape)) for key, value in tensors.items()} == {
            key: (facts["sha256"], facts["shape"]) for key, facts in rank["tensors"].items()
        }
