"""transformers computes the fixture's logits with what we write, and reads our configurations as we do."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.peer

from tests.models.cases import FAMILIES, Case, open_case, with_weights  # noqa: E402
from tests.models.proofs import PROOFS  # noqa: E402
from tests.support import fixture_path, write_plan  # noqa: E402

from anyckpt import models  # noqa: E402
from anyckpt.formats.format import WriteOptions  # noqa: E402
from anyckpt.formats.hf import FORMAT  # noqa: E402


def through(case: Case, dialect: str, kind: str, path: Path, drop: tuple[str, ...] = ()) -> Path:
    """HF -> a Megatron dialect and configuration -> HF, with nothing but these two carried over."""
    tensors = models.from_hub(case.hub(), dialect).tensors
    config = models.render_config(case.model, kind)
    between = replace(
        with_weights(case.checkpoint, tensors), config=config, config_kind=kind, artifacts={}, details={}, format="x"
    )
    model = models.identify(between)
    assert model is not None
    out = models.from_hub(models.to_hub(between, model), "hf")
    rendered = {key: value for key, value in models.render_config(model, "hf").items() if key not in drop}
    final = replace(between, tensors=out.tensors, dialect="hf", config=rendered, config_kind="hf")
    assert FORMAT.plan is not None
    return write_plan(FORMAT.plan(final, WriteOptions()), path)


def logits(path: Path, inputs: Any) -> Any:
    model = transformers.AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    with torch.no_grad():
        return model(torch.as_tensor(inputs)).logits.numpy()


OLD, NEW = ("rope_parameters", "dtype"), ("rope_theta", "rope_scaling", "torch_dtype")


@pytest.mark.parametrize(
    ("dialect", "kind", "drop"),
    [
        ("megatron-core", "megatron-args", ()),
        ("nemo-flat", "nemo1", OLD),
        ("nemo2", "nemo2", NEW),
    ],
)
@pytest.mark.parametrize("name", FAMILIES)
def test_logits(name: str, dialect: str, kind: str, drop: tuple[str, ...], tmp_path: Path) -> None:
    case = open_case(name)
    expected = np.load(fixture_path(f"families/{name}/expected.npz"))
    inputs = torch.as_tensor(expected["input_ids"])
    found = logits(through(case, dialect, kind, tmp_path / "out", drop), inputs)
    assert np.array_equal(found, logits(fixture_path(f"families/{name}/hf"), inputs)), "same bytes, same machine"
    assert np.abs(found - expected["logits"]).max() < 1e-5 * max(1.0, float(np.abs(expected["logits"]).max()))


@pytest.mark.parametrize("drop", [(), OLD, NEW])
@pytest.mark.parametrize("name", FAMILIES)
def test_transformers_reads_our_configuration_as_its_own(name: str, drop: tuple[str, ...]) -> None:
    case = open_case(name)
    kind = type(transformers.AutoConfig.from_pretrained(fixture_path(f"families/{name}/hf")))
    ours = {key: value for key, value in models.render_config(case.model, "hf").items() if key not in drop}
    assert kind.from_dict(ours).to_dict() == kind.from_dict(case.checkpoint.config).to_dict()


def test_classes_are_those_of_transformers() -> None:
    for family in models.known_families().values():
        known = family.hugging_face
        if known.model_types[0] not in transformers.CONFIG_MAPPING:
            assert PROOFS[family.name].outputs != "transformers"
            continue
        if hasattr(transformers, known.architectures[0]):
            continue
        # published with code of its own, in whose place transformers takes another family's class
        kind = transformers.CONFIG_MAPPING[known.model_types[0]]
        taken = transformers.MODEL_FOR_CAUSAL_LM_MAPPING[kind].__name__
        assert family.like and taken == models.known_families()[family.like].hugging_face.architectures[0]
