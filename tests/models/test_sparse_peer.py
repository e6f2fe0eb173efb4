"""transformers computes the fixtures' logits with what we write, and reads our configurations as we do."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.peer

from dataclasses import replace  # noqa: E402

from tests.models.cases import open_case, with_weights  # noqa: E402
from tests.models.sparse_cases import FAMILIES, UNSAYABLE  # noqa: E402
from tests.models.test_models_peer import NEW, OLD, logits, through  # noqa: E402
from tests.support import fixture_path, write_plan  # noqa: E402

from anyckpt import models  # noqa: E402
from anyckpt.formats.format import WriteOptions  # noqa: E402
from anyckpt.formats.hf import FORMAT  # noqa: E402

FOR_OTHERS = {"moe_layer_freq", "scoring_func", "topk_method"}
"""Keys of DeepSeek's own code and of vLLM, which transformers 5 does not write."""

ROUNDED = {"nemotron_h": 2e-6}
"""chunk_size, which Megatron's configuration has not, orders the sums of transformers' Mamba-2."""

THROUGH = (("megatron-core", "megatron-args"), ("nemo-flat", "nemo1"), ("nemo2", "nemo2"))


SAYABLE = [
    (name, dialect, kind) for name in FAMILIES for dialect, kind in THROUGH if kind not in UNSAYABLE.get(name, ())
]
"""Families and the frameworks that have such models."""


@pytest.mark.parametrize(("name", "dialect", "kind"), SAYABLE)
def test_logits(name: str, dialect: str, kind: str, tmp_path: Path) -> None:
    expected = np.load(fixture_path(f"families/{name}/expected.npz"))
    found = logits(through(open_case(name), dialect, kind, tmp_path / "out"), expected["input_ids"])
    original = logits(fixture_path(f"families/{name}/hf"), expected["input_ids"])
    assert np.abs(found - original).max() <= ROUNDED.get(name, 0)
    assert np.abs(found - expected["logits"]).max() < 1e-5


@pytest.mark.parametrize("drop", [OLD, NEW])
@pytest.mark.parametrize("name", FAMILIES)
def test_transformers_reads_our_configuration_as_its_own(name: str, drop: tuple[str, ...], tmp_path: Path) -> None:
    case = open_case(name)
    kind = type(transformers.AutoConfig.from_pretrained(fixture_path(f"families/{name}/hf")))
    ours = {key: value for key, value in models.render_config(case.model, "hf").items() if key not in drop}
    (tmp_path / "config.json").write_text(json.dumps(ours))
    theirs = kind.from_pretrained(fixture_path(f"families/{name}/hf")).to_dict()
    found = kind.from_pretrained(tmp_path).to_dict()
    understood = {key: value for key, value in found.items() if key in theirs or key not in FOR_OTHERS}
    assert understood == theirs


@pytest.mark.parametrize("name", FAMILIES)
def test_what_transformers_saves_in_its_own_layout(name: str, tmp_path: Path) -> None:
    """transformers 5 has the experts stacked in memory."""
    case = open_case(name)
    model = transformers.AutoModelForCausalLM.from_pretrained(fixture_path(f"families/{name}/hf"), dtype="auto")
    model.save_pretrained(tmp_path, save_original_format=False)
    from anyckpt.formats.registry import read

    saved = read(str(tmp_path))
    assert set(saved.weights()) != set(case.checkpoint.tensors) or name == "gpt_oss"
    found = models.identify(saved)
    assert found is not None
    ours = models.to_hub(saved, found).tensors
    assert {key: (t.shape, t.cast("float32").numpy().tobytes()) for key, t in ours.items()} == {
        key: (t.shape, t.cast("float32").numpy().tobytes()) for key, t in case.hub().tensors.items()
    }


@pytest.mark.parametrize("name", FAMILIES)
def test_the_negative_control(name: str, tmp_path: Path) -> None:
    """Logits tell: with one layer's experts in another order they differ."""
    case = open_case(name)
    hub = case.hub()
    key = next(key for key in hub.tensors if key.endswith("experts.linear_fc2.weight0"))
    other = key[:-1] + "1"
    swapped = {**hub.tensors, key: hub.tensors[other], other: hub.tensors[key]}
    out = models.from_hub(replace(hub, tensors=swapped), "hf")
    assert FORMAT.plan is not None
    checkpoint = with_weights(case.checkpoint, out.tensors, "hf")
    path = write_plan(FORMAT.plan(checkpoint, WriteOptions()), tmp_path / "out")
    expected = np.load(fixture_path(f"families/{name}/expected.npz"))
    assert np.abs(logits(path, expected["input_ids"]) - expected["logits"]).max() > 1e-3
