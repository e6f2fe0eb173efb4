"""Speech models of NeMo 3.0 (``.nemo``) and transformers' classes of them, both ways.

``asr_fastconformer_v3_0_0`` has models that NeMo 3.0.0 saved, what transformers 5.24's converter made of them, told
what it takes for granted (widths, ``streaming``'s share of layers left out), and what NeMo computes on a signal.  Of
``streaming`` and ``prompted`` it is the converter's steps, taken with the classes of 5.24.
"""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.support import FIXTURES, fixture_path

import anyckpt
from anyckpt import convert
from anyckpt.engine.fingerprint import fingerprint
from anyckpt.errors import MappingError, UsageError
from anyckpt.models.sentencepiece import (
    BYTE_PAIRS,
    NORMAL,
    UNIGRAMS,
    UNKNOWN,
    Vocabulary,
    model_bytes,
    read_model,
    read_spec,
)
from anyckpt.models.speech.featurizer import FILTERS, WINDOW
from anyckpt.models.speech.tokenizer_json import from_sentencepiece, to_sentencepiece
from anyckpt.operations.convert import planned
from anyckpt.operations.options import ConvertOptions
from anyckpt.plain_yaml import dump_yaml, load_yaml_mapping
from anyckpt.storage.source import MemorySource

POSITIONS = "transf_decoder._embedding.position_embedding.pos_enc"
HOME = "nemo/asr_fastconformer_v3_0_0"
MODELS = sorted(path.name for path in (FIXTURES / HOME).iterdir())
_WRITTEN_ALWAYS = {"transformers_version", "torch_dtype"}
"""What transformers writes whenever it saves, and its older key of the element type."""


def nemo(name: str) -> Path:
    return fixture_path(f"{HOME}/{name}/model.nemo")


def converted(name: str) -> Path:
    return fixture_path(f"{HOME}/{name}/converted")


def arrays(path: Path) -> dict[str, np.ndarray]:
    return {name: tensor.numpy() for name, tensor in anyckpt.open(path).items()}


def same(ours: dict[str, np.ndarray], theirs: dict[str, np.ndarray]) -> bool:
    return ours.keys() == theirs.keys() and all(
        ours[name].dtype == theirs[name].dtype and np.array_equal(ours[name], theirs[name]) for name in ours
    )


def settings(path: Path) -> Any:
    value = json.loads(path.read_text())
    return {key: each for key, each in value.items() if key not in _WRITTEN_ALWAYS}


@pytest.mark.parametrize("name", MODELS)
def test_what_transformers_converter_writes(name: str, tmp_path: Path) -> None:
    done = convert(nemo(name), tmp_path / "hf", to="hf")
    assert same(arrays(tmp_path / "hf"), arrays(converted(name)))
    for file in converted(name).glob("*.json"):
        assert settings(tmp_path / "hf" / file.name) == settings(file), file.name
    for file in ("tokenizer.json", "tokenizer_config.json", "processor_config.json"):
        if (converted(name) / file).exists():
            assert (tmp_path / "hf" / file).read_text() == (converted(name) / file).read_text(), file
    assert {WINDOW, FILTERS} <= done.ignored.keys()


@pytest.mark.parametrize("name", MODELS)
def test_back_to_nemo(name: str, tmp_path: Path) -> None:
    convert(nemo(name), tmp_path / "hf", to="hf")
    convert(tmp_path / "hf", tmp_path / "back.nemo")
    source, back = arrays(nemo(name)), arrays(tmp_path / "back.nemo")
    for name_of_table in {WINDOW, POSITIONS} & source.keys():
        assert np.allclose(source.pop(name_of_table), back.pop(name_of_table), rtol=0, atol=1e-6)
    assert same(source, back)
    before, after = anyckpt.open(nemo(name)), anyckpt.open(tmp_path / "back.nemo")
    for key in ("preprocessor", "encoder", "decoder", "joint", "labels", "target", "transf_decoder", "head"):
        kept = {k: v for k, v in _flat(after.config.get(key), key) if v is not None}
        stored = dict(_flat(before.config.get(key), key))
        assert kept == {k: stored.get(k, v) for k, v in kept.items()}, key
    files = {file.partition("_")[2]: source for file, source in _files(before).items()}
    for file, data in _files(after).items():
        assert data.read_all(1 << 24) == files[file.partition("_")[2]].read_all(1 << 24), file


