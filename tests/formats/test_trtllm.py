"""TensorRT-LLM checkpoints and .qnemo: ModelOpt's files read, divided anew byte for byte, dequantized, and refused."""

from __future__ import annotations

import json
import shutil
import tarfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.models.cases import facts, open_case
from tests.support import expected_of, fixture_path, sha256_of, write_plan

import anyckpt
from anyckpt.config import trtllm as config_trtllm
from anyckpt.containers.safetensors import read_safetensors, safetensors_parts
from anyckpt.engine.plan import OutputFile, Plan
from anyckpt.errors import AnyckptError, FormatError, MappingError, UsageError
from anyckpt.formats.trtllm.division import Division, Heads, cut, join
from anyckpt.models.families import each_family
from anyckpt.operations.archive import edit, pack, unpack
from anyckpt.quantization.quantizing import quantized
from anyckpt.storage import LocalFile
from anyckpt.tensor import LazyTensor, concatenate, from_array

CASES = {
    "fp8_a": "src_llama_a",
    "fp8_kv8_bf16_b": "src_llama_b",
    "fp8_moe_c": "src_mixtral_c",
    "int4_awq_a": "src_llama_a",
    "int8_sq05_b": "src_llama_b",
    "int8_sq_a": "src_llama_a",
    "nvfp4_b": "src_llama_b",
    "w4a8_awq_b": "src_llama_b",
}
"""Case -> what it was quantized from."""

FURTHEST = {"int4_awq_a": 0.14, "w4a8_awq_b": 0.24, "nvfp4_b": 0.1}
"""The largest relative error of a weight, which 4-bit numbers have; of 8-bit ones it is below 0.035."""

FAMILIES = ("llama", "llama_tied_bf16", "qwen2", "qwen3", "gpt2", "starcoder2")
"""Whose weights come back as they were."""
CENTRED = ("gemma", "gemma2", "nemotron")
"""Whose norms are computed."""


def exported(case: str) -> dict[str, Any]:
    """What ModelOpt wrote: variant -> files."""
    variants = json.loads((fixture_path(f"quant/{case}") / "expected.json").read_text())["variants"]
    return {name: variant["files"] for name, variant in variants.items() if name.startswith("trtllm")}


def layout_of(variant: str) -> anyckpt.LayoutRequest:
    tensor, pipeline = variant.removeprefix("trtllm_tp").split("pp")
    return anyckpt.LayoutRequest(tensor_parallel=int(tensor), pipeline_parallel=int(pipeline))


def rank_tensors(path: Path) -> dict[str, LazyTensor]:
    return read_safetensors(LocalFile(path))[0]


def comparable(config: Mapping[str, Any]) -> dict[str, Any]:
    """ModelOpt makes the list of a set, whose order differs from run to run; the producer is who wrote it."""
    plain = {key: value for key, value in config.items() if key != "producer"}
    if isinstance(plain.get("quantization"), dict) and "exclude_modules" in plain["quantization"]:
        modules = sorted(plain["quantization"]["exclude_modules"])
        plain["quantization"] = {**plain["quantization"], "exclude_modules": modules}
    return plain


def assert_as_exported(folder: Path, files: Mapping[str, Any]) -> None:
    """Every tensor of every rank byte for byte, and the configuration in its order."""
    assert sorted(path.name for path in folder.iterdir() if path.name[0] != ".") == sorted(files)
    for name, expected in files.items():
        if name.endswith(".json"):
            written = json.loads((folder / name).read_text())
            assert comparable(written) == comparable(expected)
            assert list(written) == list(expected)
            continue
        found = {
            key: {"shape": list(tensor.shape), "dtype": tensor.dtype.name, "sha256": sha256_of(tensor)}
            for key, tensor in rank_tensors(folder / name).items()
        }
        assert found == {
            key: {fact: value[fact] for fact in ("shape", "dtype", "sha256")}
            for key, value in expected["tensors"].items()
        }


@pytest.mark.parametrize("case", CASES)
def test_files_of_modelopt_are_divided_anew_byte_for_byte(tmp_path: Path, case: str) -> None:
    variants = exported(case)
    kept = [name for name in variants if (fixture_path(f"quant/{case}") / name).is_dir()]
    assert kept
    for source in kept:
        path = fixture_path(f"quant/{case}/{source}")
        for target, files in variants.items():
            output = tmp_path / f"{source}-{target}"
            anyckpt.convert(path, output, to="trtllm", layout=layout_of(target))
            assert_as_exported(output, files)
        same = tmp_path / f"{source}-{source}"
        for file in path.iterdir():
            assert (same / file.name).read_bytes() == file.read_bytes()


@pytest.mark.parametrize("variant", ["trtllm_tp1pp1", "trtllm_tp2pp1"])
def test_an_unquantized_model_is_exported_as_modelopt_does(tmp_path: Path, variant: str) -> None:
    source = fixture_path("quant/src_llama_b/hf")  # with one key head, which two ranks have
    anyckpt.convert(source, tmp_path / "out", to="trtllm", dtype="fp16", layout=layout_of(variant))
    assert_as_exported(tmp_path / "out", exported("null_b")[variant])


@pytest.mark.parametrize("case", CASES)
def test_weights_come_back_near_their_source(tmp_path: Path, case: str) -> None:
    source = anyckpt.open(fixture_path(f"quant/{CASES[case]}/hf"))
    path = fixture_path(f"quant/{case}/trtllm_tp1pp1")
    done = anyckpt.convert(path, tmp_path / "hf", to="hf", dtype="fp32")
    assert any("weights were quantized" in note for note in done.notes)
    found = anyckpt.open(tmp_path / "hf")
    assert found.keys() == source.keys()
    for name, tensor in source.items():
        one = tensor.numpy().astype(np.float64)
        other = found[name].numpy().astype(np.float64)[: one.shape[0]]  # the vocabulary of AWQ is padded to 128
        assert np.sqrt(((one - other) ** 2).mean() / (one**2).mean()) < FURTHEST.get(case, 0.035), name
    assert anyckpt.verify(path).sound
    assert anyckpt.verify(path).checked.model


