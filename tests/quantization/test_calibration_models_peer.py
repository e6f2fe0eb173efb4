"""Calibration of models of many families: a layer at a time it sees what one forward pass of the whole model shows."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.peer

from safetensors.torch import load_file, save_file  # noqa: E402
from tests.quantization.modelopt_cases import FIXTURES  # noqa: E402

import anyckpt  # noqa: E402
from anyckpt.errors import AnyckptError, FormatError, UsageError  # noqa: E402
from anyckpt.operations.convert import under_hub_names  # noqa: E402
from anyckpt.operations.options import ConvertOptions  # noqa: E402
from anyckpt.operations.steps.calibrating import linear_weights  # noqa: E402
from anyckpt.quantization.statistics import Statistics  # noqa: E402
from anyckpt.torch.calibration import calibrate  # noqa: E402

SIZES = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 64,
    "initializer_range": 0.1,
    "pad_token_id": 0,
}
MODELS: dict[str, Callable[[], Any]] = {
    "llama": lambda: transformers.LlamaConfig(**SIZES),
    "qwen3": lambda: transformers.Qwen3Config(**SIZES),
    "gemma2": lambda: transformers.Gemma2Config(**SIZES, sliding_window=8, query_pre_attn_scalar=16),
    "gemma3": lambda: transformers.Gemma3TextConfig(**SIZES, sliding_window=8, query_pre_attn_scalar=16),
    "phi3": lambda: transformers.Phi3Config(**{**SIZES, "num_key_value_heads": 4}),
    "gpt_neox": lambda: transformers.GPTNeoXConfig(**SIZES),
    "starcoder2": lambda: transformers.Starcoder2Config(**SIZES),
    "olmo2": lambda: transformers.Olmo2Config(**SIZES),
    "mixtral": lambda: transformers.MixtralConfig(**SIZES, num_local_experts=4),
    "qwen3_moe": lambda: transformers.Qwen3MoeConfig(
        **SIZES, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32
    ),
}
CENTRED = ("gemma2", "gemma3")


def batches() -> list[Any]:
    random = np.random.default_rng(5)
    return [random.integers(1, 96, (2, 20)), random.integers(1, 96, (3, 12)), random.integers(1, 96, (1, 7))]


def statistics_of(folder: Path, group_size: int | None = None) -> Statistics:
    hub = under_hub_names(anyckpt.open(folder), ConvertOptions(to="hf"))
    return calibrate(hub, linear_weights(hub), batches(), computed_in="float32", group_size=group_size)


def seen_at_once(folder: Path) -> dict[str, Any]:
    """The largest magnitude of each input of each linear module, of forward passes of the whole model."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    found: dict[str, Any] = {}

    def hook(name: str) -> Any:
        def note(module: Any, inputs: Any) -> None:
            largest = inputs[0].abs().reshape(-1, inputs[0].shape[-1]).amax(0)
            found[name] = torch.maximum(found[name], largest) if name in found else largest

        return note

    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_pre_hook(hook(name))
    with torch.no_grad():
        for ids in batches():
            model(torch.from_numpy(ids))
    return {name: largest.numpy() for name, largest in found.items()}


@pytest.mark.parametrize("family", MODELS)
def test_layers_one_at_a_time_are_the_whole_model(family: str, tmp_path: Path) -> None:
    torch.manual_seed(3)
    model = transformers.AutoModelForCausalLM.from_config(MODELS[family]())
    model.save_pretrained(tmp_path / "model")
    statistics = statistics_of(tmp_path / "model")
    whole = seen_at_once(tmp_path / "model")
    chosen = {name.removesuffix(".weight") for name in linear_weights(anyckpt.open(tmp_path / "model"))}
    assert set(statistics.modules) == chosen
    both = chosen & whole.keys()
    assert len(both) >= 6
    for name in both:
        np.testing.assert_allclose(statistics.modules[name].inputs, whole[name], rtol=1e-4, atol=1e-6, err_msg=name)
    assert len(statistics.caches) == 3
    norms = {one.norm for one in statistics.shared if one.norm}
    assert bool(norms) is (family not in (*CENTRED, "olmo2")), norms


