"""Configurations: every spelling, there and back."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from functools import cache
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.models.cases import FAMILIES, open_case
from tests.models.proofs import samples

from anyckpt import models
from anyckpt.checkpoint import Checkpoint
from anyckpt.config import hugging_face as config_hf
from anyckpt.errors import AnyckptError, MappingError, UsageError
from anyckpt.models import KINDS, Model, ModelConfig

WINDOWS = {"gemma2": (5, 0), "gemma3": (5, 0)}  # which the fixtures' authors set in Bridge's model
OLD_ROPE = ("rope_theta", "rope_scaling", "torch_dtype", "rotary_pct", "rotary_emb_base", "rope_local_base_freq")
LEFT_OUT = {
    "phi3": {"embd_pdrop", "original_max_position_embeddings"},
    "starcoder2": {"embedding_dropout"},
    "gemma": {"use_bidirectional_attention"},
    "gemma2": {"use_bidirectional_attention"},
    "gemma3": {"use_bidirectional_attention"},
}
"""Keys of a fixture that no other framework's configuration has: those of a rate of 0, and what rope does not use."""

IN_NO_CONFIG_OF_NEMO_2 = {"bos_token_id", "eos_token_id", "pad_token_id"}


def identified(config: dict[str, Any], kind: str | None = None, **options: Any) -> Model | None:
    found = kind or models.config_kind(config)
    return models.identify(Checkpoint("x", "x", {}, config=config, config_kind=found), **options)


def model_of(config: dict[str, Any], **options: Any) -> Model:
    model = identified(config, **options)
    assert model is not None
    return model


def compared(config: ModelConfig, kind: str = "hf") -> dict[str, Any]:
    """What must survive a round trip: everything but what derives from it or is of no framework but the first."""
    dropped = {"extra", "padded_vocab_size", "dtype"} | (IN_NO_CONFIG_OF_NEMO_2 if kind == "nemo2" else set())
    return {name: value for name, value in asdict(config).items() if name not in dropped}


