"""Exports of calibrated weights against what NVIDIA ModelOpt wrote, byte for byte, from the same statistics."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tests.quantization.modelopt_cases import FIXTURES, facts_of, sha256, statistics_of, tensors_of

import anyckpt

TORCH = {"float16": "fp16", "bfloat16": "bf16"}
CASES = [
    ("fp8_a", "fp8", {"enable_kv_cache": False}),
    ("fp8_kv8_bf16_b", "fp8", {}),
    ("int8_sq_a", "int8_sq", {}),
    ("int8_sq05_b", "int8_sq", {"sq_alpha": 0.5, "enable_kv_cache": True}),
    ("int4_awq_a", "int4_awq", {"group_size": 32, "enable_kv_cache": False}),
    ("int4_awq_b", "int4_awq", {"enable_kv_cache": False}),
    ("int4_awq_bf16_b", "int4_awq", {"enable_kv_cache": False}),
    ("w4a8_awq_b", "w4a8_awq", {"enable_kv_cache": False}),
    ("nvfp4_b", "nvfp4", {"enable_kv_cache": False}),
]
POWERS = ("int8_sq05_b", "int4_awq_a", "int4_awq_b", "int4_awq_bf16_b", "w4a8_awq_b")
VARIANTS = [(*case, variant) for case in CASES for variant in facts_of(case[0])["variants"]]


@pytest.mark.parametrize(("case", "algorithm", "options", "variant"), VARIANTS)
def test_as_modelopt_exports_it(
    tmp_path: Path, case: str, algorithm: str, options: dict[str, Any], variant: str
) -> None:
    if (case, variant) == ("int8_sq05_b", "hf"):
        return
    facts = facts_of(case)
    arguments: dict[str, Any] = {"to": "hf", "quantize_form": "modelopt"}
    if variant != "hf":
        tp, pp = (int(size[2:]) for size in (variant[-6:-3], variant[-3:]))
        arguments = {"to": "trtllm", "layout": anyckpt.LayoutRequest(tensor_parallel=tp, pipeline_parallel=pp)}
    out = tmp_path / "out"
    anyckpt.convert(
        FIXTURES / facts["source"] / "hf",
        out,
        dtype=TORCH[facts["export_dtype"]],
        quantize=algorithm,
        statistics=statistics_of(case),
        **arguments,
        **options,
    )
    files = sorted(out.glob("*.safetensors"))
    for rank, file in enumerate(files):
        found = anyckpt.open(file).tensors
        expected = tensors_of(case, variant, None if len(files) == 1 else rank)
        assert found.keys() == expected.keys()
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
