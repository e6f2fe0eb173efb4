"""Modules of other models put into one: NeMo's SpeechLM2 models, ASR models and others.

``salm_v3_0_0`` was saved by NeMo 3.0.0's ``SALM``, made of the fixtures of a llama and of a Parakeet (``tdt``), after
which its ``perception`` was changed; beside it is what NeMo computes on a signal.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.formats.test_nemo_speech import changed, nemo
from tests.operations.test_merge_in_place import Arrays, save
from tests.operations.test_model_module import folder, language, own_names, with_adapter
from tests.support import fixture_path

import anyckpt
from anyckpt.errors import FormatError, MappingError, UsageError
from anyckpt.operations.options import ConvertOptions

LLAMA = fixture_path("families/llama/hf")
SALM = fixture_path("nemo/salm_v3_0_0/model")


def arrays(path: Path) -> Arrays:
    return {name: tensor.numpy() for name, tensor in anyckpt.open(path).items()}


def same(ours: Arrays, theirs: Arrays) -> bool:
    return ours.keys() == theirs.keys() and all(
        ours[name].dtype == theirs[name].dtype and np.array_equal(ours[name], theirs[name]) for name in ours
    )


def inside(tensors: Arrays, start: str) -> Arrays:
    return {name.removeprefix(start): array for name, array in tensors.items() if name.startswith(start)}


def put(source: Path, out: Path, told: str | list[str] | dict[str, Any], **options: Any) -> Any:
    return anyckpt.convert(source, out, **({} if out.suffix else {"to": "hf"}), put=told, **options)


def test_an_asr_models_encoder_is_heard_with(tmp_path: Path) -> None:
    done = put(SALM, tmp_path / "out", {"perception": nemo("tdt")})
    before, after, asr = arrays(SALM), arrays(tmp_path / "out"), arrays(nemo("tdt"))
    for part in ("encoder.", "preprocessor."):
        assert same(inside(after, f"perception.{part}"), inside(asr, part))
    assert not same(inside(before, "perception.encoder."), inside(asr, "encoder."))
    for part in ("perception.proj.", "llm.", "embed_tokens."):
        assert same(inside(after, part), inside(before, part))
    told = next(note for note in done.notes if note.startswith("--put perception"))
    assert (
        "72 tensors are those of" in told and "70 of encoder" in told and "proj (2 tensors), which it has not" in told
    )
    left = {
        name.rpartition(": ")[2] for name, reason in done.ignored.items() if reason == "perception has no place for it"
    }
    assert {name for name in asr if name.startswith(("decoder.", "joint."))} <= left
    assert json.loads((tmp_path / "out/config.json").read_text()) == json.loads((SALM / "config.json").read_text())


@pytest.mark.parametrize("way", ["transformers", "salm", "alone", "file"])
def test_it_may_come_from_anywhere(way: str, tmp_path: Path) -> None:
    expected = arrays(SALM)
    if way == "transformers":
        put(nemo("tdt"), tmp_path / "tuned", ["encoder=" + str(SALM)])
        source = tmp_path / "tuned"
    elif way == "salm":
        source = SALM
    else:
        source = tmp_path / ("alone" if way == "alone" else "alone.safetensors")
        anyckpt.convert(SALM, source, module="perception", **({"to": "hf"} if way == "alone" else {}))
    put(SALM, tmp_path / "plain", {"perception": nemo("tdt")})
    assert not same(arrays(tmp_path / "plain"), expected)
    done = put(tmp_path / "plain", tmp_path / "again", {"perception": source})
    if way == "transformers":  # which has no projection
        expected |= {name: array for name, array in arrays(tmp_path / "plain").items() if "proj." in name[:16]}
        table = "perception.preprocessor.featurizer.window"
        assert np.allclose(arrays(tmp_path / "again")[table], expected[table], atol=1e-6)
        expected[table] = arrays(tmp_path / "again")[table]
    assert same(arrays(tmp_path / "again"), expected)
    assert any("stays as it is, for nothing is known" in note for note in done.notes) == (way == "file")


def test_its_encoder_goes_back_into_an_asr_model(tmp_path: Path) -> None:
    put(nemo("tdt"), tmp_path / "tuned.nemo", f"encoder={SALM}")
    before, after, salm = arrays(nemo("tdt")), arrays(tmp_path / "tuned.nemo"), arrays(SALM)
    assert same(inside(after, "encoder."), inside(salm, "perception.encoder."))
    others = {name for name in before if not name.startswith("encoder.")}
    assert same({name: after[name] for name in others}, {name: before[name] for name in others})
    anyckpt.convert(nemo("tdt"), tmp_path / "hf", to="hf")
    done = put(tmp_path / "hf", tmp_path / "tuned", {"encoder": SALM, "preprocessor": SALM})
    assert anyckpt.diff(tmp_path / "tuned.nemo", tmp_path / "tuned", weights_only=True).equal
    assert any("are made from NeMo's names" in note for note in done.notes)
    assert not any("other features" in note for note in done.notes)
    for file in ("tokenizer.json", "processor_config.json", "config.json"):
        assert json.loads((tmp_path / "tuned" / file).read_text()) == json.loads((tmp_path / "hf" / file).read_text())


def test_an_encoder_alone(tmp_path: Path) -> None:
    anyckpt.convert(SALM, tmp_path / "encoder.safetensors", module="perception.encoder")
    put(SALM, tmp_path / "plain", {"perception": nemo("tdt")})
    put(tmp_path / "plain", tmp_path / "again", {"perception.encoder": tmp_path / "encoder.safetensors"})
    assert same(inside(arrays(tmp_path / "again"), "perception.encoder."), inside(arrays(SALM), "perception.encoder."))


@pytest.mark.parametrize(
    ("module", "other", "found"),
    [
        ("perception", "ctc", "has besides encoder.layers.0.feed_forward1.linear1.bias"),
        ("perception", "canary", "has besides"),
        ("perception.encoder", "ctc", "has besides layers.0.feed_forward1.linear1.bias"),
        ("llm", "tdt", "has nothing of the names in the model's llm"),
    ],
)
def test_another_architecture_is_refused(module: str, other: str, found: str, tmp_path: Path) -> None:
    with pytest.raises(MappingError, match=found):
        put(SALM, tmp_path / "out", {module: nemo(other)})
    assert not (tmp_path / "out").exists()


def test_what_lacks_and_other_shapes_are_refused(tmp_path: Path) -> None:
    name = "encoder.layers.1.norm_out.weight"
    kept = lambda config: None  # noqa: E731
    other = changed(nemo("tdt"), tmp_path / "shape.nemo", kept, **{name: np.ones((8,), np.float32)})
    with pytest.raises(MappingError, match=r"of other shapes: encoder.layers.1.norm_out.weight \[8\] for \[16\]"):
        put(SALM, tmp_path / "out", {"perception": other})
    less = changed(nemo("tdt"), tmp_path / "less.nemo", kept, drop=(name,))
    with pytest.raises(MappingError, match="it lacks encoder.layers.1.norm_out.weight"):
        put(SALM, tmp_path / "out", {"perception": less})


def test_settings_come_along_and_are_told(tmp_path: Path) -> None:
    def change(config: dict[str, Any]) -> None:
        config["encoder"]["xscaling"] = True
        config["preprocessor"]["preemph"] = 0.9

    other = changed(nemo("tdt"), tmp_path / "other.nemo", change)
    done = put(SALM, tmp_path / "out", {"perception": other})
    said = anyckpt.open(tmp_path / "out").config["perception"]
    assert said["encoder"]["xscaling"] is True and said["preprocessor"]["preemph"] == 0.9
    assert any("perception.encoder: xscaling False becomes True" in note for note in done.notes)
    done = put(SALM, tmp_path / "encoder", {"perception.encoder": other})
    assert any("makes other features for its encoder: preemph" in note for note in done.notes)
    done = put(nemo("tdt"), tmp_path / "both.nemo", {"encoder": tmp_path / "out", "preprocessor": tmp_path / "out"})
    assert not any("other features" in note for note in done.notes)
    assert anyckpt.open(tmp_path / "both.nemo").config["preprocessor"]["preemph"] == 0.9


def test_an_encoder_whose_layers_are_all_heard(tmp_path: Path) -> None:
    """Connectors that take several layers keep the encoder under another name."""
    speech, wrapped = tmp_path / "speech", "perception.encoder_multilayer.encoder."
    anyckpt.convert(SALM, speech, to="hf", rename=f"perception.encoder.*={wrapped}*")
    put(speech, tmp_path / "out", {"perception": nemo("tdt")})
    after = arrays(tmp_path / "out")
    assert after.keys() == arrays(speech).keys()
    assert same(inside(after, wrapped), inside(arrays(nemo("tdt")), "encoder."))


def test_types_that_differ_are_told(tmp_path: Path) -> None:
    anyckpt.convert(nemo("tdt"), tmp_path / "half.nemo", dtype="bf16")
    done = put(SALM, tmp_path / "out", {"perception": tmp_path / "half.nemo"})
    assert any("tensors are bfloat16 where float32 was" in note for note in done.notes)
    put(SALM, tmp_path / "cast", {"perception": tmp_path / "half.nemo"}, dtype="fp32")
    assert {array.dtype.name for array in arrays(tmp_path / "cast").values()} == {"float32", "int64"}


@pytest.mark.parametrize("kind", ["salm", "automodel", "duplex"])
@pytest.mark.parametrize("of", ["hf", "nemo", "megatron-core"])
def test_a_tuned_language_model(kind: str, of: str, tmp_path: Path) -> None:
    tuned = Path(shutil.copytree(LLAMA, tmp_path / "tuned"))
    tuned.chmod(0o755)
    (tuned / "model.safetensors").chmod(0o644)
    save(tuned / "model.safetensors", {name: array + 1 for name, array in language().items()})
    source = tuned
    if of != "hf":
        source = tmp_path / ("tuned.nemo" if of == "nemo" else "tuned-dist")
        anyckpt.convert(tuned, source, to=of)
    speech = folder(tmp_path / "speech", own_names(kind))
    put(speech, tmp_path / "out", {"llm": source})
    assert arrays(tmp_path / "out").keys() == arrays(speech).keys()
    anyckpt.convert(tmp_path / "out", tmp_path / "llm", to="hf", module="llm")
    assert same(arrays(tmp_path / "llm"), {name: array + 1 for name, array in language().items()})
    assert (tmp_path / "out/tokenizer.json").read_bytes() == (speech / "tokenizer.json").read_bytes()


def test_a_language_models_settings(tmp_path: Path) -> None:
    config = json.loads((LLAMA / "config.json").read_text())
    tuned = Path(shutil.copytree(LLAMA, tmp_path / "tuned"))
    tuned.chmod(0o755)
    (tuned / "config.json").chmod(0o644)
    (tuned / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 0.5}))
    speech = folder(tmp_path / "speech", own_names("salm"))
    done = put(speech, tmp_path / "out", {"llm": tuned})
    assert json.loads((tmp_path / "out/llm_backbone/config.json").read_text())["rms_norm_eps"] == 0.5
    assert any("rms_norm_eps" in note and "becomes 0.5" in note for note in done.notes)
    done = put(SALM, tmp_path / "bare", {"llm": tuned})
    assert any("which must be the same as that of" in note for note in done.notes)


def test_adapters_are_merged_first(tmp_path: Path) -> None:
    speech = folder(tmp_path / "speech", with_adapter(own_names("salm"), "salm"), lora={"r": 2, "lora_alpha": 6})
    with pytest.raises(UsageError, match="has a LoRA adapter in its language model"):
        put(speech, tmp_path / "out", {"llm": LLAMA})
    with pytest.raises(UsageError, match="is an adapter, and no model"):
        put(SALM, tmp_path / "out", {"llm": fixture_path("families/lora_llama/hf_adapter")})


def test_a_module_of_any_model(tmp_path: Path) -> None:
    save(
        tmp_path / "one.safetensors", {name: array + 1 for name, array in inside(language(), "model.layers.1.").items()}
    )
    done = put(LLAMA, tmp_path / "out", {"model.layers.1": tmp_path / "one.safetensors"})
    start = "model.layers.1."
    expected = {name: array + 1 if name.startswith(start) else array for name, array in language().items()}
    assert same(arrays(tmp_path / "out"), expected)
    assert any("the configuration says of model.layers.1 stays as it is" in note for note in done.notes)
    with pytest.raises(UsageError, match="no module 'vision'"):
        put(LLAMA, tmp_path / "none", {"vision": LLAMA})


def test_a_runs_checkpoint(tmp_path: Path) -> None:
    """Where no configuration is, a note says what one elsewhere must say."""
    anyckpt.convert(SALM, tmp_path / "run.ckpt")
    done = put(tmp_path / "run.ckpt", tmp_path / "heard.ckpt", {"perception": nemo("tdt")})
    assert any("there is no configuration here: what it says of perception.encoder" in note for note in done.notes)
    heard = {name.removeprefix("state_dict."): array for name, array in arrays(tmp_path / "heard.ckpt").items()}
    assert same(inside(heard, "perception.encoder."), inside(arrays(nemo("tdt")), "encoder."))


@pytest.mark.parametrize(
    ("told", "said"),
    [
        ("perception", "MODULE=PATH, found perception[)]"),
        ("=asr.nemo", "MODULE=PATH, found =asr.nemo[)]"),
        ("perception=", "MODULE=PATH, found perception=[)]"),
        ("", "MODULE=PATH, found nothing[)]"),
        (["llm=a", "llm=b"], "--put gives llm two times"),
        (["llm=a", "llm.x=b"], "--put gives llm.x with llm and alone"),
        (["llm.x=a", "llm=b"], "--put gives llm.x with llm and alone"),
    ],
)
def test_what_cannot_be_understood(told: str | list[str], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        ConvertOptions(to="hf", put=told)


@pytest.mark.parametrize(
    ("module", "options"),
    [
        ("llm", {"module": "perception"}),
        ("llm", {"include": ["perception*"]}),
        ("perception", {"exclude": ["perception.encoder.*", "perception.preprocessor.*"]}),
    ],
)
def test_what_is_put_in_must_be_taken(module: str, options: dict[str, Any], tmp_path: Path) -> None:
    others = {"llm": LLAMA, "perception": nemo("tdt")}
    with pytest.raises(UsageError, match=f"--put {module} is for what is not taken"):
        put(SALM, tmp_path / "out", {module: others[module]}, **options)
    assert not (tmp_path / "out").exists()


def test_what_is_put_in_may_be_taken_alone(tmp_path: Path) -> None:
    put(SALM, tmp_path / "out", {"perception": nemo("tdt")}, module="perception.encoder")
    assert same(arrays(tmp_path / "out"), inside(arrays(nemo("tdt")), "encoder."))


def test_the_head_that_is_not_taken(tmp_path: Path) -> None:
    hybrid = fixture_path("nemo/asr_hybrid_v3_0_0/model.nemo")
    with pytest.raises(UsageError, match="--put ctc_decoder is for what is not taken"):
        put(hybrid, tmp_path / "out", {"ctc_decoder": hybrid}, family="parakeet-tdt")
    put(hybrid, tmp_path / "out", {"ctc_decoder": hybrid}, family="parakeet-ctc")


def test_what_does_not_go_together(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--optimizer keep carries the state of weights that --put replaces"):
        ConvertOptions(to="hf", put="llm=a", optimizer="keep")
    with pytest.raises(FormatError):
        put(SALM, tmp_path / "out", {"perception": tmp_path / "nothing.nemo"})
    assert not (tmp_path / "out").exists()


def test_the_source_of_a_module_is_not_overwritten(tmp_path: Path) -> None:
    shutil.copy(nemo("tdt"), tmp_path / "asr.nemo")
    with pytest.raises(UsageError):
        put(nemo("tdt"), tmp_path / "asr.nemo", {"encoder": tmp_path / "asr.nemo"}, overwrite=True)