LLAMA3_ROPE = st.builds(
    lambda factor: {
        "rope_type": "llama3", "factor": factor, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
    st.sampled_from([8.0, 32.0, 16.0]),
)  # fmt: skip
LINEAR_ROPE = st.builds(lambda factor: {"rope_type": "linear", "factor": factor}, st.sampled_from([2.0, 4.0, 1.5]))
TOKENS = st.none() | st.integers(0, 200_000)


@st.composite
def hf_configs(draw: st.DrawFn) -> dict[str, Any]:
    """Valid ``config.json`` of either family in either spelling."""
    family = draw(st.sampled_from(["llama", "mistral"]))
    groups, ratio = draw(st.integers(1, 8)), draw(st.integers(1, 8))
    heads = groups * ratio
    head = draw(st.sampled_from([8, 16, 64, 128]))
    config: dict[str, Any] = {
        "architectures": ["LlamaForCausalLM" if family == "llama" else "MistralForCausalLM"],
        "model_type": family,
        "num_hidden_layers": draw(st.integers(1, 130)),
        "hidden_size": heads * head,
        "intermediate_size": draw(st.integers(1, 60_000)),
        "num_attention_heads": heads,
        "num_key_value_heads": groups,
        "vocab_size": draw(st.integers(1, 300_000)),
        "max_position_embeddings": draw(st.integers(1, 1 << 20)),
        "rms_norm_eps": draw(st.sampled_from([1e-5, 1e-6, 1e-8])),
        "initializer_range": draw(st.sampled_from([0.02, 0.01, 0.008944])),
        "attention_dropout": draw(st.sampled_from([0.0, 0.1])),
        "tie_word_embeddings": draw(st.booleans()),
        "hidden_act": "silu",
        "bos_token_id": draw(TOKENS),
        "eos_token_id": draw(TOKENS | st.lists(st.integers(0, 100), min_size=1, max_size=3)),
        "pad_token_id": draw(TOKENS),
        "use_cache": True,
    }
    if draw(st.booleans()):
        config["head_dim"] = draw(st.sampled_from([head, 2 * head, 32]))
    if family == "mistral":
        config["sliding_window"] = draw(st.none() | st.integers(1, 40_000))
    else:
        config["mlp_bias"] = config["attention_bias"] = draw(st.booleans())
    base = draw(st.sampled_from([10000.0, 500000.0, 1e6, 12345.5]))
    scaling = draw(st.none() | LLAMA3_ROPE | LINEAR_ROPE)
    if draw(st.booleans()):
        config["rope_parameters"] = {"rope_theta": base, **(scaling or {"rope_type": "default"})}
        config["dtype"] = "bfloat16"
    else:
        config |= {"rope_theta": base, "rope_scaling": scaling, "torch_dtype": "bfloat16"}
    return config


@given(hf_configs(), st.sampled_from(KINDS))
def test_there_and_back(config: dict[str, Any], kind: str) -> None:
    model = model_of(config)
    if kind == "nemo2" and model.family == "mistral" and (model.config.rope_scaling or {}).get("rope_type") == "llama3":
        with pytest.raises(MappingError, match="MistralConfig7B cannot express this rope scaling"):
            models.render_config(model, kind)
        return
    rendered = json.loads(json.dumps(models.render_config(model, kind)))
    assert models.config_kind(rendered) == kind
    back = model_of(rendered)
    assert back.family == model.family
    assert compared(back.config, kind) == compared(model.config, kind)
    final = models.render_config(back, "hf")
    missing = IN_NO_CONFIG_OF_NEMO_2 if kind == "nemo2" else set()
    for key in config.keys() - {"use_cache", "rope_parameters", "rope_scaling", "torch_dtype", "dtype"} - missing:
        assert final[key] == config[key], key
    assert final["rope_parameters"]["rope_theta"] == final["rope_theta"] == model.config.rotary_base
    assert final["rope_scaling"] == model.config.rope_scaling


@given(hf_configs())
def test_both_spellings_say_the_same(config: dict[str, Any]) -> None:
    model = model_of(config)
    rendered = models.render_config(model, "hf")
    old = {key: value for key, value in rendered.items() if key not in ("rope_parameters", "dtype")}
    new = {key: value for key, value in rendered.items() if key not in ("rope_theta", "rope_scaling", "torch_dtype")}
    assert model_of(old).config == model_of(new).config == model.config


@pytest.mark.parametrize("name", FAMILIES)
def test_fields_are_those_that_the_fixture_was_verified_with(name: str) -> None:
    case = open_case(name)
    verified = {**case.meta["transformer_config"], **case.meta["gpt_model"]}
    config = asdict(case.model.config)
    factor = verified.pop("rope_scaling_factor", None)
    assert verified.pop("rope_scaling", False) == (config["rope_scaling"] is not None)
    assert factor is None or config["rope_scaling"]["factor"] == factor
    window = verified.pop("window_size", None) or WINDOWS.get(name)
    if "max_sequence_length" in verified:
        verified["max_position_embeddings"] = verified.pop("max_sequence_length")
    verified["activation"] = {"relu2": "squared_relu"}.get(verified["activation"], verified["activation"])
    assert config["window_size"] == (None if window is None else tuple(window))
    assert {key: config[key] for key in verified} == verified
    assert config["dtype"] == case.meta["weights_dtype"].removeprefix("torch.")
    assert config["vocab_size"] == case.meta["vocab_size"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", FAMILIES)
def test_each_family_there_and_back(name: str, kind: str) -> None:
    model = open_case(name).model
    rendered = json.loads(json.dumps(models.render_config(model, kind)))
    assert models.config_kind(rendered) == kind
    back = model_of(rendered)
    assert back.family == model.family
    assert compared(back.config, kind) == compared(model.config, kind)
    final, first = models.render_config(back, "hf"), models.render_config(model, "hf")
    lost = {key for key in first if key not in final or final[key] != first[key]}
    allowed = config_hf.WITHOUT_MEANING | LEFT_OUT.get(name, set())
    assert lost <= allowed | (IN_NO_CONFIG_OF_NEMO_2 if kind == "nemo2" else set())


@pytest.mark.parametrize("name", FAMILIES)
def test_each_family_in_both_spellings(name: str) -> None:
    model = open_case(name).model
    rendered = models.render_config(model, "hf")
    old = {key: value for key, value in rendered.items() if key not in ("rope_parameters", "dtype")}
    new = {key: value for key, value in rendered.items() if key not in OLD_ROPE}
    for spelled in (old, new, {key: value for key, value in old.items() if key != "layer_types"}):
        assert compared(model_of(spelled).config) == compared(model.config)
    assert model_of(rendered).config == model.config


@pytest.mark.parametrize("kind", ["nemo1", "nemo2", "megatron-args"])
@pytest.mark.parametrize("name", FAMILIES)
def test_no_family_is_mistaken_for_another(name: str, kind: str) -> None:
    """Nor is a configuration that does not name its family, as those of NVIDIA's own tools do not."""
    model = open_case(name).model
    rendered = models.render_config(model, kind)
    rendered.pop("hf_model_type", None)
    back = identified(rendered, kind)
    assert back is not None
    assert back.family == ("llama" if model.family == "phi3" and kind != "nemo2" else model.family)
    for other in models.known_families().values():
        if (
            {other.name, model.family} != {"llama", "phi3"}
            and other.name != model.family
            and other.recognise(model.config)
        ):
            wrong = {key for key, value in other.traits.items() if getattr(model.config, key) != value}
            assert wrong, other.name


def test_what_each_framework_is_told_about_the_fixtures() -> None:
    mistral, llama31, llama = (open_case(name).model for name in ("mistral_swa", "llama31_ropescale", "llama"))
    nemo1 = models.render_config(mistral, "nemo1")
    assert nemo1["window_size"] == [4, 0], "a window of 5 tokens is 4 to the left and the token itself"
    assert (nemo1["activation"], nemo1["normalization"], nemo1["bias"]) == ("fast-swiglu", "rmsnorm", False)
    assert nemo1["make_vocab_size_divisible_by"] == 32
    assert nemo1["precision"] == "bf16"
    assert models.render_config(mistral, "hf")["sliding_window"] == 5
    nemo2 = models.render_config(llama31, "nemo2")
    assert nemo2["_target_"] == "nemo.collections.llm.gpt.model.llama.LlamaModel"
    assert nemo2["config"]["_target_"] == "nemo.collections.llm.gpt.model.llama.Llama31Config"
    assert nemo2["config"]["scale_factor"] == 8
    assert nemo2["config"]["vocab_size"] == 96
    assert nemo2["config"]["activation_func"] == {"_target_": "torch.nn.functional.silu", "_call_": False}
    arguments = models.render_config(llama31, "megatron-args")
    assert (arguments["use_rope_scaling"], arguments["rope_scaling_factor"]) == (True, 8.0)
    assert models.render_config(llama31, "nemo1")["scale_positional_embedding"] is True
    arguments = models.render_config(llama, "megatron-args")
    assert arguments["group_query_attention"] is True
    assert arguments["untie_embeddings_and_output_weights"] is True
    assert arguments["rotary_base"] == 500000
    assert arguments["params_dtype"] == "torch.float32"
    assert models.render_config(llama, "hf", extra={"x": 1})["x"] == 1


NEMO1 = {
    "mcore_gpt": True, "encoder_seq_length": 32, "max_position_embeddings": 32, "num_layers": 2, "hidden_size": 16,
    "ffn_hidden_size": 32, "num_attention_heads": 4, "num_query_groups": 2, "kv_channels": None,
    "normalization": "rmsnorm", "activation": "fast-swiglu", "bias": False, "position_embedding_type": "rope",
    "rotary_percentage": 1.0, "share_embeddings_and_output_weights": False, "layernorm_epsilon": "1e-05",
    "make_vocab_size_divisible_by": 16, "precision": "bf16-mixed", "target": "a.B",
}  # fmt: skip


def test_nemo_1() -> None:
    config = model_of(NEMO1).config
    assert (config.family, config.kv_channels, config.layernorm_epsilon) == ("llama", 4, 1e-5)
    assert model_of({"cfg": NEMO1}).config == config
    assert model_of({"model": NEMO1, "trainer": {}}).config == config
    assert model_of({**NEMO1, "window_size": [4095, 0]}).family == "mistral"
    assert identified({**NEMO1, "activation": "gelu"}) is None, "of no known family"
    assert identified({**NEMO1, "bias": True}) is not None, "Llama with biases"
    assert identified({"preprocessor": {}, "target": "nemo.asr.X"}, "nemo1") is None
    with pytest.raises(MappingError, match="activation is unknown"):
        identified({**NEMO1, "activation": "tanh"})
    with pytest.raises(MappingError, match="normalization is not that of family llama"):
        identified({**NEMO1, "normalization": "layernorm"}, family="llama")


NEMO2_BASE = "nemo.collections.llm.gpt.model"


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("llama.Llama2Config7B", (32, 4096, 11008, 32, 32, 10000, 4096, None)),
        ("llama.Llama3Config8B", (32, 4096, 14336, 32, 8, 500000, 8192, None)),
        ("llama.Llama3Config70B", (80, 8192, 28672, 64, 8, 500000, 8192, None)),
        ("llama.Llama31Config405B", (126, 16384, 53248, 128, 8, 500000, 131072, None)),
        ("llama.CodeLlamaConfig7B", (32, 4096, 11008, 32, 32, 1000000, 16384, None)),
        ("mistral.MistralConfig7B", (32, 4096, 14336, 32, 8, 10000, 32768, (4096, 0))),
    ],
)
def test_nemo_2_classes_have_defaults(name: str, expected: tuple[Any, ...]) -> None:
    """io.json holds only what was passed; the class is the rest."""
    config = model_of({"_target_": f"{NEMO2_BASE}.{name}"}).config
    found = (
        config.num_layers, config.hidden_size, config.ffn_hidden_size, config.num_attention_heads,
        config.num_query_groups, config.rotary_base, config.max_position_embeddings, config.window_size,
    )  # fmt: skip
    assert found == expected
    assert (config.normalization, config.activation, config.add_bias_linear) == ("RMSNorm", "silu", False)
    assert (config.rope_scaling is not None) == ("31" in name)


