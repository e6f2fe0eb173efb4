"""Runs the test suites of torch, Megatron-Core, Lightning, accelerate, peft and safetensors against anyckpt.

    python tools/peer_suites.py megatron-core CHECKOUT [--tests PATH ...] [--ranks N] [--mode read|replace|both]

CHECKOUT is a checkout of the library's public repository at the release that is installed.  Nothing of it is copied
into this project: pytest runs there, with ``peer_suites_plugin`` looking over its shoulder.

``read``: every checkpoint that the tests save is opened by anyckpt and compared, tensor for tensor, with what the
library itself loads.  ``replace``: every checkpoint is replaced by anyckpt's conversion into the same format before
the test goes on; tests that pass without us must pass with us.  Exit code 1 if a tensor differs, anyckpt crashes, or
a test fails only with us.  By hand, not in CI: docs/peer_suites.md has the last outcome.
"""

from __future__ import annotations

import argparse
import collections
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import psutil

HERE = Path(__file__).resolve().parent
_PATH = re.compile(r"/[^\s:,()]+")  # temporary folders have other names every time
SUITES: dict[str, tuple[tuple[str, ...], dict[str, str]]] = {
    "torch": (
        ("test/test_serialization.py", "test/distributed/checkpoint"), {"ANYCKPT_PEER_PRETEND": "ranks_for_gpus"},
    ),
    "megatron-core": (
        ("tests/unit_tests/dist_checkpointing/test_serialization.py",), {"ANYCKPT_PEER_PRETEND": "cpu_for_cuda"},
    ),
    "lightning": (
        (
            "tests/tests_pytorch/checkpointing", "tests/tests_pytorch/models/test_restore.py",
            "tests/tests_pytorch/trainer/connectors/test_checkpoint_connector.py",
        ),
        {},
    ),
    "accelerate": (("tests/test_state_checkpointing.py", "tests/test_accelerator.py"), {}),
    "peft": (("tests/test_decoder_models.py", "tests/test_custom_models.py"), {}),
    "safetensors": (
        tuple(f"bindings/python/tests/test_{name}.py" for name in ("simple", "pt_comparison", "pt_model", "handle")),
        {},
    ),
}  # fmt: skip
"""Suite -> tests that save checkpoints, and settings."""


def main() -> int:
    parser = argparse.ArgumentParser(description="Run a peer's test suite against anyckpt.")
    parser.add_argument("suite", choices=SUITES)
    parser.add_argument("checkout", type=Path)
    parser.add_argument("--tests", nargs="+", default=None, help="paths in the checkout; a suite's own if not given")
    parser.add_argument("--mode", choices=["read", "replace", "both"], default="both")
    parser.add_argument("--ranks", type=int, default=1, help="processes, as torchrun starts them")
    parser.add_argument("--timeout", type=int, default=1800, help="seconds for each run")
    parser.add_argument("--each", type=int, default=120, help="seconds for each test, if pytest-timeout is there")
    parser.add_argument("--keep", type=Path, help="folder for the reports, a line of JSON each")
    parser.add_argument("-k", dest="expression", help="as pytest's -k")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        keep = given.keep or Path(folder)
        keep.mkdir(parents=True, exist_ok=True)
        bad = False
        if given.mode in ("read", "both"):
            bad |= _show_read(_run(given, "read", keep))
        if given.mode in ("replace", "both"):
            bad |= _show_replace(_run(given, "none", keep), _run(given, "replace", keep))
    return int(bad)


