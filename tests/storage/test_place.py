"""Checkpoints that are on no disk, or in a folder of an archive: found and read as those in a directory are."""

from __future__ import annotations

import io
import re
import tarfile
import zipfile
from pathlib import Path

import pytest
from tests.cli.runner import Runner
from tests.places import MemoryPlace, files_below, registered
from tests.support import fixture_path, sha256_of

import anyckpt
from anyckpt.checkpoint import Checkpoint
from anyckpt.errors import FormatError, UnsafeError
from anyckpt.formats import registry
from anyckpt.storage.location import look_at
from anyckpt.storage.place import LOCAL

FOLDERS = [
    "adapters/lora_halves_tp2",
    "deepspeed/zero1",
    "deepspeed/zero3/global_step2",
    "families/lora_llama/hf_adapter",
    "families/qwen2_moe/hf",
    "families/vit/hf",
    "fsdp/hsdp_4",
    "legacy/megatron_distopt_tp2_dp2",
    "legacy/megatron_gpt_tp1_pp1_release",
    "legacy/megatron_gpt_tp2_pp2_vpp2/iter_0000007",
    "legacy/megatron_oldnames_v1",
    "mcore/dcp_fsdp_w2/ckpt",
    "mcore/gpt_opt_plain/ckpt",
    "mcore/zarr_v012_w2_flat/ckpt",
    "nemo/lightning_tp/m-step=2.ckpt",
    "nemo/nemo2_llama_spm/model",
]
ROOT = "memory://bucket"


def packed(files: dict[str, bytes], path: Path) -> Path:
    if path.suffix == ".zip":
        with zipfile.ZipFile(path, "w") as archive:
            for name, data in files.items():
                archive.writestr(name, data)
        return path
    with tarfile.open(path, "w:gz" if path.suffix == ".gz" else "w") as archive:
        for name, data in files.items():
            info = tarfile.TarInfo(f"./{name}")
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def told(checkpoint: Checkpoint, path: str) -> dict[str, object]:
    """What a checkpoint is found to be, wherever it lies."""
    return {
        "format": checkpoint.format,
        "version": checkpoint.format_version,
        "tensors": {name: (t.dtype.name, t.shape) for name, t in checkpoint.tensors.items()},
        "digest": [sha256_of(tensor) for tensor in list(checkpoint.tensors.values())[::5]],
        "config": checkpoint.config,
        "layout": checkpoint.layout,
        "training": checkpoint.training,
        "tokenizer": checkpoint.tokenizer and list(checkpoint.tokenizer.files),
        "artifacts": sorted(checkpoint.artifacts),
        "objects": sorted(checkpoint.objects),
        "ranks": len(checkpoint.ranks),
        "ignored": checkpoint.ignored,
        "warnings": [text.replace(path, "") for text in checkpoint.warnings],
    }


@pytest.mark.parametrize("name", FOLDERS)
def test_a_folder_is_read_wherever_it_lies(name: str, tmp_path: Path) -> None:
    folder = fixture_path(name)
    wanted = told(registry.read(folder), str(folder))
    files = files_below(folder)
    place = MemoryPlace(ROOT, {f"runs/{folder.name}/{file}": data for file, data in files.items()})
    with registered("memory", place):
        path = f"{ROOT}/runs/{folder.name}"
        assert told(registry.read(path), path) == wanted
        assert told(registry.read(look_at(path)), path) == wanted
    inside = {f"{folder.name}/{file}": data for file, data in files.items()}
    for archive in (packed(inside, tmp_path / "a.tar"), packed(inside, tmp_path / "a.zip")):
        path = f"{archive}::{folder.name}"
        assert told(registry.read(path), path) == wanted
    whole = packed(files, tmp_path / "whole.tar")
    assert told(registry.read(f"{whole}::"), f"{whole}::") == wanted


def test_a_file_of_one_rank_opens_all_ranks_in_an_archive(tmp_path: Path) -> None:
    files = {f"run/checkpoints/{name}": b"" for name in ("mp_rank_00/x.ckpt", "mp_rank_01/x.ckpt", "mp_rank_01/y.ckpt")}
    place = MemoryPlace(ROOT, files)
    with registered("memory", place):
        found = look_at(f"{ROOT}/run/checkpoints/x.ckpt")
        assert found.path == f"{ROOT}/run/checkpoints/mp_rank_00/x.ckpt"
        with pytest.raises(FormatError, match="does not exist"):
            look_at(f"{ROOT}/run/checkpoints/z.ckpt")
    archive = packed(files, tmp_path / "a.zip")
    assert look_at(f"{archive}::run/checkpoints/y.ckpt").path == f"{archive}::run/checkpoints/mp_rank_01/y.ckpt"