def test_nemo_2() -> None:
    config = {"_target_": f"{NEMO2_BASE}.llama.Llama32Config1B", "num_layers": 2}
    parsed = model_of({"_target_": f"{NEMO2_BASE}.llama.LlamaModel", "config": config}).config
    assert (parsed.num_layers, parsed.hidden_size) == (2, 2048)
    assert parsed.share_embeddings_and_output_weights
    assert parsed.rope_scaling is not None
    assert parsed.rope_scaling["factor"] == 32.0
    assert identified({"_target_": f"{NEMO2_BASE}.hyena.HyenaConfig"}) is None
    with pytest.raises(MappingError, match="normalization is not that of family llama"):
        identified({**config, "normalization": "LayerNorm"})
    with pytest.raises(MappingError, match="activation_func is unknown"):
        identified({**config, "activation_func": {"_target_": "os.system"}})


@pytest.mark.parametrize(
    ("name", "kind", "formats"),
    [
        ("recurrent-gemma", "nemo2", "nemo"), ("recurrent-gemma", "megatron-args", "nemo"), ("mpt", "nemo2", "nemo"),
        ("mpt", "megatron-args", "nemo"), ("baichuan2-alibi", "nemo2", "nemo"),
        ("vit", "nemo1", "megatron-core or megatron-lm"), ("vit", "nemo2", "megatron-core or megatron-lm"),
        ("qwen2_moe", "nemo2", "nemo, megatron-core or megatron-lm"),
        ("deepseek_v3", "nemo1", "nemo2, megatron-core or megatron-lm"),
        ("falcon-7b", "nemo2", "nemo, megatron-core or megatron-lm"),
    ],
)  # fmt: skip
def test_the_remedy_names_frameworks_that_have_such_models(name: str, kind: str, formats: str) -> None:
    model = samples()[name].open()[1]
    with pytest.raises(MappingError, match=rf"; convert to {formats}$"):
        models.render_config(model, kind)
    kinds = {"nemo": "nemo1", "nemo2": "nemo2", "megatron-core": "megatron-args", "megatron-lm": "megatron-args"}
    for other in formats.replace(" or ", ", ").split(", "):
        assert models.render_config(model, kinds[other])


