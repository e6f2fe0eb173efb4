"""A call in any pickle of a checkpoint is named by every command that opens it; ordinary files give no alarm."""

from __future__ import annotations

import io
import shutil
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
from tests.cli.runner import Runner
from tests.formats.torch_archives import archive, small_file, tensor
from tests.support import FIXTURES, file_bytes, fixture_path, write_plan

from anyckpt.containers.torch_file import zip_parts
from anyckpt.engine.plan import OutputFile, Plan
from anyckpt.pickling import Global, Record
from anyckpt.tensor import from_array

CALL = b"c__builtin__\nexec\n(Vpass\ntR"
CODE = Record(Global("builtins", "exec"), ("pass",))
TOLD = "torch.load(weights_only=False) would call builtins.exec('pass')"


def injected(data: bytes, where: str = "popped") -> bytes:
    """A torch file with a call put into its pickle, as tools for that do it."""
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as source, zipfile.ZipFile(out, "w") as target:
        for entry in source.infolist():
            raw = source.read(entry)
            if entry.filename.endswith("data.pkl"):
                raw = {
                    "popped": raw[:2] + CALL + b"0" + raw[2:],
                    "left on the stack": raw[:2] + CALL + raw[2:],
                    "overwritten": raw[:-1] + b"(Vx\n" + CALL + b"Vx\nK\x01u.",
                    "kept": raw[:-1] + b"(Vx\n" + CALL + b"u.",
                    "left behind a mark": raw[:2] + b"(" + CALL + b"1" + raw[2:],
                }[where]
            target.writestr(entry.filename, raw)
    return out.getvalue()


def assert_told(anyckpt: Runner, path: Path) -> None:
    found = anyckpt("verify", path, "--json")
    assert (found.code, found.json["sound"], found.json["safe"]) == (1, False, False), found.json
    assert any(TOLD in problem["problem"] for problem in found.json["problems"])
    (call,) = (callee for callee in found.json["calls"] if callee["kind"] == "code")
    assert (call["name"], call["call"], call["times"] > 0) == ("builtins.exec", "builtins.exec('pass')", True)
    said = anyckpt("verify", path)
    assert "unsafe to load with other software" in said.out
    assert TOLD in said.out


@pytest.mark.parametrize("where", ["popped", "left on the stack", "overwritten", "kept", "left behind a mark"])
def test_a_call_whose_result_is_lost_is_told(anyckpt: Runner, tmp_path: Path, where: str) -> None:
    path = tmp_path / "x.pt"
    path.write_bytes(injected(small_file(), where))
    assert_told(anyckpt, path)
    found = anyckpt("inspect", path, "--json").json
    assert found["calls"][0]["name"] == "builtins.exec"
    assert any(TOLD in warning for warning in found["warnings"])
    assert "pickles name" in anyckpt("inspect", path).out
    done = anyckpt("convert", path, tmp_path / "out.safetensors", "--to", "safetensors", "--json")
    assert any(TOLD in note for note in done.json["notes"])