@pytest.mark.parametrize("case", ["int8_sq05_b", "fp8_kv8_bf16_b"])
def test_more_ranks_than_key_heads(tmp_path: Path, case: str) -> None:
    """Neighbours have copies of the one key head, and of its scales by row, which ModelOpt does not divide."""
    source = fixture_path(f"quant/{case}/trtllm_tp1pp1")
    anyckpt.convert(source, tmp_path / "four", to="trtllm", layout=anyckpt.LayoutRequest(tensor_parallel=4))
    scale = "transformer.layers.0.attention.qkv.weights_scaling_factor"
    whole = rank_tensors(source / "rank0.safetensors")[scale].numpy()
    for rank in range(4):
        own = rank_tensors(tmp_path / "four" / f"rank{rank}.safetensors")[scale].numpy()
        query = whole[rank * 32 : (rank + 1) * 32]
        assert np.array_equal(own, np.concatenate([query, whole[128:]]) if whole.size > 1 else whole)
    anyckpt.convert(tmp_path / "four", tmp_path / "one", to="trtllm")
    assert facts(anyckpt.open(tmp_path / "one").tensors) == facts(anyckpt.open(source).tensors)


def test_ranks_say_the_same_as_one(tmp_path: Path) -> None:
    case = fixture_path("quant/int4_awq_a")
    for variant in ("trtllm_tp1pp1", "trtllm_tp2pp2"):
        anyckpt.convert(case / variant, tmp_path / variant, to="hf", dtype="bf16")
    one, other = (anyckpt.open(tmp_path / variant) for variant in ("trtllm_tp1pp1", "trtllm_tp2pp2"))
    assert facts(one.tensors) == facts(other.tensors)
    compared = anyckpt.diff(case / "trtllm_tp2pp2", case / "trtllm_tp1pp1")
    assert compared.equal


def test_the_vocabulary_of_awq_is_that_of_the_model_again(tmp_path: Path) -> None:
    case = fixture_path("quant/int4_awq_a/trtllm_tp1pp1")  # 80 tokens, padded to 128
    found, source = anyckpt.open(case), fixture_path("quant/src_llama_a/hf")
    assert (found.config["vocab_size"], found["lm_head.weight"].shape[0]) == (80, 128)
    assert anyckpt.diff(case, source, atol=0.1).equal
    assert not anyckpt.diff(case, source, atol=0.001).equal
    anyckpt.convert(case, tmp_path / "hf", to="hf", dtype="bf16")
    assert anyckpt.open(tmp_path / "hf").config["vocab_size"] == 80


def test_archives_are_unpacked_edited_and_packed(tmp_path: Path) -> None:
    archive = fixture_path("quant/qnemo_b/llama-tiny-int4_awq_gz.qnemo")
    unpack(archive, tmp_path / "files")
    assert sorted(path.name for path in (tmp_path / "files").glob("[!.]*")) == [
        "config.json",
        "rank0.safetensors",
        "tokenizer.model",
        "tokenizer_config.yaml",
    ]
    pack(tmp_path / "files", tmp_path / "packed.qnemo")
    assert anyckpt.diff(archive, tmp_path / "packed.qnemo").equal
    model = tmp_path / "other.model"
    model.write_bytes(b"another")
    changes = {"max_position_embeddings": 32}
    edit(tmp_path / "packed.qnemo", set=changes, replace={"tokenizer.model": model}, output=tmp_path / "new.qnemo")
    before, after = anyckpt.open(archive), anyckpt.open(tmp_path / "new.qnemo")
    assert after.config == {**before.config, **changes}
    assert after.tokenizer is not None
    assert after.tokenizer.files["tokenizer.model"].read_all(100) == b"another"
    assert facts(after.tensors) == facts(before.tensors)
    with pytest.raises(UsageError, match="no artifact is called 'rank0"):
        edit(archive, replace={"rank0.safetensors": model}, output=tmp_path / "never")
    (tmp_path / "files" / "rank0.safetensors").unlink()
    with pytest.raises(FormatError, match=r"has no model_config\.yaml"):
        pack(tmp_path / "files", tmp_path / "never")


def test_archives_are_read_as_folders_are(tmp_path: Path) -> None:
    plain, gzip = (fixture_path(f"quant/qnemo_b/llama-tiny-int4_awq{end}.qnemo") for end in ("", "_gz"))
    one, other = anyckpt.open(plain), anyckpt.open(gzip)
    assert (one.format, one.details["container"], other.details["container"]) == ("trtllm", "tar", "gzip tar")
    assert facts(one.tensors) == facts(other.tensors)
    assert one.tokenizer is not None
    assert (one.tokenizer.library, one.tokenizer.model_file) == ("sentencepiece", "tokenizer.model")
    anonymous = tmp_path / "checkpoint.tgz"
    shutil.copy(gzip, anonymous)
    assert anyckpt.open(anonymous).format == "trtllm"

    anyckpt.convert(gzip, tmp_path / "again.qnemo", to="trtllm", compress=True)
    with tarfile.open(plain) as expected, tarfile.open(tmp_path / "again.qnemo") as written:
        assert written.getnames() == expected.getnames()
        for member in expected.getmembers():
            if member.isfile():
                found, stored = written.extractfile(member.name), expected.extractfile(member)
                assert found is not None
                assert stored is not None
                assert found.read() == stored.read(), member.name


@pytest.mark.parametrize("case", FAMILIES)
@pytest.mark.parametrize("sizes", [(1, 1), (2, 1), (1, 2), (4, 1)])
def test_families_come_back_as_they_were(tmp_path: Path, case: str, sizes: tuple[int, int]) -> None:
    source = open_case(case).checkpoint
    layout = anyckpt.LayoutRequest(tensor_parallel=sizes[0], pipeline_parallel=sizes[1])
    anyckpt.convert(source.path, tmp_path / "out", to="trtllm", layout=layout)
    assert anyckpt.verify(tmp_path / "out").sound
    anyckpt.convert(tmp_path / "out", tmp_path / "hf", to="hf")
    found = facts(anyckpt.open(tmp_path / "hf").tensors)
    for tied in found.keys() - facts(source.tensors).keys():  # TensorRT-LLM's classes have one of their own
        assert tied == "lm_head.weight"
        del found[tied]
    assert found == facts(source.tensors)


