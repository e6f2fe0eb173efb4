"""NeMo's aggregate tokenizers, several sentencepiece models behind one range of ids, as transformers gets them.

``asr_aggregate_v3_0_0`` is a Canary that NeMo 3.0.0 saved, of special tokens, English and German; beside it are ids
that NeMo makes of texts and prompts (of both formats), texts that it makes of ids, and what it computes on a signal.
"""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import pytest
from tests.formats.test_nemo_speech import changed, nemo
from tests.support import fixture_path

import anyckpt
from anyckpt import convert
from anyckpt.errors import MappingError
from anyckpt.models.sentencepiece import BYTE_PAIRS, NORMAL, UNIGRAMS, UNKNOWN, Vocabulary, model_bytes, read_model
from anyckpt.models.speech.aggregate import Part, from_parts
from anyckpt.plain_yaml import dump_yaml
from anyckpt.storage.source import MemorySource

HOME = "nemo/asr_aggregate_v3_0_0"
MODELS = ["tokenizer.0.spl_tokens.model", "tokenizer.1.en.model", "tokenizer.2.de.model"]


def aggregate() -> Path:
    return fixture_path(f"{HOME}/model.nemo")


def expected() -> Any:
    return json.loads(fixture_path(f"{HOME}/expected.json").read_text())


def test_every_id_is_its_own_languages_piece(tmp_path: Path) -> None:
    done = convert(aggregate(), tmp_path / "hf", to="hf")
    content = json.loads((tmp_path / "hf/tokenizer.json").read_text())
    texts = {number: text for text, number in content["model"]["vocab"].items()}
    pieces = [read_model((tmp_path / "hf" / name).read_bytes(), name).tokens for name in MODELS]
    marks = ("\u27e8spl_tokens\u27e9", "", "\u27e8de\u27e9")
    listed = [(piece, mark) for tokens, mark in zip(pieces, marks, strict=True) for piece in tokens]
    assert sorted(texts) == list(range(len(listed))) == list(range(164))
    for number, (piece, mark) in enumerate(listed):
        kept = piece == "<pad>" or piece.startswith("<|")
        assert texts[number] == (piece if kept else piece + mark)
    assert expected()["offsets"] == {"spl_tokens": 0, "en": len(pieces[0]), "de": len(pieces[0]) + len(pieces[1])}
    special = {entry["content"]: entry["id"] for entry in content["added_tokens"]}
    assert expected()["specials"].items() <= special.items()
    assert any("text becomes ids of en alone" in note for note in done.notes)
    config = json.loads((tmp_path / "hf/config.json").read_text())
    assert (config["bos_token_id"], config["decoder_start_token_id"], config["pad_token_id"]) == (4, 7, 2)


def test_back_to_nemo(tmp_path: Path) -> None:
    convert(aggregate(), tmp_path / "hf", to="hf")
    assert {*MODELS} <= {path.name for path in (tmp_path / "hf").iterdir()}
    convert(tmp_path / "hf", tmp_path / "back.nemo")
    before, after = anyckpt.open(aggregate()), anyckpt.open(tmp_path / "back.nemo")
    assert anyckpt.diff(aggregate(), tmp_path / "back.nemo", weights_only=True).equal
    ours, theirs = after.config["tokenizer"], before.config["tokenizer"]
    assert (ours["type"], ours["custom_tokenizer"]) == (theirs["type"], theirs["custom_tokenizer"])
    assert list(ours["langs"]) == list(theirs["langs"])
    for language, section in theirs["langs"].items():
        for key in ("model_path", "spe_tokenizer_vocab"):
            own = ours["langs"][language][key].removeprefix("nemo:")
            stored = section[key].removeprefix("nemo:")
            assert after.artifacts[own].read_all(1 << 24) == before.artifacts[stored].read_all(1 << 24), (language, key)
    convert(tmp_path / "back.nemo", tmp_path / "again", to="hf")
    for path in (tmp_path / "hf").glob("[!.]*"):
        assert path.read_bytes() == (tmp_path / "again" / path.name).read_bytes(), path.name


def test_the_older_prompt(tmp_path: Path) -> None:
    def change(config: dict[str, Any]) -> None:
        config["prompt_format"] = "canary"

    older = changed(aggregate(), tmp_path / "older.nemo", change)
    convert(older, tmp_path / "hf", to="hf")
    assert json.loads((tmp_path / "hf/config.json").read_text())["decoder_start_token_id"] == 4
    assert "<|translate|>" in (tmp_path / "hf/chat_template.jinja").read_text()
    convert(tmp_path / "hf", tmp_path / "back.nemo")
    assert anyckpt.open(tmp_path / "back.nemo").config["prompt_format"] == "canary"


