"""peft loads the adapters that are written, and merges what we merge."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")
pytestmark = pytest.mark.peer

from tests.support import fixture_path  # noqa: E402

import anyckpt  # noqa: E402

LLAMA = fixture_path("families/llama/hf")
ADAPTER = fixture_path("families/lora_llama/hf_adapter")
FAMILIES = (
    "llama", "qwen2", "qwen3", "gemma2", "phi3", "gpt2", "starcoder2", "falcon_seq_mqa", "gpt_neox", "nemotron",
    "starcoder_gpt_bigcode", "qwen2_moe", "deepseek_v2_lite", "nemotron_h",
)  # fmt: skip
OTHERS = {
    "linear": {"target_modules": "all-linear", "r": 4, "lora_alpha": 8},
    "some": {"target_modules": ["q_proj", "v_proj", "up_proj"], "r": 2, "lora_alpha": 8},
    "rslora": {"target_modules": ["q_proj", "down_proj"], "r": 3, "lora_alpha": 5, "use_rslora": True},
    "dora": {"target_modules": "all-linear", "r": 4, "lora_alpha": 8, "use_dora": True},
    "patterns": {"target_modules": "all-linear", "r": 4, "lora_alpha": 8,
                 "rank_pattern": {"q_proj": 2, "layers.0.mlp.up_proj": 3},
                 "alpha_pattern": {"k_proj": 4, "layers.1.self_attn.v_proj": 1}},
    "layers": {"target_modules": ["q_proj", "o_proj"], "r": 2, "lora_alpha": 3, "layers_to_transform": [1]},
    "head": {"target_modules": ["q_proj", "lm_head"], "r": 2, "lora_alpha": 3},
    "embedding": {"target_modules": ["q_proj", "embed_tokens"], "r": 2, "lora_alpha": 3},
    "saved": {"target_modules": ["q_proj"], "r": 2, "lora_alpha": 3, "modules_to_save": ["embed_tokens", "lm_head"]},
}  # fmt: skip


MODULES = {
    "deepseek_v2_lite": {"target_modules": ["q_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"]},
    "nemotron_h": {"target_modules": ["in_proj", "q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj"]},
    "qwen2_moe": {"exclude_modules": ["shared_expert_gate"]},  # of which Megatron has no module
}


def base_model(path: Path, dtype: Any = None) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(
        path, dtype=dtype or torch.float32, attn_implementation="eager"
    ).eval()


def randomized(model: Any, seed: int = 0) -> Any:
    """With factors and magnitudes that change something; peft starts from zeros."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_magnitude" in name:
                parameter.mul_(torch.rand(parameter.shape, generator=generator) + 0.5)
            elif "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.05)
            elif "modules_to_save" in name:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
    return model


def logits(model: Any, inputs: Any) -> np.ndarray:
    with torch.no_grad():
        return model(torch.as_tensor(inputs)).logits.float().numpy()  # type: ignore[no-any-return]


def inputs_of(name: str) -> Any:
    return np.load(fixture_path(f"families/{name}/expected.npz"))["input_ids"]


def with_adapter(base: Path, adapter: Path) -> Any:
    return peft.PeftModel.from_pretrained(base_model(base), adapter).eval()


# -- converting ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", [None, "fused"])
@pytest.mark.parametrize("through", ["nemo", "nemo2", "megatron-bridge"])
def test_peft_loads_the_fixture_after_megatron(through: str, form: str | None, tmp_path: Path) -> None:
    expected = np.load(fixture_path("families/lora_llama/expected.npz"))
    anyckpt.convert(ADAPTER, tmp_path / "between", to=through, config=LLAMA, adapter_form=form)
    anyckpt.convert(tmp_path / "between", tmp_path / "peft", to="peft")
    found = logits(with_adapter(LLAMA, tmp_path / "peft"), expected["input_ids"])
    own = logits(with_adapter(LLAMA, ADAPTER), expected["input_ids"])
    assert np.abs(found - own).max() <= (2e-5 if form else 0.0)
    assert np.abs(found - expected["logits_with_adapter"]).max() < 2e-5
    assert np.abs(logits(base_model(LLAMA), expected["input_ids"]) - own).max() > 0.01, "the adapter changes something"


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    yield tmp_path_factory.mktemp("adapters")