def _files(checkpoint: Any) -> dict[str, Any]:
    return {**checkpoint.artifacts, **(checkpoint.tokenizer.files if checkpoint.tokenizer is not None else {})}


def _flat(value: Any, path: str) -> list[tuple[str, Any]]:
    if isinstance(value, dict):
        return [pair for key, each in value.items() for pair in _flat(each, f"{path}.{key}")]
    return [(path, value)]


@pytest.mark.parametrize("name", ["ctc_plain", "rnnt", "tdt"])
def test_a_sentencepiece_model_made_of_tokenizer_json(name: str, tmp_path: Path) -> None:
    """The converter keeps no ``tokenizer.model``: NeMo gets one that has the same pieces."""
    done = convert(converted(name), tmp_path / "made.nemo")
    assert any("made of tokenizer.json" in note for note in done.notes)
    made, own = (_sentencepiece(path) for path in (tmp_path / "made.nemo", nemo(name)))
    first, second = (read_model(data, name) for data in (made, own))
    assert (first.tokens, first.types) == (second.tokens, second.types)
    again = from_sentencepiece(MemorySource(made), ("<unk>", "<pad>"), ("<pad>", "<unk>"))
    assert again["model"] == from_sentencepiece(MemorySource(own), ("<unk>", "<pad>"), ("<pad>", "<unk>"))["model"]


def _sentencepiece(path: Path) -> bytes:
    tokenizer = anyckpt.open(path).tokenizer
    assert tokenizer is not None and tokenizer.model_file is not None
    return tokenizer.files[tokenizer.model_file].read_all(1 << 24)


def test_inspect_says_what_it_is() -> None:
    found = anyckpt.inspect(nemo("tdt"))
    assert (found.family, found.config_kind) == ("parakeet-tdt", "nemo1")
    assert found.model is not None
    assert (found.model["num_layers"], found.model["num_mel_bins"], found.model["durations"]) == (
        2,
        16,
        (0, 1, 2, 3, 4),
    )


def test_the_same_model_is_the_same(tmp_path: Path) -> None:
    convert(nemo("rnnt"), tmp_path / "hf", to="hf")
    assert anyckpt.diff(nemo("rnnt"), tmp_path / "hf").equal


def test_other_features_are_kept(tmp_path: Path) -> None:
    """A feature extractor's settings go to NeMo's preprocessor and back."""

    def change(config: dict[str, Any]) -> None:
        config["preprocessor"] |= {"window_size": 0.02, "window_stride": 0.0125, "n_fft": 1024, "preemph": 0.9}

    source = changed(nemo("ctc_plain"), tmp_path / "other.nemo", change, drop=(WINDOW, FILTERS))
    convert(source, tmp_path / "hf", to="hf")
    said = json.loads((tmp_path / "hf/processor_config.json").read_text())["feature_extractor"]
    assert (said["win_length"], said["hop_length"], said["n_fft"], said["preemphasis"]) == (320, 200, 1024, 0.9)
    convert(tmp_path / "hf", tmp_path / "back.nemo")
    back = anyckpt.open(tmp_path / "back.nemo")
    section = {key: back.config["preprocessor"][key] for key in ("window_size", "window_stride", "n_fft", "preemph")}
    assert section == {"window_size": 0.02, "window_stride": 0.0125, "n_fft": 1024, "preemph": 0.9}
    assert (back[WINDOW].shape, back[FILTERS].shape) == ((320,), (1, 16, 513))


