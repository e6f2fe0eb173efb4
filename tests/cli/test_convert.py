"""``anyckpt convert``: its JSON contract, dry runs, options, refusals."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import stat
from pathlib import Path

import pytest
from tests.cli.runner import Runner
from tests.support import fixture_path

import anyckpt as api

LLAMA = "families/llama/hf"


def test_the_json_contract(anyckpt: Runner, tmp_path: Path) -> None:
    out = tmp_path / "out"
    found = anyckpt("convert", fixture_path(LLAMA), out, "--to", "nemo", "--dtype", "bf16", "--json").json
    assert found["output"] == str(out)
    assert found["format"] == "nemo"
    assert found["tensors"] == 15
    assert found["bytes_written"] == out.stat().st_size
    assert found["bytes_read"] > 0
    assert found["seconds"] > 0
    assert found["peak_rss_bytes"] > 1 << 20
    assert all(set(entry) == {"name", "reason"} for entry in found["ignored"])
    assert not any("weight" in entry["name"] for entry in found["ignored"])
    assert found["casts"] == {"float32 -> bfloat16": 15}


def test_the_text_says_what_was_done(anyckpt: Runner, tmp_path: Path) -> None:
    found = anyckpt("convert", fixture_path(LLAMA), tmp_path / "out.nemo", "--to", "nemo", "--dtype", "bf16")
    assert found.code == 0
    assert "cast float32 -> bfloat16: 15 tensors" in found.out
    assert f"{tmp_path / 'out.nemo'}: nemo, 15 tensors, " in found.out
    assert "peak memory" in found.out


@pytest.mark.parametrize("target", ["hf", "safetensors", "torch", "lightning", "dcp", "megatron-core", "nemo", "nemo2"])
def test_a_dry_run_writes_nothing_and_plans_what_a_run_does(anyckpt: Runner, tmp_path: Path, target: str) -> None:
    words = ("convert", fixture_path(LLAMA), tmp_path / "out", "--to", target, "--json")
    planned = anyckpt(*words, "--dry-run").json
    assert planned["dry_run"] is True
    assert not list(tmp_path.iterdir())
    text = anyckpt(*words[:-1], "--dry-run").out
    assert "nothing is written" in text
    assert not list(tmp_path.iterdir())
    done = anyckpt(*words).json
    assert done["dry_run"] is False
    for key in ("output", "format", "tensors", "bytes_written", "ignored", "casts", "notes"):
        assert planned[key] == done[key], key
    written = {f["path"]: f["bytes"] for f in planned["files"]}
    for name, size in written.items():
        assert (tmp_path / "out" / name if name else tmp_path / "out").stat().st_size == size


def test_an_existing_destination_is_refused_and_kept(anyckpt: Runner, tmp_path: Path) -> None:
    out = tmp_path / "out.safetensors"
    out.write_bytes(b"mine")
    words = ("convert", fixture_path(LLAMA), out, "--to", "safetensors")
    assert "--overwrite" in anyckpt(*words).error
    assert "--overwrite" in anyckpt(*words, "--dry-run").error
    assert out.read_bytes() == b"mine"
    assert anyckpt(*words, "--overwrite").code == 0
    assert not api.diff(fixture_path(LLAMA), out, weights_only=True)


def test_overwriting_replaces_checkpoints_only(anyckpt: Runner, tmp_path: Path) -> None:
    out = tmp_path / "home"
    out.mkdir()
    (out / "thesis.txt").write_text("years of work")
    words = ("convert", fixture_path(LLAMA), out, "--to", "hf", "--overwrite")
    assert "is a directory that holds something else" in anyckpt(*words).error
    assert (out / "thesis.txt").read_text() == "years of work"
    (out / "thesis.txt").unlink()
    assert anyckpt(*words).code == 0
    assert anyckpt(*words).code == 0


@pytest.mark.parametrize("where", ["same", "inside", "around", "link"])
def test_the_source_is_never_written_to(anyckpt: Runner, tmp_path: Path, where: str) -> None:
    source = tmp_path / "a/model"
    source.parent.mkdir()
    os.symlink(fixture_path(LLAMA), tmp_path / "other")
    import shutil

    shutil.copytree(fixture_path(LLAMA), source)
    (tmp_path / "link").symlink_to(source)
    out = {"same": source, "inside": source / "x", "around": source.parent, "link": tmp_path / "link"}[where]
    before = sorted(path.name for path in source.iterdir())
    assert "choose" in anyckpt("convert", source, out, "--to", "hf", "--overwrite").error
    assert sorted(path.name for path in source.iterdir()) == before


def test_include_and_exclude_choose_by_source_names(anyckpt: Runner, tmp_path: Path) -> None:
    out = tmp_path / "out.safetensors"
    found = anyckpt(
        "convert", fixture_path(LLAMA), out, "--to", "safetensors",
        "--include", "model.layers.*", "--include", "lm_head.*", "--exclude", "*.mlp.*", "--json",
    ).json  # fmt: skip
    names = set(api.open(out).tensors)
    assert "lm_head.weight" in names
    assert "model.layers.1.self_attn.q_proj.weight" in names
    assert not any(".mlp." in name or "embed" in name for name in names)
    assert found["tensors"] == len(names) == 13
    left_out = {entry["name"]: entry["reason"] for entry in found["ignored"]}
    assert sum(name.endswith(".weight") for name in left_out) == 8
    assert "--exclude" in left_out["model.layers.0.mlp.up_proj.weight"]


def test_choices_that_leave_nothing_are_errors(anyckpt: Runner, tmp_path: Path) -> None:
    words = ("convert", fixture_path(LLAMA), tmp_path / "out", "--to", "torch")
    assert "'nonsense.*'" in anyckpt(*words, "--include", "nonsense.*").error
    assert "leave no weight" in anyckpt(*words, "--exclude", "*").error
    assert not list(tmp_path.iterdir())


def test_what_matches_nothing_to_exclude_is_told(anyckpt: Runner, tmp_path: Path) -> None:
    words = (fixture_path(LLAMA), tmp_path / "out", "--exclude", "*.mpl.*", "--exclude", "lm_head.*")
    told = "--exclude '*.mpl.*' matches no tensor and leaves out nothing: names are such as lm_head.weight\n"
    assert anyckpt("convert", *words, "--to", "safetensors").err.count(told) == 1
    mean = ("average", fixture_path(LLAMA), fixture_path(LLAMA), "-o", tmp_path / "mean", *words[2:])
    assert anyckpt(*mean).err.count(told) == 1


def test_a_part_of_a_model_is_no_model_of_its_family(anyckpt: Runner, tmp_path: Path) -> None:
    words = ("convert", fixture_path(LLAMA), tmp_path / "out", "--to", "megatron-core", "--exclude", "*.layers.1.*")
    assert "layer 1 is missing" in anyckpt(*words).error
    assert not list(tmp_path.iterdir())


def test_weights_are_sharded_by_size(anyckpt: Runner, tmp_path: Path) -> None:
    words = ("convert", fixture_path(LLAMA), tmp_path / "out", "--to", "hf", "--max-shard-size", "50kB")
    assert anyckpt(*words).code == 0
    shards = sorted((tmp_path / "out").glob("model-*.safetensors"))
    assert len(shards) > 3
    assert all(shard.stat().st_size < 55_000 for shard in shards)
    assert "--max-shard-size" in anyckpt(*words[:-1], "5 parsecs").error


def test_a_size_that_a_format_does_not_divide_by_is_said(anyckpt: Runner, tmp_path: Path) -> None:
    words = ("convert", fixture_path(LLAMA), tmp_path / "out.safetensors", "--to", "safetensors", "--max-shard-size")
    assert "does not divide" in anyckpt(*words, "50kB", "--dry-run").err
    assert "does not divide" not in anyckpt(*words, "5GB", "--dry-run").err


@pytest.mark.parametrize("target", ["safetensors", "torch", "dcp"])
def test_a_configuration_that_has_no_place_is_said(target: str, anyckpt: Runner, tmp_path: Path) -> None:
    done = anyckpt("convert", fixture_path(LLAMA), tmp_path / "out", "--to", target, "--json").json
    assert any("no place for the" in note and "configuration" in note for note in done["notes"])
    again = anyckpt("convert", tmp_path / "out", tmp_path / "again", "--to", target, "--json").json
    assert not any("no place" in note for note in again["notes"]), "it has none that could be lost"


def test_the_configuration_tells_the_type_that_weights_were_cast_to(anyckpt: Runner, tmp_path: Path) -> None:
    for target in ("hf", "nemo"):
        assert anyckpt("convert", fixture_path(LLAMA), tmp_path / target, "--to", target, "--dtype", "bf16").code == 0
    assert anyckpt("convert", tmp_path / "nemo", tmp_path / "back", "--to", "hf").code == 0
    for folder in ("hf", "back"):
        config = json.loads((tmp_path / folder / "config.json").read_text())
        assert {config.get("dtype"), config.get("torch_dtype")} - {None} == {"bfloat16"}
    assert not api.diff(tmp_path / "hf", tmp_path / "back")


def test_configuration_tokenizer_and_family_can_be_handed_in(anyckpt: Runner, tmp_path: Path) -> None:
    hf = fixture_path(LLAMA)
    bare = hf / "model.safetensors"
    target = ("--to", "nemo2")
    assert "--config" in anyckpt("convert", bare, tmp_path / "out", *target).error
    assert "--config" in anyckpt("convert", bare, tmp_path / "out", *target, "--family", "llama").error
    assert not list(tmp_path.iterdir())
    words = ("convert", bare, tmp_path / "out", *target, "--config", hf / "config.json", "--tokenizer", hf)
    assert anyckpt(*words).code == 0
    assert not api.diff(hf, tmp_path / "out")
    tokenizer = api.open(tmp_path / "out").tokenizer
    assert tokenizer is not None
    assert any(s.read_all() == (hf / "tokenizer.json").read_bytes() for s in tokenizer.files.values())


@pytest.mark.parametrize(
    ("option", "value", "text"),
    [
        ("--config", "nothing.json", "nothing.json"),
        ("--tokenizer", "nothing", "does not exist"),
        ("--memory", "1 parsec", "--memory"),
        ("--memory", "4MB", "give --memory 16MiB"),
        ("--family", "nonsense", "unknown model family"),
        ("--tokenizer", str(fixture_path(LLAMA) / "config.json"), "is not a tokenizer"),
    ],
)
def test_unusable_options_are_errors(anyckpt: Runner, tmp_path: Path, option: str, value: str, text: str) -> None:
    given = str(tmp_path / value) if "nothing" in value else value
    assert text in anyckpt("convert", fixture_path(LLAMA), tmp_path / "out", "--to", "nemo", option, given).error
    assert not list(tmp_path.iterdir())


def test_an_unknown_target_lists_the_known_ones(anyckpt: Runner, tmp_path: Path) -> None:
    shown = anyckpt("convert", fixture_path(LLAMA), tmp_path / "out", "--to", "onnx").error
    assert "megatron-core" in shown
    assert "nemo2" in shown


def test_training_state_is_dropped_and_said_or_kept(anyckpt: Runner, tmp_path: Path) -> None:
    source = fixture_path("mcore/dcp_fsdp_w2/ckpt")
    stored = api.open(source)
    dropped = anyckpt("convert", source, tmp_path / "kept", "--to", "torch", "--optimizer", "keep", "--json").json
    kept = api.open(tmp_path / "kept")
    assert set(kept.tensors) == set(stored.tensors)
    assert dropped["tensors"] == len(stored.tensors)


def test_a_missing_parent_folder_is_made_or_refused_in_one_line(anyckpt: Runner, tmp_path: Path) -> None:
    found = anyckpt("convert", fixture_path(LLAMA), tmp_path / "a/b/out.pt", "--to", "torch")
    assert found.code == 0 or found.error


def test_an_unwritable_destination_is_one_line(anyckpt: Runner) -> None:
    assert "/proc/" in anyckpt("convert", fixture_path(LLAMA), "/proc/nothing/out.pt", "--to", "torch").error


def test_overwriting_replaces_no_other_file_and_no_device(anyckpt: Runner, tmp_path: Path) -> None:
    thesis, pipe = tmp_path / "thesis.tex", tmp_path / "pipe"
    thesis.write_text("years of work")
    os.mkfifo(pipe)
    for path in (thesis, pipe):
        words = ("convert", fixture_path(LLAMA), path, "--to", "safetensors", "--overwrite")
        assert "is a file that is not a checkpoint" in anyckpt(*words).error
    assert thesis.read_text() == "years of work"
    assert stat.S_ISFIFO(pipe.stat().st_mode)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["pipe", "thesis.tex"]


@pytest.mark.parametrize("name", ["damaged.nemo", "without_suffix"])
def test_overwriting_replaces_a_damaged_checkpoint(anyckpt: Runner, tmp_path: Path, name: str) -> None:
    out = tmp_path / name
    words = ("convert", fixture_path(LLAMA), out, "--to", "nemo", "--overwrite")
    assert anyckpt(*words).code == 0
    out.write_bytes(bytes(100))
    assert anyckpt(*words).code == 0
    assert not api.diff(fixture_path(LLAMA), out, weights_only=True)


@pytest.mark.parametrize("words", [(), ("--optimizer", "keep")])
def test_a_tensor_that_its_parts_alone_do_not_make_is_refused(
    anyckpt: Runner, tmp_path: Path, words: tuple[str, ...]
) -> None:
    source = fixture_path("legacy/zoo_kinds/zip.pt")
    composite = set(api.open(source).objects)
    assert composite
    output = tmp_path / "m.safetensors"
    error = anyckpt("convert", source, output, "--to", "safetensors", *words).error
    assert any(f"tensor '{name}'" in error for name in composite)
    assert "leave it out with --exclude" in error
    assert not output.exists()


def test_an_impossible_configuration_names_its_file(anyckpt: Runner, tmp_path: Path) -> None:
    source = tmp_path / "model"
    shutil.copytree(fixture_path(LLAMA), source)
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "num_attention_heads": 0}))
    error = anyckpt("convert", source, tmp_path / "out", "--to", "nemo").error
    assert error.startswith(f"{source}: the configuration's num_attention_heads")


def test_sharded_is_refused_where_it_means_nothing(anyckpt: Runner, tmp_path: Path) -> None:
    words = ("convert", fixture_path(LLAMA), tmp_path / "out", "--sharded", "--to")
    assert "--sharded means nothing for torch" in anyckpt(*words, "torch").error
    assert not list(tmp_path.iterdir())
    assert anyckpt(*words, "lightning").code == 0


def test_parts_of_different_types_can_be_cast(anyckpt: Runner, tmp_path: Path) -> None:
    """As the error for them says."""
    source, plain = tmp_path / "mixed", api.open(fixture_path(LLAMA))
    tensors = {name: t.cast("fp16") if "k_proj" in name else t for name, t in plain.tensors.items()}
    api.convert(dataclasses.replace(plain, tensors=tensors), source, to="hf")
    words = ("convert", source, tmp_path / "out", "--to", "megatron-core")
    assert anyckpt(*words).error.endswith("; cast all with --dtype")
    assert anyckpt(*words, "--dtype", "fp16").code == 0
    assert anyckpt("verify", source).code == 0
    api.convert(fixture_path(LLAMA), tmp_path / "plain", to="megatron-core", dtype="fp16")
    assert anyckpt("diff", tmp_path / "out", tmp_path / "plain").code == 0


@pytest.mark.parametrize("target", ["nemo", "megatron-core"])
def test_a_model_that_a_framework_cannot_have_is_named(anyckpt: Runner, tmp_path: Path, target: str) -> None:
    source = tmp_path / "model"
    shutil.copytree(fixture_path(LLAMA), source)
    config = json.loads((source / "config.json").read_text())
    config["rope_parameters"] = {"rope_type": "longrope", "rope_theta": 1e4}
    (source / "config.json").write_text(json.dumps(config))
    error = anyckpt("convert", source, tmp_path / "out", "--to", target).error
    assert error.startswith(f"{source}: ") and "cannot express this rope scaling" in error
