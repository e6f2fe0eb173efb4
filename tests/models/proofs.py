"""What proves each family: the models that the generic tests run over, and that docs/families.md names.

A family that is added gets a line in ``PROOFS``.  ``test_proofs.py`` then takes each of its samples to the hub and
back, through every container, and tries each tensor missing, surplus and changed; ``test_proofs_peer.py`` compares
each ``Tiny`` with transformers' own model, names, shapes and outputs.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import numpy as np
from tests.models import remote_code
from tests.support import fixture_path

from anyckpt import models
from anyckpt.checkpoint import Checkpoint, OptimizerState
from anyckpt.formats.hf import FORMAT
from anyckpt.formats.registry import look_at
from anyckpt.models import Model
from anyckpt.models.from_hub import as_written
from anyckpt.optimizer.parameters import trained
from anyckpt.tensor import LazyTensor, from_array

Opened = tuple[Checkpoint, Model]


@dataclass(frozen=True, kw_only=True)
class Sample:
    """A small model of a family.

    Attributes:
        name: of its own among all families' samples.
        refused: target format (``nemo2``, ``megatron-lm``, ...) -> pattern of the error, where the target has no such
            model.

    ``shows`` says in the table of families what such a sample proves.
    """

    shows: ClassVar[str]

    name: str
    refused: Mapping[str, str] = field(default_factory=dict)

    def open(self) -> Opened:
        """The Hugging Face checkpoint and what it is identified as."""
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class Fixture(Sample):
    """``tests/fixtures/families/<name>``, made with transformers.

    It has the tensors of Megatron-Core that gave equal logits (``mcore_te.safetensors``) and these logits.

    Attributes:
        beyond: hub names of what is not part of the Megatron-Core module that these are of.
    """

    beyond: tuple[str, ...] = ()
    shows = "**tensors**"

    def open(self) -> Opened:
        return _identified(FORMAT.read(look_at(fixture_path(f"families/{self.name}") / "hf")))


@dataclass(frozen=True, kw_only=True)
class Tiny(Sample):
    """A random model of transformers' own class; without torch, tensors of the names and shapes that our rules say.

    Attributes:
        config: its ``config.json``, as the arguments of transformers' configuration class; with ``model_type``.
        near_one: ends of names whose values are few and near 1, so that taking 1 off them loses nothing.
    """

    shows = "**outputs**"

    config: Mapping[str, Any]
    near_one: tuple[str, ...] = ()

    def open(self) -> Opened:
        family = next(f for f in models.known_families().values() if self._type in f.hugging_face.model_types)
        config = {"architectures": [family.hugging_face.architectures[0]], **self.config}
        empty = Checkpoint(self.name, "hf", {}, dialect="hf", config=config, config_kind="hf")
        model = _identified(empty)[1]
        tensors: dict[str, LazyTensor] = {}
        for item in model.definition.expected(model.config):
            shapes = item.rule.operation.source_shapes(item.shape, item.config)
            if item.sources:
                tensors.update({n: self._values(n, tuple(s)) for n, s in zip(item.sources, shapes, strict=True)})
        return _identified(replace(empty, tensors=as_written(tensors, model)))

    def _values(self, name: str, shape: tuple[int, ...]) -> LazyTensor:
        found = values(name, shape)
        return from_array(near_one(found.numpy())) if name.endswith(self.near_one or ("\n",)) else found

    @property
    def _type(self) -> Any:
        return self.config["model_type"]


@dataclass(frozen=True, kw_only=True)
class Synthetic(Sample):
    """A state dict of given names and shapes, of a model that transformers has no class of.

    Attributes:
        config: its ``config.json``.
        shapes: stored name -> shape, written down independently of our rules.
        provenance: where names, shapes and keys were seen.
        unit_rows: stored names whose rows have length 1, because what the model computes depends on no other.
    """

    shows = "**names**"

    config: Mapping[str, Any]
    shapes: Mapping[str, tuple[int, ...]]
    provenance: str
    unit_rows: tuple[str, ...] = ()

    def open(self) -> Opened:
        tensors = {name: values(name, shape) for name, shape in self.shapes.items()}
        for name in self.unit_rows:
            rows = tensors[name].numpy().astype("<f8")
            tensors[name] = from_array((rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype("<f4"))
        config = json.loads(json.dumps(self.config))
        return _identified(Checkpoint(self.name, "hf", tensors, dialect="hf", config=config, config_kind="hf"))


@dataclass(frozen=True)
class Proof:
    """How it is seen that a family is mapped right.

    Attributes:
        samples: models of the family, each a layout or a configuration of its own kind.
        outputs: who computes the same outputs from what we write: ``transformers`` (a peer test compares them), or
            "" where nobody does.
        note: what a reader of the table of families should know of it.
    """

    samples: tuple[Sample, ...]
    outputs: str = "transformers"
    note: str = ""


def values(name: str, shape: tuple[int, ...]) -> LazyTensor:
    """Random values that a name always gets."""
    return from_array(np.random.default_rng(zlib.crc32(name.encode())).standard_normal(shape).astype("<f4"))


def near_one(array: np.ndarray) -> np.ndarray:
    """Values from 0.75 to 1.25 that are whole multiples of 1/64, by which any values are replaced."""
    return (1 + np.clip(np.round(array * 8), -16, 16) / 64).astype(array.dtype)


def _identified(checkpoint: Checkpoint) -> Opened:
    model = models.identify(checkpoint)
    assert model is not None, checkpoint.path
    return checkpoint, model


def proof(*given: Sample, outputs: str = "transformers", note: str = "") -> Proof:
    """A proof by these samples."""
    return Proof(given, outputs, note)


def fixture(name: str, refused: Mapping[str, str] | None = None, beyond: tuple[str, ...] = ()) -> Sample:
    """A fixture, where it cannot go, and what Megatron-Core has no tensor for."""
    return Fixture(name=name, refused=refused or {}, beyond=beyond)


def tiny(
    name: str, model_type: str, refused: Mapping[str, str] | None = None, near_one: tuple[str, ...] = (), **config: Any
) -> Sample:
    """A model that transformers makes, and where it cannot go."""
    return Tiny(name=name, refused=refused or {}, near_one=near_one, config={"model_type": model_type, **config})


_SIZES = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4, "vocab_size": 64,
    "max_position_embeddings": 64, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
GROUPED = {**_SIZES, "num_key_value_heads": 2}
_WIDE = {**GROUPED, "head_dim": 16}
_FALCON = {
    "num_attention_heads": 8, "num_hidden_layers": 2, "hidden_size": 64, "vocab_size": 64, "ffn_hidden_size": 96,
}  # fmt: skip
_NEW_FALCON = {**_FALCON, "new_decoder_architecture": True}
_GPT = {
    "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 32, "vocab_size": 64, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
_SCALED = {
    "full_attention": {"rope_theta": 1e6, "rope_type": "linear", "factor": 8.0},
    "sliding_attention": {"rope_theta": 1e4, "rope_type": "default"},
}
_PARTIAL = {"rope_theta": 1e4, "rope_type": "default", "partial_rotary_factor": 0.75}
LLAMA_4 = {
    **_WIDE, "intermediate_size_mlp": 40, "num_local_experts": 4, "attention_chunk_size": 8,
}  # fmt: skip
_LLAMA_3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}  # fmt: skip
_ALTERNATING = ["sliding_attention", "full_attention"] * 2
MAMBA = {
    "hidden_size": 32, "num_hidden_layers": 3, "num_heads": 8, "head_dim": 8, "state_size": 16, "vocab_size": 64,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip

NEMOTRON_3 = {
    **_WIDE, "layers_block_type": ["linear_attention", "moe", "full_attention", "moe"], "num_hidden_layers": 4,
    "mamba_num_heads": 4, "mamba_head_dim": 8, "n_groups": 2, "ssm_state_size": 16, "n_routed_experts": 4,
    "num_experts_per_tok": 2, "moe_intermediate_size": 24, "moe_shared_expert_intermediate_size": 40,
    "moe_latent_size": 20, "routed_scaling_factor": 2.5,
}  # fmt: skip

GEMMA_4 = {
    **_WIDE, "num_hidden_layers": 6, "global_head_dim": 24, "sliding_window": 4,
    "layer_types": ["sliding_attention", "sliding_attention", "full_attention"] * 2,
}  # fmt: skip
GEMMA_3N = {
    **_WIDE, "num_hidden_layers": 6, "sliding_window": 4, "num_kv_shared_layers": 3, "laurel_rank": 6,
    "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 64,
    "layer_types": ["sliding_attention", "sliding_attention", "full_attention"] * 2,
}  # fmt: skip

_BERT = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 64,
    "max_position_embeddings": 64,
}  # fmt: skip
_IMAGES = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 16,
    "patch_size": 4,
}  # fmt: skip
_TEXT_TOWER = {**_BERT, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "hidden_size": 24}
_TALL = {**_IMAGES, "num_hidden_layers": 3}
TWO_TOWERS = {
    "text_config": {**_TEXT_TOWER, "model_type": "clip_text_model"},
    "vision_config": {**_TALL, "model_type": "clip_vision_model"},
}
_BERTS = ("BertForPreTraining", "BertForMaskedLM", "BertForNextSentencePrediction", "BertModel")

_ROBERTAS = ("RobertaForMaskedLM", "RobertaModel")
_DISTILBERT = {
    "dim": 32, "hidden_dim": 48, "n_layers": 2, "n_heads": 4, "vocab_size": 64, "max_position_embeddings": 64,
}  # fmt: skip

_WHISPER = {
    "d_model": 32, "encoder_layers": 2, "decoder_layers": 3, "encoder_attention_heads": 4, "decoder_attention_heads": 4,
    "encoder_ffn_dim": 128, "decoder_ffn_dim": 128, "vocab_size": 64, "num_mel_bins": 8, "max_source_positions": 10,
    "max_target_positions": 24, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1,
}  # fmt: skip

_FALCON_H1 = {
    "mamba_n_heads": 4, "mamba_d_ssm": 32, "mamba_n_groups": 2, "mamba_d_state": 8, "embedding_multiplier": 5.6,
    "lm_head_multiplier": 0.04, "mlp_multipliers": [0.9, 0.3], "key_multiplier": 0.4, "ssm_in_multiplier": 1.25,
    "ssm_out_multiplier": 0.2, "ssm_multipliers": [0.35, 0.25, 0.18, 0.5, 0.35], "attention_out_multiplier": 0.9,
}  # fmt: skip
GROUPED_BERT = {**_SIZES, "local_attention": 8}
_TWO_THETAS = {
    "full_attention": {"rope_theta": 2e4, "rope_type": "default"},
    "sliding_attention": {"rope_theta": 5e3, "rope_type": "default"},
}

_T5 = {
    "d_model": 32, "d_kv": 16, "d_ff": 48, "num_layers": 2, "num_heads": 4, "vocab_size": 64,
    "feed_forward_proj": "gated-gelu", "scale_decoder_outputs": False,
}  # fmt: skip

GRIFFIN = {
    "hidden_size": 32, "intermediate_size": 96, "num_hidden_layers": 5, "num_attention_heads": 4,
    "num_key_value_heads": 1, "attention_window_size": 8, "logits_soft_cap": 3.0, "vocab_size": 64, "bos_token_id": 2,
    "eos_token_id": 1, "pad_token_id": 0,
}  # fmt: skip

_NETS = {
    **GROUPED, "head_dim": 16, "linear_key_head_dim": 8, "linear_value_head_dim": 4, "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
}  # fmt: skip
_NETS_EXPERTS = {
    **{key: value for key, value in _NETS.items() if key != "intermediate_size"}, "num_experts": 4,
    "num_experts_per_tok": 2, "moe_intermediate_size": 20, "shared_expert_intermediate_size": 24,
}  # fmt: skip
_NET_IN_CORE = "and in Megatron-Core's own gated delta net, of which what is saved is what is written"
_NET_NORM = ("linear_attn.norm.weight",)
_SOME_NETS = ["full_attention", "linear_attention", "linear_attention", "full_attention"]

_LATENT = {
    **_SIZES, "num_key_value_heads": 4, "moe_intermediate_size": 20, "n_routed_experts": 8, "num_experts_per_tok": 4,
    "n_group": 4, "topk_group": 2, "first_k_dense_replace": 1, "q_lora_rank": 24, "kv_lora_rank": 12,
    "qk_rope_head_dim": 8, "qk_nope_head_dim": 16, "v_head_dim": 16, "index_n_heads": 2, "index_head_dim": 16,
    "index_topk": 6,
}  # fmt: skip

NO_NEMO_1 = {"nemo": "NeMo 1 has no models of family"}
NO_NEMO_2 = {"nemo2": "NeMo 2 has no models of family"}
_NO_NEMO = {**NO_NEMO_1, **NO_NEMO_2}
NO_BRIDGE = {"megatron-bridge": "Megatron-Bridge has decoders of language models alone"}
_VISION = {**NO_NEMO_1, **NO_BRIDGE}
_MEGATRON = ("megatron-core", "megatron-core-zarr", "megatron-bridge", "megatron-lm")
NEMO_1_ALONE = {**NO_NEMO_2, **dict.fromkeys(_MEGATRON, "Megatron-Core has no models of family")}
_NO_ALIBI = dict.fromkeys(_MEGATRON, "Megatron-Core has no such position embedding")
_PARALLEL = {
    "nemo2": "models of family .* have no parallel_residual",
    "megatron-bridge": "no layers whose attention and MLP run side by side",
}

_CORE_ALONE = {**NO_NEMO_1, **NO_NEMO_2}
_HUB_ALONE = NEMO_1_ALONE | NO_NEMO_1
_OWN_CROSS = _HUB_ALONE | {"nemo2": "how NeMo 2 names models of family mllama is not known"}
_OTHER_CLIP = {"nemo": "how NeMo 1 names models of family clip", "nemo2": "how NeMo 2 names models of family clip"}
_YARN = {
    "rope_type": "yarn", "rope_theta": 1e4, "factor": 8.0, "beta_fast": 32.0, "beta_slow": 1.0,
    "original_max_position_embeddings": 8,
}  # fmt: skip
_GRANITE = {
    "embedding_multiplier": 12.0, "residual_multiplier": 0.22, "attention_multiplier": 0.2, "logits_scaling": 8.0,
}  # fmt: skip
GRANITE_4 = {
    "mamba_n_heads": 8, "mamba_n_groups": 2, "mamba_d_state": 16,
    "layer_types": ["linear_attention", "full_attention"] * 2,
}  # fmt: skip
_EXPERTS = {
    **GROUPED, "moe_intermediate_size": 24, "n_routed_experts": 8, "n_group": 1, "topk_group": 1,
    "num_experts_per_tok": 2, "first_k_dense_replace": 1, "n_shared_experts": 2, "routed_scaling_factor": 1.5,
}  # fmt: skip
_LATENT = {
    **_EXPERTS, "num_key_value_heads": 4, "kv_lora_rank": 16, "q_lora_rank": 24, "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4, "v_head_dim": 8,
}  # fmt: skip

_FAST_CONFORMER = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_mel_bins": 16,
    "subsampling_conv_channels": 8, "conv_kernel_size": 5,
}  # fmt: skip
_UNBIASED_CONFORMER = {
    **_FAST_CONFORMER, "attention_bias": False, "convolution_bias": False, "scale_input": False,
    "subsampling_factor": 4,
}  # fmt: skip
_STREAMING_CONFORMER = {
    **_FAST_CONFORMER, "attention_bias": False, "convolution_bias": False, "scale_input": False, "sliding_window": 5,
    "default_num_lookahead_tokens": 3,
}  # fmt: skip
_CTC = {"vocab_size": 33, "pad_token_id": 32}
_TRANSDUCER = {
    "vocab_size": 33, "blank_token_id": 32, "pad_token_id": 2, "decoder_hidden_size": 12, "num_decoder_layers": 2,
}  # fmt: skip
_TEXT_DECODER = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 4, "head_dim": 8, "max_position_embeddings": 32,
}  # fmt: skip
_NEMO_SPEECH = {key: why for key, why in NEMO_1_ALONE.items() if key != "nemo"}

PROOFS: dict[str, Proof] = {
    "parakeet-ctc": proof(
        tiny("parakeet-ctc", "parakeet_ctc", _NEMO_SPEECH, **_CTC, encoder_config=_FAST_CONFORMER),
        tiny("parakeet-ctc-unbiased", "parakeet_ctc", _NEMO_SPEECH, **_CTC, encoder_config=_UNBIASED_CONFORMER),
        note="and NeMo 3.0 of its own files",
    ),
    "parakeet-rnnt": proof(
        tiny("parakeet-rnnt", "parakeet_rnnt", _NEMO_SPEECH, **_TRANSDUCER, encoder_config=_FAST_CONFORMER),
        note="and NeMo 3.0 of its own files",
    ),
    "canary": proof(
        tiny(
            "canary",
            "canary",
            _NEMO_SPEECH,
            vocab_size=64,
            encoder_config={"layerdrop": 0.0, **_FAST_CONFORMER},
            decoder_config=_TEXT_DECODER,
        ),
        note="and NeMo 3.0 of its own files",
    ),
    "parakeet-tdt": proof(
        tiny("parakeet-tdt", "parakeet_tdt", _NEMO_SPEECH, **_TRANSDUCER, encoder_config=_UNBIASED_CONFORMER),
        note="and NeMo 3.0 of its own files",
    ),
    "nemotron-asr-streaming": proof(
        tiny(
            "nemotron-asr", "nemotron_asr_streaming", _NEMO_SPEECH, **_TRANSDUCER, encoder_config=_STREAMING_CONFORMER
        ),
        note="and NeMo 3.0 of its own files",
    ),
    "nemotron3.5-asr": proof(
        tiny(
            "nemotron-3.5-asr",
            "nemotron3_5_asr",
            _NEMO_SPEECH,
            **_TRANSDUCER,
            encoder_config=_STREAMING_CONFORMER,
            num_prompts=6,
            prompt_intermediate_size=64,
            default_prompt_id=3,
        ),
        note="and NeMo 3.0 of its own files",
    ),
    "deepseek-v2": proof(fixture("deepseek_v2_lite", NO_NEMO_1)),
    "deepseek-v3": proof(
        fixture("deepseek_v3", NO_NEMO_1),
        tiny("moonlight", "deepseek_v3", NO_NEMO_1, **{**_LATENT, "q_lora_rank": None}, num_nextn_predict_layers=0),
    ),
    "glm4-moe": proof(
        tiny("glm-4.5-air", "glm4_moe", _CORE_ALONE, **_EXPERTS, head_dim=16, attention_bias=True),
        tiny("glm-4.5", "glm4_moe", _CORE_ALONE, **_EXPERTS, head_dim=16, attention_bias=True, use_qk_norm=True),
        tiny("glm-4.5-plain", "glm4_moe", _CORE_ALONE, **{**_EXPERTS, "first_k_dense_replace": 3}),
    ),
    "glm4-moe-lite": proof(
        tiny("glm-4.7-flash", "glm4_moe_lite", _CORE_ALONE, **{k: v for k, v in _LATENT.items() if k[0] != "f"}),
        tiny(
            "glm-4.7-flash-dense",
            "glm4_moe_lite",
            _CORE_ALONE,
            **_LATENT,
            mlp_layer_types=["dense"] * 2 + ["sparse"] * 2,
        ),
    ),
    "roberta": proof(
        *(tiny(name, "roberta", _HUB_ALONE, **_BERT, architectures=[name]) for name in _ROBERTAS),
        tiny("roberta-one-type", "roberta", _HUB_ALONE, **_BERT, type_vocab_size=1),
    ),
    "xlm-roberta": proof(
        *(tiny(f"XLM{name}", "xlm-roberta", _HUB_ALONE, **_BERT, architectures=[f"XLM{name}"]) for name in _ROBERTAS),
    ),
    "distilbert": proof(
        *(
            tiny(name, "distilbert", _HUB_ALONE, **_DISTILBERT, architectures=[name])
            for name in ("DistilBertForMaskedLM", "DistilBertModel")
        ),
    ),
    "whisper": proof(
        tiny("whisper", "whisper", _HUB_ALONE, **_WHISPER),
        tiny(
            "whisper-distilled", "whisper", _HUB_ALONE, **{**_WHISPER, "decoder_layers": 1}, tie_word_embeddings=False
        ),
    ),
    "modernbert": proof(
        *(
            tiny(name, "modernbert", _HUB_ALONE, **GROUPED_BERT, architectures=[name])
            for name in ("ModernBertForMaskedLM", "ModernBertModel")
        ),
        tiny(
            "modernbert-listed",
            "modernbert",
            _HUB_ALONE,
            **GROUPED_BERT,
            layer_types=_ALTERNATING,
            rope_parameters=_TWO_THETAS,
        ),
    ),
    "falcon-h1": proof(
        tiny("falcon-h1", "falcon_h1", _HUB_ALONE, **GROUPED, **_FALCON_H1),
        tiny(
            "falcon-h1-norm",
            "falcon_h1",
            _HUB_ALONE,
            **GROUPED,
            **{**_FALCON_H1, "mamba_d_head": 8},
            mamba_rms_norm=True,
            mamba_norm_before_gate=False,
            tie_word_embeddings=True,
        ),
    ),
    "lfm2": proof(
        tiny(
            "lfm2",
            "lfm2",
            _HUB_ALONE,
            **GROUPED,
            layer_types=["conv", "conv", "full_attention", "conv"],
            block_multiple_of=8,
        ),
        tiny(
            "lfm2-plain",
            "lfm2",
            _HUB_ALONE,
            **GROUPED,
            full_attn_idxs=[1, 3],
            block_auto_adjust_ff_dim=False,
            tie_word_embeddings=False,
            conv_L_cache=4,
        ),
    ),
    "ernie4-5": proof(
        tiny("ernie-4.5", "ernie4_5", _CORE_ALONE, **_WIDE),
        tiny("ernie-4.5-biased", "ernie4_5", _CORE_ALONE, **_WIDE, use_bias=True, tie_word_embeddings=False),
    ),
    "ernie4-5-moe": proof(
        tiny(
            "ernie-4.5-moe",
            "ernie4_5_moe",
            _CORE_ALONE,
            **GROUPED,
            moe_intermediate_size=24,
            moe_num_experts=8,
            moe_k=2,
        ),
        tiny(
            "ernie-4.5-interval",
            "ernie4_5_moe",
            _CORE_ALONE,
            **GROUPED,
            moe_intermediate_size=24,
            moe_num_experts=8,
            moe_k=2,
            moe_layer_interval=2,
            moe_num_shared_experts=1,
            moe_layer_end_index=3,
            tie_word_embeddings=False,
        ),
    ),
    "cohere2": proof(
        tiny("cohere2", "cohere2", _HUB_ALONE, **GROUPED, sliding_window=4, logit_scale=0.25),
        tiny(
            "cohere2-alternating",
            "cohere2",
            _HUB_ALONE,
            **GROUPED,
            sliding_window=4,
            layer_types=_ALTERNATING,
            tie_word_embeddings=False,
        ),
    ),
    "hunyuan-dense": proof(
        tiny("hunyuan", "hunyuan_v1_dense", _HUB_ALONE, **_WIDE),
        tiny(
            "hunyuan-alpha",
            "hunyuan_v1_dense",
            _HUB_ALONE,
            **_WIDE,
            tie_word_embeddings=True,
            rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "alpha": 50.0, "factor": 1.0},
        ),
    ),
    "internlm2": proof(
        Synthetic(
            name="internlm2",
            config=remote_code.INTERNLM2,
            shapes=remote_code.internlm2_shapes(remote_code.INTERNLM2),
            provenance=remote_code.INTERNLM2_SOURCE,
            refused=_CORE_ALONE,
        ),
        outputs="Megatron-Core",
        note="Megatron-Core gives the logits of transformers' Llama of the same weights",
    ),
    "internlm3": proof(
        tiny("internlm3", "internlm3", _CORE_ALONE, **_WIDE, architectures=["LlamaForCausalLM"]),
        tiny(
            "internlm3-biased",
            "internlm3",
            _CORE_ALONE,
            **_WIDE,
            attention_bias=True,
            mlp_bias=True,
            architectures=["LlamaForCausalLM"],
        ),
    ),
    "ministral3": proof(
        tiny(
            "ministral3",
            "ministral3",
            _CORE_ALONE,
            **_WIDE,
            rope_parameters={**_YARN, "mscale": 1.0, "mscale_all_dim": 1.0, "llama_4_scaling_beta": 0.1},
        ),
        tiny(
            "ministral3-window",
            "ministral3",
            _CORE_ALONE,
            **_WIDE,
            sliding_window=6,
            tie_word_embeddings=True,
            rope_parameters={**_YARN, "llama_4_scaling_beta": 0.3, "truncate": False},
        ),
    ),
    "minimax-m2": proof(
        tiny("minimax-m2", "minimax_m2", _CORE_ALONE, **_WIDE, num_local_experts=8, num_experts_per_tok=2),
        tiny(
            "minimax-m2-partial",
            "minimax_m2",
            _CORE_ALONE,
            **_WIDE,
            num_local_experts=8,
            num_experts_per_tok=2,
            rotary_dim=8,
        ),
    ),
    "olmo2": proof(
        tiny("olmo2", "olmo2", _HUB_ALONE, **GROUPED),
        tiny("olmo2-tied", "olmo2", _HUB_ALONE, **_SIZES, tie_word_embeddings=True),
    ),
    "olmo3": proof(
        tiny("olmo3", "olmo3", _HUB_ALONE, **GROUPED, sliding_window=4),
        tiny(
            "olmo3-scaled",
            "olmo3",
            _HUB_ALONE,
            **GROUPED,
            sliding_window=4,
            layer_types=_ALTERNATING,
            rope_parameters={"full_attention": _YARN, "sliding_attention": {"rope_theta": 1e4, "rope_type": "default"}},
        ),
    ),
    "olmoe": proof(
        tiny("olmoe", "olmoe", _CORE_ALONE, **GROUPED, num_experts=4, num_experts_per_tok=2),
        tiny(
            "olmoe-normalised",
            "olmoe",
            _CORE_ALONE,
            **_SIZES,
            num_experts=4,
            num_experts_per_tok=2,
            norm_topk_prob=True,
        ),
    ),
    "granite": proof(
        tiny("granite", "granite", _HUB_ALONE, **GROUPED, **_GRANITE),
        tiny(
            "granite-tied",
            "granite",
            _HUB_ALONE,
            **GROUPED,
            **_GRANITE,
            tie_word_embeddings=True,
            attention_bias=True,
            mlp_bias=True,
        ),
    ),
    "granitemoe": proof(
        tiny("granitemoe", "granitemoe", _HUB_ALONE, **GROUPED, **_GRANITE, num_local_experts=4),
    ),
    "granitemoehybrid": proof(
        tiny(
            "granite-4-experts",
            "granitemoehybrid",
            _HUB_ALONE,
            **GROUPED,
            **_GRANITE,
            **GRANITE_4,
            num_local_experts=4,
            shared_intermediate_size=40,
        ),
        tiny(
            "granite-4-dense",
            "granitemoehybrid",
            _HUB_ALONE,
            **GROUPED,
            **_GRANITE,
            **GRANITE_4,
            num_local_experts=0,
            shared_intermediate_size=40,
            position_embedding_type="rope",
            tie_word_embeddings=True,
        ),
    ),
    "exaone4": proof(
        tiny("exaone4", "exaone4", _CORE_ALONE, **GROUPED, sliding_window=None, layer_types=["full_attention"] * 4),
        tiny("exaone4-window", "exaone4", _CORE_ALONE, **_WIDE, sliding_window=4),
        tiny(
            "exaone4-letters",
            "exaone4",
            _CORE_ALONE,
            **_WIDE,
            sliding_window=4,
            layer_types=_ALTERNATING,
            sliding_window_pattern="LG",
        ),
    ),
    "seed-oss": proof(
        tiny("seed-oss", "seed_oss", _CORE_ALONE, **_WIDE),
        tiny("seed-oss-unbiased", "seed_oss", _CORE_ALONE, **_WIDE, attention_bias=False, tie_word_embeddings=True),
    ),
    "smollm3": proof(
        tiny("smollm3", "smollm3", _CORE_ALONE, **GROUPED),
        tiny(
            "smollm3-listed",
            "smollm3",
            _CORE_ALONE,
            **GROUPED,
            no_rope_layers=[1, 0, 0, 1],
            attention_bias=True,
            mlp_bias=True,
            tie_word_embeddings=False,
        ),
        tiny("smollm3-rotary", "smollm3", _CORE_ALONE, **GROUPED, no_rope_layers=[1] * 4),
    ),
    "deepseek-v3.2": proof(tiny("deepseek-v3.2", "deepseek_v32", _NO_NEMO, **_LATENT)),
    "glm-moe-dsa": proof(
        tiny("glm-5", "glm_moe_dsa", _NO_NEMO, **{**_LATENT, "n_group": 1, "topk_group": 1}),
        note="layers that share the tokens another layer's indexer chose are refused",
    ),
    "falcon": proof(
        fixture("falcon_seq_mqa"),
        tiny("falcon-7b", "falcon", _PARALLEL, **_FALCON),
        tiny("falcon-40b", "falcon", _PARALLEL, **_NEW_FALCON, num_kv_heads=2),
        tiny("falcon-11b", "falcon", _PARALLEL, **_NEW_FALCON, num_kv_heads=4, num_ln_in_parallel_attn=1),
        tiny("falcon-heads", "falcon", **_FALCON, multi_query=False, parallel_attn=False, bias=True),
    ),
    "baichuan": proof(
        *(
            Synthetic(
                name=name,
                config=config,
                shapes=remote_code.baichuan_shapes(config),
                provenance=remote_code.BAICHUAN_SOURCE,
                unit_rows=("lm_head.weight",),
                refused=refused,
            )
            for name, config, refused in (
                ("baichuan2", remote_code.BAICHUAN, {}),
                ("baichuan2-alibi", remote_code.BAICHUAN_13B, _NO_ALIBI | {"nemo2": "no such position embedding"}),
            )
        ),
        outputs="Megatron-Core",
        note="Megatron-Core gives the logits of its own code (rope), whose output layer has rows of length 1",
    ),
    "glm": proof(tiny("glm", "glm", **_WIDE), tiny("glm-unbiased", "glm", **_WIDE, attention_bias=False)),
    "chatglm": proof(
        Synthetic(
            name="chatglm",
            config=remote_code.CHATGLM,
            shapes=remote_code.chatglm_shapes(remote_code.CHATGLM),
            provenance=remote_code.CHATGLM_SOURCE,
        ),
        outputs="Megatron-Core",
        note="Megatron-Core gives the logits of its own code",
    ),
    "mpt": proof(
        tiny("mpt", "mpt", NO_NEMO_2 | _NO_ALIBI, d_model=32, n_heads=4, n_layers=2, max_seq_len=64, vocab_size=64),
    ),
    "bert": proof(*(tiny(name, "bert", NO_BRIDGE, **_BERT, architectures=[name]) for name in _BERTS)),
    "gemma": proof(fixture("gemma")),
    "gemma2": proof(fixture("gemma2"), tiny("gemma2-window", "gemma2", **_WIDE, sliding_window=4)),
    "gemma3": proof(
        fixture("gemma3"),
        tiny(
            "gemma3-scaled",
            "gemma3_text",
            **_WIDE,
            sliding_window=4,
            rope_parameters=_SCALED,
            layer_types=["sliding_attention", "full_attention"] * 2,
        ),
    ),
    "gemma3n": proof(
        tiny("gemma3n", "gemma3n_text", _HUB_ALONE, **GEMMA_3N),
        tiny(
            "gemma3n-widths",
            "gemma3n_text",
            _HUB_ALONE,
            **{**GEMMA_3N, "intermediate_size": [48, 40, 56, 48, 48, 32]},
            activation_sparsity_pattern=[0.9, 0.9, 0.0, 0.0, 0.0, 0.0],
            altup_num_inputs=2,
        ),
    ),
    "mllama": proof(
        tiny("mllama", "mllama_text_model", _OWN_CROSS, **GROUPED, cross_attention_layers=[1, 3]),
        tiny("mllama-unlisted", "mllama_text_model", _OWN_CROSS, **GROUPED),
    ),
    "gemma4": proof(
        tiny(
            "gemma4-inputs",
            "gemma4_text",
            _HUB_ALONE,
            **GEMMA_4,
            hidden_size_per_layer_input=8,
            vocab_size_per_layer_input=64,
            num_kv_shared_layers=3,
            use_double_wide_mlp=True,
        ),
        tiny(
            "gemma4-experts",
            "gemma4_text",
            _HUB_ALONE,
            **GEMMA_4,
            hidden_size_per_layer_input=0,
            attention_k_eq_v=True,
            num_global_key_value_heads=1,
            enable_moe_block=True,
            num_experts=4,
            top_k_experts=2,
            moe_intermediate_size=20,
            final_logit_softcapping=30.0,
        ),
        tiny("gemma4-dense", "gemma4_text", _HUB_ALONE, **GEMMA_4, hidden_size_per_layer_input=0),
    ),
    "gpt2": proof(
        fixture("gpt2"), tiny("gpt2-untied", "gpt2", **_GPT, tie_word_embeddings=False, activation_function="gelu")
    ),
    "gpt_bigcode": proof(
        fixture("starcoder_gpt_bigcode"), tiny("santacoder-heads", "gpt_bigcode", **_GPT, multi_query=False)
    ),
    "gpt_neox": proof(fixture("gpt_neox"), tiny("pythia", "gpt_neox", _PARALLEL, **_SIZES, use_parallel_residual=True)),
    "gpt-oss": proof(fixture("gpt_oss", NO_NEMO_1)),
    "llama": proof(fixture("llama"), fixture("llama_tied_bf16"), fixture("llama31_ropescale")),
    "llama-nemotron": proof(
        Synthetic(
            name="llama-nemotron",
            config=remote_code.DECILM,
            shapes=remote_code.decilm_shapes(remote_code.DECILM),
            provenance=remote_code.DECILM_SOURCE,
            refused=NO_NEMO_1,
        ),
        outputs="Megatron-Core",
        note="Megatron-Core's heterogeneous model loads our files and gives the logits of its own code",
    ),
    "llama4": proof(
        tiny("llama4", "llama4_text", NO_NEMO_1, **LLAMA_4),
        tiny(
            "llama4-interleaved",
            "llama4_text",
            NO_NEMO_1,
            **LLAMA_4,
            interleave_moe_layer_step=2,
            use_qk_norm=False,
            no_rope_layer_interval=2,
        ),
        tiny(
            "llama4-lists",
            "llama4_text",
            {**NO_NEMO_1, "nemo2": "cannot express which layers have rotary embedding"},
            **LLAMA_4,
            moe_layers=[0, 3],
            floor_scale=8,
            attn_scale=0.3,
            no_rope_layers=[1, 0, 0, 1],
            rope_parameters={**_LLAMA_3, "rope_theta": 5e5},
        ),
    ),
    "mamba2": proof(
        tiny("mamba2", "mamba2", **MAMBA, n_groups=4),
        tiny("mamba2-one-group", "mamba2", {"megatron-lm": "groups of Mamba mixers"}, **MAMBA, n_groups=1),
        note="and in Megatron-Core's MambaModel, with its kernels replaced by the recurrence that they compute",
    ),
    "megatron-bert": proof(
        fixture("megatron_bert", NO_BRIDGE),
        *(
            tiny(f"Megatron{name}", "megatron-bert", NO_BRIDGE, **_BERT, architectures=[f"Megatron{name}"])
            for name in _BERTS[1:]
        ),
    ),
    "mistral": proof(
        fixture("mistral_swa"),
        tiny("ministral", "ministral", **_WIDE, sliding_window=8, layer_types=_ALTERNATING),
        tiny("ministral-first", "ministral", **GROUPED, sliding_window=6, layer_types=_ALTERNATING[::-1]),
        tiny("mistral-without", "mistral", **GROUPED, sliding_window=None),
    ),
    "mixtral": proof(fixture("mixtral")),
    "nemotron": proof(
        fixture("nemotron"), tiny("nemotron-biased", "nemotron", **GROUPED, mlp_bias=True, attention_bias=True)
    ),
    "nemotron-h": proof(
        fixture("nemotron_h", NO_NEMO_1),
        tiny("nemotron-3-super", "nemotron_h", NO_NEMO_1, **NEMOTRON_3),
    ),
    "phi3": proof(fixture("phi3"), tiny("phi4-partial", "phi3", **GROUPED, rope_parameters=_PARTIAL)),
    "qwen2": proof(
        fixture("qwen2"),
        tiny("qwen2-window", "qwen2", **GROUPED, use_sliding_window=True, sliding_window=4, max_window_layers=2),
    ),
    "qwen2-moe": proof(fixture("qwen2_moe", NO_NEMO_2)),
    "qwen3": proof(fixture("qwen3"), tiny("qwen3-tied", "qwen3", **_WIDE, tie_word_embeddings=True)),
    "qwen3-moe": proof(fixture("qwen3_moe")),
    "qwen3-next": proof(
        tiny("qwen3-next", "qwen3_next", _NO_NEMO, _NET_NORM, **_NETS_EXPERTS),
        tiny(
            "qwen3-next-dense-layers",
            "qwen3_next",
            _NO_NEMO,
            _NET_NORM,
            **_NETS_EXPERTS,
            intermediate_size=48,
            mlp_only_layers=[1],
            norm_topk_prob=False,
            layer_types=_SOME_NETS,
        ),
        note=_NET_IN_CORE,
    ),
    "qwen3.5": proof(
        tiny("qwen3.5", "qwen3_5_text", _NO_NEMO, _NET_NORM, **_NETS),
        tiny(
            "qwen3.5-tied",
            "qwen3_5_text",
            _NO_NEMO,
            _NET_NORM,
            **_NETS,
            tie_word_embeddings=True,
            layer_types=_SOME_NETS,
        ),
        note=_NET_IN_CORE,
    ),
    "qwen3.5-moe": proof(tiny("qwen3.5-moe", "qwen3_5_moe_text", _NO_NEMO, _NET_NORM, **_NETS_EXPERTS)),
    "recurrent-gemma": proof(
        tiny("recurrent-gemma", "recurrent_gemma", NEMO_1_ALONE, **GRIFFIN),
        tiny(
            "recurrent-gemma-heads",
            "recurrent_gemma",
            {**NEMO_1_ALONE, "nemo": "no output layer besides its embedding"},
            **{**GRIFFIN, "num_key_value_heads": 4, "num_hidden_layers": 3},
            tie_word_embeddings=False,
        ),
        note="NeMo 1 alone has such models; its modules were written down anew, for its kernels need a GPU",
    ),
    "starcoder2": proof(
        fixture("starcoder2"), tiny("starcoder2-window", "starcoder2", **GROUPED, sliding_window=4, use_bias=False)
    ),
    "t5": proof(
        fixture("t5_v1_1", NO_BRIDGE, beyond=("lm_head.output_layer.bias",)),
        tiny("t5-asymmetric", "t5", NO_BRIDGE, **{**_T5, "num_decoder_layers": 3, "d_kv": 8}),
        tiny("t5-relu", "t5", NO_BRIDGE, **{**_T5, "feed_forward_proj": "relu", "relative_attention_num_buckets": 16}),
    ),
    "clip-vision": proof(
        fixture("clip_vision", _VISION, ("post_layernorm.weight", "post_layernorm.bias")),
        tiny("clip-bare", "clip_vision_model", _VISION, **_IMAGES),
        tiny(
            "clip-projection",
            "clip_vision_model",
            _VISION,
            **_IMAGES,
            projection_dim=24,
            architectures=["CLIPVisionModelWithProjection"],
        ),
    ),
    "clip-text": proof(
        tiny("clip-text", "clip_text_model", _HUB_ALONE, **_TEXT_TOWER),
        tiny(
            "clip-text-projection",
            "clip_text_model",
            _HUB_ALONE,
            **_TEXT_TOWER,
            projection_dim=20,
            architectures=["CLIPTextModelWithProjection"],
        ),
    ),
    "clip": proof(tiny("clip", "clip", _HUB_ALONE | _OTHER_CLIP, **TWO_TOWERS, projection_dim=20)),
    "siglip-text": proof(tiny("siglip-text", "siglip_text_model", _HUB_ALONE, **_TEXT_TOWER, projection_size=28)),
    "siglip-vision": proof(
        tiny("siglip-vision", "siglip_vision_model", _HUB_ALONE, **_IMAGES),
        tiny("siglip-headless", "siglip_vision_model", _HUB_ALONE, **_IMAGES, vision_use_head=False),
    ),
    "siglip": proof(
        tiny(
            "siglip",
            "siglip",
            _HUB_ALONE,
            text_config={**_TEXT_TOWER, "projection_size": 32, "model_type": "siglip_text_model"},
            vision_config=_TALL,
        )
    ),
    "vit": proof(
        fixture("vit", {**_VISION, **NO_NEMO_2}, ("layernorm.weight", "layernorm.bias")),
        tiny("vit-pooler", "vit", {**_VISION, **NO_NEMO_2}, **_IMAGES),
        tiny(
            "vit-classifier",
            "vit",
            {**_VISION, **NO_NEMO_2},
            **_IMAGES,
            num_labels=5,
            architectures=["ViTForImageClassification"],
        ),
    ),
}
"""By family's name."""


def in_training(checkpoint: Checkpoint, model: Model) -> Checkpoint:
    """The sample as Megatron-Core names it, with Adam's state of every parameter."""
    named = models.from_hub(models.to_hub(checkpoint, model), "hub").tensors
    parameters = trained(named)
    slots = {
        slot: {name: values(f"{slot} {name}", tensor.shape) for name, tensor in parameters.items()}
        for slot in ("master", "exp_avg", "exp_avg_sq")
    }
    exact = {name: tensor for name, tensor in parameters.items() if tensor.dtype.name == "float32"}
    slots["master"].update(exact)  # weights in fp32 are their own masters
    group = {"lr": 1e-3, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
    return replace(
        checkpoint, tensors=dict(named), dialect="hub", format="megatron-lm", artifacts={},
        training=replace(checkpoint.training, has_optimizer=True, step=1),
        optimizer=lambda: OptimizerState(slots=slots, step=1, groups=(group,)),
    )  # fmt: skip


def samples() -> dict[str, Sample]:
    """Every sample of every family by its name."""
    return {sample.name: sample for proof in PROOFS.values() for sample in proof.samples}
