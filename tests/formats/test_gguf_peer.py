"""GGUF against llama.cpp's own package, transformers' loader, and the tokenizers' libraries."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.formats.test_gguf import byte_pairs, with_tokenizer
from tests.support import fixture_path

import anyckpt
from anyckpt.formats.gguf import blocks, general
from anyckpt.formats.gguf.architectures import ARCHITECTURES, OUTER
from anyckpt.formats.gguf.byte_pairs import _EXPRESSIONS
from anyckpt.formats.gguf.container import read_header
from anyckpt.formats.gguf.nodes import Decoded
from anyckpt.formats.gguf.types import TYPES
from anyckpt.storage import LocalFile
from anyckpt.tensor import from_array

pytestmark = pytest.mark.peer


def test_types_are_the_package_s() -> None:
    from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType, LlamaFileType

    for name, kind in TYPES.items():
        number = GGMLQuantizationType[name]
        assert number == kind.number
        assert GGML_QUANT_SIZES[number] == (kind.block, kind.nbytes)
        if kind.file_type is not None:
            assert LlamaFileType(kind.file_type).name in (f"MOSTLY_{name}", f"ALL_{name}")


@pytest.mark.parametrize("name", [name for name, kind in TYPES.items() if not kind.dtype])
def test_blocks_are_decoded_as_by_the_package(name: str) -> None:
    from gguf import quants
    from gguf.constants import GGMLQuantizationType

    kind = TYPES[name]
    rows = np.random.default_rng(5).integers(0, 256, (6, 3 * kind.nbytes), dtype=np.uint8)
    with np.errstate(all="ignore"):
        expected = quants.dequantize(rows, GGMLQuantizationType[name])
    found = np.asarray(Decoded(from_array(rows), kind))
    assert np.array_equal(found.view(np.uint32), expected.view(np.uint32))


@pytest.mark.parametrize("name", sorted(blocks.ENCODERS))
def test_blocks_are_encoded_as_by_the_package(name: str) -> None:
    from gguf import quants
    from gguf.constants import GGMLQuantizationType

    generator = np.random.default_rng(6)
    values = generator.standard_normal((2048, 32)).astype(np.float32) * generator.choice([1e-6, 1, 300], (2048, 1))
    values[0], values[1], values[2] = 0, 1, -3
    values[3] = generator.integers(-254, 255, 32) / 2  # halves, where roundings differ
    values = values.astype(np.float32)
    assert np.array_equal(blocks.encode(name, values), quants.quantize(values, GGMLQuantizationType[name]))


@pytest.mark.parametrize("known", ARCHITECTURES, ids=lambda known: known.model_type)
def test_names_are_the_package_s(known: Any) -> None:
    from gguf.constants import MODEL_ARCH, MODEL_ARCH_NAMES
    from gguf.tensor_mapping import get_tensor_name_map

    architecture = next(each for each in MODEL_ARCH if MODEL_ARCH_NAMES[each] == known.name)
    names = get_tensor_name_map(architecture, 1)
    for stored, own in OUTER.items():
        expected = None if known.tied and stored == "output.weight" else stored
        assert names.get_name(own, (".weight",)) == expected
    for stem, own in known.layer.items():
        assert names.get_name(f"model.layers.0.{own}", (".weight",)) == f"blk.0.{stem}"
    for stem, own in known.experts.items():
        one = own.replace(".{}", "").replace("{}.", "")
        if "block_sparse" not in own and not known.pairs_of_experts:
            assert names.get_name(f"model.layers.0.{one}", (".weight",)) == f"blk.0.{stem}"


@pytest.mark.parametrize("family", ["llama", "mixtral", "qwen2_moe", "gemma3", "gpt_oss"])
def test_the_package_reads_ours(family: str, tmp_path: Path) -> None:
    from gguf import GGUFReader, quants

    source = fixture_path(f"families/{family}/hf")
    anyckpt.convert(source, tmp_path / "m.gguf", tensor_type="f32")
    anyckpt.convert(source, tmp_path / "q.gguf", tensor_type="q8_0")
    plain = {tensor.name: tensor for tensor in GGUFReader(tmp_path / "m.gguf").tensors}
    for tensor in GGUFReader(tmp_path / "q.gguf").tensors:
        numbers = quants.dequantize(plain[tensor.name].data, plain[tensor.name].tensor_type)
        assert np.array_equal(quants.quantize(numbers, tensor.tensor_type), tensor.data), tensor.name
    said = read_header(LocalFile(tmp_path / "m.gguf")).metadata
    fields = GGUFReader(tmp_path / "m.gguf").fields
    assert {key for key in fields if not key.startswith("GGUF.")} == set(said)
    for key, value in said.items():
        assert fields[key].contents() == value


@pytest.mark.parametrize(
    "family", ["llama", "llama31_ropescale", "llama_tied_bf16", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "gemma3"]
)
def test_transformers_loads_ours(family: str, tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    source = fixture_path(f"families/{family}/hf")
    anyckpt.convert(source, tmp_path / "m.gguf", tensor_type="f32")
    anyckpt.convert(tmp_path / "m.gguf", tmp_path / "back", to="hf")
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    tokens = torch.arange(1, 12)[None]
    others = [
        AutoModelForCausalLM.from_pretrained(
            tmp_path, gguf_file="m.gguf", config=model.config, dtype=torch.float32
        ).eval(),
        AutoModelForCausalLM.from_pretrained(tmp_path / "back", dtype=torch.float32).eval(),
    ]
    with torch.no_grad():
        expected = model(tokens).logits
        for other in others:
            assert torch.equal(other(tokens).logits, expected)


@pytest.mark.parametrize("family", ["mixtral", "gemma", "gpt_oss"])
def test_what_transformers_does_not_load_comes_back(family: str, tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    source = fixture_path(f"families/{family}/hf")
    anyckpt.convert(source, tmp_path / "m.gguf", tensor_type="f32")
    anyckpt.convert(tmp_path / "m.gguf", tmp_path / "back", to="hf")
    models = [
        AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval() for path in (source, tmp_path / "back")
    ]
    with torch.no_grad():
        one, other = (model(torch.arange(1, 12)[None]).logits for model in models)
    assert torch.equal(one, other)


TEXTS = ("The quick fox's 12345 jumps!! over\n\n it.", "I'LL go héllo wörld 你好 42", "  more\tspaces ", "<s>hey</s> X")


@pytest.mark.parametrize("kind", ["gpt-2", *_EXPRESSIONS])
def test_byte_pairs_cut_texts_alike(kind: str, tmp_path: Path) -> None:
    from tokenizers import Tokenizer, pre_tokenizers, trainers
    from transformers import AutoTokenizer

    source = with_tokenizer(tmp_path / "source", byte_pairs(kind))
    content = json.loads((source / "tokenizer.json").read_text())
    if kind != "gpt-2":
        content["pre_tokenizer"]["pretokenizers"][0]["invert"] = False
    begun = {**content, "model": {"type": "BPE", "vocab": {}, "merges": []}, "added_tokens": [], "version": "1.0"}
    tokenizer = Tokenizer.from_str(json.dumps(begun))
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<s>", "</s>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator(TEXTS * 20, trainer)
    tokenizer.save(str(source / "tokenizer.json"))
    enlarge(source, 320)
    anyckpt.convert(source, tmp_path / "m.gguf")
    anyckpt.convert(tmp_path / "m.gguf", tmp_path / "back", to="hf")
    back = Tokenizer.from_file(str(tmp_path / "back" / "tokenizer.json"))
    theirs = AutoTokenizer.from_pretrained(tmp_path, gguf_file="m.gguf")
    for text in TEXTS:
        expected = tokenizer.encode(text).ids
        assert back.encode(text, add_special_tokens=False).ids == expected
        assert back.encode(text).ids == [0, *expected]
    assert theirs(TEXTS[0], add_special_tokens=False).input_ids == tokenizer.encode(TEXTS[0]).ids


def enlarge(folder: Path, rows: int) -> None:
    from safetensors.numpy import load_file, save_file

    weights = load_file(folder / "model.safetensors")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        weights[name] = np.resize(weights[name], (rows, weights[name].shape[1]))
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "vocab_size": rows}))


def test_sentencepiece_cuts_texts_alike(tmp_path: Path) -> None:
    import sentencepiece

    trained = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["the quick brown fox jumps over 123 lazy dogs"] * 50 + ["another, with more"] * 50),
        model_writer=trained,
        vocab_size=100,
        model_type="bpe",
        hard_vocab_limit=False,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    source = tmp_path / "source"
    shutil.copytree(fixture_path("families/llama/hf"), source)
    (source / "tokenizer.json").unlink()
    (source / "tokenizer.model").write_bytes(trained.getvalue())
    anyckpt.convert(source, tmp_path / "m.gguf")
    anyckpt.convert(tmp_path / "m.gguf", tmp_path / "back", to="hf")
    one = sentencepiece.SentencePieceProcessor(model_proto=trained.getvalue())
    other = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "back" / "tokenizer.model"))
    assert one.vocab_size() == other.vocab_size()
    for text in ("the quick brown fox", "  more   words, 12 dogs", "unknown Ω"):
        assert one.encode(text) == other.encode(text)
    for number in range(one.vocab_size()):
        assert one.id_to_piece(number) == other.id_to_piece(number)
        assert one.get_score(number) == other.get_score(number)
        assert one.is_control(number) == other.is_control(number)


def test_pieces_of_json_are_cut_as_the_model_they_were_made_of(tmp_path: Path) -> None:
    """transformers saves a sentencepiece model as ``tokenizer.json`` alone; scores that are found again do the same."""
    import sentencepiece
    from transformers import AutoTokenizer

    trained = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(
            ["the quick brown fox jumps over 123 lazy dogs"] * 50 + Path(__file__).read_text().split("\n")
        ),
        model_writer=trained,
        vocab_size=600,
        model_type="bpe",
        byte_fallback=True,
        hard_vocab_limit=False,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    source = tmp_path / "source"
    shutil.copytree(fixture_path("families/llama/hf"), source)
    (source / "tokenizer.json").unlink()
    (source / "tokenizer.model").write_bytes(trained.getvalue())
    settings = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (source / "tokenizer_config.json").write_text(json.dumps(settings))
    AutoTokenizer.from_pretrained(source).save_pretrained(source)
    (source / "tokenizer.model").unlink()
    enlarge(source, 620)
    done = anyckpt.convert(source, tmp_path / "m.gguf")
    assert "tokenizer.json" not in done.ignored, done.notes
    anyckpt.convert(tmp_path / "m.gguf", tmp_path / "back", to="hf")
    one = sentencepiece.SentencePieceProcessor(model_proto=trained.getvalue())
    other = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "back" / "tokenizer.model"))
    for text in (
        "the quick brown fox",
        "  more   words, 12 dogs",
        "unknown Ω 你好",
        "def test(source) -> None:\n\treturn",
    ):
        assert one.encode(text) == other.encode(text), text


def test_parts_that_the_package_wrote(tmp_path: Path) -> None:
    import gguf

    whole = tmp_path / "whole.gguf"
    anyckpt.convert(fixture_path("families/llama/hf"), whole)
    reader = gguf.GGUFReader(whole)
    writer = gguf.GGUFWriter(tmp_path / "parts.gguf", "llama", split_max_tensors=7)
    for key, field in reader.fields.items():
        if key.startswith("llama."):
            writer.add_key_value(key, field.contents(), field.types[0])
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, np.array(tensor.data))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    parts = sorted(tmp_path.glob("parts-*.gguf"))
    assert len(parts) > 2
    found, expected = anyckpt.open(parts[1]), anyckpt.open(whole)
    assert {name: tensor.numpy().tobytes() for name, tensor in found.items()} == {
        name: tensor.numpy().tobytes() for name, tensor in expected.items()
    }
    anyckpt.convert(whole, tmp_path / "ours", to="gguf", max_shard_size="100KB")
    ours = sorted((tmp_path / "ours").glob("*.gguf"))
    said = [gguf.GGUFReader(part).fields["split.no"].contents() for part in ours]
    assert said == list(range(len(ours)))


@pytest.mark.parametrize("shapes", [
    {"a": (123, 456)}, {"a": (1000, 1000), "b.ffn_up_exps.weight": (8, 300, 400), "c.ffn_down_exps.weight": (8, 4, 4)},
    {"a": (7_000, 1_000_000)}, {"a": (3, 4)},
])  # fmt: skip
def test_sizes_are_called_as_by_the_package(shapes: dict[str, tuple[int, ...]]) -> None:
    from math import prod

    from gguf.utility import size_label

    experts = {name: shape for name, shape in shapes.items() if "_exps" in name}
    shared = sum(prod(shape) for name, shape in shapes.items() if name not in experts)
    each = sum(prod(shape[1:]) for shape in experts.values())
    total = sum(map(prod, shapes.values()))
    assert general.size_label(shapes) == size_label(total, shared, each, 8 if experts else 0)


@pytest.mark.parametrize("name", ["llama-2-7b-chat", "Qwen3-8B", "my-v1.5-model", "phi", "meta-llama"])
def test_names_are_titled_as_by_the_package(name: str) -> None:
    from gguf.metadata import Metadata

    assert general.title(name) == Metadata.id_to_title(name)
