"""``anyckpt verify`` against digests that a publisher gives, and what it says of contents that nothing proves."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.cli.runner import Runner
from tests.support import fixture_path

import anyckpt as api

LLAMA = "families/llama/hf"
NEMO = "nemo/nemo1_basic_v3_0_0/toy.nemo"


def digest(path: Path, algorithm: str = "sha256") -> str:
    return hashlib.new(algorithm, path.read_bytes()).hexdigest()


def blob_id(path: Path) -> str:
    data = path.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def copied(tmp_path: Path) -> Path:
    shutil.copytree(fixture_path(LLAMA), tmp_path / "llama")
    return tmp_path / "llama"


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def plain(folder: Path) -> str:
    return "".join(f"{digest(file)}  {file.name}\n" for file in sorted(folder.iterdir()))


def starred(folder: Path) -> str:
    return "# made by hand\r\n" + "".join(f"{digest(file, 'sha512')} *./{file.name}\r\n" for file in folder.iterdir())


def tagged(folder: Path) -> str:
    return "".join(f"SHA256 ({file.name}) = {digest(file).upper()}\n" for file in folder.iterdir())


def of_the_folder_above(folder: Path) -> str:
    return "".join(f"{digest(file, 'md5')}  {folder.name}/{file.name}\n" for file in folder.iterdir())


def of_the_hub(folder: Path) -> str:
    rows = [{"rfilename": file.name, "size": file.stat().st_size, "blobId": blob_id(file)} for file in folder.iterdir()]
    for row in rows:
        if str(row["rfilename"]).endswith(".safetensors"):
            row["lfs"] = {"sha256": digest(folder / str(row["rfilename"])), "size": row["size"], "pointerSize": 134}  # type: ignore[assignment]
    return json.dumps({"id": "somebody/llama", "siblings": rows})


def tree_of_the_hub(folder: Path) -> str:
    rows = [
        {"type": "file", "oid": "0" * 40, "path": file.name, "lfs": {"oid": f"{digest(file)}"}}
        if file.suffix == ".safetensors"
        else {"type": "file", "oid": blob_id(file), "path": file.name}
        for file in folder.iterdir()
    ]
    return json.dumps([*rows, {"type": "directory", "oid": "1" * 40, "path": "onnx"}])


FORMS = [plain, starred, tagged, of_the_folder_above, of_the_hub, tree_of_the_hub]


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_lists_of_digests(form: Callable[[Path], str], inside: bool, anyckpt: Runner, tmp_path: Path) -> None:
    folder = copied(tmp_path)
    files = len(list(folder.iterdir()))
    text = form(folder)
    listed = (folder if inside else tmp_path) / "SHA256SUMS"
    listed.write_text(text)
    found = anyckpt("verify", folder, "--checksum", listed, "--json")
    assert found.code == 0, found.json["problems"]
    assert found.json["checked"]["published"] == files
    assert found.json["checked"]["proved"] == found.json["checked"]["tensors"] == 21
    assert found.json["unchecked"] == []
    assert f"{files} files as published" in anyckpt("verify", folder, "--checksum", listed).out
    flip(folder / "model.safetensors")
    damaged = anyckpt("verify", folder, "--checksum", listed, "--json")
    assert damaged.code == 1
    (problem,) = damaged.json["problems"]
    assert (damaged.json["checked"]["proved"], damaged.json["unchecked"]) == (0, found.json["unchecked"])
    assert problem["where"] == "model.safetensors"
    assert "is not the one of SHA256SUMS (expected " in problem["problem"]


def test_a_listed_file_that_is_missing(anyckpt: Runner, tmp_path: Path) -> None:
    folder = copied(tmp_path)
    (folder / "SHA256SUMS").write_text(plain(folder))
    (folder / "tokenizer.json").unlink()
    (folder / "more.txt").write_text("x")
    found = anyckpt("verify", folder, "--checksum", folder / "SHA256SUMS", "--json")
    assert [problem["where"] for problem in found.json["problems"]] == ["tokenizer.json"]
    assert any("more.txt" in text for text in found.json["unchecked"])


def test_a_list_of_other_files(anyckpt: Runner, tmp_path: Path) -> None:
    folder = copied(tmp_path)
    (tmp_path / "other").write_text(f"{'0' * 64}  other.bin\n")
    assert "has no digest of" in anyckpt("verify", folder, "--checksum", tmp_path / "other").error
    (tmp_path / "empty").write_text("nothing\n")
    assert "has no digests" in anyckpt("verify", folder, "--checksum", tmp_path / "empty").error
    (tmp_path / "json").write_text("{")
    assert "is no JSON" in anyckpt("verify", folder, "--checksum", tmp_path / "json").error
    assert "does not exist" in anyckpt("verify", folder, "--checksum", tmp_path / "none").error


@pytest.mark.parametrize("form", ["{0}", "{0}  toy.nemo\n", "{0}  /mnt/models/toy.nemo\nffff  x\n", "sha256:{0}\n"])
def test_a_list_for_one_file(form: str, anyckpt: Runner, tmp_path: Path) -> None:
    path = tmp_path / "toy.nemo"
    shutil.copy(fixture_path(NEMO), path)
    (tmp_path / "toy.nemo.sha256").write_text(form.format(digest(path)))
    found = anyckpt("verify", path, "--checksum", tmp_path / "toy.nemo.sha256", "--json")
    assert found.code == 0, found.json["problems"]
    assert found.json["checked"]["published"] == 1
    assert found.json["checked"]["proved"] == found.json["checked"]["tensors"]


def test_a_pointer_of_git_lfs(anyckpt: Runner, tmp_path: Path) -> None:
    path = tmp_path / "toy.nemo"
    shutil.copy(fixture_path(NEMO), path)
    (tmp_path / "git").mkdir()
    pointer = tmp_path / "git/toy.nemo"
    pointer.write_text(
        f"version https://git-lfs.github.com/spec/v1\noid sha256:{digest(path)}\nsize {path.stat().st_size}\n"
    )
    assert anyckpt("verify", path, "--checksum", pointer, "--json").json["checked"]["published"] == 1
    found = anyckpt("verify", pointer)
    assert found.code == 1
    assert "is a Git LFS pointer" in found.out


@pytest.mark.parametrize("algorithm", ["md5", "sha1", "sha256", "sha512", "blake2b"])
def test_an_expected_digest(algorithm: str, anyckpt: Runner) -> None:
    path = fixture_path(NEMO)
    value = digest(path, algorithm)
    words = [f"{algorithm}:{value}", f"{algorithm.upper()}:{value.upper()}"]
    for word in [*words, value] if algorithm != "blake2b" else words:
        assert anyckpt("verify", path, "--expect", word).code == 0
    wrong = anyckpt("verify", path, "--expect", f"{algorithm}:{'0' * len(value)}")
    assert wrong.code == 1
    assert "is not the one of --expect" in wrong.out


def test_an_expected_digest_of_a_file_of_a_folder(anyckpt: Runner, tmp_path: Path) -> None:
    folder = copied(tmp_path)
    value = digest(folder / "model.safetensors")
    assert anyckpt("verify", folder, "--expect", f"model.safetensors=sha256:{value}").code == 0
    flip(folder / "model.safetensors")
    assert anyckpt("verify", folder, "--expect", f"model.safetensors={value}").code == 1
    assert "FILE=sha256:HEX" in anyckpt("verify", folder, "--expect", f"sha256:{value}").error
    assert "no file of the checkpoint" in anyckpt("verify", folder, "--expect", f"x=sha256:{value}").error
    assert "is no digest" in anyckpt("verify", folder, "--expect", "sha256:xyz").error
    assert "known algorithm" in anyckpt("verify", folder, "--expect", f"model.safetensors=sha512:{value}").error


def test_what_the_hub_noted_of_downloads_is_compared(anyckpt: Runner, tmp_path: Path) -> None:
    folder = copied(tmp_path)
    notes = folder / ".cache/huggingface/download"
    notes.mkdir(parents=True)
    files = [file for file in folder.iterdir() if file.is_file()]
    for file in files:
        etag = digest(file) if file.suffix == ".safetensors" else blob_id(file)
        (notes / f"{file.name}.metadata").write_text(f"{'a' * 40}\n{etag}\n1712656091.123\n")
    for path, count in ((folder, len(files)), (folder / "model.safetensors", 1)):
        found = anyckpt("verify", path, "--json").json
        assert found["sound"]
        assert found["checked"]["published"] == count
        assert found["checked"]["proved"] == 21
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "use_cache": False}))
    changed = anyckpt("verify", folder, "--json")
    assert changed.code == 0
    assert any("config.json: its blob id" in text for text in changed.json["warnings"])
    flip(folder / "model.safetensors")
    damaged = anyckpt("verify", folder)
    assert damaged.code == 1
    assert "model.safetensors: its SHA256 is not the one of the Hub's metadata" in damaged.out


def test_the_hubs_cache_calls_its_blobs_by_their_digests(anyckpt: Runner, tmp_path: Path) -> None:
    folder = tmp_path / "models--x--llama/snapshots/abc"
    folder.mkdir(parents=True)
    blobs = tmp_path / "models--x--llama/blobs"
    blobs.mkdir()
    for file in fixture_path(LLAMA).iterdir():
        blob = blobs / (digest(file) if file.suffix == ".safetensors" else blob_id(file))
        shutil.copy(file, blob)
        (folder / file.name).symlink_to(f"../../blobs/{blob.name}")
    found = anyckpt("verify", folder, "--json").json
    assert found["checked"]["published"] == len(list(folder.iterdir()))
    flip((folder / "model.safetensors").resolve())
    assert "the name in the Hub's cache" in anyckpt("verify", folder).out


def test_contents_that_nothing_proves_are_told(anyckpt: Runner, tmp_path: Path) -> None:
    found = anyckpt("verify", fixture_path(LLAMA))
    assert found.code == 0
    assert "not checked: the contents of 21 tensors were not read: no digest or checksum says" in found.err
    assert "the contents of none of them proved" in found.out
    deep = anyckpt("verify", fixture_path(LLAMA), "--deep")
    assert "the contents of 21 tensors were read, not proved" in deep.err
    api.convert(fixture_path(LLAMA), tmp_path / "ours", to="hf")
    assert "the contents of" not in anyckpt("verify", tmp_path / "ours").err
    for relative in (NEMO, "mcore/gpt_opt_plain/ckpt", "legacy/ptl_adamw/model--val_loss=0.5-epoch=3.ckpt"):
        told = anyckpt("verify", fixture_path(relative), "--json").json
        assert told["checked"]["proved"] == told["checked"]["tensors"], relative  # by the CRCs of their zip archives


def test_the_python_interface(tmp_path: Path) -> None:
    path = fixture_path(NEMO)
    found = api.verify(path, expect=f"sha256:{digest(path)}")
    assert (found.sound, found.opened, found.checked.published) == (True, True, 1)
    (tmp_path / "list").write_text(f"{'0' * 64}  toy.nemo")
    assert [problem.where for problem in api.verify(path, checksum=tmp_path / "list").problems] == [str(path)]


def test_notes_of_downloads_lie_in_the_folder_of_the_whole_repository(anyckpt: Runner, tmp_path: Path) -> None:
    folder = copied(tmp_path)
    (folder / "original").mkdir()
    inner = folder / "original/model.safetensors"
    shutil.copy(folder / "model.safetensors", inner)
    notes = folder / ".cache/huggingface/download/original"
    notes.mkdir(parents=True)
    (notes / "model.safetensors.metadata").write_text(f"{'a' * 40}\n{digest(inner)}\n1712656091.123\n")
    for path in (folder, folder / "original", inner):
        assert anyckpt("verify", path, "--json").json["checked"]["published"] == 1, path
    flip(inner)
    assert anyckpt("verify", inner).code == 1
