"""Dequantized weights are bit for bit those that transformers loads, and so are the logits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.peer

from safetensors.torch import load_file, save_file  # noqa: E402
from tests.quantization.quantized import FP8, MXFP4, as_fp8, mxfp4, quantized  # noqa: E402

import anyckpt  # noqa: E402
from anyckpt.dtypes import dtype  # noqa: E402
from anyckpt.tensor import as_numbers  # noqa: E402

TOKENS = torch.tensor([[3, 7, 11, 2, 60, 5, 1, 9, 33, 12, 4, 8]])
KINDS = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@pytest.fixture(scope="module")
def deepseek(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of sizes that are multiples of 128, for transformers 5.23 cannot load cut blocks."""
    torch.manual_seed(1)
    config = transformers.DeepseekV3Config(
        vocab_size=96, hidden_size=128, intermediate_size=256, moe_intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=4, q_lora_rank=128, kv_lora_rank=64, qk_rope_head_dim=64,
        qk_nope_head_dim=64, v_head_dim=64, n_routed_experts=4, n_group=2, topk_group=1, num_experts_per_tok=2,
        n_shared_experts=1, first_k_dense_replace=1, max_position_embeddings=64, initializer_range=0.3,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("deepseek")
    transformers.DeepseekV3ForCausalLM(config).to(torch.bfloat16).save_pretrained(folder / "plain")
    return quantized(folder / "plain", folder / "fp8", FP8, as_fp8())


@pytest.fixture(scope="module")
def gpt_oss(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As wide as its experts, so that shapes do not tell what is transposed."""
    torch.manual_seed(2)
    config = transformers.GptOssConfig(
        vocab_size=96, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, num_local_experts=4, num_experts_per_tok=2, sliding_window=8,
        max_position_embeddings=64, initializer_range=0.3, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        rope_parameters={"rope_type": "default", "rope_theta": 150000.0},
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("gpt-oss")
    transformers.GptOssForCausalLM(config).to(torch.bfloat16).save_pretrained(folder / "plain")
    return quantized(folder / "plain", folder / "mxfp4", MXFP4, mxfp4)


def loaded(folder: Path, **options: Any) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager", **options).eval()


def assert_same_model(one: Any, other: Any) -> None:
    theirs, ours = one.state_dict(), other.state_dict()
    assert theirs.keys() == ours.keys()
    for name, tensor in theirs.items():
        assert tensor.dtype == ours[name].dtype, name
        assert torch.equal(tensor, ours[name]), name
    with torch.no_grad():
        first, second = one(TOKENS).logits, other(TOKENS).logits
    assert first.float().std() > 0.1
    assert torch.equal(first, second)


@pytest.mark.parametrize("route", [("hf",), ("megatron-core", "hf"), ("nemo2", "hf")])
def test_deepseek_is_what_transformers_dequantizes(deepseek: Path, route: tuple[str, ...], tmp_path: Path) -> None:
    source = deepseek
    for number, to in enumerate(route):
        done = anyckpt.convert(source, tmp_path / str(number), to=to, dtype="bf16" if source == deepseek else None)
        source = tmp_path / str(number)
        assert number or done.casts["float8_e4m3fn -> bfloat16"] > 20
    theirs = loaded(deepseek, quantization_config=transformers.FineGrainedFP8Config(dequantize=True), dtype="bfloat16")
    assert_same_model(theirs, loaded(source, dtype="auto"))


@pytest.mark.parametrize("route", [("hf",), ("megatron-core", "hf"), ("nemo2", "hf")])
def test_gpt_oss_is_what_transformers_dequantizes(gpt_oss: Path, route: tuple[str, ...], tmp_path: Path) -> None:
    source = gpt_oss
    for number, to in enumerate(route):
        anyckpt.convert(source, tmp_path / str(number), to=to, dtype="bf16" if source == gpt_oss else None)
        source = tmp_path / str(number)
    theirs = loaded(gpt_oss, quantization_config=transformers.Mxfp4Config(dequantize=True), dtype="bfloat16")
    assert_same_model(theirs, loaded(source, dtype="auto"))


@pytest.mark.parametrize(
    ("model", "algorithm", "form", "config"),
    [("deepseek", "fp8_blocks", "fp8", "FineGrainedFP8Config"), ("gpt_oss", "mxfp4", "mxfp4", "Mxfp4Config")],
)
def test_transformers_dequantizes_what_we_quantize(
    model: str, algorithm: str, form: str, config: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    plain = request.getfixturevalue(model).parent / "plain"
    anyckpt.convert(plain, tmp_path / "q", to="hf", quantize=algorithm, quantize_form=form)
    anyckpt.convert(tmp_path / "q", tmp_path / "back", to="hf", dtype="bf16")
    how = getattr(transformers, config)(dequantize=True)
    theirs = loaded(tmp_path / "q", quantization_config=how, dtype="bfloat16")
    assert_same_model(theirs, loaded(tmp_path / "back", dtype="auto"))


def test_a_transposed_expert_would_be_noticed(gpt_oss: Path, tmp_path: Path) -> None:
    anyckpt.convert(gpt_oss, tmp_path / "out", to="hf", dtype="bf16")
    model = loaded(tmp_path / "out", dtype="auto")
    experts = model.model.layers[0].mlp.experts
    with torch.no_grad():
        before = model(TOKENS).logits
        experts.down_proj.copy_(experts.down_proj.transpose(1, 2).clone())
        assert (model(TOKENS).logits - before).abs().max() > 0.1


@pytest.mark.parametrize("to", list(KINDS))
def test_every_code_and_exponent_of_mxfp4(to: str, gpt_oss: Path, tmp_path: Path) -> None:
    """Against the function of transformers, OpenAI's own, for all pairs of codes and all exponents that are numbers."""
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    name = "model.layers.0.mlp.experts.gate_up_proj"
    generator = np.random.default_rng(3)
    stored = load_file(gpt_oss / "model.safetensors")
    blocks, scales = stored[f"{name}_blocks"], stored[f"{name}_scales"]
    blocks.copy_(torch.from_numpy(generator.permutation(np.resize(np.arange(256), blocks.numel()))).view(blocks.shape))
    scales.copy_(torch.from_numpy(generator.permutation(np.resize(np.arange(255), scales.numel()))).view(scales.shape))
    folder = tmp_path / "all"
    quantized(gpt_oss, folder, MXFP4, lambda key, array: {key: _numpy(stored[key])})
    anyckpt.convert(folder, tmp_path / "out", to="hf", dtype=to)
    found = load_file(tmp_path / "out" / "model.safetensors")[name]
    assert torch.equal(found, convert_moe_packed_tensors(blocks, scales, dtype=KINDS[to]))


def _numpy(tensor: Any) -> Any:
    kind = dtype(str(tensor.dtype))
    raw = tensor.contiguous().view(torch.uint8).numpy().view(kind.raw)
    return as_numbers(raw, kind).reshape(tuple(tensor.shape))


@pytest.mark.parametrize("to", list(KINDS))
@pytest.mark.parametrize("shape", [(128, 128), (130, 257), (1, 300), (576, 100)])
def test_every_code_of_fp8_and_cut_blocks(to: str, shape: tuple[int, int], tmp_path: Path) -> None:
    """Against torch's arithmetic: transformers 5.23 refuses, or takes other blocks, where the last ones are cut."""
    torch.manual_seed(4)
    codes = torch.randint(0, 256, shape, dtype=torch.uint8)
    codes[(codes & 0x7F) == 0x7F] = 0x7E  # not a number
    weight = codes.view(torch.float8_e4m3fn)
    rows, columns = (-(-n // 128) for n in shape)
    scales = torch.rand(rows, columns) * 1e-3
    (tmp_path / "in").mkdir()
    save_file(
        {"a.weight": weight, "a.weight_scale_inv": scales, "b": torch.ones(3, dtype=torch.bfloat16)},
        tmp_path / "in" / "model.safetensors",
    )
    (tmp_path / "in" / "config.json").write_text(json.dumps({"model_type": "x", "quantization_config": FP8}))
    anyckpt.convert(tmp_path / "in", tmp_path / "out.safetensors", to="safetensors", dtype=to)
    found = load_file(tmp_path / "out.safetensors")
    spread = scales.repeat_interleave(128, 0)[: shape[0]].repeat_interleave(128, 1)[:, : shape[1]]
    assert torch.equal(found["a.weight"], (weight.float() * spread).to(KINDS[to]))
    assert found["b"].dtype == KINDS[to]
    assert found.keys() == {"a.weight", "b"}
