"""``anyckpt unpack``, ``pack`` and ``edit``."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from tests.cli.runner import Runner
from tests.support import fixture_path

import anyckpt as api

NEMO = "nemo/nemo1_basic_v3_0_0/toy.nemo"


def test_unpacking_and_packing_gives_an_equal_archive(anyckpt: Runner, tmp_path: Path) -> None:
    folder, again = tmp_path / "folder", tmp_path / "again.nemo"
    done = anyckpt("unpack", fixture_path(NEMO), folder, "--json").json
    assert set(done) == {"output", "members", "changed", "bytes_written", "seconds"}
    assert (folder / "model_config.yaml").exists()
    assert (folder / "model_weights.ckpt").exists()
    text = anyckpt("pack", folder, again)
    assert text.code == 0
    assert f"{again}: {len(done['members'])} files, " in text.out
    assert anyckpt("diff", fixture_path(NEMO), again, "--raw").code == 0
    assert api.open(again).config == api.open(fixture_path(NEMO)).config


def test_editing_changes_what_was_asked_for_and_nothing_else(anyckpt: Runner, tmp_path: Path) -> None:
    archive, vocabulary = tmp_path / "m.nemo", tmp_path / "new.txt"
    shutil.copy(fixture_path(NEMO), archive)
    vocabulary.write_text("one\ntwo\n")
    found = anyckpt(
        "edit", archive, "--set", "optim.lr=1e-5", "--set", "extra.optional=[1, null]",
        "--replace-artifact", f"child.vocab_file={vocabulary}",
    )  # fmt: skip
    assert found.code == 0, found.err
    assert "changed: optim.lr" in found.out
    before, after = api.open(fixture_path(NEMO)), api.open(archive)
    assert after.config["optim"]["lr"] == 1e-5
    assert after.config["extra"]["optional"] == [1, None]
    changed = [
        name for name, source in after.artifacts.items() if source.read_all() != before.artifacts[name].read_all()
    ]
    assert [name.endswith("child_vocab.txt") for name in changed] == [True]
    found_change = api.diff(before, after, raw=True)
    assert not (found_change.different or found_change.only_in_a or found_change.only_in_b or found_change.state)
    assert {setting.name.partition(".")[0] for setting in found_change.configuration} == {"optim", "extra"}


def test_editing_can_leave_the_archive_alone(anyckpt: Runner, tmp_path: Path) -> None:
    archive, out = tmp_path / "m.nemo", tmp_path / "out.nemo"
    shutil.copy(fixture_path(NEMO), archive)
    data = archive.read_bytes()
    assert anyckpt("edit", archive, "--set", "dim=5", "-o", out).code == 0
    assert archive.read_bytes() == data
    assert api.open(out).config["dim"] == 5
    assert "--overwrite" in anyckpt("edit", archive, "--set", "dim=6", "-o", out).error


@pytest.mark.parametrize(
    ("words", "text"),
    [
        ((), "nothing to change"),
        (("--set", "dim"), "key=value"),
        (("--set", "=5"), "key=value"),
        (("--set", "dim=[1"), "dim"),
        (("--set", "nothing.here=5"), "nothing"),
        (("--replace-artifact", "vocab"), "name=path"),
        (("--replace-artifact", "tokenizer.vocab=/nothing/here"), "/nothing/here"),
        (("--replace-artifact", "nothing=/etc/hostname"), "nothing"),
    ],
)
def test_edits_that_cannot_be_done_change_nothing(
    anyckpt: Runner, tmp_path: Path, words: tuple[str, ...], text: str
) -> None:
    archive = tmp_path / "m.nemo"
    shutil.copy(fixture_path(NEMO), archive)
    data = archive.read_bytes()
    assert text in anyckpt("edit", archive, *words).error
    assert archive.read_bytes() == data
    assert [path.name for path in tmp_path.iterdir()] == ["m.nemo"]


def test_an_existing_destination_is_refused(anyckpt: Runner, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    assert anyckpt("unpack", fixture_path(NEMO), folder).code == 0
    assert "--overwrite" in anyckpt("unpack", fixture_path(NEMO), folder).error
    assert anyckpt("unpack", fixture_path(NEMO), folder, "--overwrite").code == 0
    (tmp_path / "mine.nemo").write_bytes(b"mine")
    assert "--overwrite" in anyckpt("pack", folder, tmp_path / "mine.nemo").error
    assert (tmp_path / "mine.nemo").read_bytes() == b"mine"


def test_what_is_no_archive_is_an_error(anyckpt: Runner, tmp_path: Path) -> None:
    assert "does not exist" in anyckpt("unpack", tmp_path / "nothing.nemo", tmp_path / "out").error
    assert "config.json" not in anyckpt("pack", fixture_path("families/llama/hf"), tmp_path / "out.nemo").out
    assert "model_config.yaml" in anyckpt("pack", fixture_path("families/llama/hf"), tmp_path / "out.nemo").error
    assert not list(tmp_path.iterdir())