def made(folders: Path, family: str, kind: str) -> tuple[Path, Path]:
    """A base model's folder, and that of an adapter that peft made for it."""
    base, path = fixture_path(f"families/{family}/hf"), folders / f"{family}-{kind}"
    if not path.exists():
        options = {**OTHERS[kind], **MODULES.get(family, {})}
        model = peft.get_peft_model(base_model(base), peft.LoraConfig(task_type="CAUSAL_LM", **options))
        randomized(model).save_pretrained(path)
    return base, path


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_there_and_back(name: str, folders: Path, tmp_path: Path) -> None:
    """peft adapts whatever it finds linear; after Megatron's names it computes the same."""
    base, adapter = made(folders, name, "linear")
    anyckpt.convert(adapter, tmp_path / "core", to="megatron-core", config=base)
    anyckpt.convert(tmp_path / "core", tmp_path / "peft", to="peft", config=base)
    first, second = (anyckpt.open(path).tensors for path in (adapter, tmp_path / "peft"))
    assert first.keys() == second.keys()
    assert all(np.array_equal(tensor.numpy(), second[key].numpy()) for key, tensor in first.items())
    inputs = inputs_of(name)
    found = logits(with_adapter(base, tmp_path / "peft"), inputs)
    assert np.array_equal(found, logits(with_adapter(base, adapter), inputs))


@pytest.mark.parametrize("kind", ["patterns", "rslora", "layers", "some"])
def test_peft_loads_what_is_written_of_it(kind: str, folders: Path, tmp_path: Path) -> None:
    base, adapter = made(folders, "llama", kind)
    tensors = anyckpt.open(adapter).tensors
    written = tmp_path / "peft"
    anyckpt.convert(adapter, written, to="peft", config=base, adapter_form="canonical")
    assert anyckpt.open(written).tensors.keys() == tensors.keys()
    inputs = inputs_of("llama")
    own, found = logits(with_adapter(base, adapter), inputs), logits(with_adapter(base, written), inputs)
    assert np.abs(own - found).max() < 1e-6
    config = json.loads((written / "adapter_config.json").read_text())
    assert config["use_rslora"] is False


def test_dora_through_fused(folders: Path, tmp_path: Path) -> None:
    base, adapter = made(folders, "llama", "dora")
    anyckpt.convert(adapter, tmp_path / "nemo2", to="nemo2", config=base, adapter_form="fused")
    anyckpt.convert(tmp_path / "nemo2", tmp_path / "peft", to="peft")
    inputs = inputs_of("llama")
    found = logits(with_adapter(base, tmp_path / "peft"), inputs)
    own = logits(with_adapter(base, adapter), inputs)
    assert np.abs(found - own).max() < 2e-5
    assert np.abs(own - logits(base_model(base), inputs)).max() > 0.01


def test_megatron_core_reads_what_is_written(tmp_path: Path) -> None:
    serialization = pytest.importorskip("megatron.core.dist_checkpointing")
    anyckpt.convert(ADAPTER, tmp_path / "core", to="megatron-core", config=LLAMA)
    known = serialization.load_tensors_metadata(str(tmp_path / "core"))
    ours = anyckpt.open(tmp_path / "core").tensors
    assert known.keys() == ours.keys()
    assert {name: tuple(tensor.global_shape) for name, tensor in known.items()} == {
        name: tensor.shape for name, tensor in ours.items()
    }


# -- merging -------------------------------------------------------------------------------------------------


def assert_merged_as_peft(base: Path, adapter: Path, out: Path, inputs: Any) -> None:
    anyckpt.merge_lora(base, adapter, out, dtype="fp32")
    theirs = with_adapter(base, adapter)
    before = logits(theirs, inputs)
    merged = theirs.merge_and_unload()
    state, ours = merged.state_dict(), base_model(out).state_dict()
    assert state.keys() == ours.keys()
    for name, tensor in state.items():
        scale = max(1.0, float(tensor.abs().max()))
        assert float((tensor - ours[name]).abs().max()) <= 1e-6 * scale, name
    found = logits(base_model(out), inputs)
    allowed = 2e-5 * max(1.0, float(np.abs(before).max()))
    assert np.abs(found - logits(merged, inputs)).max() < allowed
    assert np.abs(found - before).max() < allowed
    assert np.abs(found - logits(base_model(base), inputs)).max() > 100 * allowed, "the adapter changes something"