def test_memory_of_a_layer_is_given_back(tmp_path: Path) -> None:
    """When a layer runs, no other has its weights; the last normalization is loaded while the last layer waits."""
    from anyckpt.torch.calibration.model import LazyModel

    torch.manual_seed(3)
    transformers.AutoModelForCausalLM.from_config(MODELS["llama"]()).save_pretrained(tmp_path / "model")
    hub = under_hub_names(anyckpt.open(tmp_path / "model"), ConvertOptions(to="hf"))
    held: list[int] = []
    load = LazyModel.load

    def counted(self: LazyModel, name: str, module: Any, *, recurse: bool = True) -> None:
        load(self, name, module, recurse=recurse)
        held.append(sum(not one.is_meta for one in self.module.parameters()))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LazyModel, "load", counted)
        calibrate(hub, linear_weights(hub), batches(), computed_in="float32")
    layer = len(list(transformers.AutoModelForCausalLM.from_config(MODELS["llama"]()).model.layers[0].parameters()))
    assert max(held[:-1]) == layer and held[-1] == layer + 1


def test_any_source_is_calibrated_and_gives_the_same(tmp_path: Path) -> None:
    """From a .nemo of the same model, with the same statistics."""
    source = FIXTURES / "src_llama_b" / "hf"
    anyckpt.convert(source, tmp_path / "model.nemo", to="nemo")
    ids = np.load(FIXTURES / "src_llama_b" / "calib.npz")["input_ids"].reshape(6, 24)
    np.save(tmp_path / "ids.npy", ids)
    for name, path in (("a", source), ("b", tmp_path / "model.nemo")):
        anyckpt.quantize(
            path,
            tmp_path / name,
            algorithm="w4a8_awq",
            calib_dataset=tmp_path / "ids.npy",
            calib_batch_size=2,
            calib_dtype="fp32",
            save_statistics=tmp_path / f"{name}.seen",
        )
    found, other = (anyckpt.open(tmp_path / name).tensors for name in "ab")
    assert found.keys() == other.keys()
    for name, tensor in found.items():
        np.testing.assert_array_equal(tensor.numpy(), other[name].numpy(), err_msg=name)
    again = tmp_path / "again"
    anyckpt.convert(source, again, to="trtllm", quantize="w4a8_awq", statistics=tmp_path / "b.seen")
    for name, tensor in anyckpt.open(again).tensors.items():
        np.testing.assert_array_equal(tensor.numpy(), found[name].numpy(), err_msg=name)


BOUNDS = {"fp8": 0.08, "int8_sq": 0.08, "int4_awq": 0.35, "w4a8_awq": 0.35, "nvfp4": 0.35}
"""How far logits of the tiny model may be, as a share of their own size: about what the codes' steps allow."""


@pytest.mark.parametrize("algorithm", BOUNDS)
def test_logits_of_dequantized_weights_are_near(algorithm: str, tmp_path: Path) -> None:
    source = FIXTURES / "src_llama_b" / "hf"
    ids = np.load(FIXTURES / "src_llama_b" / "calib.npz")["input_ids"].reshape(6, 24)
    np.save(tmp_path / "ids.npy", ids)
    anyckpt.quantize(
        source,
        tmp_path / "q",
        algorithm=algorithm,
        to="hf",
        calib_dataset=tmp_path / "ids.npy",
        calib_dtype="fp32",
        dtype="fp32",
    )
    anyckpt.convert(tmp_path / "q", tmp_path / "back", to="hf", dtype="fp32")
    logits = []
    for folder in (source, tmp_path / "back"):
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        with torch.no_grad():
            logits.append(model(torch.from_numpy(ids)).logits)
    share = float((logits[0] - logits[1]).norm() / logits[0].norm())
    assert 0 < share < BOUNDS[algorithm]


def test_what_is_no_number_is_told_with_its_module(tmp_path: Path) -> None:
    torch.manual_seed(3)
    transformers.AutoModelForCausalLM.from_config(MODELS["llama"]()).save_pretrained(tmp_path / "model")
    file = tmp_path / "model" / "model.safetensors"
    weights = load_file(file)
    weights["model.layers.1.input_layernorm.weight"][3] = float("inf")
    save_file(weights, file, {"format": "pt"})
    with pytest.raises(FormatError, match=r"model\.layers\.1\.self_attn\.q_proj.*not-a-numbers"):
        statistics_of(tmp_path / "model")