@pytest.mark.parametrize("case", ["mixtral", "qwen2_moe", "qwen3_moe"])
@pytest.mark.parametrize("sizes", [(1, 1), (2, 2)])
def test_experts_come_back_as_they_were(tmp_path: Path, case: str, sizes: tuple[int, int]) -> None:
    source = open_case(case).checkpoint
    layout = anyckpt.LayoutRequest(tensor_parallel=sizes[0], pipeline_parallel=sizes[1])
    anyckpt.convert(source.path, tmp_path / "out", to="trtllm", layout=layout)
    assert anyckpt.verify(tmp_path / "out").sound
    anyckpt.convert(tmp_path / "out", tmp_path / "hf", to="hf", dtype="bf16")
    back = anyckpt.open(tmp_path / "hf")
    assert facts(back.tensors) == facts(source.tensors)
    keys = ("intermediate_size", "moe_intermediate_size", "norm_topk_prob", "num_experts_per_tok")
    for key in (*keys, "shared_expert_intermediate_size"):
        assert back.config.get(key) == source.config.get(key), key


@pytest.mark.parametrize(
    ("case", "sums_to_one", "mode"),
    [("qwen2_moe", False, 0), ("qwen2_moe", True, 1), ("qwen3_moe", False, 0), ("qwen3_moe", True, 1)],
)
def test_experts_of_qwen_have_tensorrt_llms_names(tmp_path: Path, case: str, sums_to_one: bool, mode: int) -> None:
    """Those of its ``SharedMoE``, whose first layer is ``[up; gate]`` in one tensor."""
    source = open_case(case).checkpoint
    config = {**source.config, "norm_topk_prob": sums_to_one}
    layout = anyckpt.LayoutRequest(tensor_parallel=2)
    anyckpt.convert(source.path, tmp_path / "out", to="trtllm", config=config, layout=layout)
    first, stem = rank_tensors(tmp_path / "out" / "rank0.safetensors"), "transformer.layers.0.mlp"
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written["moe"] == {"num_experts": 4, "top_k": 2, "normalization_mode": mode}
    assert (written["qwen_type"], written["hidden_act"]) == (case, "swiglu")
    assert first[f"{stem}.router.weight"].dtype.name == "float32"
    shared = {name.removeprefix(f"{stem}.") for name in first if name.startswith(f"{stem}.shared")}
    if case == "qwen3_moe":
        assert not shared
        return
    assert shared == {"shared_expert.fc.weight", "shared_expert.proj.weight", "shared_expert_gate.weight"}
    own = "model.layers.0.mlp.shared_expert"
    up, gate = (source[f"{own}.{name}_proj.weight"].cast("float32").numpy() for name in ("up", "gate"))
    half = up.shape[0] // 2
    found = first[f"{stem}.shared_expert.fc.weight"].cast("float32").numpy()
    assert np.array_equal(found, np.concatenate([up[:half], gate[:half]]))


def test_layers_without_experts_beside_others_are_refused(tmp_path: Path) -> None:
    source = open_case("deepseek_v3").checkpoint
    with pytest.raises(MappingError, match="how TensorRT-LLM names models of family deepseek-v3"):
        anyckpt.convert(source.path, tmp_path / "out", to="trtllm")
    config = {**open_case("qwen3_moe").checkpoint.config, "mlp_only_layers": [1]}
    tensors = {name: tensor for name, tensor in open_case("qwen3_moe").checkpoint.items() if "layers.1.mlp" not in name}
    for name, shape in (("gate", (80, 48)), ("up", (80, 48)), ("down", (48, 80))):
        tensors[f"model.layers.1.mlp.{name}_proj.weight"] = from_array(np.ones(shape, np.float32)).cast("bfloat16")
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    write_plan(Plan("", (OutputFile("model.safetensors", safetensors_parts(tensors)),)), folder)
    with pytest.raises(MappingError, match="none in 1 of 2, layer 1 among them"):
        anyckpt.convert(folder, tmp_path / "out", to="trtllm")


@pytest.mark.parametrize("ranks", [1, 2])
def test_experts_in_four_bit_floats_have_a_scale_each(tmp_path: Path, ranks: int) -> None:
    """As ModelOpt 0.40 stacks what it makes of each expert; of ``[up; gate]`` there is one scale of the whole."""
    source = open_case("mixtral").checkpoint
    layout = anyckpt.LayoutRequest(tensor_parallel=ranks)
    options: dict[str, Any] = {"quantize": "nvfp4", "layout": layout, "activation_scale": 0.5}
    if ranks > 1:  # 48 columns are 3 blocks
        options["quantize_exclude"] = "*.mlp.proj"
    done = anyckpt.convert(source.path, tmp_path / "out", to="trtllm", **options)
    assert any("fails on those of" in note for note in done.notes)
    stem = "transformer.layers.0.mlp.fc"
    found = anyckpt.open(tmp_path / "out").weights()
    alone = "model.layers.0.block_sparse_moe.experts.2"
    pair = concatenate([source[f"{alone}.w3.weight"], source[f"{alone}.w1.weight"]], 0)
    expected = quantized(pair, "nvfp4")
    assert found[f"{stem}.weights_scaling_factor_2"].shape == (4,)
    assert found[f"{stem}.activation_scaling_factor"].shape == (1,)
    for role, name in (
        ("weight", "weight"),
        ("scale", "weights_scaling_factor"),
        ("scale_2", "weights_scaling_factor_2"),
    ):
        one = found[f"{stem}.{name}"][2]
        assert one.numpy().tobytes() == expected[role].numpy().tobytes(), role
    assert anyckpt.verify(tmp_path / "out").sound
    anyckpt.convert(tmp_path / "out", tmp_path / "hf", to="hf", dtype="bf16")
    back = anyckpt.open(tmp_path / "hf")
    for name in (f"{alone}.w1.weight", f"{alone}.w2.weight"):
        one, other = (tensors[name].cast("float32").numpy() for tensors in (source, back))
        assert np.linalg.norm(one - other) < 0.12 * np.linalg.norm(one)