@pytest.mark.parametrize("kind", OTHERS)
def test_merged_as_peft_merges(kind: str, folders: Path, tmp_path: Path) -> None:
    base, adapter = made(folders, "llama", kind)
    assert_merged_as_peft(base, adapter, tmp_path / "out", inputs_of("llama"))


@pytest.mark.parametrize("name", [name for name in FAMILIES if name != "llama"])
def test_every_family_is_merged_as_peft_merges(name: str, folders: Path, tmp_path: Path) -> None:
    base, adapter = made(folders, name, "linear")
    assert_merged_as_peft(base, adapter, tmp_path / "out", inputs_of(name))


@pytest.mark.parametrize("name", ["mixtral", "qwen2_moe", "qwen3_moe", "deepseek_v2_lite", "gpt_oss"])
def test_experts_in_one_parameter(name: str, tmp_path: Path) -> None:
    base = fixture_path(f"families/{name}/hf")
    config = peft.LoraConfig(
        task_type="CAUSAL_LM", r=2, lora_alpha=6, target_modules=["q_proj"],
        target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
    )  # fmt: skip
    randomized(peft.get_peft_model(base_model(base), config)).save_pretrained(tmp_path / "adapter")
    assert_merged_as_peft(base, tmp_path / "adapter", tmp_path / "out", inputs_of(name))
    anyckpt.convert(tmp_path / "adapter", tmp_path / "core", to="megatron-core", config=base)
    anyckpt.convert(tmp_path / "core", tmp_path / "peft", to="peft", config=base)
    first, second = (anyckpt.open(path).tensors for path in (tmp_path / "adapter", tmp_path / "peft"))
    assert first.keys() == second.keys()
    assert all(np.array_equal(tensor.numpy(), second[key].numpy()) for key, tensor in first.items())
    own, found = (logits(with_adapter(base, tmp_path / path), inputs_of(name)) for path in ("adapter", "peft"))
    assert np.array_equal(own, found)


def test_dora_of_transposed_matrices(folders: Path, tmp_path: Path) -> None:
    base, adapter = made(folders, "gpt2", "dora")
    assert_merged_as_peft(base, adapter, tmp_path / "out", inputs_of("gpt2"))


def test_biases(tmp_path: Path) -> None:
    base = fixture_path("families/qwen2/hf")
    for number, options in enumerate(({"bias": "all"}, {"bias": "lora_only"}, {"lora_bias": True})):
        config = peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj"], r=2, **options)
        model = randomized(peft.get_peft_model(base_model(base), config))
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.endswith("bias"):
                    parameter.add_(0.25)
        model.save_pretrained(tmp_path / f"a{number}")
        assert_merged_as_peft(base, tmp_path / f"a{number}", tmp_path / f"out{number}", inputs_of("qwen2"))


def test_bfloat16_is_rounded_once(folders: Path, tmp_path: Path) -> None:
    """peft adds in bfloat16; here the sum is that of float32, rounded once."""
    base, adapter = made(folders, "qwen2", "linear")
    anyckpt.merge_lora(base, adapter, tmp_path / "narrow")
    exact = with_adapter(base, adapter).merge_and_unload().state_dict()
    ours = base_model(tmp_path / "narrow", torch.bfloat16).state_dict()
    different = total = 0
    for name, tensor in exact.items():
        narrow = tensor.to(torch.bfloat16)
        assert ours[name].dtype == torch.bfloat16
        different += int((narrow != ours[name]).sum())
        total += narrow.numel()
        error = (ours[name].float() - tensor).abs()
        assert bool((error <= tensor.abs() * 2.0**-8 + 1e-7).all()), name
    assert different <= total * 1e-5, "but for sums that lie within float32's rounding of the middle"
