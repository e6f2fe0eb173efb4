"""``quantize`` as far as it goes without torch: NeMo's settings, samples, and statistics that are there already."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from tests.models.cases import facts
from tests.quantization.modelopt_cases import FIXTURES, statistics_of

import anyckpt
from anyckpt.errors import AnyckptError, FormatError, MissingLibraryError, OutputError, UsageError
from anyckpt.operations.steps.calibration_data import batches_of, cut, read_samples
from anyckpt.operations.steps.ptq_settings import read_ptq_settings
from anyckpt.quantization.statistics import Seen, Statistics, digest_of, load

SOURCE = FIXTURES / "src_llama_b" / "hf"
NEMO1 = """
inference: {greedy: false, top_k: 0, batch_size: 32, max_context_length: 48}
trainer: {devices: 8, precision: "${export.dtype}"}
model: {tensor_model_parallel_size: 8, restore_from_path: llama.nemo}
quantization:
  decoder_type: ${export.decoder_type}
  algorithm: int4_awq
  calib_dataset: cnn_dailymail
  num_calib_size: 512
  awq_block_size: 64
  sq_alpha: 1.0
  enable_kv_cache: null
export:
  decoder_type: llama
  inference_tensor_parallel: 2
  inference_pipeline_parallel: 1
  dtype: 16
  save_path: llama-${quantization.algorithm}.qnemo
  compress: false
  sample_output: true