@pytest.mark.parametrize("case", CENTRED)
def test_norms_are_stored_as_gamma(tmp_path: Path, case: str) -> None:
    source = open_case(case).checkpoint
    anyckpt.convert(source.path, tmp_path / "out", to="trtllm", dtype="fp32")
    out = anyckpt.open(tmp_path / "out")
    gamma = out["transformer.layers.0.input_layernorm.weight"].numpy()
    stored = source["model.layers.0.input_layernorm.weight"].cast("float32").numpy()
    assert np.array_equal(gamma, stored + np.float32(1))
    assert ("lm_head.weight" in out) == (not out.config["share_embedding_table"])
    anyckpt.convert(tmp_path / "out", tmp_path / "hf", to="hf")
    found = anyckpt.open(tmp_path / "hf")
    for name, tensor in source.items():
        one, other = tensor.cast("float32").numpy(), found[name].cast("float32").numpy()
        assert np.allclose(one, other, atol=1e-7) if "norm" in name else np.array_equal(one, other), name
    anyckpt.convert(tmp_path / "out", tmp_path / "own", to="hf", config=source.config, dtype="fp32")
    own = anyckpt.open(tmp_path / "own")
    assert facts(own.tensors) == facts(found.tensors)
    assert "layernorm_zero_centered_gamma" not in own.config


def test_experts_are_stacked_with_the_gate_last_and_the_router_wide(tmp_path: Path) -> None:
    source = open_case("mixtral").checkpoint
    layout = anyckpt.LayoutRequest(tensor_parallel=2)
    anyckpt.convert(source.path, tmp_path / "out", to="trtllm", dtype="fp16", layout=layout)
    first = rank_tensors(tmp_path / "out" / "rank0.safetensors")
    experts = "model.layers.0.block_sparse_moe.experts"
    up, gate = (source[f"{experts}.1.{name}.weight"].cast("float16").numpy() for name in ("w3", "w1"))
    half = up.shape[0] // 2
    expected = np.concatenate([up[:half], gate[:half]])
    assert np.array_equal(first["transformer.layers.0.mlp.fc.weight"][1].numpy(), expected)
    assert first["transformer.layers.0.mlp.router.weight"].dtype.name == "float32"
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["mapping"] == {"world_size": 2, "tp_size": 2, "pp_size": 1, "moe_tp_size": 2, "moe_ep_size": 1}


@given(st.data())
def test_cutting_heads_and_joining_them_are_inverse(data: st.DataObject) -> None:
    keys = data.draw(st.sampled_from([1, 2, 3, 4, 6]))
    queries = keys * data.draw(st.integers(1, 4))
    ranks = data.draw(st.integers(1, 8))
    rows, columns = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 2))
    heads = Heads(queries, keys, ranks)
    whole = np.arange((queries + 2 * keys) * rows * columns, dtype=np.int32).reshape(-1, columns)
    how = Division(0, "qkv")
    fits = queries % ranks == 0 and (keys % ranks == 0 or ranks % keys == 0)
    try:
        parts = [cut(from_array(whole), how, rank, heads) for rank in range(ranks)]
    except AnyckptError:
        assert not fits
        return
    assert fits or ranks == 1
    assert np.array_equal(join(parts, how, heads).numpy(), whole)


def test_rows_of_the_vocabulary_are_padded_for_ranks_and_come_back(tmp_path: Path) -> None:
    source = open_case("llama").checkpoint  # 151 tokens
    assert source["lm_head.weight"].shape[0] % 2
    layout = anyckpt.LayoutRequest(tensor_parallel=2)
    anyckpt.convert(source.path, tmp_path / "out", to="trtllm", layout=layout)
    last = rank_tensors(tmp_path / "out" / "rank1.safetensors")["lm_head.weight"].numpy()
    assert not last[-1].any()
    assert anyckpt.open(tmp_path / "out")["lm_head.weight"].shape == source["lm_head.weight"].shape


def test_a_configuration_of_tensorrt_llms_own_converters(tmp_path: Path) -> None:
    """These say less, keep the embedding whole on every rank, and name themselves otherwise."""
    source = open_case("llama").checkpoint
    layout = anyckpt.LayoutRequest(tensor_parallel=2)
    anyckpt.convert(source.path, tmp_path / "ours", to="trtllm", layout=layout)
    stated = json.loads((tmp_path / "ours" / "config.json").read_text())
    kept = (
        "architecture dtype hidden_size num_hidden_layers num_attention_heads num_key_value_heads intermediate_size "
        "vocab_size norm_epsilon hidden_act position_embedding_type rotary_base max_position_embeddings"
    ).split()
    config = {"version": "0.17.0", "mapping": {"world_size": 2, "tp_size": 2, "moe_tp_size": -1, "moe_ep_size": -1}}
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    (theirs / "config.json").write_text(json.dumps({**config, **{key: stated[key] for key in kept}}))
    embedding = source["model.embed_tokens.weight"]
    for rank in range(2):
        tensors = rank_tensors(tmp_path / "ours" / f"rank{rank}.safetensors")
        tensors["transformer.vocab_embedding.weight"] = embedding
        parts = safetensors_parts(tensors)
        write_plan(Plan("x", (OutputFile(f"rank{rank}.safetensors", parts),)), theirs)
    found = anyckpt.open(theirs)
    assert (found.format_version, found.layout.tensor_parallel) == ("TensorRT-LLM 0.17.0", 2)
    anyckpt.convert(theirs, tmp_path / "hf", to="hf")
    assert facts(anyckpt.open(tmp_path / "hf").tensors) == facts(source.tensors)


ROTARY = {"position_embedding_type": "rope_gpt_neox"}


