"""Models of families that anyckpt does not know are merged as peft merges them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")
pytestmark = pytest.mark.peer

import anyckpt  # noqa: E402

TEXT = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "vocab_size": 80, "pad_token_id": None}  # fmt: skip
VISION = {"depth": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "patch_size": 4,
          "out_hidden_size": 32, "spatial_merge_size": 2, "window_size": 16, "fullatt_block_indexes": [1]}  # fmt: skip
WHISPER = {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2,
           "decoder_attention_heads": 2, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "vocab_size": 90,
           "num_mel_bins": 8, "max_source_positions": 16, "max_target_positions": 16, "pad_token_id": 0,
           "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}  # fmt: skip


def granite(**changes: Any) -> Any:
    return transformers.GraniteForCausalLM(transformers.GraniteConfig(**{**TEXT, **changes}))


def qwen_vl() -> Any:
    return transformers.Qwen2_5_VLForConditionalGeneration(
        transformers.Qwen2_5_VLConfig(
            text_config={**TEXT, "rope_scaling": {"rope_type": "default", "mrope_section": [1, 1, 2]}},
            vision_config=VISION,
        )
    )


def whisper() -> Any:
    return transformers.WhisperForConditionalGeneration(transformers.WhisperConfig(**WHISPER))


def openai_gpt() -> Any:
    """Weights are (in, out), and square ones among them."""
    return transformers.OpenAIGPTLMHeadModel(
        transformers.OpenAIGPTConfig(vocab_size=80, n_positions=16, n_embd=32, n_layer=2, n_head=2)
    )


def resized(**changes: Any) -> Any:
    model = granite(**changes)
    model.resize_token_embeddings(88)
    return model


LINEAR = {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "o_proj", "gate_proj"]}
CASES: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "granite": (granite, None, {**LINEAR, "rank_pattern": {"layers.0.self_attn.q_proj": 2}, "use_rslora": True,
                                "alpha_pattern": {"o_proj": 3}}),
    "dora": (granite, None, {**LINEAR, "use_dora": True}),
    "vision": (qwen_vl, None, {**LINEAR, "target_modules": "all-linear"}),
    "whisper": (whisper, None, {**LINEAR, "target_modules": ["q_proj", "fc1", "conv1", "conv2"]}),
    "whisper-dora": (whisper, None, {**LINEAR, "target_modules": ["k_proj", "conv2"], "use_dora": True}),
    "conv1d": (openai_gpt, None, {**LINEAR, "target_modules": ["c_attn", "c_proj", "c_fc"], "use_dora": True}),
    "embedding": (granite, None, {**LINEAR, "target_modules": ["embed_tokens", "q_proj"]}),
    "tokens": (granite, None, {**LINEAR, "trainable_token_indices": [3, 77, 11]}),
    "tied-tokens": (lambda: granite(tie_word_embeddings=True), None, {**LINEAR, "trainable_token_indices": [3, 7]}),
    "tied-resized": (
        lambda: resized(tie_word_embeddings=True), lambda: granite(tie_word_embeddings=True), {**LINEAR},
    ),
    "resized": (resized, granite, {**LINEAR, "modules_to_save": ["embed_tokens", "lm_head"]}),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", CASES)
def test_merged_as_peft_merges(case: str, tmp_path: Path) -> None:
    trained, original, options = CASES[case]
    torch.manual_seed(0)
    model = trained()
    if original is not None:
        torch.manual_seed(0)
    (model if original is None else original()).save_pretrained(tmp_path / "base")
    wrapped = peft.get_peft_model(model, peft.LoraConfig(**options))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.rand(parameter.shape, generator=generator) * 0.1 + 0.01)
    embeddings = True if case == "tied-resized" else "auto"  # peft asks the hub whether rows were added
    wrapped.save_pretrained(tmp_path / "adapter", save_embedding_layers=embeddings)
    wrapped.merge_and_unload().save_pretrained(tmp_path / "theirs")
    anyckpt.merge_lora(tmp_path / "base", tmp_path / "adapter", tmp_path / "ours")
    theirs, ours = anyckpt.open(tmp_path / "theirs"), anyckpt.open(tmp_path / "ours")
    base = anyckpt.open(tmp_path / "base")
    assert not anyckpt.diff(theirs, ours, atol=1e-5, raw=True)
    changed = anyckpt.diff(base, ours, raw=True)
    assert 0 < len(changed.different) < changed.compared
    assert ours.config.get("vocab_size") == theirs.config.get("vocab_size")
    if original is None:
        for name, tensor in base.tensors.items():
            if name not in {one.name for one in changed.different}:
                assert tensor.numpy().tobytes() == ours.tensors[name].numpy().tobytes()