def changed(
    source: Path, out: Path, change: Callable[[dict[str, Any]], None], drop: tuple[str, ...] = (), **tensors: Any
) -> Path:
    """A ``.nemo`` with another configuration, or with other tensors."""
    opened = anyckpt.open(source)
    config = json.loads(json.dumps(opened.config))
    change(config)
    weights = {name: tensor for name, tensor in opened.tensors.items() if name not in drop}
    weights |= {name: anyckpt.tensor.from_array(array) for name, array in tensors.items()}
    if drop or tensors:
        from dataclasses import replace

        convert(replace(opened, tensors=weights, config=config), out)
        return out
    with tarfile.open(source) as old, tarfile.open(out, "w") as new:
        for member in old:
            data = old.extractfile(member)
            content = data.read() if data is not None else b""
            if member.name.endswith("model_config.yaml"):
                assert load_yaml_mapping(content, "") == opened.config
                content = dump_yaml(config).encode()
                member.size = len(content)
            new.addfile(member, io.BytesIO(content))
    return out


REFUSED: tuple[tuple[str, str, tuple[str, ...], Any], ...] = (
    ("ctc", "encoder's subsampling", ("encoder", "subsampling"), "striding"),
    ("ctc", "encoder's subsampling", ("encoder", "subsampling"), None),
    ("ctc", "encoder's self_attention_model", ("encoder", "self_attention_model"), "abs_pos"),
    ("ctc", "encoder's att_context_size", ("encoder", "att_context_size"), [70, 13]),
    ("ctc", "encoder's att_context_style", ("encoder", "att_context_style"), "chunked_limited"),
    ("ctc", "encoder's causal_downsampling", ("encoder", "causal_downsampling"), True),
    ("ctc", "encoder's conv_context_size", ("encoder", "conv_context_size"), "causal"),
    ("ctc", "encoder's conv_norm_type", ("encoder", "conv_norm_type"), "layer_norm"),
    ("ctc", "encoder's reduction", ("encoder", "reduction"), "pooling"),
    ("ctc", "encoder's feat_out", ("encoder", "feat_out"), 8),
    ("ctc", "encoder says more_attention", ("encoder", "more_attention"), 3),
    ("ctc", "preprocessor's normalize", ("preprocessor", "normalize"), "all_features"),
    ("ctc", "preprocessor's window", ("preprocessor", "window"), "hamming"),
    ("ctc", "preprocessor's mag_power", ("preprocessor", "mag_power"), 1.0),
    ("ctc", "preprocessor's frame_splicing", ("preprocessor", "frame_splicing"), 3),
    ("ctc", "preprocessor's highfreq", ("preprocessor", "highfreq"), 4000),
    ("ctc", "preprocessor's _target_", ("preprocessor", "_target_"), "nemo.AudioToMFCCPreprocessor"),
    ("streaming", "encoder's att_context_size", ("encoder", "att_context_size"), [-1, 13]),
    ("streaming", "encoder's att_context_size", ("encoder", "att_context_size"), [[8, 3], [4, 1]]),
    ("streaming", "encoder's att_context_size", ("encoder", "att_context_size"), None),
    ("streaming", "left_context is not possible", ("encoder", "att_context_size"), [[8, 4]]),
    ("streaming", "encoder's att_context_style", ("encoder", "att_context_style"), "regular"),
    ("streaming", "encoder's conv_norm_type", ("encoder", "conv_norm_type"), "batch_norm"),
    ("streaming", "encoder's conv_context_size", ("encoder", "conv_context_size"), [4, 4]),
    ("streaming", "encoder's causal_downsampling", ("encoder", "causal_downsampling"), False),
    ("streaming", "preprocessor's normalize", ("preprocessor", "normalize"), "per_feature"),
    ("prompted", "model_defaults has no prompts", ("model_defaults", "initialize_prompt_feature"), False),
    ("prompted", "prompts is not possible", ("model_defaults", "prompt_dictionary"), {"en": 8}),
    ("prompted", "prompt_dictionary's en", ("model_defaults", "prompt_dictionary"), {"en": "first"}),
    ("rnnt", "decoder's blank_as_pad", ("decoder", "blank_as_pad"), False),
    ("rnnt", "decoder's normalization_mode", ("decoder", "normalization_mode"), "layer"),
    ("rnnt", "jointnet's joint_hidden", ("joint", "jointnet", "joint_hidden"), 24),
    ("rnnt", "jointnet's activation", ("joint", "jointnet", "activation"), "tanh"),
    ("canary", "prompt_format", ("prompt_format",), "canary3"),
    ("canary", "model_defaults's lm_dec_hidden", ("model_defaults", "lm_dec_hidden"), 32),
    ("canary", "transf_encoder's num_layers", ("transf_encoder", "num_layers"), 2),
    ("canary", "config_dict's pre_ln", ("transf_decoder", "config_dict", "pre_ln"), False),
    ("canary", "config_dict's hidden_act", ("transf_decoder", "config_dict", "hidden_act"), "gelu"),
    ("canary", "config_dict's num_token_types", ("transf_decoder", "config_dict", "num_token_types"), 2),
    ("canary", "head's num_layers", ("head", "num_layers"), 2),
    ("tdt", "labels have no <pad>", ("labels",), ["a"] * 96),
    ("tdt", "joint's num_extra_outputs", ("joint", "num_extra_outputs"), 2),
)