@pytest.mark.parametrize(
    ("config", "family"),
    [
        ({"architecture": "GPTForCausalLM", "hidden_act": "squared-relu"}, "nemotron"),
        (
            {"architecture": "GPTForCausalLM", "hidden_act": "swiglu", "position_embedding_type": "rope_gpt_neox"},
            "llama",
        ),
        (
            {"architecture": "GPTForCausalLM", "hidden_act": "gelu", "position_embedding_type": "rope_gpt_neox"},
            "starcoder2",
        ),
        ({"architecture": "GPTForCausalLM", "hidden_act": "gelu"}, "gpt2"),
        ({"architecture": "QWenForCausalLM", "qwen_type": "qwen3"}, "qwen3"),
        ({"architecture": "QWenForCausalLM", "qwen_type": "qwen2"}, "qwen2"),
        ({"architecture": "Gemma2ForCausalLM"}, "gemma2"),
        ({"architecture": "PhiForCausalLM"}, None),
    ],
)
def test_the_class_tells_the_family(config: dict[str, Any], family: str | None) -> None:
    assert next((known.name for known in each_family() if config_trtllm.is_of(known, config)), None) == family


TOKENIZERS: dict[str, dict[str, bytes]] = {
    "nemo 1, sentencepiece": {
        "tokenizer_config.yaml": b"library: sentencepiece\ntype: null\nmodel: tokenizer.model\n",
        "tokenizer.model": b"\x0a\x01",
    },
    "nemo 1, hugging face": {
        "tokenizer_config.yaml": b"library: huggingface\ntype: meta-llama/Llama-2-7b\nuse_fast: true\n",
        "tokenizer.json": b"{}",
        "tokenizer_config.json": b"{}",
    },
    "nemo 2": {"nemo_context/nemo_tokenizer/tokenizer.json": b"{}", "nemo_context/io.json": b"{}"},
    "nemo 2, hugging face": {"huggingface_tokenizer/tokenizer.json": b"{}"},
    "hugging face": {"tokenizer.json": b"{}"},
}


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_tokenizers_as_nemo_writes_them(tmp_path: Path, kind: str) -> None:
    folder = tmp_path / "folder"
    shutil.copytree(fixture_path("quant/fp8_a/trtllm_tp1pp1"), folder)
    for name, data in TOKENIZERS[kind].items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    found = anyckpt.open(folder).tokenizer
    assert found is not None
    assert found.library == ("sentencepiece" if "sentencepiece" in kind else "huggingface")
    assert found.hub_name == ("meta-llama/Llama-2-7b" if kind == "nemo 1, hugging face" else None)
    wanted = {name.rpartition("/")[2] for name in TOKENIZERS[kind]} - {"tokenizer_config.yaml", "io.json"}
    assert set(found.files) == wanted
    anyckpt.convert(folder, tmp_path / "again", to="trtllm")
    again = anyckpt.open(tmp_path / "again").tokenizer
    assert again is not None
    assert (again.library, set(again.files), again.model_file) == (found.library, wanted, found.model_file)


STRANGE = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 10**9),
    st.floats(),
    st.text(max_size=3),
    st.lists(st.integers(), max_size=2),
)


