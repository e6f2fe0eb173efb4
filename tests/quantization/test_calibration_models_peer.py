"""Calibration of models of many families: a layer at a time it sees what one forward pass of the whole model shows."""

from __future__ import annotations

import json
import threading
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
from torch.multiprocessing.reductions import StorageWeakRef  # noqa: E402

import anyckpt  # noqa: E402
from anyckpt.errors import AnyckptError, FormatError, UsageError  # noqa: E402
from anyckpt.operations.convert import under_hub_names  # noqa: E402
from anyckpt.operations.options import ConvertOptions  # noqa: E402
from anyckpt.operations.steps.calibrating import linear_weights  # noqa: E402
from anyckpt.quantization.statistics import Statistics  # noqa: E402
from anyckpt.torch.calibration import calibrate  # noqa: E402
from anyckpt.torch.calibration.model import Rows  # noqa: E402
from anyckpt.torch.calibration.seeing import Sharing  # noqa: E402

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


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama") / "model"
    torch.manual_seed(3)
    transformers.AutoModelForCausalLM.from_config(MODELS["llama"]()).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("part", ["LlamaMLP", "LlamaRotaryEmbedding"])
@pytest.mark.parametrize("kind", [RuntimeError, ZeroDivisionError])
def test_a_model_that_does_not_run_is_told_in_its_own_words(
    part: str, kind: type[Exception], llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise kind("no kernel\nand more")

    threads = threading.active_count()
    monkeypatch.setattr(getattr(transformers.models.llama.modeling_llama, part), "forward", broken)
    with pytest.raises(UsageError, match=rf"LlamaForCausalLM does not run here.*{kind.__name__}: no kernel\)"):
        statistics_of(llama)
    assert threading.active_count() == threads


@pytest.mark.parametrize(
    "part", ["run.note_inputs", "awq.losses", "awq.scales", "model.LazyModel.load", "model.LazyModel.free"]
)
def test_a_defect_of_ours_is_not_told_as_the_models(part: str, llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def defect(*_: Any, **__: Any) -> None:
        raise ValueError("ours")

    threads = threading.active_count()
    monkeypatch.setattr(f"anyckpt.torch.calibration.{part}", defect)
    with pytest.raises(ValueError, match="^ours$"):
        statistics_of(llama, group_size=32)
    assert threading.active_count() == threads


@pytest.mark.parametrize(
    "part", ["transformers.models.llama.modeling_llama.LlamaMLP.forward", "anyckpt.torch.calibration.awq.losses"]
)
def test_too_little_memory_is_told_with_what_takes_less(
    part: str, llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def large(*_: Any, **__: Any) -> None:
        torch.empty(1 << 45)

    monkeypatch.setattr(part, large)
    with pytest.raises(UsageError, match="not enough memory .* lower --calib-batch-size"):
        statistics_of(llama, group_size=32)


def test_too_many_batches_are_told(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    start, started = threading.Thread.start, []

    def few(self: threading.Thread) -> None:
        started.append(self)
        if len(started) > 2:
            raise RuntimeError("can't start new thread")
        start(self)

    monkeypatch.setattr(threading.Thread, "start", few)
    with pytest.raises(UsageError, match="more batches .* raise --calib-batch-size"):
        statistics_of(llama)
    assert not any(one.is_alive() for one in started)


@pytest.mark.parametrize("change", [{"rms_norm_eps": "x"}, {"pad_token_id": 1000}, {"rope_scaling": {"rope_type": 3}}])
def test_a_configuration_that_makes_no_model_is_told(change: dict[str, Any], llama: Path) -> None:
    hub = under_hub_names(anyckpt.open(llama), ConvertOptions(to="hf"))
    other = replace(hub, config={**hub.config, **change})
    with pytest.raises(UsageError, match="transformers makes no causal language model"):
        calibrate(other, linear_weights(hub), batches(), computed_in="float32")


@pytest.mark.parametrize("key", ["attn_implementation", "_attn_implementation", "_attn_implementation_internal"])
def test_a_configuration_names_no_code_to_run(key: str, llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers fetches the kernels, and the classes, that a configuration names; here it is never asked to."""
    asked: list[str] = []

    def note(name: str) -> Callable[..., Any]:
        def noted(*_: Any, **__: Any) -> Any:
            asked.append(name)
            raise ValueError("code is asked for")

        return noted

    monkeypatch.setattr("transformers.modeling_utils.lazy_import_flash_attention", note("kernel"))
    monkeypatch.setattr("builtins.input", note("a question whether to run code"))
    monkeypatch.setattr("transformers.models.auto.auto_factory.get_class_from_dynamic_module", note("class"))
    hub = under_hub_names(anyckpt.open(llama), ConvertOptions(to="hf"))
    hostile = {**hub.config, key: "kernels-community/attention", "auto_map": {"AutoModelForCausalLM": "evil.Evil"}}
    calibrate(replace(hub, config=hostile), linear_weights(hub), batches(), computed_in="float32")
    unknown = replace(hub, config={**hostile, "model_type": "clip_text_model"})
    with pytest.raises(UsageError, match="transformers makes no causal language model"):
        calibrate(unknown, linear_weights(hub), batches(), computed_in="float32")
    assert not asked


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


def test_what_experts_see_is_not_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Masks of transformers' experts are as large as tokens times experts times experts of a token."""
    torch.manual_seed(3)
    transformers.AutoModelForCausalLM.from_config(MODELS["qwen3_moe"]()).save_pretrained(tmp_path / "model")
    masks: list[int] = []
    one_hot = torch.nn.functional.one_hot

    def counted(*args: Any, **options: Any) -> Any:
        masks.append(one_hot(*args, **options).numel())
        return one_hot(*args, **options)

    monkeypatch.setattr(torch.nn.functional, "one_hot", counted)
    statistics_of(tmp_path / "model")
    tokens, experts, of_a_token = 40, 4, 2
    assert 0 < max(masks) <= tokens * (experts + 1) * of_a_token


def test_shared_inputs_are_told_apart_without_being_held() -> None:
    sharing = Sharing()
    addresses: set[int] = set()
    for number in range(1000):
        inputs = torch.zeros(64, 64)
        memory, address = StorageWeakRef(inputs.untyped_storage()), inputs.data_ptr()
        for name in ("gate", "up"):
            sharing.note([Rows(f"{number}.{name}", 0, 1)], inputs.reshape(-1, 64))
        del inputs
        assert memory.expired()
        if address in addresses:
            break
        addresses.add(address)
    else:
        pytest.fail("memory that was given back is not used again, so that nothing is tried")
    assert list(sharing.groups.values()) == [[f"{n}.gate", f"{n}.up"] for n in range(number + 1)]
