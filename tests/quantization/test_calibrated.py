"""Exports of calibrated weights against what NVIDIA ModelOpt wrote, byte for byte, from the same statistics."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tests.quantization.modelopt_cases import export, exports, facts_of, ones, sha256, statistics_of, tensors_of

import anyckpt

POWERS = ("int8_sq05_b", "int4_awq_a", "int4_awq_b", "int4_awq_bf16_b", "w4a8_awq_b")
VARIANTS = [one for one in exports() if not one[0].endswith("moe_c")]
"""Of the models of Llama's modules, of which ModelOpt's statistics are kept."""


@pytest.mark.parametrize(("case", "algorithm", "options", "variant"), VARIANTS)
def test_as_modelopt_exports_it(
    tmp_path: Path, case: str, algorithm: str, options: dict[str, Any], variant: str
) -> None:
    facts = facts_of(case)
    out = tmp_path / "out"
    files = export(case, algorithm, options, variant, statistics_of(case), out)
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
            if case in POWERS and ("scal" in name and fact["dtype"] == "float32"):
                continue  # numpy's powers of the factors differ from torch's in the last bit
            assert sha256(tensor) == fact["sha256"], name
    if variant != "hf":
        config = json.loads((out / "config.json").read_text())
        stated = facts["variants"][variant]["files"]["config.json"]
        assert {**config, "producer": None} == {**stated, "producer": None}
    else:
        for file in ("config.json", "hf_quant_config.json"):
            config = json.loads((out / file).read_text())
            stated = facts["variants"][variant]["files"][file]
            if file == "config.json":
                config, stated = config["quantization_config"], stated["quantization_config"]
            assert config == stated