@pytest.mark.parametrize("name", ["gemma2", "gpt_oss"])
def test_a_window_that_no_layer_has_is_still_a_number(name: str) -> None:
    """transformers builds its mask for every model of such a class, and fails on null."""
    model = open_case(name).model
    none = replace(model, config=replace(model.config, window_size=None, window_attn_skip_freq=None))
    rendered = models.render_config(none, "hf")
    assert rendered["sliding_window"] > 0 and set(rendered["layer_types"]) == {"full_attention"}
    assert model_of(rendered).config.window_size is None


def test_layers_that_nvidias_classes_give_the_window_to_are_told() -> None:
    for kind in ("nemo1", "nemo2", "megatron-args"):
        notes: list[str] = []
        models.render_config(open_case("gemma2").model, kind, notes=notes)
        assert any("the second, fourth" in note for note in notes), kind


def test_the_off_by_one_of_nemo_is_told() -> None:
    model = model_of({"_target_": f"{NEMO2_BASE}.mistral.MistralConfig7B", "vocab_size": 32000})
    notes: list[str] = []
    assert models.render_config(model, "hf", notes=notes)["sliding_window"] == 4097
    assert any("set sliding_window to 4096" in note for note in notes)


def test_megatron_arguments() -> None:
    arguments = {
        "num_layers": 2, "hidden_size": 64, "num_attention_heads": 4, "ffn_hidden_size": 80, "swiglu": True,
        "normalization": "RMSNorm", "position_embedding_type": "rope", "add_bias_linear": False, "norm_epsilon": 1e-6,
        "num_query_groups": 1, "group_query_attention": False, "untie_embeddings_and_output_weights": True,
        "params_dtype": "torch.bfloat16", "use_rope_scaling": True, "rope_scaling_factor": 32.0,
    }  # fmt: skip
    config = model_of(arguments).config
    assert (config.num_query_groups, config.kv_channels, config.dtype) == (4, 16, "bfloat16")
    assert config.rope_scaling is not None
    assert config.rope_scaling["factor"] == 32.0
    old = {key: value for key, value in arguments.items() if key != "add_bias_linear"}
    assert model_of({**old, "disable_bias_linear": True}).config == config
    assert model_of({**arguments, "group_query_attention": True}).config.num_query_groups == 1
    assert identified({"num_layers": 2}, "megatron-args") is None, "a stub"
    assert identified({**arguments, "swiglu": False}) is None