@pytest.mark.parametrize(("name", "message", "keys", "value"), REFUSED)
def test_what_transformers_has_no_class_for(
    name: str, message: str, keys: tuple[str, ...], value: Any, tmp_path: Path
) -> None:
    def change(config: dict[str, Any]) -> None:
        section = config
        for key in keys[:-1]:
            section = section[key]
        section[keys[-1]] = value

    source = changed(nemo(name), tmp_path / "other.nemo", change)
    with pytest.raises(MappingError, match=message):
        convert(source, tmp_path / "hf", to="hf")
    convert(source, tmp_path / "copy.safetensors")
    convert(source, tmp_path / "copy.nemo")


def test_filters_of_another_kind(tmp_path: Path) -> None:
    """Buffers that do not follow from the configuration: transformers would hear something else."""
    other = np.ones((1, 16, 257), np.float32)
    source = changed(nemo("ctc_plain"), tmp_path / "other.nemo", lambda config: None, **{FILTERS: other})
    with pytest.raises(MappingError, match="is not what transformers computes"):
        convert(source, tmp_path / "hf", to="hf")


def test_a_blank_of_its_own(tmp_path: Path) -> None:
    """NeMo begins with zeros, transformers with the blank's row, which NeMo leaves at zero."""
    row = arrays(nemo("rnnt"))["decoder.prediction.embed.weight"].copy()
    row[-1] = 1
    source = changed(nemo("rnnt"), tmp_path / "o.nemo", lambda config: None, **{"decoder.prediction.embed.weight": row})
    done = convert(source, tmp_path / "hf", to="hf")
    assert any("the blank's row is not zero" in note for note in done.notes)


def test_lookaheads_are_the_processors(tmp_path: Path) -> None:
    """The configuration has the usual one alone, and without the processor's file it is the only one."""
    convert(nemo("streaming"), tmp_path / "hf", to="hf")
    assert anyckpt.inspect(tmp_path / "hf").model["lookaheads"] == (3, 1, 0)  # type: ignore[index]
    file = tmp_path / "hf/processor_config.json"
    said = json.loads(file.read_text())
    file.write_text(
        json.dumps({**said, "feature_extractor": {**said["feature_extractor"], "mel_filters_dtype": "bfloat16"}})
    )
    with pytest.raises(MappingError, match="mel_filters_dtype is one that NeMo's features have not"):
        convert(tmp_path / "hf", tmp_path / "none.nemo")
    file.unlink()
    convert(tmp_path / "hf", tmp_path / "one.nemo")
    assert anyckpt.open(tmp_path / "one.nemo").config["encoder"]["att_context_size"] == [8, 3]