def test_a_call_before_the_damage_is_told(anyckpt: Runner, tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    path.write_bytes(archive(None, pickle=b"\x80\x02" + CALL + b"\xfe"))
    assert TOLD in anyckpt("inspect", path).error
    for pickle in (b"\x80\x02" + CALL + b"\xfe", b"\x80\x02]]Ns" + CALL + b"."):
        path.write_bytes(archive(None, pickle=pickle))
        found = anyckpt("verify", path)
        assert found.code == 1
        assert TOLD in found.out
        assert "damaged (1 problem) and unsafe to load with other software" in found.out
        assert anyckpt("verify", path, "--json").json["safe"] is False


def test_a_bare_pickle_that_calls_is_told(anyckpt: Runner, tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    path.write_bytes(b"\x80\x02" + CALL + b".")
    result = anyckpt("inspect", path)
    assert TOLD in result.out + result.err


@pytest.mark.parametrize(
    "name", ["optimizer.pt", "training_args.bin", "rng_state.pth", "pytorch_model.bin", "notes.pkl"]
)
def test_files_beside_the_weights_are_looked_at(anyckpt: Runner, tmp_path: Path, name: str) -> None:
    path = tmp_path / "model"
    shutil.copytree(fixture_path("families/llama/hf"), path)
    (path / name).write_bytes(b"\x80\x02" + CALL + b"0}." if name.endswith(".pkl") else injected(small_file()))
    assert_told(anyckpt, path)
    assert anyckpt("inspect", path, "--json").json["calls"][0]["kind"] == "code"


def test_members_of_a_nemo_archive_are_looked_at(anyckpt: Runner, tmp_path: Path) -> None:
    path = tmp_path / "x.nemo"
    with tarfile.open(fixture_path("nemo/nemo1_basic_v3_0_0/toy.nemo")) as source, tarfile.open(path, "w") as target:
        for member in source.getmembers():
            target.addfile(member, source.extractfile(member) if member.isfile() else None)
        data = b"\x80\x04\x8c\x08builtins\x8c\x04exec\x93\x8c\x04pass\x85R."
        extra = tarfile.TarInfo("vocabulary.pkl")
        extra.size = len(data)
        target.addfile(extra, io.BytesIO(data))
    assert_told(anyckpt, path)


def test_arrays_of_objects_are_looked_at(anyckpt: Runner, tmp_path: Path) -> None:
    path = tmp_path / "model"
    shutil.copytree(fixture_path("families/llama/hf"), path)
    np.save(path / "extra.npy", np.array([None], dtype=object), allow_pickle=True)
    assert anyckpt("verify", path).code == 0
    raw = (path / "extra.npy").read_bytes()
    (path / "extra.npy").write_bytes(raw[:-1] + CALL.replace(b"__builtin__", b"builtins") + b"0.")
    assert_told(anyckpt, path)


def test_objects_of_a_distributed_checkpoint_are_looked_at(anyckpt: Runner, tmp_path: Path) -> None:
    source = tmp_path / "x.pt"
    source.write_bytes(archive({"a": tensor(), "thing": [CODE]}))
    assert anyckpt("convert", source, tmp_path / "out", "--to", "dcp", "--optimizer", "keep").code == 0
    found = anyckpt("inspect", tmp_path / "out", "--json").json
    assert found["calls"][0]["name"] == "builtins.exec"
    assert_told(anyckpt, tmp_path / "out")


@pytest.mark.parametrize("wrap", ["bytes", "tensor"])
def test_a_pickle_within_a_modules_own_state_is_looked_at(anyckpt: Runner, tmp_path: Path, wrap: str) -> None:
    inner = b"\x80\x02" + CALL + b"0}."
    if wrap == "bytes":
        root = {"a": tensor(), "layer._extra_state": Record(Global("_io", "BytesIO"), (inner,))}
        data = archive(root)
    else:
        data = file_bytes(
            OutputFile("", zip_parts({"layer._extra_state": from_array(np.frombuffer(inner, dtype=np.uint8).copy())}))
        )
    path = tmp_path / "x.pt"
    path.write_bytes(data)
    assert_told(anyckpt, path)


@pytest.mark.parametrize("wrap", ["bytes", "bytes of a torch file", "tensor", "tensor of a torch file"])
def test_values_that_are_the_bytes_of_a_pickle_are_looked_at(anyckpt: Runner, tmp_path: Path, wrap: str) -> None:
    data = injected(small_file()) if wrap.endswith("torch file") else b"\x80\x02" + CALL + b"0}."
    value = from_array(np.frombuffer(data, "u1")) if wrap.startswith("tensor") else data
    path = tmp_path / "x.pt"
    weights = from_array(np.ones(3, "f4"))
    write_plan(Plan("torch", (OutputFile("", zip_parts({"w": weights, "blob": value})),)), path)
    assert_told(anyckpt, path)


def test_bytes_that_begin_like_a_pickle_are_no_alarm(anyckpt: Runner, tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    root = {"w": from_array(np.ones(3, "f4")), "blob": b"\x80\x04 and so on"}
    write_plan(Plan("torch", (OutputFile("", zip_parts(root)),)), path)
    found = anyckpt("verify", path, "--json").json
    assert (found["safe"], found["unchecked"]) == (True, [])


def test_other_pickles_in_a_torch_file_are_looked_at(anyckpt: Runner, tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    path.write_bytes(small_file())
    with zipfile.ZipFile(path, "a") as target:
        folder = target.namelist()[0].split("/")[0]
        target.writestr(f"{folder}/extra/state.pkl", b"\x80\x02" + CALL + b"0}.")
    assert_told(anyckpt, path)


def test_every_pickle_of_a_file_beside_the_weights_is_looked_at(anyckpt: Runner, tmp_path: Path) -> None:
    path = tmp_path / "model"
    shutil.copytree(fixture_path("families/llama/hf"), path)
    (path / "log.pkl").write_bytes(b"\x80\x02}." * 5 + b"\x80\x02" + CALL + b"0}.")
    assert_told(anyckpt, path)


def test_files_that_call_are_counted(anyckpt: Runner, tmp_path: Path) -> None:
    path = tmp_path / "model"
    shutil.copytree(fixture_path("families/llama/hf"), path)
    for number in range(20):
        (path / f"{number}.pkl").write_bytes(b"\x80\x02" + CALL + b"0}.")
    (problem,) = anyckpt("verify", path, "--json").json["problems"]
    assert "more" in problem["where"]
    assert len(anyckpt("verify", path, "--json").json["calls"][0]["files"]) == 20


def test_a_pickle_that_cannot_be_read_is_said_to_be_unchecked(anyckpt: Runner, tmp_path: Path) -> None:
    path = tmp_path / "model"
    shutil.copytree(fixture_path("families/llama/hf"), path)
    (path / "optimizer.pt").write_bytes(b"\x80\x02}")
    found = anyckpt("verify", path, "--json")
    assert found.code == 0
    assert any("optimizer.pt" in line for line in found.json["unchecked"])
    assert "not checked: " in anyckpt("verify", path).err


def test_a_class_of_another_package_is_told_and_no_alarm(anyckpt: Runner, tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    path.write_bytes(archive({"a": tensor(), "settings": Record(Global("mine.settings", "Settings"), (), True)}))
    found = anyckpt("verify", path)
    assert found.code == 0
    assert "classes of other packages: mine.settings.Settings" in found.err
    assert "warning" not in found.err


def test_a_function_of_another_package_is_a_warning(anyckpt: Runner, tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    path.write_bytes(archive({"a": tensor(), "settings": Record(Global("mine.settings", "make"), (1,))}))
    found = anyckpt("verify", path)
    assert found.code == 0
    assert "would call mine.settings.make(1)" in found.err


def _written_by_frameworks() -> list[str]:
    files = [path for path in FIXTURES.rglob("*") if path.suffix in (".ckpt", ".pt", ".nemo") and path.is_file()]
    folders = {path.parent for path in FIXTURES.rglob(".metadata")}
    return sorted(str(path.relative_to(FIXTURES)) for path in {*files, *folders} if "malicious" not in path.parts)


def test_what_frameworks_wrote_gives_no_alarm(anyckpt: Runner) -> None:
    looked_at = 0
    for relative in _written_by_frameworks():
        result = anyckpt("inspect", FIXTURES / relative, "--json")
        if result.code == 0:
            assert not [callee for callee in result.json["calls"] if callee["kind"] == "code"], relative
            looked_at += 1
        assert "weights_only=False" not in result.err
    assert looked_at > 100
