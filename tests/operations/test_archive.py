"""Unpacking, packing and editing ``.nemo`` archives."""

from __future__ import annotations

import hashlib
import io
import os
import tarfile
from pathlib import Path

import pytest
from tests.support import assert_tensors_equal_expected, expected_of, fixture_path

from anyckpt.errors import FormatError, OutputError, UnsafeError, UsageError
from anyckpt.formats.nemo import FORMAT
from anyckpt.formats.registry import look_at
from anyckpt.operations.archive import edit, pack, parse_setting, unpack
from anyckpt.storage.tar_headers import tar_end, tar_header

NAMES = ["nemo1_basic_v3_0_0", "nemo1_dist_tp2", "nemo1_mp_tp2_pp2", "asr_ctc_conformer_v3_0_0"]


def fixture(name: str) -> Path:
    return next(fixture_path(f"nemo/{name}").glob("*.nemo"))


def contents(path: Path) -> dict[str, bytes]:
    with tarfile.open(path) as tar:
        return {m.name: tar.extractfile(m).read() for m in tar.getmembers() if m.isfile()}  # type: ignore[union-attr]


def files(path: Path) -> dict[str, bytes]:
    found = {f"./{file.relative_to(path)}": file.read_bytes() for file in path.rglob("*") if file.is_file()}
    return {name: data for name, data in found.items() if not name.endswith("anyckpt-manifest.json")}


def left_in(folder: Path) -> set[str]:
    return {name for name in os.listdir(folder) if not name.endswith("anyckpt-manifest.json")}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("compressed", [False, True])
def test_unpack_and_pack(name: str, compressed: bool, tmp_path: Path) -> None:
    source = fixture(name)
    if compressed:
        source = tmp_path / "gz.nemo"
        with tarfile.open(source, "w:gz") as tar:
            for member, data in contents(fixture(name)).items():
                info = tarfile.TarInfo(member)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    report = unpack(source, tmp_path / "x")
    assert files(tmp_path / "x") == contents(fixture(name))
    assert {f"./{member}" for member in report.members} == set(contents(fixture(name)))
    packed = pack(tmp_path / "x", tmp_path / "y.nemo")
    assert contents(tmp_path / "y.nemo") == contents(fixture(name))
    assert packed.bytes_written == (tmp_path / "y.nemo").stat().st_size
    with tarfile.open(tmp_path / "y.nemo", "r:") as tar:
        members = {m.name: m.isdir() for m in tar.getmembers()}
        assert list(members)[:2] == [".", "./model_config.yaml"]
    with tarfile.open(fixture(name), "r:") as tar:
        assert members == {m.name: m.isdir() for m in tar.getmembers()}


def test_unpack_refuses_what_climbs_out(tmp_path: Path) -> None:
    path = tmp_path / "m.nemo"
    path.write_bytes(tar_header("./model_config.yaml", 0) + tar_header("../evil", 0) + tar_end(1024))
    with pytest.raises(UnsafeError):
        unpack(path, tmp_path / "in" / "x")
    assert left_in(tmp_path) == {"m.nemo"}


def test_unpack_keeps_what_is_there(tmp_path: Path) -> None:
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "mine").write_text("mine")
    for overwrite in (False, True):
        with pytest.raises(OutputError):
            unpack(fixture(NAMES[0]), tmp_path / "x", overwrite=overwrite)
    assert (tmp_path / "x" / "mine").read_text() == "mine"


def test_unpack_a_damaged_archive(tmp_path: Path) -> None:
    whole = fixture(NAMES[0]).read_bytes()
    (tmp_path / "m.nemo").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(FormatError):
        unpack(tmp_path / "m.nemo", tmp_path / "x")
    assert left_in(tmp_path) == {"m.nemo"}
    (tmp_path / "m.nemo").write_bytes(b"")
    with pytest.raises(FormatError, match="is empty"):
        unpack(tmp_path / "m.nemo", tmp_path / "x")


@pytest.mark.parametrize(
    "missing", ["model_config.yaml", "model_weights.ckpt", "a18018d2b8d747b58c64ab1b906b0f5a_tokenizer.model"]
)
def test_pack_refuses_what_is_not_whole(missing: str, tmp_path: Path) -> None:
    unpack(fixture(NAMES[0]), tmp_path / "x")
    (tmp_path / "x" / missing).unlink()
    with pytest.raises(FormatError):
        pack(tmp_path / "x", tmp_path / "y.nemo")
    assert left_in(tmp_path) == {"x"}


def test_pack_refuses_links(tmp_path: Path) -> None:
    unpack(fixture(NAMES[0]), tmp_path / "x")
    (tmp_path / "x" / "passwords").symlink_to("/etc/passwd")
    with pytest.raises(UnsafeError, match="symbolic link"):
        pack(tmp_path / "x", tmp_path / "y.nemo")


def test_pack_of_a_file(tmp_path: Path) -> None:
    with pytest.raises(UsageError):
        pack(fixture(NAMES[0]), tmp_path / "y.nemo")


# -- edit ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_edit_changes_one_key_and_nothing_else(name: str, tmp_path: Path) -> None:
    output = tmp_path / "e.nemo"
    report = edit(fixture(name), set={"target": "my.Model"}, output=output)
    before, after = contents(fixture(name)), contents(output)
    assert list(after) == list(before) and report.changed == ("target",)
    different = {member for member in before if before[member] != after[member]}
    assert different == {"./model_config.yaml"}
    old, new = before["./model_config.yaml"].decode(), after["./model_config.yaml"].decode()
    target = expected_of(f"nemo/{name}")["config"]["target"]
    assert new == old.replace(f"target: {target}\nnemo_version", "target: my.Model\nnemo_version")


