"""Paths that lead into archives: found, read in place, and refused where there is nothing."""

from __future__ import annotations

import gzip
import io
import shutil
import tarfile
import zipfile
from pathlib import Path

import pytest
from tests.cli.runner import Runner
from tests.support import fixture_path, sha256_of

import anyckpt
from anyckpt.errors import FormatError, UnsafeError
from anyckpt.formats import registry
from anyckpt.storage.location import file_of, look_at, place_of
from anyckpt.storage.place import LOCAL

AGENT = fixture_path("legacy/modules/stable_baselines3.zip")
STATE = fixture_path("legacy/modules/state_dict.pt")


def digests(path: str | Path) -> dict[str, str]:
    return {name: sha256_of(tensor) for name, tensor in registry.read(path).weights().items()}


def zipped(path: Path, files: dict[str, bytes], method: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return path


def test_an_archive_of_checkpoints_says_what_to_open() -> None:
    with pytest.raises(FormatError) as caught:
        registry.read(AGENT)
    assert "Stable-Baselines3" in str(caught.value) and f"{AGENT}::policy.pth (torch)" in str(caught.value)
    assert set(digests(f"{AGENT}::policy.pth")) == set(digests(STATE))


@pytest.mark.parametrize("kind", ["stored", "deflated", "tar", "tar.gz", "nested"])
def test_members_of_every_kind_of_archive(kind: str, tmp_path: Path) -> None:
    data = STATE.read_bytes()
    path = tmp_path / f"a.{kind}"
    inner = "models/one.pt"
    if kind in ("stored", "deflated"):
        zipped(path, {inner: data}, zipfile.ZIP_STORED if kind == "stored" else zipfile.ZIP_DEFLATED)
    elif kind == "nested":
        zipped(tmp_path / "b.zip", {"one.pt": data})
        zipped(path, {"inner.zip": (tmp_path / "b.zip").read_bytes(), "notes.txt": b"x"})
        inner = "inner.zip::one.pt"
        with pytest.raises(FormatError, match=r"inner\.zip \(archive\)"):
            registry.read(path)
    else:
        out = io.BytesIO()
        with tarfile.open(fileobj=out, mode="w") as archive:
            info = tarfile.TarInfo(inner)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
        path.write_bytes(gzip.compress(out.getvalue()) if kind == "tar.gz" else out.getvalue())
    assert digests(f"{path}::{inner}") == digests(STATE)


def test_every_command_takes_such_a_path(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = Runner(capsys)
    agent = tmp_path / "agent.zip"
    shutil.copyfile(AGENT, agent)
    member = f"{agent}::policy.pth"
    assert "policy.pth" in run("inspect", member, "--stats").out
    out = tmp_path / "out.safetensors"
    assert run("convert", member, str(out), "--to", "safetensors").code == 0
    assert run("diff", member, str(out)).code == 0
    assert run("verify", member).code == 0
    assert run("average", member, str(out), "--output", str(tmp_path / "mean.pt"), "--to", "torch").code == 0
    assert digests(tmp_path / "mean.pt").keys() == digests(member).keys()
    done = run("convert", member, str(agent), "--to", "torch", "--overwrite")
    assert done.code == 2 and agent.read_bytes() == AGENT.read_bytes()


def test_resuming_sees_that_the_archive_changed(tmp_path: Path) -> None:
    agent = tmp_path / "agent.zip"
    shutil.copyfile(AGENT, agent)
    anyckpt.convert(f"{agent}::policy.pth", tmp_path / "out.pt", to="torch")
    assert anyckpt.convert(f"{agent}::policy.pth", tmp_path / "out.pt", to="torch", resume=True).resumed_bytes
    agent.touch()
    with pytest.raises(anyckpt.AnyckptError, match="already exists"):
        anyckpt.convert(f"{agent}::policy.pth", tmp_path / "out.pt", to="torch", resume=True)


def test_paths_that_lead_nowhere(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match=r"has no member 'policy' \(found data, policy.pth"):
        look_at(f"{AGENT}::policy")
    with pytest.raises(FormatError, match="is not an archive"):
        look_at(f"{AGENT}::data::x")
    with pytest.raises(FormatError, match="does not exist"):
        look_at(tmp_path / "a.zip::b")
    climbing = zipped(tmp_path / "c.zip", {"../x": b"1"})
    with pytest.raises(UnsafeError, match="climbs out"):
        look_at(f"{climbing}::x")


def test_a_file_whose_name_has_colons_is_an_ordinary_file(tmp_path: Path) -> None:
    odd = tmp_path / "a.zip::b.pt"
    shutil.copyfile(STATE, odd)
    assert place_of(str(odd)) is LOCAL and digests(odd) == digests(STATE)
    zipped(tmp_path / "x::y.zip", {"c::d.pt": STATE.read_bytes()})
    assert file_of(f"{tmp_path}/x::y.zip::z") == f"{tmp_path}/x::y.zip"