"""
NEMO2 = {
    "quantization_config": {
        "algorithm": "fp8",
        "calibration_dataset": "texts.jsonl",
        "calibration_dataset_size": 16,
        "calibration_batch_size": 4,
        "calibration_seq_len": 128,
        "enable_kv_cache": True,
    },
    "export_config": {"path": "out", "export_format": "hf", "inference_tp": 4, "inference_pp": 2, "dtype": "bf16"},
    "calibration_tp": 2,
    "legacy_ckpt": False,
}


def test_every_key_of_nemos_file_has_an_outcome(tmp_path: Path) -> None:
    file = tmp_path / "megatron_gpt_ptq.yaml"
    file.write_text(NEMO1)
    found = read_ptq_settings(file)
    assert found.options == {
        "algorithm": "int4_awq",
        "awq_block_size": 64,
        "calib_batch_size": 32,
        "calib_dataset": "cnn_dailymail",
        "calib_sequence_length": 48,
        "compress": False,
        "decoder_type": "llama",
        "dtype": 16,
        "inference_pipeline_parallel": 1,
        "inference_tensor_parallel": 2,
        "num_calib_size": 512,
        "sq_alpha": 1.0,
    }
    stated = yaml.safe_load(NEMO1)
    keys = {f"{section}.{key}" for section, values in stated.items() for key in values}
    used = {"quantization.decoder_type", "quantization.enable_kv_cache", "inference.batch_size"}
    assert set(found.unused) <= keys
    assert keys - found.unused.keys() - used == {
        "inference.max_context_length",
        *(f"quantization.{key}" for key in stated["quantization"] if key not in ("decoder_type", "enable_kv_cache")),
        *(f"export.{key}" for key in stated["export"] if key not in ("save_path", "sample_output")),
    }


def test_nemo2_has_other_words_for_the_same() -> None:
    found = read_ptq_settings(NEMO2)
    assert found.options == {
        "algorithm": "fp8",
        "calib_batch_size": 4,
        "calib_dataset": "texts.jsonl",
        "calib_sequence_length": 128,
        "dtype": "bf16",
        "enable_kv_cache": True,
        "inference_pipeline_parallel": 2,
        "inference_tensor_parallel": 4,
        "num_calib_size": 16,
        "to": "hf",
    }
    assert set(found.unused) == {"export_config.path", "calibration_tp", "legacy_ckpt"}


@pytest.mark.parametrize(
    ("stated", "said"),
    [
        ({"quantization": {"algorithms": "fp8"}}, "quantization.algorithms is no setting"),
        ({"quantization": {"decoder_type": "gpt"}, "export": {"decoder_type": "llama"}}, "say different things"),
        ({"export": {"dtype": "${export.missing}"}}, "refers to one that is not there"),
        ({"export": {"dtype": "${export.dtype}"}}, "refers to itself"),
    ],
)
def test_a_setting_that_cannot_be_followed_is_named(stated: dict[str, Any], said: str) -> None:
    with pytest.raises(AnyckptError, match=said):
        read_ptq_settings(stated)


def test_settings_decide_what_is_written_and_options_go_before_them(tmp_path: Path) -> None:
    settings = {
        "quantization": {"algorithm": "int8_sq", "sq_alpha": 0.5, "enable_kv_cache": True, "decoder_type": "llama"},
        "export": {"dtype": 16, "inference_tensor_parallel": 2, "compress": True, "save_path": "elsewhere"},
    }
    arguments: dict[str, Any] = {"config": settings, "statistics": statistics_of("int8_sq05_b")}
    done = anyckpt.quantize(SOURCE, tmp_path / "a.qnemo", inference_tensor_parallel=1, **arguments)
    assert any("no effect has export.save_path" in note for note in done.notes)
    found = anyckpt.inspect(tmp_path / "a.qnemo").to_json()
    assert found["format"] == "trtllm"
    anyckpt.quantize(SOURCE, tmp_path / "b", compress=False, **arguments)
    config = json.loads((tmp_path / "b" / "config.json").read_text())
    assert config["mapping"]["tp_size"] == 2
    assert config["quantization"]["kv_cache_quant_algo"] == "INT8"
    assert config["dtype"] == "float16"


def test_a_gpt_keeps_its_cache_and_its_scales_from_being_small(tmp_path: Path) -> None:
    for decoder, kept, least in (("llama", "FP8", 0.0), ("gpt", None, 0.01)):
        out = tmp_path / decoder
        statistics = statistics_of("fp8_kv8_bf16_b")
        anyckpt.quantize(SOURCE, out, algorithm="fp8", statistics=statistics, decoder_type=decoder)
        config = json.loads((out / "config.json").read_text())
        assert config["quantization"]["kv_cache_quant_algo"] == kept
        tensors = anyckpt.open(out).tensors
        scales = [float(t.numpy()[0]) for name, t in tensors.items() if name.endswith("activation_scaling_factor")]
        assert bool(min(scales) == np.float32(0.01)) is (decoder == "gpt")
        assert min(scales) >= np.float32(least)


def test_null_quantizes_nothing(tmp_path: Path) -> None:
    anyckpt.quantize(SOURCE, tmp_path / "out", config={"quantization": {"algorithm": None}})
    assert json.loads((tmp_path / "out" / "config.json").read_text())["quantization"]["quant_algo"] is None


@pytest.mark.parametrize("said", [{}, {"calib_dataset": "texts.txt"}])
def test_a_form_without_activations_is_written_without_any(said: dict[str, Any], tmp_path: Path) -> None:
    model = FIXTURES.parent / "families/llama/hf"
    done = anyckpt.quantize(model, tmp_path / "out", to="hf", algorithm="int8", **said)
    anyckpt.convert(model, tmp_path / "other", to="hf", quantize="int8")
    assert anyckpt.diff(tmp_path / "out", tmp_path / "other").equal
    assert any("calib_dataset has no effect" in note for note in done.notes) == bool(said)


def test_without_the_libraries_it_says_which_extra_brings_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.startswith("anyckpt.torch.calibration")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "transformers", None)
    monkeypatch.setitem(sys.modules, "torch", None)
    text = tmp_path / "text.txt"
    text.write_text("words")
    with pytest.raises(MissingLibraryError, match=r"pip install 'anyckpt\[quantize\]'"):
        anyckpt.quantize(SOURCE, tmp_path / "out", algorithm="fp8", calib_dataset=text)
    assert not (tmp_path / "out").exists()


# -- statistics ------------------------------------------------------------------------------------------------


def test_statistics_come_back_from_their_file(tmp_path: Path) -> None:
    made = statistics_of("w4a8_awq_b")
    made.save(tmp_path / "seen")
    back = load(tmp_path / "seen")
    assert (back.model, back.computed_in, back.group_size) == (made.model, made.computed_in, made.group_size)
    assert back.shared == made.shared and dict(back.caches) == dict(made.caches)
    assert list(back.modules) == list(made.modules)
    for name, seen in made.modules.items():
        for part in ("inputs", "columns", "losses", "scales"):
            np.testing.assert_array_equal(getattr(back.modules[name], part), getattr(seen, part))
    assert {path.name for path in tmp_path.iterdir()} == {"seen", ".seen.anyckpt-manifest.json"}


def test_a_file_that_is_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="is no file of calibration statistics"):
        load(SOURCE / "model.safetensors")
    statistics = statistics_of("fp8_kv8_bf16_b")
    first = next(iter(statistics.modules))
    broken = Seen(np.full(128, np.nan, np.float32), statistics.modules[first].columns, 3)
    Statistics("", "bfloat16", {first: broken}).save(tmp_path / "nan")
    with pytest.raises(FormatError, match="is no file of calibration statistics"):
        load(tmp_path / "nan")


@pytest.mark.parametrize(
    "change",
    [
        {"scales": np.ones(3, np.float32)},
        {"scales": np.zeros(128, np.float32)},
        {"scales": np.ones(128)},
        {"columns": np.ones(5, np.float32)},
        {"inputs": -np.ones(128, np.float32)},
        {"losses": np.arange(40.0)},
        {"losses": np.zeros(0)},
    ],
)
def test_numbers_that_no_calibration_gives_are_refused(change: dict[str, Any], tmp_path: Path) -> None:
    made = statistics_of("w4a8_awq_b")
    first = next(name for name in made.modules if "q_proj" in name)
    replace(made, modules={**made.modules, first: replace(made.modules[first], **change)}).save(tmp_path / "seen")
    with pytest.raises(FormatError, match="is no file of calibration statistics"):
        load(tmp_path / "seen")


def test_a_cache_without_a_magnitude_is_refused(tmp_path: Path) -> None:
    made = statistics_of("fp8_kv8_bf16_b")
    for pair in ((-1.0, 1.0), (1.0, float("nan")), (float("inf"), 1.0)):
        replace(made, caches=dict.fromkeys(made.caches, pair)).save(tmp_path / "seen")
        with pytest.raises(FormatError, match="is no file of calibration statistics"):
            load(tmp_path / "seen")


def test_statistics_are_saved_in_the_place_of_nothing_else(tmp_path: Path) -> None:
    """It is told before anything runs, and what is there stays."""
    folder, file = tmp_path / "folder", tmp_path / "config.json"
    folder.mkdir()
    (folder / "mine.txt").write_text("mine")
    file.write_text("mine")
    weights = tmp_path / "model.safetensors"
    weights.write_bytes((SOURCE / "model.safetensors").read_bytes())
    statistics = statistics_of("fp8_kv8_bf16_b")
    for path, said in ((folder, "is a directory"), (file, "something else"), (weights, "something else")):
        for save in (
            lambda path=path: anyckpt.quantize(SOURCE, tmp_path / "out", calib_dataset="none", save_statistics=path),
            lambda path=path: statistics.save(path),
        ):
            with pytest.raises(OutputError, match=said):
                save()
    assert (folder / "mine.txt").read_text() == file.read_text() == "mine"
    assert weights.read_bytes() == (SOURCE / "model.safetensors").read_bytes()
    for path in (tmp_path / "out", tmp_path / "out" / "seen"):
        with pytest.raises(UsageError, match="cannot be saved where the model is written"):
            anyckpt.quantize(SOURCE, tmp_path / "out", calib_dataset="none", save_statistics=path)
    for _ in range(2):
        anyckpt.quantize(
            SOURCE, tmp_path / "out", statistics=statistics, save_statistics=tmp_path / "seen", overwrite=True
        )
    assert load(tmp_path / "seen").model == statistics.model


def test_statistics_of_another_model_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="the statistics are of another model"):
        anyckpt.quantize(
            FIXTURES / "src_llama_a" / "hf", tmp_path / "a", algorithm="fp8", statistics=statistics_of("fp8_kv8_bf16_b")
        )
    changed = tmp_path / "changed"
    changed.mkdir()
    (changed / "config.json").write_bytes((SOURCE / "config.json").read_bytes())
    data = bytearray((SOURCE / "model.safetensors").read_bytes())
    start = len(data) // 2
    data[start : start + 100_000] = bytes(byte ^ 1 for byte in data[start : start + 100_000])
    (changed / "model.safetensors").write_bytes(data)
    with pytest.raises(UsageError, match="other numbers in weights of the same names"):
        anyckpt.quantize(changed, tmp_path / "b", algorithm="fp8", statistics=statistics_of("fp8_kv8_bf16_b"))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"algorithm": "int4_awq"}, "nothing of AWQ's search"),
        ({"algorithm": "int4_awq", "awq_block_size": 64}, "nothing of AWQ's search"),
        ({"algorithm": "fp8_per_channel"}, "nothing that activations decide"),
        ({"algorithm": "int8_sq", "to": "hf", "enable_kv_cache": True}, "8-bit integers"),
        ({"algorithm": "int9"}, "unknown algorithm"),
        ({"algorithm": "int8_sq", "to": "nemo"}, "not written as nemo"),
    ],
)
def test_what_statistics_cannot_be_used_for_is_said(options: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=said):
        anyckpt.quantize(SOURCE, tmp_path / "out", statistics=statistics_of("fp8_kv8_bf16_b"), **options)


def test_a_module_that_nothing_went_into_is_named(tmp_path: Path) -> None:
    whole = statistics_of("fp8_kv8_bf16_b")
    some = {name: seen for name, seen in whole.modules.items() if "o_proj" not in name}
    weights = anyckpt.open(SOURCE).weights()
    model = digest_of({f"{name}.weight": weights[f"{name}.weight"] for name in some})
    statistics = Statistics(model, whole.computed_in, some, whole.shared)
    with pytest.raises(UsageError, match=r"nothing went into model\.layers\.0\.self_attn\.o_proj"):
        anyckpt.quantize(SOURCE, tmp_path / "out", algorithm="fp8", statistics=statistics, enable_kv_cache=False)
    anyckpt.quantize(
        SOURCE,
        tmp_path / "out",
        algorithm="fp8",
        statistics=statistics,
        enable_kv_cache=False,
        quantize_exclude="*attention.dense",
    )


@pytest.mark.parametrize("group", [32, 64, 128])
def test_groups_of_any_size_come_back(group: int, tmp_path: Path) -> None:
    """ModelOpt's configuration does not say how large they are."""
    statistics = replace(statistics_of("int4_awq_b"), group_size=group)
    for number, form in enumerate(("hf", "trtllm")):
        out = tmp_path / f"q{number}"
        options: dict[str, Any] = {"statistics": statistics, "awq_block_size": group, "to": form}
        anyckpt.quantize(SOURCE, out, algorithm="int4_awq", report=tmp_path / "report.json", **options)
        assert json.loads((tmp_path / "report.json").read_text())["total"]["sqnr_db"] > 15
        assert not anyckpt.verify(out).problems
        anyckpt.convert(out, tmp_path / f"back{number}", to="hf", dtype="bf16")


