"""Random configurations of Llama-Nemotron, Baichuan 2, ChatGLM and MPT: every spelling, there and back."""

from __future__ import annotations

import json
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st
from tests.models.remote_code import BAICHUAN, CHATGLM, DECILM, LLAMA3_ROPE, block
from tests.models.test_config import IN_NO_CONFIG_OF_NEMO_2, compared, model_of

from anyckpt import models
from anyckpt.errors import MappingError
from anyckpt.models import KINDS

TOKENS = st.none() | st.integers(0, 200_000)
REFUSED = {"llama-nemotron": {"nemo1"}, "mpt": {"nemo2", "megatron-args"}}
UNSAID = {"torch_dtype", "dtype", "use_cache", "rope_parameters"}


@st.composite
def common(draw: st.DrawFn) -> dict[str, Any]:
    head, heads = draw(st.sampled_from([8, 16, 64])), draw(st.integers(1, 16))
    return {
        "hidden_size": head * heads,
        "num_attention_heads": heads,
        "num_hidden_layers": draw(st.integers(1, 12)),
        "vocab_size": draw(st.integers(1, 300_000)),
        "initializer_range": draw(st.sampled_from([0.02, 0.01, 0.008944])),
        "tie_word_embeddings": draw(st.booleans()),
        "bos_token_id": draw(TOKENS),
        "eos_token_id": draw(TOKENS),
        "pad_token_id": draw(TOKENS),
    }


@st.composite
def decilm(draw: st.DrawFn) -> dict[str, Any]:
    config = {**DECILM, **draw(common())}
    heads = config["num_attention_heads"]
    each = [number for number in range(1, heads + 1) if heads % number == 0]
    blocks = []
    for _ in range(config["num_hidden_layers"]):
        attention = draw(st.sampled_from(["attention", "linear", "none"]))
        mlp = draw(st.sampled_from(["ffn", "linear", "none"]))
        linear = ("attention " if attention == "linear" else "") + ("ffn" if mlp == "linear" else "")
        groups = draw(st.sampled_from(each)) if attention == "attention" else None
        width = draw(st.floats(0.25, 30, allow_nan=False)) if mlp == "ffn" else None
        blocks.append(block(groups, width, linear))
    scaling = {**LLAMA3_ROPE, "factor": draw(st.sampled_from([8.0, 16.0, 32.0]))}
    theta = draw(st.sampled_from([10000.0, 500000.0]))
    return {**config, "block_configs": blocks, "rope_scaling": scaling, "rope_theta": theta}


@st.composite
def baichuan(draw: st.DrawFn) -> dict[str, Any]:
    config = {**BAICHUAN, **draw(common()), "intermediate_size": draw(st.integers(1, 60_000))}
    length = draw(st.integers(1, 1 << 17))
    config |= {"max_position_embeddings": length, "model_max_length": length}
    if draw(st.booleans()):
        del config["max_position_embeddings"]
    return config


@st.composite
def chatglm(draw: st.DrawFn) -> dict[str, Any]:
    given = draw(common())
    heads = given["num_attention_heads"]
    groups = draw(st.sampled_from([number for number in range(1, heads + 1) if heads % number == 0]))
    renamed = {"num_hidden_layers": "num_layers", "vocab_size": "padded_vocab_size"}
    config = {**CHATGLM, **{renamed.get(key, key): value for key, value in given.items()}}
    return config | {
        "multi_query_attention": groups != heads,
        "multi_query_group_num": groups,
        "kv_channels": draw(st.sampled_from([8, 128])),
        "ffn_hidden_size": draw(st.integers(1, 60_000)),
        "seq_length": draw(st.sampled_from([8192, 32768, 4096])),
        "add_qkv_bias": draw(st.booleans()),
        "add_bias_linear": draw(st.booleans()),
        "rope_ratio": draw(st.sampled_from([1, 50, 500])),
        "_name_or_path": draw(st.sampled_from(["THUDM/chatglm2-6b-32k", "THUDM/chatglm3-6b", "x"])),
    }


@st.composite
def mpt(draw: st.DrawFn) -> dict[str, Any]:
    renamed = {"hidden_size": "d_model", "num_attention_heads": "n_heads", "num_hidden_layers": "n_layers"}
    config = {renamed.get(key, key): value for key, value in draw(common()).items()}
    return config | {
        "model_type": "mpt",
        "architectures": ["MptForCausalLM"],
        "expansion_ratio": draw(st.integers(1, 8)),
        "max_seq_len": draw(st.integers(1, 1 << 17)),
        "layer_norm_epsilon": draw(st.sampled_from([1e-5, 1e-6])),
    }


@settings(max_examples=150, deadline=None)
@given(st.one_of(decilm(), baichuan(), chatglm(), mpt()), st.sampled_from(KINDS))
def test_there_and_back(config: dict[str, Any], kind: str) -> None:
    model = model_of(config)
    alibi = model.config.position_embedding_type == "alibi" and kind in ("nemo2", "megatron-args")
    if alibi or kind in REFUSED.get(model.family, ()):
        try:
            models.render_config(model, kind)
        except MappingError:
            return
        raise AssertionError(f"{kind} has no such models")
    rendered = json.loads(json.dumps(models.render_config(model, kind)))
    back = model_of(rendered)
    assert back.family == model.family
    assert compared(back.config, kind) == compared(model.config, kind)
    first, final = models.render_config(model, "hf"), models.render_config(back, "hf")
    unsaid = UNSAID | (IN_NO_CONFIG_OF_NEMO_2 if kind == "nemo2" else set())
    carried = model.config.extra["hf"].keys()
    for key in config.keys() & first.keys() - unsaid - carried:
        assert final[key] == first[key], key
