"""Random configurations of the dense decoders: every spelling, there and back."""

from __future__ import annotations

import json
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st
from tests.models.cases import open_case
from tests.models.test_config import IN_NO_CONFIG_OF_NEMO_2, compared, model_of

from anyckpt import models
from anyckpt.models import KINDS

NAMED_AS_LLAMA = ("qwen2", "qwen3", "gemma", "gemma2", "gemma3", "phi3", "starcoder2", "nemotron")
WITH_HEAD_DIM = {"qwen2", "qwen3", "gemma", "gemma2", "gemma3", "nemotron"}
WINDOWED = {"qwen2", "qwen3", "gemma2", "gemma3"}
EPSILON = {"starcoder2": "norm_epsilon", "nemotron": "norm_eps"}
_BASES: dict[str, dict[str, Any]] = {}


def base(name: str) -> dict[str, Any]:
    if name not in _BASES:
        _BASES[name] = dict(open_case(name).checkpoint.config)
    return _BASES[name]


@st.composite
def configs(draw: st.DrawFn) -> dict[str, Any]:
    """Valid ``config.json`` of a family whose keys are Llama's."""
    name = draw(st.sampled_from(NAMED_AS_LLAMA))
    groups, ratio = draw(st.integers(1, 8)), draw(st.integers(1, 4))
    head, layers = draw(st.sampled_from([8, 16, 64])), draw(st.integers(1, 40))
    config = base(name) | {
        "num_hidden_layers": layers,
        "hidden_size": groups * ratio * head,
        "intermediate_size": draw(st.integers(1, 60_000)),
        "num_attention_heads": groups * ratio,
        "num_key_value_heads": groups,
        "vocab_size": draw(st.integers(1, 300_000)),
        "max_position_embeddings": draw(st.integers(1, 1 << 20)),
        EPSILON.get(name, "rms_norm_eps"): draw(st.sampled_from([1e-5, 1e-6, 1e-8])),
        "initializer_range": draw(st.sampled_from([0.02, 0.01, 0.008944])),
        "attention_dropout": draw(st.sampled_from([0.0, 0.1])),
        "tie_word_embeddings": draw(st.booleans()),
        "bos_token_id": draw(st.none() | st.integers(0, 200_000)),
        "eos_token_id": draw(st.none() | st.integers(0, 200_000)),
    }
    for key in ("layer_types", "head_dim"):
        config.pop(key, None)
    if name in WITH_HEAD_DIM:
        config["head_dim"] = draw(st.sampled_from([head, 2 * head, 32]))
    if name in WINDOWED:
        config["sliding_window"] = draw(st.integers(1, 40_000))
        if name.startswith("qwen"):
            config |= {"use_sliding_window": draw(st.booleans()), "max_window_layers": draw(st.integers(0, 41))}
    elif name == "starcoder2":
        config |= {"sliding_window": draw(st.none() | st.integers(1, 40_000)), "use_bias": draw(st.booleans())}
    if name in ("gemma2", "gemma3"):
        config["query_pre_attn_scalar"] = draw(st.integers(1, 300))
        config["final_logit_softcapping"] = draw(st.none() | st.just(30.0)) if name == "gemma2" else None
    if name != "gemma3":
        percent = draw(st.sampled_from([0.25, 0.5, 1.0])) if name in ("phi3", "nemotron") else 1.0
        theta = draw(st.sampled_from([10000.0, 1e6, 12345.5]))
        if draw(st.booleans()):
            config["rope_parameters"] = {"rope_theta": theta, "rope_type": "default", "partial_rotary_factor": percent}
        else:
            del config["rope_parameters"]
            config |= {"rope_theta": theta, "rope_scaling": None, "partial_rotary_factor": percent}
    return config


@settings(max_examples=150)
@given(configs(), st.sampled_from(KINDS))
def test_there_and_back(config: dict[str, Any], kind: str) -> None:
    model = model_of(config)
    rendered = json.loads(json.dumps(models.render_config(model, kind)))
    back = model_of(rendered)
    assert back.family == model.family
    assert compared(back.config, kind) == compared(model.config, kind)
    first, final = models.render_config(model, "hf"), models.render_config(back, "hf")
    unsaid = IN_NO_CONFIG_OF_NEMO_2 if kind == "nemo2" else set()
    matters = config.keys() & first.keys() - unsaid - {"max_window_layers", "sliding_window", "use_cache"}
    for key in matters - {"transformers_version", "_sliding_window_pattern", "embd_pdrop", "embedding_dropout"}:
        if key not in ("use_bidirectional_attention", "original_max_position_embeddings"):
            assert final[key] == first[key], key