def test_edit_in_place(tmp_path: Path) -> None:
    path = tmp_path / "m.nemo"
    path.write_bytes(fixture(NAMES[0]).read_bytes())
    assert FORMAT.read(look_at(path)).config["optim"]["lr"] == 0.001
    edit(path, set={"optim.lr": 1e-5, "extra.new": [1, {"a": None}], "tokenizer.type": "bpe"})
    checkpoint = FORMAT.read(look_at(path))
    assert checkpoint.config["optim"]["lr"] == 1e-5
    assert checkpoint.config["extra"]["new"] == [1, {"a": None}]
    assert_tensors_equal_expected(checkpoint.tensors, expected_of(f"nemo/{NAMES[0]}")["tensors"])
    assert left_in(tmp_path) == {"m.nemo"}


@pytest.mark.parametrize("wanted", ["tokenizer.vocab", "vocab.txt", "531550150548489a96de02a607be6cc0_vocab.txt"])
def test_edit_swaps_an_artifact(wanted: str, tmp_path: Path) -> None:
    new = tmp_path / "new.txt"
    new.write_bytes(b"new words\n" * 200)
    report = edit(fixture(NAMES[0]), replace={wanted: new}, output=tmp_path / "e.nemo")
    member = "531550150548489a96de02a607be6cc0_vocab.txt"
    before, after = contents(fixture(NAMES[0])), contents(tmp_path / "e.nemo")
    assert after == {**before, f"./{member}": new.read_bytes()}
    assert report.changed == (member,)
    assert FORMAT.read(look_at(tmp_path / "e.nemo")).warnings == []


def test_edit_of_a_list_item(tmp_path: Path) -> None:
    edit(fixture("asr_ctc_conformer_v3_0_0"), set={"labels.1": "z"}, output=tmp_path / "e.nemo")
    assert FORMAT.read(look_at(tmp_path / "e.nemo")).config["labels"] == [" ", "z", "b", "c", "'"]


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({}, UsageError, "nothing to change"),
        ({"set": {"no.such.key": 1}}, UsageError, "has no 'no'"),
        ({"set": {"dim.deeper": 1}}, UsageError, "found the value 4"),
        ({"set": {"tokenizer.model": "nemo:gone"}}, FormatError, "refers to 'gone'"),
        ({"replace": {"nothing.txt": "x"}}, UsageError, "no artifact is called 'nothing.txt'"),
        ({"replace": {"model_weights.ckpt": "x"}}, UsageError, "no artifact"),
        ({"replace": {"model_config.yaml": "x"}}, UsageError, "no artifact"),
    ],
)
def test_edits_that_are_refused(
    changes: dict[str, dict[str, str]], error: type[Exception], message: str, tmp_path: Path
) -> None:
    path = tmp_path / "m.nemo"
    path.write_bytes(fixture(NAMES[0]).read_bytes())
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    with pytest.raises(error, match=message):
        edit(path, **changes)  # type: ignore[arg-type]
    assert hashlib.sha256(path.read_bytes()).hexdigest() == digest and left_in(tmp_path) == {"m.nemo"}


def test_missing_replacement_file(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="cannot be opened"):
        edit(fixture(NAMES[0]), replace={"vocab.txt": tmp_path / "gone"}, output=tmp_path / "e.nemo")
    assert left_in(tmp_path) == set()


def test_ambiguous_artifact(tmp_path: Path) -> None:
    members = contents(fixture(NAMES[0]))
    members["./" + "0" * 32 + "_vocab.txt"] = b"another"
    path = tmp_path / "m.nemo"
    with tarfile.open(path, "w:") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    with pytest.raises(UsageError, match="several artifacts"):
        edit(path, replace={"vocab.txt": path})


def test_edit_does_not_read_weights_when_planning(tmp_path: Path) -> None:
    """A refused edit of a huge archive costs no more than its headers."""
    path = tmp_path / "m.nemo"
    config = contents(fixture(NAMES[0]))["./model_config.yaml"]
    config = config.replace(b"nemo:", b"")
    with open(path, "wb") as file:
        file.write(tar_header("./model_config.yaml", len(config)) + config + bytes(-len(config) % 512))
        file.write(tar_header("./model_weights.ckpt", 100 << 30))
        file.seek(100 << 30, 1)
        file.write(tar_end(0))
    with pytest.raises(UsageError):
        edit(path, set={"no.such": 1})


def test_directory_is_not_an_archive(tmp_path: Path) -> None:
    for change in (lambda: unpack(tmp_path, tmp_path / "x"), lambda: edit(tmp_path, set={"a": 1})):
        with pytest.raises(UsageError, match="is a directory"):
            change()


def test_settings_are_yaml() -> None:
    assert parse_setting("a.b=1e-5") == ("a.b", 1e-5)
    assert parse_setting("a=null") == ("a", None)
    assert parse_setting("a=[1, x]") == ("a", [1, "x"])
    assert parse_setting("a=b=c") == ("a", "b=c")
    assert parse_setting("a=") == ("a", None)
    for text in ("a", "=1"):
        with pytest.raises(UsageError):
            parse_setting(text)
    with pytest.raises(FormatError):
        parse_setting("a=[1")