@given(st.data())
def test_configurations_that_say_anything(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    """Whatever a value is, the file is read, or an error names it."""
    source = fixture_path("quant/int4_awq_a/trtllm_tp2pp2")
    config = json.loads((source / "config.json").read_text())
    part = data.draw(st.sampled_from([config, config["mapping"], config["quantization"]]))
    part[data.draw(st.sampled_from(sorted(part)))] = data.draw(STRANGE)
    folder = tmp_path_factory.mktemp("strange")
    for file in source.glob("*.safetensors"):
        (folder / file.name).symlink_to(file)
    (folder / "config.json").write_text(json.dumps(config))
    try:
        anyckpt.verify(folder)
        anyckpt.convert(folder, folder / "out", to="hf", dtype="bf16", dry_run=True)
        layout = anyckpt.LayoutRequest(tensor_parallel=data.draw(st.integers(1, 3)))
        anyckpt.convert(folder, folder / "out", to="trtllm", layout=layout, dry_run=True)
    except AnyckptError as error:
        assert str(error)


QUANTIZED = {
    "fp8_a": ("fp8", {}),
    "fp8_bf16_a": ("fp8", {}),
    "fp8_moe_c": ("fp8", {}),
    "fp8_pcpt_a": ("fp8_per_channel", {}),
    "int8_a": ("int8", {"activation_scale": 0.1}),
    "int4_rtn_a": ("int4", {"group_size": 32}),
    "nvfp4_b": ("nvfp4", {"activation_scale": 0.01}),
}
SOURCES = {"a": "src_llama_a", "b": "src_llama_b", "c": "src_mixtral_c"}


@pytest.mark.parametrize("case", QUANTIZED)
def test_weights_are_quantized_as_modelopt_does(tmp_path: Path, case: str) -> None:
    algorithm, options = QUANTIZED[case]
    dtype = {"float16": "fp16", "bfloat16": "bf16"}[expected_of(f"quant/{case}")["export_dtype"]]
    source = fixture_path(f"quant/{SOURCES[case[-1]]}/hf")
    for variant, files in exported(case).items():
        output, layout = tmp_path / variant, layout_of(variant)
        anyckpt.convert(source, output, to="trtllm", quantize=algorithm, dtype=dtype, layout=layout, **options)
        written = json.loads((output / "config.json").read_text())
        assert comparable(written) == comparable(files["config.json"])
        for name in files.keys() - {"config.json"}:
            found = rank_tensors(output / name)
            for key, facts_of in files[name]["tensors"].items():
                assert list(found[key].shape) == facts_of["shape"], key
                if not key.endswith("activation_scaling_factor"):  # which activations tell
                    assert sha256_of(found[key]) == facts_of["sha256"], key
            more = {key.rpartition(".")[2] for key in found.keys() - files[name]["tensors"].keys()}
            assert more <= {"prequant_scaling_factor"}  # ones, for which TensorRT-LLM's loader asks
        assert anyckpt.verify(output).sound
        assert not anyckpt.open(output).warnings


CARRIED = {
    ("int4", None): "W4A16_AWQ",
    ("fp8_per_channel", None): "FP8_PER_CHANNEL_PER_TOKEN",
    ("fp8_per_channel", "modelopt"): "FP8_PER_CHANNEL_PER_TOKEN",
}


@pytest.mark.parametrize(("algorithm", "form"), CARRIED)
@pytest.mark.parametrize("source", ["quant/src_llama_a/hf", "families/gemma/hf"])
def test_codes_of_other_software_are_kept(tmp_path: Path, algorithm: str, form: str | None, source: str) -> None:
    """Every weight is the same number, and no code is another."""
    folder, group = tmp_path / "hf", 8 if algorithm == "int4" else None
    original = fixture_path(source)
    anyckpt.convert(original, folder, to="hf", quantize=algorithm, quantize_form=form, group_size=group)
    layout = anyckpt.LayoutRequest(tensor_parallel=2)
    done = anyckpt.convert(folder, tmp_path / "out", to="trtllm", layout=layout)
    assert any(f"keep their codes and scales ({'compressed' if form is None else form}" in note for note in done.notes)
    assert set(done.ignored.values()) <= {"the shape of packed codes, which the weight has itself"}
    found = anyckpt.open(tmp_path / "out")
    assert found.quantization is not None
    assert found.quantization["quant_algo"] == CARRIED[algorithm, form]
    assert not found.warnings
    assert anyckpt.verify(tmp_path / "out").sound
    for name in ("hf", "out"):
        anyckpt.convert(tmp_path / name, tmp_path / f"{name}-numbers", to="hf", dtype="fp32")
    one, other = (anyckpt.open(tmp_path / f"{name}-numbers") for name in ("hf", "out"))
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        if "norm" in name:  # gamma of Gemma is rounded to bfloat16 with its 1
            assert np.allclose(tensor.numpy(), other[name].numpy(), atol=0.01)
        else:
            assert np.array_equal(tensor.numpy(), other[name].numpy()), name


def test_codes_that_tensorrt_llm_has_no_place_for(tmp_path: Path) -> None:
    anyckpt.convert(fixture_path("quant/src_llama_a/hf"), tmp_path / "hf", to="hf", quantize="fp8")
    with pytest.raises(UsageError, match="stored in no way that TensorRT-LLM has .*--dtype bf16, and --quantize"):
        anyckpt.convert(tmp_path / "hf", tmp_path / "out", to="trtllm")
    anyckpt.convert(tmp_path / "hf", tmp_path / "out", to="trtllm", dtype="bf16", quantize="fp8")
    mixture = fixture_path("families/mixtral/hf")
    anyckpt.convert(mixture, tmp_path / "experts", to="hf", quantize="fp8_per_channel")
    with pytest.raises(UsageError, match="experts are stored in no known way so"):
        anyckpt.convert(tmp_path / "experts", tmp_path / "out2", to="trtllm")


@pytest.mark.parametrize(("algorithm", "said"), [("int8_wo", "W8A16"), ("int4_wo", "W4A16")])
def test_weight_only_is_left_to_the_loader(tmp_path: Path, algorithm: str, said: str) -> None:
    source = fixture_path("quant/src_llama_b/hf")
    done = anyckpt.convert(source, tmp_path / "out", to="trtllm", dtype="fp16", quantize=algorithm)
    assert any("5 weights stay numbers" in note for note in done.notes)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["quantization"]["quant_algo"] == said
    anyckpt.convert(source, tmp_path / "plain", to="trtllm", dtype="fp16")
    names = ("out", "plain")
    one, other = (rank_tensors(tmp_path / name / "rank0.safetensors") for name in names)
    assert facts(one) == facts(other)
    assert anyckpt.verify(tmp_path / "out").sound
    assert not anyckpt.open(tmp_path / "out").warnings
    anyckpt.convert(tmp_path / "out", tmp_path / "hf", to="hf", dtype="bf16")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"quantize": "int8"}, "only activations tell; give it with --activation-scale"),
        ({"quantize": "mxfp4"}, r"trtllm does not hold mxfp4 \(expected fp8, .*nvfp4"),
        ({"quantize": "fp8", "quantize_form": "modelopt"}, "does not hold fp8 in the form modelopt"),
        ({"quantize": "int4", "group_size": 48}, "groups do not divide the rows"),
    ],
)
def test_what_cannot_be_quantized_so(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        anyckpt.convert(fixture_path("quant/src_llama_a/hf"), tmp_path / "out", to="trtllm", **options)


# -- what is wrong -------------------------------------------------------------------------------------------


def test_groups_that_ranks_would_have_a_part_of(tmp_path: Path) -> None:
    source, layout = fixture_path("quant/src_llama_a/hf"), anyckpt.LayoutRequest(tensor_parallel=4)
    options: dict[str, Any] = {"to": "trtllm", "quantize": "int4", "layout": layout}
    with pytest.raises(UsageError, match=r"attention\.dense\.weights_scaling_factor.*--group-size 32"):
        anyckpt.convert(source, tmp_path / "q", group_size=64, quantize_exclude="*mlp*", **options)
    anyckpt.convert(source, tmp_path / "q", group_size=32, quantize_exclude="*mlp*", **options)


def changed(tmp_path: Path, case: str, change: Callable[[dict[str, LazyTensor], dict[str, Any]], None]) -> Path:
    """A copy of a case of one rank, changed."""
    source, output = fixture_path(f"quant/{case}/trtllm_tp1pp1"), tmp_path / "changed"
    tensors = rank_tensors(source / "rank0.safetensors")
    config = json.loads((source / "config.json").read_text())
    change(tensors, config)
    output.mkdir()
    write_plan(Plan("x", (OutputFile("rank0.safetensors", safetensors_parts(tensors)),)), output)
    (output / "config.json").write_text(json.dumps(config))
    return output


QKV = "transformer.layers.0.attention.qkv"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t, c: t.pop(f"{QKV}.weights_scaling_factor"), r"without the scales of its algorithm \(expected .*qkv"),
        (
            lambda t, c: t.update({f"{QKV}.weights_scaling_factor": from_array(np.ones((3, 4), np.float32))}),
            r"scales do not fit the weight's codes .*found \(3, 4\)",
        ),
        (
            lambda t, c: t.update({f"{QKV}.prequant_scaling_factor": from_array(np.ones(7, np.float16))}),
            r"does not fit the weight's columns \(expected 128 floats, found float16 \(7,\)\)",
        ),
        (lambda t, c: t.pop(f"{QKV}.weight"), "is part of a quantized weight whose other parts are missing"),
        (lambda t, c: c["quantization"].update(quant_algo="W3A5_MAGIC"), r"TensorRT-LLM's FP8, .*NVFP4.*W3A5_MAGIC"),
        (lambda t, c: c["quantization"].update(group_size=64), r"scales do not fit .*one for each 64 of 128 columns"),
    ],
)
def test_parts_that_do_not_fit_are_told(
    tmp_path: Path, change: Callable[[dict[str, LazyTensor], dict[str, Any]], None], message: str
) -> None:
    path = changed(tmp_path, "int4_awq_a", change)
    with pytest.raises(MappingError, match=message):
        anyckpt.convert(path, tmp_path / "out", to="hf", dtype="fp32")
    checked = anyckpt.verify(path)
    assert not checked.sound or "not known" in checked.warnings[0]