def test_tokenizer_json_alone_is_not_enough_for_nemo(tmp_path: Path) -> None:
    convert(aggregate(), tmp_path / "hf", to="hf")
    (tmp_path / "hf" / MODELS[1]).unlink()
    with pytest.raises(MappingError, match="is of several sentencepiece models, which NeMo needs"):
        convert(tmp_path / "hf", tmp_path / "back.nemo")
    convert(aggregate(), tmp_path / "other", to="hf")
    (tmp_path / "other" / MODELS[2]).write_bytes((tmp_path / "other" / MODELS[0]).read_bytes())
    with pytest.raises(MappingError, match="the tokenizers are of another model"):
        convert(tmp_path / "other", tmp_path / "back.nemo")


@pytest.mark.parametrize("language", ["../../de", "a/b", "", "de\n"])
def test_languages_whose_names_are_none_for_files(language: str, tmp_path: Path) -> None:
    def change(config: dict[str, Any]) -> None:
        config["tokenizer"]["langs"][language] = config["tokenizer"]["langs"].pop("de")

    source = changed(aggregate(), tmp_path / "other.nemo", change)
    with pytest.raises(MappingError, match="a language whose name is none for a file"):
        convert(source, tmp_path / "hf", to="hf")
    convert(source, tmp_path / "copy.nemo")


def made(tokens: list[str], kind: int = BYTE_PAIRS) -> bytes:
    types = tuple(UNKNOWN if token == "<unk>" else NORMAL for token in tokens)
    scores = tuple(-float(number) for number in range(len(tokens)))
    return model_bytes(Vocabulary(tuple(tokens), scores, types), {}, space=True, kind=kind, trimmed=True)


@pytest.mark.parametrize("name", ["ctc_plain", "rnnt"])
def test_transducers_and_ctc_have_them_too(name: str, tmp_path: Path) -> None:
    labels = anyckpt.open(nemo(name)).config["decoder"].get("vocabulary") or anyckpt.open(nemo(name)).config["labels"]
    half = len(labels) // 2
    models = {"en": made(["<unk>", *map(str, range(half - 1))]), "fr": made(["<unk>", *map(str, range(half - 1))])}
    source = tmp_path / "several.nemo"
    with tarfile.open(nemo(name)) as old, tarfile.open(source, "w") as new:
        config = anyckpt.open(nemo(name)).config
        config["tokenizer"] = {
            "type": "agg",
            "langs": {lang: {"dir": "", "type": "bpe", "model_path": f"nemo:{lang}.model"} for lang in models},
        }
        files = {f"./{lang}.model": data for lang, data in models.items()}
        weights = old.extractfile("./model_weights.ckpt")
        assert weights is not None
        for member, data in {
            **files,
            "./model_config.yaml": dump_yaml(config).encode(),
            "./model_weights.ckpt": weights.read(),
        }.items():
            entry = tarfile.TarInfo(member)
            entry.size = len(data)
            new.addfile(entry, io.BytesIO(data))
    convert(source, tmp_path / "hf", to="hf")
    content = json.loads((tmp_path / "hf/tokenizer.json").read_text())
    assert content["model"]["vocab"]["0\u27e8fr\u27e9"] == half + 1
    blank = "<pad>" if name == "ctc_plain" else "<blank>"
    assert next(entry["id"] for entry in content["added_tokens"] if entry["content"] == blank) == len(labels)
    convert(tmp_path / "hf", tmp_path / "back.nemo")
    assert list(anyckpt.open(tmp_path / "back.nemo").config["tokenizer"]["langs"]) == ["en", "fr"]
    assert anyckpt.diff(source, tmp_path / "back.nemo", weights_only=True).equal


def part(language: str, tokens: list[str], offset: int, kind: int = BYTE_PAIRS) -> Part:
    data = made(tokens, kind)
    return Part(language, MemorySource(data, f"{language}.model"), read_model(data, language), offset)


def test_unigrams() -> None:
    parts = [part("a", ["<unk>", "x", "y"], 0, UNIGRAMS), part("b", ["<unk>", "x"], 3, UNIGRAMS)]
    model = from_parts(parts, (), ())["model"]
    assert [piece for piece, _ in model["vocab"]] == ["<unk>", "x", "y", "<unk>\u27e8b\u27e9", "x\u27e8b\u27e9"]
    assert model["unk_id"] == 0
    assert (
        from_parts([part("spl_tokens", ["<unk>"], 0, UNIGRAMS), part("a", ["<unk>"], 1, UNIGRAMS)], (), ())["model"][
            "unk_id"
        ]
        == 1
    )


def test_a_piece_that_has_a_languages_name_behind_it() -> None:
    with pytest.raises(MappingError, match="has a piece two times"):
        from_parts([part("a", ["<unk>", "x\u27e8b\u27e9"], 0), part("b", ["<unk>", "x"], 2)], (), ())