@pytest.mark.parametrize("algorithm", ["fp8", "int8_sq"])
@pytest.mark.parametrize("to", ["hf", "trtllm"])
def test_the_report_has_what_calibration_saw(algorithm: str, to: str, tmp_path: Path) -> None:
    for file in ("report.json", "report.html"):
        anyckpt.quantize(
            SOURCE,
            tmp_path / "out",
            algorithm=algorithm,
            to=to,
            statistics=statistics_of("fp8_kv8_bf16_b"),
            report=tmp_path / file,
            overwrite=True,
        )
    seen = json.loads((tmp_path / "report.json").read_text())
    assert seen["total"]["sqnr_db"] > 20
    assert all(one["largest_input"] > 0 for one in seen["calibration"]["modules"])
    assert "Calibration" in (tmp_path / "report.html").read_text()


def test_the_way_back_undoes_what_was_moved_into_weights(tmp_path: Path) -> None:
    """But for what a normalization has taken in, which goes with it."""
    anyckpt.quantize(SOURCE, tmp_path / "q", algorithm="int8_sq", to="hf", statistics=statistics_of("fp8_kv8_bf16_b"))
    anyckpt.convert(tmp_path / "q", tmp_path / "back", to="hf", dtype="fp32")
    was, back = anyckpt.open(SOURCE).weights(), anyckpt.open(tmp_path / "back").weights()
    assert was.keys() == back.keys()
    for name, tensor in was.items():
        before, after = tensor.numpy().astype(np.float32), back[name].numpy()
        assert np.abs(before - after).max() <= 0.05 * np.abs(before).max(), name


