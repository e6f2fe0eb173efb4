"""Files of OpenAI's Whisper: one that its own package wrote, what is made of it, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.support import fixture_path, write_plan

import anyckpt
from anyckpt.containers.torch_file.writer import zip_parts
from anyckpt.engine.plan import OutputFile, Plan
from anyckpt.errors import FormatError, MappingError, UsageError
from anyckpt.formats import whisper
from anyckpt.tensor import LazyTensor

TINY = fixture_path("whisper/tiny.pt")


def stored(path: Path = TINY) -> dict[str, LazyTensor]:
    """The file's tensors as it names them."""
    return anyckpt.open(path).tensors


def contents(path: Path = TINY) -> dict[str, Any]:
    from anyckpt.containers.torch_file import read_torch
    from anyckpt.storage.location import look_at

    root: dict[str, Any] = dict(read_torch(look_at(path).open()).root)
    return root


def written(root: Any, path: Path) -> Path:
    write_plan(Plan("x", (OutputFile(path.name, zip_parts(root)),)), path.parent)
    return path


def test_a_file_of_openai_is_read_under_transformers_names() -> None:
    opened = anyckpt.open(TINY)
    assert opened.format == "whisper"
    assert opened.parameters == sum(tensor.size for tensor in contents()["model_state_dict"].values())
    config = opened.config
    assert config["encoder_layers"] == 1 and config["decoder_layers"] == 2 and config["encoder_ffn_dim"] == 64
    assert anyckpt.inspect(TINY).family == "whisper"
    assert opened["model.decoder.layers.1.encoder_attn.k_proj.weight"].shape == (16, 16)


def test_there_and_back_nothing_changes(tmp_path: Path) -> None:
    anyckpt.convert(TINY, tmp_path / "hf", to="hf")
    done = anyckpt.convert(tmp_path / "hf", tmp_path / "back.pt", to="whisper")
    assert anyckpt.diff(TINY, tmp_path / "back.pt").equal
    assert done.ignored.keys() == {"preprocessor_config.json"}
    before, after = contents(), contents(tmp_path / "back.pt")
    assert after["dims"] == before["dims"]
    states = [{name: tensor.numpy().tobytes() for name, tensor in root["model_state_dict"].items()}
              for root in (before, after)]  # fmt: skip
    assert states[0] == states[1]
    assert not anyckpt.verify(tmp_path / "back.pt").problems


def test_a_model_without_its_output_layer_is_the_same(tmp_path: Path) -> None:
    anyckpt.convert(TINY, tmp_path / "hf", to="hf")
    (tmp_path / "bare").mkdir()
    anyckpt.convert(tmp_path / "hf", tmp_path / "bare/model.safetensors", rename="model.*=*")
    config = (tmp_path / "hf/config.json").read_text().replace("WhisperForConditionalGeneration", "WhisperModel")
    (tmp_path / "bare/config.json").write_text(config)
    anyckpt.convert(tmp_path / "bare", tmp_path / "back.pt", to="whisper")
    assert anyckpt.diff(TINY, tmp_path / "back.pt").equal


@pytest.mark.parametrize(
    ("dims", "name", "end"),
    [
        ({"n_mels": 80, "n_audio_state": 384, "n_text_layer": 4, "n_vocab": 51864}, "openai/whisper-tiny.en", 50256),
        ({"n_mels": 80, "n_audio_state": 768, "n_text_layer": 12, "n_vocab": 51865}, "openai/whisper-small", 50257),
        ({"n_mels": 128, "n_audio_state": 1280, "n_text_layer": 4, "n_vocab": 51866},
         "openai/whisper-large-v3-turbo", 50257),
        ({"n_mels": 80, "n_audio_state": 384, "n_text_layer": 5, "n_vocab": 51866}, None, 50257),
        ({}, None, None),
    ],
)  # fmt: skip
def test_tokens_are_those_of_the_published_models(dims: dict[str, int], name: str | None, end: int | None) -> None:
    """As the folders of openai/whisper-* at the hub have them."""
    all_dims = {**contents()["dims"], **dims}
    all_dims["n_text_state"] = all_dims["n_audio_state"]
    config = whisper._configuration(all_dims, {}, "x")
    assert (config["eos_token_id"], config["bos_token_id"], config["pad_token_id"]) == (end, end, end)
    assert config.get("decoder_start_token_id") == (None if end is None else end + 1)
    tokenizer = whisper._tokenizer(config)
    assert (None if tokenizer is None else tokenizer.hub_name) == name


@given(st.sampled_from(sorted(whisper._OUTER)) | st.builds(
    "{}.blocks.{}.{}.{}".format, st.sampled_from(["encoder", "decoder"]), st.integers(0, 99),
    st.sampled_from(sorted(whisper._MODULES)), st.sampled_from(["weight", "bias"]),
))  # fmt: skip
def test_every_name_has_one_other(name: str) -> None:
    own = whisper._at_hub(name)
    assert own is not None
    assert whisper._in_file(own) == name


def test_what_else_is_in_the_file_is_told(tmp_path: Path) -> None:
    root = contents()
    extra = root["model_state_dict"]["decoder.ln.bias"]
    file = written({**root, "epoch": 3, "best": {"moment": extra}}, tmp_path / "more.pt")
    done = anyckpt.convert(file, tmp_path / "hf", to="hf")
    assert {"beside.epoch", "beside.best.moment"} <= done.ignored.keys()
    assert anyckpt.diff(TINY, tmp_path / "hf", weights_only=True).equal


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dims": {"n_mels": 8, "n_audio_ctx": 1, "n_text_ctx": 1}}, "its dimension n_audio_state is no size"),
        ({"dims": [("n_audio_ctx", "n_text_ctx")]}, "has no dimensions of a Whisper model"),
        ({"model_state_dict": {}}, "without weights"),
        ({"width": 24}, "its dimension n_text_state is not the encoder's"),
    ],
)
def test_damage_is_told(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    root = contents()
    if "width" in change:
        change = {"dims": {**root["dims"], "n_text_state": change["width"]}}
    with pytest.raises(FormatError, match=message):
        anyckpt.open(written({**root, **change}, tmp_path / "odd.pt"))


def test_two_tensors_of_one_place_are_told(tmp_path: Path) -> None:
    root = contents()
    state = {**root["model_state_dict"], "model.decoder.layer_norm.bias": root["model_state_dict"]["decoder.ln.bias"]}
    with pytest.raises(FormatError, match="two tensors are the same one"):
        anyckpt.open(written({**root, "model_state_dict": state}, tmp_path / "odd.pt"))


def test_what_openais_class_cannot_hold_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="has no such models.*model_type llama"):
        anyckpt.convert(fixture_path("families/llama/hf"), tmp_path / "x.pt", to="whisper")
    opened = anyckpt.open(TINY)
    wide = {**opened.config, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48}
    with pytest.raises(MappingError, match="another encoder_ffn_dim"):
        whisper._plan(anyckpt.Checkpoint("x", "hf", opened.tensors, config=wide), whisper_options())
    more = {**opened.tensors, "proj_out.weight": opened["model.decoder.embed_tokens.weight"]}
    with pytest.raises(MappingError, match="no such tensor"):
        whisper._plan(anyckpt.Checkpoint("x", "hf", more, config=opened.config), whisper_options())


def whisper_options() -> Any:
    from anyckpt.formats.format import WriteOptions

    return WriteOptions()