def test_quantized_weights_are_not_taken_for_numbers(tmp_path: Path) -> None:
    with pytest.raises(MappingError, match="dequantize it with --dtype bf16"):
        anyckpt.convert(fixture_path("quant/fp8_a/trtllm_tp1pp1"), tmp_path / "out", to="hf")


def test_families_that_tensorrt_llm_names_in_no_known_way(tmp_path: Path) -> None:
    for case in ("phi3", "clip_vision"):
        with pytest.raises(MappingError, match="how TensorRT-LLM names models of family .* is not known"):
            anyckpt.convert(fixture_path(f"families/{case}/hf"), tmp_path / "out", to="trtllm")


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        (anyckpt.LayoutRequest(tensor_parallel=3), "its heads cannot be divided among 3 .*another --tp"),
        (anyckpt.LayoutRequest(pipeline_parallel=3), r"divides 2 layers, found 3\); choose another --pp"),
        (anyckpt.LayoutRequest(expert_parallel=2), "no parallel layout but a tensor-parallel and a pipeline-parallel"),
    ],
)
def test_layouts_that_are_impossible(tmp_path: Path, layout: anyckpt.LayoutRequest, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        anyckpt.convert(fixture_path("quant/src_llama_a/hf"), tmp_path / "out", to="trtllm", layout=layout)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda folder: (folder / "rank2.safetensors").unlink(), "1 of 4 ranks' files are missing: rank2.safetensors"),
        (lambda folder: shutil.copy(folder / "rank0.safetensors", folder / "rank4.safetensors"), "more ranks' files"),
        (lambda folder: shutil.copy(folder / "rank0.safetensors", folder / "rank3.safetensors"), "not in all of rank2"),
    ],
)
def test_ranks_that_are_no_whole(tmp_path: Path, change: Callable[[Path], object], message: str) -> None:
    shutil.copytree(fixture_path("quant/int4_awq_a/trtllm_tp2pp2"), tmp_path / "copy")
    change(tmp_path / "copy")
    with pytest.raises((FormatError, MappingError), match=message):
        anyckpt.open(tmp_path / "copy")


@pytest.mark.parametrize(
    ("name", "value", "problem"),
    [
        (f"{QKV}.weights_scaling_factor", np.nan, "1 of 1 are infinite or no numbers"),
        (f"{QKV}.weights_scaling_factor", -1.0, "1 of 1 are negative"),
        (f"{QKV}.activation_scaling_factor", 0.0, "1 of 1 are zero"),
    ],
)
def test_numbers_that_no_scale_has_are_damage(tmp_path: Path, name: str, value: float, problem: str) -> None:
    sound = anyckpt.verify(fixture_path("quant/fp8_a/trtllm_tp1pp1"))
    assert (sound.sound, sound.checked.scales) == (True, 20)
    path = changed(tmp_path, "fp8_a", lambda t, c: t.update({name: from_array(np.array([value], np.float32))}))
    found = anyckpt.verify(path)
    assert [(each.where, each.problem) for each in found.problems] == [
        (name, f"its scales are not possible: {problem}")
    ]


def test_eight_bit_weights_that_nothing_is_said_of_are_told(tmp_path: Path) -> None:
    source = open_case("llama").checkpoint
    name = "model.layers.0.mlp.down_proj.weight"
    tensors = {**dict(source.items()), name: source[name].cast("float8_e4m3fn")}
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(source.config))
    write_plan(Plan("", (OutputFile("model.safetensors", safetensors_parts(tensors)),)), folder)
    done = anyckpt.convert(folder, tmp_path / "out", to="trtllm")
    told = "1 weights are 8-bit numbers, transformer.layers.0.mlp.proj.weight among them"
    assert any(note.startswith(told) for note in done.notes)


def test_what_tensorrt_llm_does_not_load_is_told(tmp_path: Path) -> None:
    def as_weight_only(tensors: dict[str, LazyTensor], config: dict[str, Any]) -> None:
        for name in [
            name for name in tensors if name.endswith(("prequant_scaling_factor", "activation_scaling_factor"))
        ]:
            del tensors[name]
        config["quantization"]["quant_algo"] = "W8A16"

    path = changed(tmp_path, "int8_sq_a", as_weight_only)
    assert any("row by row and weights_scaling_factor" in text for text in anyckpt.open(path).warnings)
    done = anyckpt.convert(path, tmp_path / "out", to="trtllm")
    assert any("TensorRT-LLM cannot load these W8A16 weights" in note for note in done.notes)
    anyckpt.convert(path, tmp_path / "hf", to="hf", dtype="bf16")

    shutil.rmtree(path)

    def without_factors(tensors: dict[str, LazyTensor], config: dict[str, Any]) -> None:
        for name in [name for name in tensors if name.endswith("prequant_scaling_factor")]:
            del tensors[name]

    path = changed(tmp_path, "int4_awq_a", without_factors)
    assert any("which 10 of 10 quantized weights lack" in text for text in anyckpt.open(path).warnings)


@pytest.mark.parametrize(
    ("modules", "message"),
    [
        (["lm_head"], None),
        (
            ["lm_head", "transformer.layers.1.*"],
            "5 layers are quantized and among exclude_modules",
        ),
        (None, None),
    ],
)
def test_the_list_of_what_is_not_quantized_is_held_against_it(
    tmp_path: Path, modules: list[str] | None, message: str | None
) -> None:
    path = changed(tmp_path, "fp8_a", lambda t, c: c["quantization"].update(exclude_modules=modules))
    warnings = anyckpt.open(path).warnings
    assert warnings == [] if message is None else message in warnings[0]