@pytest.mark.parametrize("kind", ["nemo1", "nemo2", "megatron-args"])
@pytest.mark.parametrize("feature", ["num_moe_experts", "multi_latent_attention", "mtp_num_layers"])
def test_another_architecture_is_not_taken_for_llama(kind: str, feature: str) -> None:
    rendered = models.render_config(open_case("llama").model, kind)
    (rendered["config"] if kind == "nemo2" else rendered)[feature] = 8
    if kind == "nemo2":  # whose class says Llama
        with pytest.raises(MappingError, match=f"{feature} is not that of family llama .*found 8"):
            identified(rendered)
        return
    assert identified(rendered) is None
    with pytest.raises(MappingError, match=f"{feature} is not that of family llama .*found 8"):
        identified(rendered, family="llama")


def test_what_a_framework_cannot_say_is_an_error_or_a_note() -> None:
    model = open_case("llama31_ropescale").model
    yarn = {"rope_type": "yarn", "factor": 4.0}
    other = {**dict(model.config.rope_scaling or {}), "low_freq_factor": 2.0}
    for scaling, kinds in ((yarn, ("nemo1", "nemo2", "megatron-args")), (other, ("nemo1", "megatron-args"))):
        changed = replace(model, config=replace(model.config, rope_scaling=scaling))
        for kind in kinds:
            with pytest.raises(MappingError, match="cannot express this rope scaling"):
                models.render_config(changed, kind)
        assert models.render_config(changed, "hf")["rope_scaling"] == scaling
    notes: list[str] = []
    factor = replace(model.config, rope_scaling={**dict(model.config.rope_scaling or {}), "factor": 32.0})
    models.render_config(replace(model, config=factor), "nemo1", notes=notes)
    assert any("scales rope by 8" in note for note in notes)
    windowed = replace(model, config=replace(model.config, window_size=(5, 0)))
    with pytest.raises(MappingError, match="LlamaForCausalLM has no such attention window"):
        models.render_config(windowed, "hf")
    notes = []
    special = model_of({**open_case("llama").checkpoint.config, "layer_drop": 0.5})
    models.render_config(special, "nemo2", notes=notes)
    assert any("layer_drop" in note for note in notes)
    assert models.render_config(special, "hf")["layer_drop"] == 0.5
    padded = replace(open_case("llama").model.config, padded_vocab_size=192)
    models.render_config(replace(model, config=padded), "nemo2", notes=notes)
    assert any("true vocabulary of 151" in note for note in notes)
    unknown = replace(model, config=replace(model.config, vocab_size=None))
    with pytest.raises(MappingError, match="vocabulary size is unknown"):
        models.render_config(unknown, "hf")
    with pytest.raises(UsageError, match="unknown kind"):
        models.render_config(model, "toml")