def test_languages_are_the_processors(tmp_path: Path) -> None:
    convert(nemo("prompted"), tmp_path / "hf", to="hf")
    said = json.loads((tmp_path / "hf/processor_config.json").read_text())
    assert said["prompt_dictionary"] == {"en-US": 0, "en": 0, "de-DE": 1, "de": 1, "no": 2, "auto": 5}
    config = json.loads((tmp_path / "hf/config.json").read_text())
    (tmp_path / "hf/config.json").write_text(json.dumps({**config, "default_prompt_id": 1}))
    (tmp_path / "hf/processor_config.json").unlink()
    done = convert(tmp_path / "hf", tmp_path / "back.nemo")
    assert any("no names of languages are known" in note for note in done.notes)
    assert any("where none is given, and transformers number 1" in note for note in done.notes)
    convert(tmp_path / "back.nemo", tmp_path / "again", to="hf")
    assert json.loads((tmp_path / "again/config.json").read_text())["default_prompt_id"] == 1


@pytest.mark.parametrize("name", MODELS)
def test_nothing_differs_after_both_ways(name: str, tmp_path: Path) -> None:
    convert(nemo(name), tmp_path / "hf", to="hf")
    convert(tmp_path / "hf", tmp_path / "back.nemo")
    for other in (tmp_path / "hf", tmp_path / "back.nemo"):
        assert anyckpt.diff(nemo(name), other).equal


def test_joint_networks_without_dropout(tmp_path: Path) -> None:
    """NeMo numbers its modules by whether there is any."""
    stored = arrays(nemo("rnnt"))
    moved = {f"joint.joint_net.1.{part}": stored[f"joint.joint_net.2.{part}"] for part in ("weight", "bias")}

    def change(config: dict[str, Any]) -> None:
        config["joint"]["jointnet"]["dropout"] = 0.0

    gone = tuple(f"joint.joint_net.2.{part}" for part in ("weight", "bias"))
    source = changed(nemo("rnnt"), tmp_path / "o.nemo", change, drop=gone, **moved)
    convert(source, tmp_path / "hf", to="hf")
    assert same(arrays(tmp_path / "hf"), arrays(converted("rnnt")))


def test_ranks_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="NeMo's speech models have no distributed checkpoint"):
        convert(converted("rnnt"), tmp_path / "sharded.nemo", sharded=True)


def test_another_model_of_nemo(tmp_path: Path) -> None:
    def change(config: dict[str, Any]) -> None:
        config["target"] = "nemo.collections.asr.models.hybrid_rnnt_ctc_bpe_models.EncDecHybridRNNTCTCBPEModel"

    source = changed(nemo("rnnt"), tmp_path / "hybrid.nemo", change)
    with pytest.raises(UsageError, match="is of NeMo's EncDecHybridRNNTCTCBPEModel, of which no family"):
        convert(source, tmp_path / "hf", to="hf")
    for path in (source, fixture_path("nemo/asr_ctc_conformer_v3_0_0/ctc.nemo")):  # whose names look like the hub's
        convert(path, tmp_path / "copy.nemo", overwrite=True)
        assert same(arrays(path), arrays(tmp_path / "copy.nemo"))


def test_tables_stay_as_exact_as_they_are(tmp_path: Path) -> None:
    """NeMo has them in float32, whatever the weights are in."""
    for source in (nemo("canary"), converted("canary")):
        convert(source, tmp_path / "half.nemo", dtype="bf16", overwrite=True)
        kinds = {name: tensor.dtype.name for name, tensor in anyckpt.open(tmp_path / "half.nemo").items()}
        assert {name for name, kind in kinds.items() if kind == "float32"} == {WINDOW, FILTERS, POSITIONS}
        convert(tmp_path / "half.nemo", tmp_path / "hf", to="hf", overwrite=True)


def test_a_state_dict_without_its_output_layer(tmp_path: Path) -> None:
    done = convert(nemo("canary"), tmp_path / "named.safetensors", names="hf")
    assert any("proj_out.weight is tied to model.decoder.embed_tokens.weight" in note for note in done.notes)