def test_every_command_takes_a_folder_in_an_archive(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = Runner(capsys)
    folder = fixture_path("mcore/gpt_opt_plain/ckpt")
    archive = packed({f"dcp/{name}": data for name, data in files_below(folder).items()}, tmp_path / "a.tar")
    inside = f"{archive}::dcp"
    assert "megatron-core" in run("inspect", inside, "--stats").out
    assert run("diff", inside, str(folder)).code == 0
    assert run("verify", inside).code == 0
    out, of_folder = tmp_path / "out", tmp_path / "of-folder"
    assert run("convert", inside, str(out), "--to", "dcp").code == 0
    assert run("convert", str(folder), str(of_folder), "--to", "dcp").code == 0
    manifest = ".anyckpt-manifest.json"
    written = [{n: d for n, d in files_below(path).items() if n != manifest} for path in (out, of_folder)]
    assert written[0] == written[1]
    nested = packed({"deep/a.tar": archive.read_bytes()}, tmp_path / "b.zip")
    assert run("diff", f"{nested}::deep/a.tar::dcp", str(folder)).code == 0


def test_an_archive_of_folders_says_what_to_open(tmp_path: Path) -> None:
    files = files_below(fixture_path("families/vit/hf"))
    archive = packed({f"models/vit/{name}": data for name, data in files.items()}, tmp_path / "a.tar")
    with pytest.raises(FormatError, match=rf"open a member of it, {archive}::models/vit \(hf\)$"):
        registry.read(archive)
    top = packed(files, tmp_path / "top.zip")
    with pytest.raises(FormatError, match=rf"open a member of it, {top}:: \(hf\)$"):
        registry.read(top)
    with pytest.raises(FormatError, match=rf"open {archive}::models/vit, which looks like hf"):
        registry.read(f"{archive}::models")


def test_what_an_archive_does_not_hold(tmp_path: Path) -> None:
    archive = packed({"models/a.pt": b"x"}, tmp_path / "a.tar")
    for missing in ("model", "models/b.pt", "models/a.pt/x"):
        with pytest.raises(FormatError, match=f"has no member '{missing}'"):
            look_at(f"{archive}::{missing}")
    climbing = packed({"../models/a.pt": b"x"}, tmp_path / "b.tar")
    with pytest.raises(UnsafeError):
        look_at(f"{climbing}::models")


def test_names_below_and_above() -> None:
    place = MemoryPlace(ROOT, {"a/b/c": b"1", "a/b.txt": b"22", "top": b""})
    with registered("memory", place):
        top = look_at(ROOT)
        assert top.is_directory and top.names == ("a", "top") and top.parent is None
        inner = look_at(f"{ROOT}/a/")
        assert inner.names == ("b", "b.txt") and inner.name == "a" and inner.parent == f"{ROOT}/"
        assert inner.folder().names() == ["b.txt", "b/c"] and inner.open("b.txt").size == 2
        assert inner.is_file("b", "c") and inner.is_folder("b") and not inner.is_file("b")
        assert inner.names_in("b") == ("c",) and inner.names_in("none") == ()
        assert inner.at("b").join("c") == f"{ROOT}/a/b/c"
        with pytest.raises(UnsafeError):
            inner.folder().open("../top")


def test_names_on_a_disk(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x.pt").write_bytes(b"123")
    (tmp_path / "link").symlink_to(tmp_path / "nothing")
    location = look_at(tmp_path)
    assert location.names == ("a", "link") and location.is_folder("a") and location.is_file("a", "x.pt")
    assert not location.is_file("link") and LOCAL.exists(location.join("link"))
    assert location.at("a", "x.pt").head == b"123" and location.at("a").parent == str(tmp_path)
    assert location.on_disk == str(tmp_path)


def test_readers_know_no_operating_system() -> None:
    """What finds and opens files is a place's to do; a reader that asks the system reads from disks alone."""
    package = Path(anyckpt.__file__).parent
    asks = re.compile(r"\bos\.(?!PathLike)|\bLocalFile\b|\bLocalFolder\b|(?<!def )(?<![.\w])open\(")
    rooms = [room for room in ("formats", "containers", "config", "models", "optimizer") if (package / room).is_dir()]
    for path in sorted(path for room in rooms for path in (package / room).rglob("*.py")):
        found = asks.search(path.read_text())
        assert found is None, f"{path}: {found and found[0]}"


def test_every_command_takes_a_place(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = Runner(capsys)
    folder = fixture_path("families/qwen2_moe/hf")
    anyckpt.convert(folder, tmp_path / "lm", to="megatron-lm")
    files = {f"hf/{name}": data for name, data in files_below(folder).items()}
    files.update({f"lm/{name}": data for name, data in files_below(tmp_path / "lm").items()})
    files["hf/extra.pkl"] = b"cos\nsystem\n(S'true'\ntR."
    hub, ranks = f"{ROOT}/hf", f"{ROOT}/lm"
    with registered("memory", MemoryPlace(ROOT, files)):
        assert "qwen2-moe" in run("inspect", hub).out
        found = run("verify", hub)
        assert found.code == 1 and "os.system" in found.out
        assert "digests" in run("verify", ranks).out
        assert run("diff", hub, str(folder)).code == 0
        assert run("average", hub, str(folder), "--output", str(tmp_path / "mean")).code == 0
        assert run("reshard", ranks, str(tmp_path / "tp2"), "--tp", "2").code == 0
        done = run("convert", hub, str(tmp_path / "core"), "--to", "megatron-core", "--config", f"{hub}/config.json")
        assert done.code == 0
        refused = run("convert", hub, f"{ROOT}/out", "--to", "hf")
        assert refused.code == 2 and "cannot be written to" in refused.err
        missing = run("inspect", f"{ROOT}/none")
        assert missing.code == 2 and "does not exist" in missing.err
    nowhere = run("inspect", "elsewhere://bucket/model")
    assert nowhere.code == 2 and "is in a place that is not known" in nowhere.err
    assert "give the address of the store that the profile names" in run("inspect", "msc://profile/run").error
