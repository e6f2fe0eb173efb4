"""``--share auto``, ``--wait`` and ``--slurm``."""

from __future__ import annotations

import os
import shlex
import subprocess
from pathlib import Path

import pytest
from tests.cli.runner import Runner
from tests.support import fixture_path

from anyckpt.engine.launchers import LAUNCHERS
from anyckpt.operations.verify import verify

LLAMA = fixture_path("families/llama/hf")
HF = ("--to", "hf", "--max-shard-size", "100KB")
WRITING = {
    "convert": ("SRC", "DST", "--to", "hf"),
    "quantize": ("SRC", "DST", "--algorithm", "int8", "--stats", "seen"),
    "reshard": ("SRC", "DST", "--tp", "2"),
    "average": ("A", "B", "-o", "DST"),
    "merge": ("A", "B", "-o", "DST"),
    "merge-lora": ("BASE", "ADAPTER", "DST"),
}
LOOKING = {
    "verify": ("SRC", "--deep"),
    "diff": ("SRC", "OTHER"),
    "inspect": ("SRC", "--stats"),
}


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for launcher in LAUNCHERS:
        for name in (launcher.rank, *launcher.sizes):
            monkeypatch.delenv(name, raising=False)


def test_ranks_come_from_the_environment_where_that_is_asked(
    anyckpt: Runner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "out"
    assert "nothing says which of how many processes" in anyckpt("convert", LLAMA, output, *HF, "--share", "auto").error
    monkeypatch.setenv("SLURM_NTASKS", "2")
    monkeypatch.setenv("SLURM_PROCID", "1")
    assert "share 2/2" in anyckpt("convert", LLAMA, output, *HF, "--share", "auto").out
    monkeypatch.setenv("SLURM_PROCID", "0")
    assert not output.exists()
    done = anyckpt("convert", LLAMA, output, *HF, "--share", "auto", "--json").json
    assert (done["share"], done["missing_shares"]) == ("1/2", [])
    assert verify(output).sound


def test_who_is_not_asked_does_all_inside_an_allocation(
    anyckpt: Runner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_PROCID", "0")
    monkeypatch.setenv("SLURM_NTASKS", "8")
    assert anyckpt("convert", LLAMA, tmp_path / "out", *HF, "--json").json["share"] is None
    assert verify(tmp_path / "out").sound


def test_the_wait_ends_with_a_named_share(anyckpt: Runner, tmp_path: Path) -> None:
    words = ("convert", LLAMA, tmp_path / "out", *HF)
    told = anyckpt(*words, "--share", "1/2", "--wait", "0.3").error
    assert "missing: share 2 of 2 (not begun in " in told and "run the processes of these shares again" in told
    assert anyckpt(*words, "--share", "2/2", "--wait", "9").code == 0
    assert verify(tmp_path / "out").sound
    assert "--share" in anyckpt(*words, "--wait", "3").error
    assert "no time" in anyckpt(*words, "--share", "1/2", "--wait", "-3").error
    assert "no time" in anyckpt(*words, "--share", "1/2", "--wait", "nan").error


def test_quantizing_in_shares(anyckpt: Runner, tmp_path: Path) -> None:
    words = ("--algorithm", "fp8_per_channel", "--to", "hf")
    one = anyckpt("quantize", LLAMA, tmp_path / "one", *words)
    if one.code:
        pytest.fail(one.err)
    for number in (2, 1):
        anyckpt("quantize", LLAMA, tmp_path / "two", *words, "--share", f"{number}/2")
    names = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert names == sorted(path.name for path in (tmp_path / "two").iterdir())
    assert all((tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes() for name in names)
    calibrated = ("--algorithm", "int4_awq", "--calib-dataset", "texts.jsonl", "--share", "1/2")
    assert "--save-stats" in anyckpt("quantize", LLAMA, tmp_path / "other", *calibrated).error


@pytest.mark.parametrize("name", WRITING)
def test_a_script_for_slurm_is_one_for_the_shell(anyckpt: Runner, tmp_path: Path, name: str) -> None:
    words = [word.replace("SRC", "it's $HOME & more") for word in WRITING[name]]
    result = anyckpt(name, *words, "--slurm", "--workers", "4")
    assert result.code == 0 and result.err == ""
    script = tmp_path / "script"
    script.write_text(result.out)
    subprocess.run(["bash", "-n", str(script)], check=True)
    lines = result.out.splitlines()
    for asked in ("--nodes=", "--ntasks-per-node=", "--requeue", f"--chdir={shlex.quote(os.getcwd())}"):
        assert any(line.startswith("#SBATCH ") and asked in line for line in lines), asked
    (srun,) = (shlex.split(line) for line in lines if line.startswith("srun "))
    assert srun[srun.index("anyckpt") :] == ["anyckpt", name, *words, "--workers", "4", "--share", "auto"]


def test_the_script_runs_the_command(anyckpt: Runner, tmp_path: Path) -> None:
    output = tmp_path / "out"
    script = anyckpt("convert", LLAMA, output, *HF, "--slurm").out
    srun = 'srun() { shift; for n in 1 0; do SLURM_PROCID=$n SLURM_NTASKS=2 "$@"; done; }\n'
    subprocess.run(["bash", "-c", srun + script], check=True, env=dict(os.environ), capture_output=True)
    assert verify(output).sound


def test_the_script_calibrates_once(anyckpt: Runner, tmp_path: Path) -> None:
    words = [
        "SRC",
        "DST",
        "--calib-dataset",
        "it's",
        "--tp=2",
        "--calib-batch-size=4",
        "--num-calib-size",
        "9",
        "--gzip",
    ]
    result = anyckpt("quantize", *words, "--save-stats", "all see", "--slurm")
    script = tmp_path / "script"
    script.write_text(result.out)
    subprocess.run(["bash", "-n", str(script)], check=True)
    lines = [shlex.split(line) for line in result.out.splitlines() if line.startswith(("srun ", "["))]
    first, tasks = (line[line.index("anyckpt") + 1 :] for line in lines)
    assert lines[0][: lines[0].index("||")] == ["[", "-e", "all see", "]"]
    assert first == ["quantize", *words, "--save-stats", "all see", "--dry-run"]
    assert tasks == ["quantize", "SRC", "DST", "--tp=2", "--gzip", "--stats", "all see", "--share", "auto"]
    assert "--save-stats FILE" in anyckpt("quantize", *words, "--slurm").error
    assert "srun" in anyckpt("quantize", *words, "--stats", "seen", "--slurm").out


@pytest.mark.parametrize("words", [[], ["--algorithm", "int4_awq"], ["--algorithm=int8", "--tp", "2"], ["--to", "hf"]])
def test_a_script_whose_tasks_have_nothing_to_calibrate_with(anyckpt: Runner, words: list[str]) -> None:
    error = anyckpt("quantize", "SRC", "DST", *words, "--slurm").error
    assert "depends on activations, and the tasks of the script would have nothing to calibrate with" in error
    for more in (["--stats", "seen"], ["--config", "ptq.yaml"], ["--calib-dataset", "texts", "--save-stats", "seen"]):
        assert "srun" in anyckpt("quantize", "SRC", "DST", *words, *more, "--slurm").out
    for alone in (
        ["--algorithm", "null"],
        ["--algorithm", "fp8", "--to", "hf", "--quantize-form", "compressed-tensors"],
    ):
        assert "srun" in anyckpt("quantize", "SRC", "DST", *alone, "--slurm").out


@pytest.mark.parametrize("name", LOOKING)
def test_the_script_of_those_that_write_nothing_needs_a_folder(anyckpt: Runner, name: str) -> None:
    assert anyckpt(name, *LOOKING[name], "--slurm").error == (
        "the tasks of the script need a folder that all of them see, for what each of them finds; "
        "name one with --records DIR"
    )
    found = anyckpt(name, *LOOKING[name], "--slurm", "--records", "looks")
    assert found.out.endswith(f"anyckpt {name} {' '.join(LOOKING[name])} --records looks --share auto\n")


def test_a_script_to_share_out_nothing(anyckpt: Runner) -> None:
    error = anyckpt("inspect", "SRC", "--slurm", "--records", "looks").error
    assert error == "there is nothing to share out; leave out --slurm, or ask for --stats or --digest"


@pytest.mark.parametrize("surplus", ["--share=1/2", "--dry-run", "--engine=ray"])
def test_what_means_nothing_in_the_script_is_refused(anyckpt: Runner, surplus: str) -> None:
    assert f"{surplus} means nothing" in anyckpt("convert", "a", "b", "--to", "hf", "--slurm", surplus).error
