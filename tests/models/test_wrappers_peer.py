"""transformers' own multimodal models, in every spelling in which it saves them: whole, and their text parts alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.peer

from tests.peer_defects import broken_by  # noqa: E402

import anyckpt  # noqa: E402
from anyckpt import models  # noqa: E402
from anyckpt.formats.registry import read  # noqa: E402

_TEXT = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 64, "max_position_embeddings": 64, "bos_token_id": 1,
    "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
_EYES = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 16,
    "patch_size": 8,
}  # fmt: skip
_PLAIN = {key: value for key, value in _TEXT.items() if key != "head_dim"}
_MROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 2, 2]}
_QWENS = {
    "depth": 2,
    "hidden_size": 16,
    "num_heads": 2,
    "intermediate_size": 24,
    "out_hidden_size": 32,
    "patch_size": 4,
}
_TOWER = {**_QWENS, "deepstack_visual_indexes": [0], "num_position_embeddings": 16}
_EARS = {
    "d_model": 16, "encoder_layers": 1, "encoder_attention_heads": 2, "encoder_ffn_dim": 24, "num_mel_bins": 8,
    "output_dim": 32,
}  # fmt: skip
_TOKENS = {
    "image_token_id": 60, "video_token_id": 61, "vision_start_token_id": 62, "vision_end_token_id": 63,
}  # fmt: skip
WHOLES: dict[str, dict[str, Any]] = {
    "qwen3_vl": {
        "text_config": {"model_type": "qwen3_vl_text", **_TEXT, "rope_parameters": _MROPE}, "vision_config": _TOWER,
        **_TOKENS, "tie_word_embeddings": True,
    },
    "qwen3_vl_moe": {
        "text_config": {
            "model_type": "qwen3_vl_moe_text", **_TEXT, "num_experts": 4, "moe_intermediate_size": 20,
            "rope_parameters": _MROPE,
        },
        "vision_config": _TOWER, **_TOKENS,
    },
    "qwen2_5_vl": {
        "text_config": {
            "model_type": "qwen2_5_vl_text", **_PLAIN, "rope_parameters": {**_MROPE, "mrope_section": [2, 1, 1]},
        },
        "vision_config": {**_QWENS, "fullatt_block_indexes": [0]}, **_TOKENS,
    },
    "glm4v_moe": {
        "text_config": {
            "model_type": "glm4v_moe_text", **_TEXT, "n_routed_experts": 4, "num_experts_per_tok": 2,
            "moe_intermediate_size": 20, "rope_parameters": {**_MROPE, "partial_rotary_factor": 0.5,
            "mrope_section": [2, 1, 1]},
        },
        "vision_config": {
            "depth": 1, "hidden_size": 16, "num_heads": 2, "intermediate_size": 24, "out_hidden_size": 32,
            "patch_size": 4, "image_size": 16,
        },
        **_TOKENS,
    },
    "qwen2_5_omni_thinker": {
        "text_config": {
            "model_type": "qwen2_5_omni_text", **_PLAIN, "rope_parameters": {**_MROPE, "mrope_section": [2, 1, 1]},
        },
        "vision_config": {**_QWENS, "fullatt_block_indexes": [0]}, "audio_config": _EARS,
    },
    "qwen3_omni_moe_thinker": {
        "text_config": {
            "model_type": "qwen3_omni_moe_text", **_TEXT, "num_experts": 4, "num_experts_per_tok": 2,
            "moe_intermediate_size": 20, "rope_parameters": _MROPE,
        },
        "vision_config": _TOWER, "audio_config": {**_EARS, "downsample_hidden_size": 8},
    },
    "internvl": {"text_config": {"model_type": "qwen2", **_PLAIN}, "vision_config": _EYES, "image_token_id": 60},
    "gemma3": {
        "text_config": {"model_type": "gemma3_text", **_TEXT, "sliding_window": 8},
        "vision_config": {"model_type": "siglip_vision_model", **_EYES},
        "image_token_index": 60, "boi_token_index": 61, "eoi_token_index": 62, "mm_tokens_per_image": 4,
    },
    "llama4": {
        "text_config": {
            "model_type": "llama4_text", **_TEXT, "intermediate_size_mlp": 40, "num_local_experts": 2,
            "attention_chunk_size": 8,
        },
        "vision_config": {
            "model_type": "llama4_vision_model", **_EYES, "vision_output_dim": 16, "projector_input_dim": 16,
            "projector_output_dim": 16,
        },
        "image_token_index": 60, "boi_token_index": 61, "eoi_token_index": 62,
    },
    "mistral3": {
        "text_config": {"model_type": "mistral", **_TEXT, "sliding_window": None},
        "vision_config": {"model_type": "pixtral", **_EYES, "head_dim": 8},
        "image_token_index": 60, "tie_word_embeddings": False,
    },
    "llava": {
        "text_config": {"model_type": "llama", **_TEXT, "tie_word_embeddings": False},
        "vision_config": {"model_type": "clip_vision_model", **_EYES, "projection_dim": 16},
        "image_token_index": 60, "tie_word_embeddings": False,
    },
}  # fmt: skip


CLASSES = {
    "qwen2_5_omni_thinker": "Qwen2_5OmniThinkerForConditionalGeneration",
    "qwen3_omni_moe_thinker": "Qwen3OmniMoeThinkerForConditionalGeneration",
}
TEXT_ALONE = {
    "qwen3_vl_text": "qwen3", "qwen3_vl_moe_text": "qwen3_moe", "qwen2_5_vl_text": "qwen2",
    "glm4v_moe_text": "glm4_moe", "qwen2_5_omni_text": "qwen2", "qwen3_omni_moe_text": "qwen3_moe",
}  # fmt: skip
"""Of text parts that transformers has no class for by themselves: what they are written as."""

NO_IMAGE_OUTPUTS = broken_by(
    "transformers", ">=5.24", AttributeError,
    "Llama4ForConditionalGeneration asks its text model's output for image_outputs, which it does not have",
)  # fmt: skip


def saved(model_type: str, folder: Path, original: bool) -> Any:
    torch.manual_seed(0)
    if model_type in CLASSES:
        kind = getattr(transformers, CLASSES[model_type])
        whole = kind._from_config(kind.config_class(**WHOLES[model_type]), attn_implementation="eager").eval()
    else:
        config = transformers.AutoConfig.for_model(model_type, **WHOLES[model_type])
        whole = transformers.AutoModelForImageTextToText.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for parameter in whole.parameters():
            parameter.normal_(std=0.2)
    whole.save_pretrained(folder, save_original_format=original)
    return whole


@pytest.mark.parametrize("original", [True, False])
@pytest.mark.parametrize(
    "model_type", [pytest.param(name, marks=NO_IMAGE_OUTPUTS if name == "llama4" else ()) for name in WHOLES]
)
def test_the_text_part_computes_the_same(model_type: str, original: bool, tmp_path: Path) -> None:
    whole = saved(model_type, tmp_path / "whole", original)
    source = read(str(tmp_path / "whole"))
    model = models.identify(source)
    assert model is not None
    assert model.config.extra["part_of"] == model_type
    anyckpt.convert(str(tmp_path / "whole"), tmp_path / "megatron", to="megatron-lm")
    anyckpt.convert(str(tmp_path / "megatron"), tmp_path / "text", to="hf")
    text = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "text", attn_implementation="eager").eval()
    kind = WHOLES[model_type]["text_config"]["model_type"]
    assert text.config.model_type == TEXT_ALONE.get(kind, kind)
    tokens = torch.randint(3, 60, (2, 24), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        ours, theirs = text(input_ids=tokens).logits, whole(input_ids=tokens).logits
    assert torch.equal(ours, theirs)
    with torch.no_grad():
        text.get_input_embeddings().weight[tokens[0, 0]] += 1
        assert not torch.equal(text(input_ids=tokens).logits, theirs), "the comparison can fail"


@pytest.mark.parametrize("original", [True, False])
@pytest.mark.parametrize("model_type", WHOLES)
def test_the_whole_through_megatron(model_type: str, original: bool, tmp_path: Path) -> None:
    """transformers loads every tensor again as it was, from the names under which the type is published."""
    before = saved(model_type, tmp_path / "whole", original)
    anyckpt.convert(str(tmp_path / "whole"), tmp_path / "megatron", to="megatron-core")
    anyckpt.convert(str(tmp_path / "megatron"), tmp_path / "back", to="hf")
    source, back = read(str(tmp_path / "whole")), read(str(tmp_path / "back"))
    assert back.config == source.config
    if original:
        assert back.tensors.keys() == source.tensors.keys()
    after = type(before).from_pretrained(tmp_path / "back", attn_implementation="eager")
    theirs, ours = before.state_dict(), after.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("model_type", WHOLES)
def test_what_is_left_out_is_said(model_type: str, tmp_path: Path) -> None:
    saved(model_type, tmp_path / "whole", True)
    source = read(str(tmp_path / "whole"))
    model = models.identify(source)
    assert model is not None
    hub = models.to_hub(source, model)
    expected = sum(len(item.sources) for item in model.definition.expected(model.config))
    assert len(hub.ignored) + expected >= len(source.tensors)
    assert all("another part of the" in reason for reason in hub.ignored.values())
    assert any("vis" in name for name in hub.ignored)
    assert any(f"{len(hub.ignored)} tensors of " in note for note in hub.notes)