def test_what_lightning_saved(tmp_path: Path) -> None:
    """A training checkpoint has the configuration, and no tokenizer."""
    convert(nemo("tdt"), tmp_path / "last.ckpt")
    (tmp_path / "tokenizer.model").write_bytes(_sentencepiece(nemo("tdt")))
    assert anyckpt.inspect(tmp_path / "last.ckpt").family == "parakeet-tdt"
    convert(tmp_path / "last.ckpt", tmp_path / "hf", to="hf", tokenizer=tmp_path / "tokenizer.model")
    assert same(arrays(tmp_path / "hf"), arrays(converted("tdt")))
    assert (tmp_path / "hf/tokenizer.json").read_text() == (converted("tdt") / "tokenizer.json").read_text()


def test_a_table_that_nobody_could_hold(tmp_path: Path) -> None:
    def change(config: dict[str, Any]) -> None:
        config["preprocessor"] |= {"n_fft": 1 << 38, "window_size": 0.025}

    source = changed(nemo("ctc_plain"), tmp_path / "large.nemo", change)
    with pytest.raises(MappingError, match="fft_length is not possible"):
        convert(source, tmp_path / "hf", to="hf")


def test_a_damaged_processor(tmp_path: Path) -> None:
    convert(nemo("canary"), tmp_path / "hf", to="hf")
    (tmp_path / "hf/processor_config.json").write_text("{")
    with pytest.raises(MappingError, match="is not JSON"):
        convert(tmp_path / "hf", tmp_path / "back.nemo")
    assert anyckpt.inspect(tmp_path / "hf").family is None
    (tmp_path / "hf/processor_config.json").write_text('{"feature_extractor": {"feature_size": 80}}')
    with pytest.raises(MappingError, match="another feature extractor"):
        convert(tmp_path / "hf", tmp_path / "back.nemo")


def test_a_plan_is_known_again() -> None:
    """What is computed is the same in every plan, so that an interrupted run goes on."""
    made = [planned(anyckpt.open(converted("canary")), ConvertOptions(to="nemo")) for _ in range(2)]
    first, second = (fingerprint(plan, [str(converted("canary"))]) for plan in made)
    assert first.obstacle is None
    assert first.value == second.value


def test_a_tokenizer_of_another_model(tmp_path: Path) -> None:
    convert(nemo("ctc_plain"), tmp_path / "hf", to="hf")
    data = _sentencepiece(nemo("tdt"))
    found = read_model(data, "")
    shorter = Vocabulary(found.tokens[:-1], found.scores[:-1], found.types[:-1])
    (tmp_path / "hf/tokenizer.model").write_bytes(model_bytes(shorter, {}, space=True))
    with pytest.raises(MappingError, match="the tokenizer is of another model"):
        convert(tmp_path / "hf", tmp_path / "back.nemo")


def test_unigrams() -> None:
    found = Vocabulary(("<unk>", "a", "b", "ab"), (0.0, -1.0, -1.5, -0.5), (UNKNOWN, NORMAL, NORMAL, NORMAL))
    data = model_bytes(found, {}, space=True, characters=b"\1\2", kind=UNIGRAMS)
    assert read_spec(data, "").kind == UNIGRAMS
    made = from_sentencepiece(MemorySource(data), ("<pad>",), ("<pad>", "<unk>"))
    assert made["model"] == {
        "type": "Unigram",
        "unk_id": 0,
        "vocab": [["<unk>", 0.0], ["a", -1.0], ["b", -1.5], ["ab", -0.5]],
        "byte_fallback": True,
    }
    back = to_sentencepiece(made, 4, "tokenizer.json")
    assert read_model(back, "") == found
    assert read_spec(back, "") == read_spec(data, "")


def test_a_kind_of_sentencepiece_that_transformers_has_not() -> None:
    data = model_bytes(Vocabulary(("<unk>", "a"), (0.0, 0.0), (UNKNOWN, NORMAL)), {}, space=True, kind=3)
    with pytest.raises(MappingError, match="transformers has no tokenizer for"):
        from_sentencepiece(MemorySource(data), (), ())
    assert read_spec(_sentencepiece(nemo("rnnt")), "").kind == BYTE_PAIRS