def test_what_transformers_does_not_know_is_refused(tmp_path: Path) -> None:
    torch.manual_seed(3)
    transformers.AutoModelForCausalLM.from_config(MODELS["llama"]()).save_pretrained(tmp_path / "model")
    hub = under_hub_names(anyckpt.open(tmp_path / "model"), ConvertOptions(to="hf"))
    other = replace(hub, config={**hub.config, "model_type": "nobody"})
    with pytest.raises(UsageError, match="transformers makes no causal language model"):
        calibrate(other, linear_weights(hub), batches(), computed_in="float32")
    few = replace(hub, tensors={name: t for name, t in hub.tensors.items() if "layers.1.mlp.up" not in name})
    with pytest.raises(AnyckptError, match="needs a weight that the checkpoint has not"):
        calibrate(few, linear_weights(few), batches(), computed_in="float32")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"calib_sequence_length": 65}, "sequences are longer than the model's positions"),
        ({"num_calib_size": 7}, "there is less to calibrate with than was asked for"),
        ({"calib_dataset": "text.txt"}, "has no tokenizer"),
        ({"calib_dataset": "large.jsonl"}, "token ids are not of the model's vocabulary"),
        ({"algorithm": "int4_awq", "awq_block_size": 96}, "groups do not divide the rows"),
        ({"algorithm": "fp8_per_channel", "save_statistics": "seen"}, "needs no calibration"),
    ],
)
def test_what_cannot_be_calibrated_so_is_said(
    options: dict[str, Any], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("text.txt").write_text("some words")
    Path("large.jsonl").write_text(json.dumps([1, 2, 300]))
    Path("ids.jsonl").write_text("[1, 2, 3]\n[4, 5]\n")
    arguments: dict[str, Any] = {"algorithm": "int8_sq", "calib_dataset": "ids.jsonl", **options}
    with pytest.raises(UsageError, match=said):
        anyckpt.quantize(FIXTURES / "src_llama_b" / "hf", "out", **arguments)
    assert not Path("out").exists()


def test_a_model_that_does_not_run_is_told_in_its_own_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(3)
    transformers.AutoModelForCausalLM.from_config(MODELS["llama"]()).save_pretrained(tmp_path / "model")

    def broken(*_: Any, **__: Any) -> None:
        raise RuntimeError("no kernel\nand more")

    for part in ("LlamaMLP", "LlamaRotaryEmbedding"):
        with monkeypatch.context() as patch:
            patch.setattr(getattr(transformers.models.llama.modeling_llama, part), "forward", broken)
            with pytest.raises(UsageError, match=r"LlamaForCausalLM does not run here.*RuntimeError: no kernel\)"):
                statistics_of(tmp_path / "model")


def test_what_is_quantized_already_is_not_calibrated(tmp_path: Path) -> None:
    anyckpt.convert(FIXTURES / "src_llama_b" / "hf", tmp_path / "q", to="hf", quantize="fp8")
    (tmp_path / "ids.jsonl").write_text("[1, 2, 3]\n")
    arguments: dict[str, Any] = {"algorithm": "int8_sq", "calib_dataset": tmp_path / "ids.jsonl"}
    with pytest.raises(UsageError, match="the model is quantized already"):
        anyckpt.quantize(tmp_path / "q", tmp_path / "out", **arguments)
    anyckpt.quantize(tmp_path / "q", tmp_path / "out", dtype="bf16", **arguments)
    assert (tmp_path / "out" / "rank0.safetensors").exists()


def test_texts_go_through_the_models_tokenizer(tmp_path: Path) -> None:
    """That of a .qnemo, which is sentencepiece's."""
    archive = FIXTURES / "qnemo_b"
    tokenizer = tmp_path / "tokenizer.model"
    stored = anyckpt.open(next(archive.glob("*.qnemo"))).tokenizer
    assert stored is not None and stored.model_file is not None
    tokenizer.write_bytes(stored.files[stored.model_file].read_all())
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog " * 40)
    done = anyckpt.quantize(
        FIXTURES / "src_llama_b" / "hf",
        tmp_path / "out",
        algorithm="fp8",
        calib_dataset=text,
        tokenizer=tokenizer,
        calib_sequence_length=16,
        num_calib_size=4,
    )
    assert any("calibrated with 4 samples" in note and "64 tokens" in note for note in done.notes)