def test_layers_in_full_precision_that_no_list_has(tmp_path: Path) -> None:
    source = fixture_path("quant/src_llama_a/hf")
    leave = "transformer.layers.0.mlp.*"
    anyckpt.convert(source, tmp_path / "out", to="trtllm", dtype="fp16", quantize="fp8", quantize_exclude=leave)
    assert anyckpt.verify(tmp_path / "out").sound
    assert not anyckpt.open(tmp_path / "out").warnings
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert len(config["quantization"]["exclude_modules"]) == 4
    config["quantization"]["exclude_modules"] = ["lm_head"]
    (tmp_path / "out" / "config.json").write_text(json.dumps(config))
    assert any("3 layers are in full precision" in text for text in anyckpt.open(tmp_path / "out").warnings)


def test_weights_in_the_order_of_kernels_are_not_taken_for_rows(tmp_path: Path) -> None:
    def permuted(tensors: dict[str, LazyTensor], config: dict[str, Any]) -> None:
        for name in [name for name in tensors if name.endswith("_scaling_factor")]:
            scale = tensors.pop(name)
            if name.endswith(".weights_scaling_factor"):
                tensors[name.replace("weights_scaling_factor", "per_channel_scale")] = scale
        config["quantization"]["quant_algo"] = "W8A16"

    path = changed(tmp_path, "int8_sq_a", permuted)
    with pytest.raises(MappingError, match="order in which a GPU's kernels read it"):
        anyckpt.convert(path, tmp_path / "hf", to="hf", dtype="bf16")


def test_copies_that_differ_are_told(tmp_path: Path) -> None:
    shutil.copytree(fixture_path("quant/int4_awq_a/trtllm_tp2pp2"), tmp_path / "copy")
    tensors = rank_tensors(fixture_path("quant/int4_awq_a/trtllm_tp2pp2/rank1.safetensors"))
    norm = "transformer.layers.0.input_layernorm.weight"
    tensors[norm] = from_array(tensors[norm].numpy() + np.float16(1))
    write_plan(Plan("x", (OutputFile("rank1.safetensors", safetensors_parts(tensors)),)), tmp_path / "copy")
    assert any("differs between ranks" in text for text in anyckpt.open(tmp_path / "copy").warnings)


def test_experts_over_ranks_are_refused(tmp_path: Path) -> None:
    path = changed(tmp_path, "fp8_moe_c", lambda t, c: c["mapping"].update(moe_ep_size=2))
    with pytest.raises(MappingError, match="its ranks divide experts"):
        anyckpt.open(path)


def test_compress_is_of_formats_with_archives(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--compress means nothing for hf"):
        anyckpt.convert(fixture_path("quant/src_llama_a/hf"), tmp_path / "out", to="hf", compress=True)


@pytest.mark.parametrize("target", ["trtllm", "nemo"])
def test_gzip_compresses_an_archive(target: str, tmp_path: Path) -> None:
    source = fixture_path("families/llama/hf")
    named = tmp_path / {"trtllm": "m.qnemo", "nemo": "m.nemo"}[target]
    plain = anyckpt.convert(source, tmp_path / "plain", to=target, compress=True if target == "trtllm" else None)
    done = anyckpt.convert(source, named, gzip=True, workers=8)
    anyckpt.convert(source, tmp_path / "one", to=target, gzip=True, workers=1)
    assert (tmp_path / "one").read_bytes() == named.read_bytes()
    assert done.bytes_written == named.stat().st_size < plain.bytes_written
    with tarfile.open(named, "r:gz") as found, tarfile.open(tmp_path / "plain", "r:") as expected:
        assert found.getnames() == expected.getnames()
        for one, other in zip(found.getmembers(), expected.getmembers(), strict=True):
            if one.isfile():
                read, stored = found.extractfile(one), expected.extractfile(other)
                assert read is not None
                assert stored is not None
                assert read.read() == stored.read()
    assert anyckpt.diff(named, tmp_path / "plain").equal
    result = anyckpt.verify(named)
    assert result.sound
    assert result.checked.digests == 1
    damaged = bytearray(named.read_bytes())
    damaged[-9] ^= 1
    named.write_bytes(damaged)
    assert not anyckpt.verify(named)


def test_gzip_is_refused_where_it_cannot_be(tmp_path: Path) -> None:
    source = fixture_path("families/llama/hf")
    for text, options in {
        "--gzip means nothing for hf": {"to": "hf"},
        "--no-compress asks for none": {"to": "trtllm", "compress": False},
        "--resume means nothing with --gzip": {"to": "trtllm", "resume": True},
        "--share means nothing with --gzip": {"to": "nemo", "share": "1/2"},
    }.items():
        with pytest.raises(UsageError, match=text):
            anyckpt.convert(source, tmp_path / "out", gzip=True, **options)  # type: ignore[arg-type]
    planned = anyckpt.convert(source, tmp_path / "out", to="trtllm", gzip=True, dry_run=True)
    assert any("before --gzip" in note for note in planned.notes)
    assert not list(tmp_path.iterdir())


def test_gzip_goes_with_quantizing_and_packing(tmp_path: Path) -> None:
    archive = tmp_path / "q.qnemo"
    settings = {"export": {"compress": False}, "quantization": {"algorithm": "fp8_per_channel"}}
    anyckpt.quantize(fixture_path("quant/src_llama_a/hf"), archive, config=settings, gzip=True)
    assert anyckpt.open(archive).details["container"] == "gzip tar"
    unpack(archive, tmp_path / "files")
    pack(tmp_path / "files", tmp_path / "again.qnemo", gzip=True)
    assert anyckpt.open(tmp_path / "again.qnemo").details["container"] == "gzip tar"
    assert anyckpt.diff(archive, tmp_path / "again.qnemo").equal
    anyckpt.convert(archive, tmp_path / "named.qnemo", compress=False)
    assert (tmp_path / "named.qnemo").is_dir()
