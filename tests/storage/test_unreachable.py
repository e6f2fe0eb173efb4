"""A network that fails at some moment: what is told is the right answer or that error, and never another answer."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import random
import threading
from collections.abc import Callable
from pathlib import Path
from shutil import copytree, rmtree

import pytest
from tests.cli.runner import Runner
from tests.places import FarSource, Log, MemoryPlace, files_below, registered
from tests.support import fixture_path

from anyckpt.errors import LastingError, UnreachableError
from anyckpt.storage.source import ByteSource

PATHS = [
    "deepspeed/zero1",
    "families/lora_llama/hf_adapter",
    "families/qwen3/hf",
    "fsdp/fsdp_2",
    "legacy/megatron_gpt_tp2_pp2_vpp2/iter_0000007",
    "legacy/megatron_distopt_tp2_dp2",
    "legacy/zoo_objects/zip.pt",
    "mcore/dcp_fsdp_w2/ckpt",
    "mcore/gpt_opt_plain/ckpt",
    "mcore/zarr_v012_w2_flat/ckpt",
    "nemo/lightning_tp/m-step=2.ckpt",
    "nemo/nemo1_dist_tp2/model.nemo",
    "nemo/nemo1_mp_tp2/model.nemo",
    "nemo/nemo2_llama_spm/model",
    "nemo/ptl_ckpt_nemo3_0_0/toy--val_loss=1.0260-step=6-consumed_samples=12.0-last.ckpt",
    "quant/fp8_moe_c/trtllm_tp1pp1",
    "quant/int4_awq_a/trtllm_tp2pp2",
]
ROOT = "far://bucket"
COMMANDS = ("inspect", "verify --deep", "diff", "convert")


class Network:
    """Counts what it is asked, and fails at some of it.

    Args:
        fails: whether it does at the request of a number.
    """

    def __init__(self, fails: Callable[[int], bool] = lambda number: False) -> None:
        self._lock = threading.Lock()
        self._fails = fails
        self.asked = 0

    def pass_through(self, name: str) -> None:
        with self._lock:
            number, self.asked = self.asked, self.asked + 1
        if self._fails(number):
            raise UnreachableError("cannot be reached", path=name, remedy="check the connection")


class UnreliableSource(FarSource):
    """A far source, behind a network."""

    __slots__ = ("_network",)

    def __init__(self, data: bytes, name: str, network: Network) -> None:
        super().__init__(data, name, Log(), 0.0)
        self._network = network

    def _read_into(self, offset: int, buffer: memoryview) -> None:
        self._network.pass_through(self.name)
        super()._read_into(offset, buffer)


class UnreliablePlace(MemoryPlace):
    """A far place, of which what is where is asked for over a network, too."""

    def __init__(self, files: dict[str, bytes], network: Network) -> None:
        super().__init__(ROOT, files, lambda data, name: UnreliableSource(data, name, network))
        self._network = network

    def kind(self, path: str) -> str | None:
        self._network.pass_through(path)
        return super().kind(path)

    def names(self, path: str) -> tuple[str, ...]:
        self._network.pass_through(path)
        return super().names(path)

    def open(self, path: str) -> ByteSource:
        self._network.pass_through(path)
        return super().open(path)


def answer(run: Runner, command: str, name: str, files: dict[str, bytes], network: Network, out: Path) -> object:
    """What a command says of a checkpoint, and the bytes it writes; None where it says that it could not be reached."""
    path, here = f"{ROOT}/{name}", fixture_path(name)
    with registered("far", UnreliablePlace(files, network)):
        if command == "convert":
            result = run("convert", path, out, "--to", "torch", "--json")
        elif command == "diff":
            result = run("diff", path, here, "--json")
        else:
            result = run(*command.split(), path, "--json")
    if "cannot be reached" in result.err:
        assert result.code == 2 and result.out == "", (result.code, result.out, result.err)
        assert not out.exists()
        return None
    if command != "convert":
        return result.code, result.out, result.err
    return result.code, result.err, hashlib.sha256(out.read_bytes()).hexdigest() if out.exists() else ""


def moments(asked: int) -> list[int]:
    """Numbers of requests: every one, or, of many, the first and others that are spread evenly."""
    few = 16
    return list(range(asked)) if asked <= 2 * few else [*range(few), *range(few, asked, -(-(asked - few) // few))]


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("path", PATHS)
def test_a_fault_is_told_or_does_no_harm(
    path: str, command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    here = fixture_path(path)
    files = files_below(here) if here.is_dir() else {"": here.read_bytes()}
    files = {f"{path}/{name}".rstrip("/"): data for name, data in files.items()}
    run, network = Runner(capsys), Network()
    right = answer(run, command, path, files, network, tmp_path / "right.pt")
    assert right is not None
    for once in (True, False):
        for moment in moments(network.asked):
            fails = moment.__eq__ if once else moment.__le__
            found = answer(run, command, path, files, Network(fails), tmp_path / "out.pt")
            assert found in (None, right), (moment, once)
            for left in tmp_path.glob("*out.pt*"):
                left.unlink() if left.is_file() else rmtree(left)


def test_a_conversion_that_a_network_breaks_off_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    header = {f"w{i}": {"dtype": "F32", "shape": [1 << 20], "data_offsets": [i << 22, i + 1 << 22]} for i in range(6)}
    text = json.dumps(header).encode()
    data = len(text).to_bytes(8, "little") + text + random.Random(7).randbytes(6 << 22)
    network = Network()
    asked = [f"{ROOT}/model.safetensors", tmp_path / "out.pt", "--to", "torch", "--workers", "1", "--json"]
    run = Runner(capsys)
    with registered("far", UnreliablePlace({"model.safetensors": data}, network)):
        assert run("convert", asked[0], tmp_path / "whole.pt", *asked[2:]).code == 0
    with registered("far", UnreliablePlace({"model.safetensors": data}, Network((network.asked - 2).__le__))):
        assert "cannot be reached" in run("convert", *asked).error
    with registered("far", UnreliablePlace({"model.safetensors": data}, Network())):
        assert run("convert", *asked, "--resume").json["resumed_bytes"] >= 4 << 20
    assert (tmp_path / "out.pt").read_bytes() == (tmp_path / "whole.pt").read_bytes()


@pytest.mark.parametrize("command", COMMANDS)
def test_a_mounted_file_system_that_does_not_answer_is_told(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    copytree(fixture_path("mcore/dcp_fsdp_w2/ckpt"), tmp_path / "model")
    real, left = os.preadv, iter(range(0))

    def read(descriptor: int, buffers: list[memoryview], offset: int) -> int:
        if next(left, None) is None:
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
        return real(descriptor, buffers, offset)

    run, name = Runner(capsys), tmp_path / "model"
    told = {"diff": [name], "convert": [tmp_path / "out.pt", "--to", "torch"]}.get(command, [])
    for moment in (0, 1, 5):
        left = iter(range(moment))
        with monkeypatch.context() as patch:
            patch.setattr(os, "preadv", read)
            error = run(*command.split(), name, *told).error
        assert "cannot be read at byte" in error and os.strerror(errno.ESTALE) in error
        assert not (tmp_path / "out.pt").exists()


def test_an_error_of_the_moment_is_none_that_lasts() -> None:
    assert not issubclass(UnreachableError, LastingError)
    with pytest.raises(UnreachableError), contextlib.suppress(LastingError):
        raise UnreachableError("cannot be reached")