# -- samples ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content", "texts", "ids"),
    [
        ("a.jsonl", '{"text": "one"}\n\n{"text": "two"}\n', ("one", "two"), []),
        ("a.jsonl", '{"article": "one", "id": 3}\n', ("one",), []),
        ("a.json", '[{"text": "one"}, {"text": " "}]', ("one",), []),
        ("a.jsonl", "[1, 2]\n[3]\n", (), [[1, 2], [3]]),
        ("a.json", "[[1, 2], [3]]", (), [[1, 2], [3]]),
        ("a.json", "[1, 2, 3]", (), [[1, 2, 3]]),
        ("a.txt", "one\ntwo", ("one\ntwo",), []),
    ],
)
def test_samples_are_read(
    name: str, content: str, texts: tuple[str, ...], ids: list[list[int]], tmp_path: Path
) -> None:
    (tmp_path / name).write_text(content)
    found = read_samples(tmp_path / name)
    assert found.texts == texts
    assert [one.tolist() for one in found.ids] == ids


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.txt", b" \n", "no text to calibrate with"),
        ("a.jsonl", b'{"text": ""}\n', "no text to calibrate with"),
        ("a.jsonl", b'{"body": "x"}\n', "record 1 has no text"),
        ("a.jsonl", b'{"text": 3}\n', "record 1 has no text"),
        ("a.jsonl", b'{"text": "x"}\n{"text\n', "line 2 is not valid JSON"),
        ("a.jsonl", b"[1, -2]\n", "neither an object with a text nor a list of token ids"),
        ("a.jsonl", b'[1]\n{"text": "x"}\n', "has texts and token ids"),
        ("a.txt", b"\xff\xfe\x00", "is no text in UTF-8"),
        ("a.npy", b"no array", "is no array of numpy"),
        ("cnn_dailymail", None, "nothing is fetched"),
        ("nothing.txt", None, "does not exist"),
    ],
)
def test_what_is_no_sample_is_told(name: str, content: bytes | None, said: str, tmp_path: Path) -> None:
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(AnyckptError, match=said):
        read_samples(path if name != "cnn_dailymail" else name)


