"""Multimodal models of transformers, as arguments of their configuration classes: what the tests take apart.

``WHOLES`` are made with random weights, loaded again and computed with; of ``NAMED`` are only names and shapes.
"""

from __future__ import annotations

from typing import Any

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
    "qwen3_5": {
        "text_config": {
            "model_type": "qwen3_5_text", **_TEXT, "num_hidden_layers": 4, "linear_key_head_dim": 8,
            "linear_value_head_dim": 4, "linear_num_key_heads": 2, "linear_num_value_heads": 4,
            "rope_parameters": {**_MROPE, "partial_rotary_factor": 0.5, "mrope_section": [2, 1, 1]},
        },
        "vision_config": {**_QWENS, "num_position_embeddings": 16}, **_TOKENS,
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

OF_CONTAINERS: dict[str, dict[str, Any]] = {
    "gemma4_unified": {
        "text_config": {
            "model_type": "gemma4_unified_text", **_TEXT,
            "num_hidden_layers": 6, "global_head_dim": 24, "sliding_window": 4,
            "layer_types": ["sliding_attention", "sliding_attention", "full_attention"] * 2,
        },
        "vision_config": {
            "patch_size": 4, "pooling_kernel_size": 1, "mm_embed_dim": 16, "mm_posemb_size": 4, "output_proj_dims": 16,
        },
        "audio_config": {"audio_embed_dim": 16},
    },
    "gemma4": {
        "text_config": {
            "model_type": "gemma4_text", **_TEXT, "num_hidden_layers": 6, "global_head_dim": 24, "sliding_window": 4,
            "layer_types": ["sliding_attention", "sliding_attention", "full_attention"] * 2,
            "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 64,
        },
        "vision_config": {**_EYES, "num_key_value_heads": 2, "head_dim": 8, "global_head_dim": 8},
        "audio_config": None,
    },
    "mllama": {
        "text_config": {
            "model_type": "mllama_text_model", **_PLAIN, "num_hidden_layers": 4, "cross_attention_layers": [1, 3],
        },
        "vision_config": {
            "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_global_layers": 1,
            "attention_heads": 2, "image_size": 16, "patch_size": 8, "vision_output_dim": 32, "max_num_tiles": 2,
            "intermediate_layers_indices": [0], "supported_aspect_ratios": [[1, 1], [1, 2]],
        },
        "image_token_index": 60,
    },
}  # fmt: skip
"""Those whose text part Megatron has no model for; containers keep them whole."""


CLASSES = {
    "qwen2_5_omni_thinker": "Qwen2_5OmniThinkerForConditionalGeneration",
    "qwen3_omni_moe_thinker": "Qwen3OmniMoeThinkerForConditionalGeneration",
}
"""Classes that are no ``AutoModelForImageTextToText``."""

TEXT_ALONE = {
    "qwen3_vl_text": "qwen3", "qwen3_vl_moe_text": "qwen3_moe", "qwen2_5_vl_text": "qwen2",
    "glm4v_moe_text": "glm4_moe", "qwen2_5_omni_text": "qwen2", "qwen3_omni_moe_text": "qwen3_moe",
}  # fmt: skip
"""Of text parts that transformers has no class for by themselves: what they are written as."""

NAMED = {
    "idefics3": "Idefics3ForConditionalGeneration",
    "kimi_k25": "Kimi_K25ForConditionalGeneration",
    "voxtral": "VoxtralForConditionalGeneration",
    "qwen2_audio": "Qwen2AudioForConditionalGeneration",
    "video_llava": "VideoLlavaForConditionalGeneration",
    "janus": "JanusForConditionalGeneration",
    "exaone4_5": "Exaone4_5_ForConditionalGeneration",
    "qwen3_5_moe": "Qwen3_5MoeForConditionalGeneration",
}