def _run(given: argparse.Namespace, mode: str, keep: Path) -> list[dict[str, Any]]:
    report = (keep / f"{given.suite}.{mode}.{given.ranks}.jsonl").resolve()
    report.unlink(missing_ok=True)
    paths, settings = SUITES[given.suite]
    code = os.pathsep.join([str(HERE), str(HERE.parent / "src"), str(given.checkout.resolve())])
    environment = {
        **os.environ, **settings, "PYTHONPATH": code, "ANYCKPT_PEER_MODE": mode, "ANYCKPT_PEER_REPORT": str(report),
        "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    launch = [] if given.ranks == 1 else ["-m", "torch.distributed.run", f"--nproc-per-node={given.ranks}"]
    quiet = "-q -p peer_suites_plugin -p no:cacheprovider -o addopts= --continue-on-collection-errors"
    command = [sys.executable, *launch, "-m", "pytest", *quiet.split()]
    command += [f"--timeout={given.each}"] if _has("pytest_timeout") else []
    command += ["-k", given.expression] if given.expression else []
    command += given.tests or paths
    with subprocess.Popen(command, cwd=given.checkout, env=environment, stdout=sys.stderr) as process:
        try:
            process.wait(given.timeout)
        except subprocess.TimeoutExpired:
            print(f"{mode}: stopped after {given.timeout} s", file=sys.stderr)
            started = psutil.Process(process.pid)
            for own in [*started.children(recursive=True), started]:  # ranks have sessions of their own
                own.kill()
    return [json.loads(line) for line in report.read_text().splitlines()] if report.exists() else []


def _has(module: str) -> bool:
    return subprocess.run([sys.executable, "-c", f"import {module}"], capture_output=True).returncode == 0


def _tests(lines: list[dict[str, Any]]) -> dict[str, bool]:
    """Whether each test passed, on every rank."""
    passed: dict[str, bool] = {}
    for line in lines:
        if line["kind"] == "test" and line["outcome"] != "skipped":
            passed[line["test_id"]] = passed.get(line["test_id"], True) and line["outcome"] == "passed"
    return passed


def _outcomes(lines: list[dict[str, Any]]) -> collections.Counter[str]:
    return collections.Counter(line["outcome"] for line in lines if line["kind"] == "checkpoint")


def _show_read(lines: list[dict[str, Any]]) -> bool:
    counts = _outcomes(lines)
    tensors = sum(line.get("tensors", 0) for line in lines if line.get("outcome") == "equal")
    print(f"read: {sum(counts.values())} checkpoints: {dict(counts)}; {tensors} tensors equal")
    _show_outcomes(lines, "different", "crash", "refused")
    return bool(counts["different"] or counts["crash"])


def _show_outcomes(lines: list[dict[str, Any]], *outcomes: str) -> None:
    """A line for each test and message; a test may save the same thing a hundred times."""
    found = collections.Counter(
        f"{line['outcome']}: {line['test']}: {_PATH.sub('...', str(line.get('detail')))}"
        for line in lines
        if line["kind"] == "checkpoint" and line["outcome"] in outcomes
    )
    for text, times in found.items():
        print(f"  {text}" + (f" ({times} times)" if times > 1 else ""))


def _show_replace(without: list[dict[str, Any]], with_us: list[dict[str, Any]]) -> bool:
    counts, before, after = _outcomes(with_us), _tests(without), _tests(with_us)
    good = [name for name, passed in before.items() if passed]
    lost = [name for name in good if not after.get(name, True)]
    unrun = [name for name in good if name not in after]
    replaced = {line["test"] for line in with_us if line.get("outcome") == "replaced"}
    print(f"replace: {sum(counts.values())} checkpoints: {dict(counts)}")
    print(
        f"  of {len(before)} tests {len(good)} pass without us; "
        f"{len(good) - len(lost) - len(unrun)} of them with us, {len(unrun)} did not run with us;"
        f" {len([name for name in good if name in replaced and after.get(name)])} passed with our checkpoints"
    )
    for name in lost:
        why = next((line["detail"] for line in with_us if line.get("test_id") == name and line["detail"]), "no reason")
        print(f"  only with us: {name}: {why.strip().splitlines()[-1]}")
    _show_outcomes(with_us, "crash", "refused")
    return bool(lost or unrun or counts["crash"])


if __name__ == "__main__":
    sys.exit(main())