HF = {"model_type": "llama", "num_hidden_layers": 2, "hidden_size": 64, "num_attention_heads": 4}


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"hidden_size": "64"}, "hidden_size is of the wrong type"),
        ({"hidden_size": True}, "hidden_size is of the wrong type"),
        ({"hidden_size": 1 << 70}, "hidden_size is of the wrong type"),
        ({"hidden_size": -64}, "hidden_size is not possible"),
        ({"num_attention_heads": 0}, "num_attention_heads is not possible"),
        ({"num_hidden_layers": 10**9}, "too many layers"),
        ({"num_key_value_heads": 3}, "do not divide into its query groups"),
        ({"vocab_size": 0}, "vocab_size is not possible"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps is of the wrong type"),
        ({"rms_norm_eps": float("inf")}, "rms_norm_eps is of the wrong type"),
        ({"rms_norm_eps": "tiny"}, "rms_norm_eps is of the wrong type"),
        ({"tie_word_embeddings": 1}, "tie_word_embeddings is of the wrong type"),
        ({"eos_token_id": ["a"]}, "eos_token_id is of the wrong type"),
        ({"hidden_act": "gelu"}, "hidden_act is not that of family llama"),
        ({"hidden_act": 3}, "hidden_act is of the wrong type"),
        ({"rope_scaling": "linear"}, "rope_scaling is of the wrong type"),
        ({"rope_scaling": {"type": 4}}, "rope type is not text"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1.0}}}, "rope parameters per kind of layer"),
        ({"attention_bias": True}, "biases that Megatron-Core has no layers for"),
        ({"quantization_config": {"quant_method": "awq"}}, "the model is quantized.*found awq"),
        ({"model_type": "mistral", "sliding_window": 0}, "sliding_window is not possible"),
        ({"rope_theta": -1.0}, "rotary_base is not possible"),
        ({"model_type": "gemma2", "query_pre_attn_scalar": 0}, "query_pre_attn_scalar is not possible"),
        ({"model_type": "gemma2", "query_pre_attn_scalar": -256}, "query_pre_attn_scalar is not possible"),
    ],
)
def test_impossible_configurations(change: dict[str, Any], problem: str) -> None:
    with pytest.raises(MappingError, match=problem):
        identified({**HF, **change})


@pytest.mark.parametrize("factor", [0, -8.0, 10**400, float("inf"), float("nan")])
@pytest.mark.parametrize("kind", ["linear", "llama3"])
def test_a_scaling_of_positions_by_no_factor_goes_nowhere(kind: str, factor: float) -> None:
    whole = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    model = identified({**HF, "vocab_size": 64, "rope_scaling": {"type": kind, "factor": factor, **whole}})
    assert model is not None
    with pytest.raises(MappingError, match="cannot express this rope scaling"):
        models.render_config(model, "nemo1")


PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@cache
def rendered_case(name: str, kind: str) -> str:
    return json.dumps(models.render_config(open_case(name).model, kind))


@settings(deadline=None, max_examples=300)
@given(st.sampled_from(FAMILIES), st.sampled_from(KINDS), st.data())
def test_a_hostile_value_is_an_error_of_ours_or_nothing(name: str, kind: str, data: st.DataObject) -> None:
    config = json.loads(rendered_case(name, kind))
    inner = config["config"] if kind == "nemo2" else config
    inner[data.draw(st.sampled_from(sorted(inner)))] = data.draw(PLAIN)
    try:
        model = identified(config, kind)
        if model is not None:
            for other in KINDS:
                models.render_config(model, other)
    except AnyckptError as error:
        assert "\n" not in str(error)


def test_identify_without_or_against_a_configuration() -> None:
    case = open_case("llama")
    bare = replace(case.checkpoint, config={}, config_kind=None)
    assert models.identify(bare) is None
    with pytest.raises(MappingError, match="has no configuration"):
        models.identify(bare, family="llama")
    model = models.identify(bare, config=case.checkpoint.config)
    assert model == case.model
    with pytest.raises(UsageError, match="unknown model family 'lama' .*llama, .*mistral"):
        models.identify(bare, family="lama", config=case.checkpoint.config)
    with pytest.raises(UsageError, match="of no known kind"):
        models.identify(bare, config={"a": 1})
    assert models.identify(replace(bare, config={"model_type": "rwkv"}, config_kind="hf")) is None
    chosen = models.identify(case.checkpoint, family="mistral")
    assert chosen is not None
    assert (chosen.family, chosen.config.window_size) == ("mistral", (4095, 0))