@pytest.mark.parametrize("count", [10**12, 10**24, 4, -3])
def test_an_array_without_its_numbers_is_told(count: int, tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.arange(3))
    whole = (tmp_path / "a.npy").read_bytes()
    stated = f"({count},), }}".encode()
    begin, end = whole.index(b"(3,), }"), whole.index(b"\n")
    (tmp_path / "a.npy").write_bytes(whole[:begin] + stated.ljust(end - begin) + whole[end:])
    with pytest.raises(FormatError, match="is no array of numpy"):
        read_samples(tmp_path / "a.npy")


def test_a_row_of_floats_is_no_row_of_ids(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.ones((2, 3)))
    with pytest.raises(FormatError, match="is no array of token ids"):
        read_samples(tmp_path / "a.npy")
    np.save(tmp_path / "b.npy", np.ones((0, 3), np.int64))
    with pytest.raises(UsageError, match="no text to calibrate with"):
        read_samples(tmp_path / "b.npy")


@given(
    st.lists(st.lists(st.integers(0, 99), max_size=12), max_size=20),
    st.integers(1, 8),
    st.integers(1, 5),
)
def test_batches_have_every_token_and_no_padding(sequences: list[list[int]], length: int, size: int) -> None:
    batches = batches_of(sequences, length, size)
    found = sorted(row.tolist() for batch in batches for row in batch)
    assert found == sorted(one[:length] for one in sequences if one)
    assert all(len(batch) <= size for batch in batches)


@given(st.lists(st.integers(0, 99), min_size=1, max_size=40), st.integers(1, 9))
def test_a_row_is_cut_into_whole_samples(ids: list[int], length: int) -> None:
    parts = [list(part) for part in cut(ids, length)]
    whole = len(ids) // length * length
    assert [one for part in parts for one in part] == ids[: whole or len(ids)]
    assert len(parts) == 1 or all(len(part) == length for part in parts)


def test_statistics_are_of_the_layers_that_are_left(tmp_path: Path) -> None:
    """Layers that get other numbers have not the scales of those that had these before."""
    source, whole = FIXTURES / "src_llama_a" / "hf", statistics_of("fp8_a")
    how: dict[str, Any] = {"to": "hf", "quantize": "fp8"}
    with pytest.raises(UsageError, match="the statistics are of another model"):
        anyckpt.convert(source, tmp_path / "out", statistics=whole, drop_layers="0", **how)
    anyckpt.convert(source, tmp_path / "less", to="hf", drop_layers="0")
    seen = {name.replace(".1.", ".0."): own for name, own in whole.modules.items() if ".0." not in name}
    weights = anyckpt.open(tmp_path / "less").weights()
    model = digest_of({f"{name}.weight": weights[f"{name}.weight"] for name in seen})
    statistics = Statistics(model, whole.computed_in, seen, ())
    anyckpt.convert(tmp_path / "less", tmp_path / "expected", statistics=statistics, **how)
    anyckpt.convert(source, tmp_path / "out", statistics=statistics, drop_layers="0", **how)
    assert facts(anyckpt.open(tmp_path / "out").tensors) == facts(anyckpt.open(tmp_path / "expected").tensors)


def test_statistics_are_of_names_and_rows_as_the_user_gives_them(tmp_path: Path) -> None:
    source, statistics = FIXTURES / "src_llama_a" / "hf", statistics_of("fp8_a")
    how: dict[str, Any] = {"to": "hf", "quantize": "fp8", "statistics": statistics}
    anyckpt.convert(source, tmp_path / "names.safetensors", to="safetensors", rename="model.*=net.*")
    names = {"config": source / "config.json", "rename": "net.*=model.*"}
    anyckpt.convert(tmp_path / "names.safetensors", tmp_path / "named", **names, **how)
    anyckpt.convert(source, tmp_path / "expected", **how)
    expected = facts(anyckpt.open(tmp_path / "expected").tensors)
    assert facts(anyckpt.open(tmp_path / "named").tensors) == expected
    rows = anyckpt.LayoutRequest(vocab_size=anyckpt.open(source).config["vocab_size"] + 5, new_rows="mean")
    anyckpt.convert(source, tmp_path / "rows", layout=rows, **how)
    found = facts(anyckpt.open(tmp_path / "rows").tensors)
    assert {name for name in found if found[name] != expected[name]} == {"lm_head.weight", "model.embed_tokens.weight"}
