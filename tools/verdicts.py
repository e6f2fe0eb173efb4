"""The tables of docs/security.md: what loaders and scanners make of hostile files and of files that frameworks wrote.

    python tools/verdicts.py --torch PYTHON --scanners PYTHON

PYTHON are interpreters with torch, and with picklescan, fickling and modelscan; they may be the same.  Run by hand.
The hostile files leave an empty file where they run, in a temporary folder; still, run it where nothing matters.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import io
import json
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FIXTURES = ROOT / "tests" / "fixtures"
PAGE = ROOT / "docs" / "security.md"
MARKER = "anyckpt-was-executed"
BEGIN, END = "<!-- verdicts -->\n", "<!-- end of verdicts -->\n"
TOOLS = ("torch", "picklescan", "fickling", "modelscan", "anyckpt")
CALL = f"c__builtin__\nexec\n(Vopen('{MARKER}','w')\ntR".encode()
_GETATTR, _OWNER = b"cbuiltins\ngetattr\n", b"cenum\nbltns\n"  # enum of Python 3.11 and later has its builtins so
_COMPUTED = {
    "partial": b"cfunctools\npartial\n(" + _GETATTR + _OWNER + b"tR(Vexec\ntR",
    "reduce": b"cfunctools\nreduce\n(" + _GETATTR + b"(Vexec\nl" + _OWNER + b"tR",
    "map": b"coperator\ngetitem\n(cbuiltins\nlist\n(cbuiltins\nmap\n("
    + _GETATTR + b"(" + _OWNER + b"l(Vexec\nltRtRI0\ntR",
    "dictionary": b"coperator\ngetitem\n((Vx\n" + _GETATTR + b"dVx\ntR(" + _OWNER + b"Vexec\ntR",
}  # fmt: skip
"""Python's ``exec``, reached by names of which each is harmless by itself."""
WRITES = f"czipfile\nZipFile\n(V{MARKER}\nVw\ntR".encode()
BENIGN = (".pt", ".ckpt", ".bin", ".pth")


# -- one tool, one file: run in the tool's own interpreter ------------------------------------------------------------


def by_running(path: str) -> str:
    """What ``torch.load(weights_only=False)`` does."""
    import torch

    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        with suppress(BaseException):
            torch.load(path, weights_only=False)
        return "runs" if os.path.exists(MARKER) else "-"


def by_torch(path: str) -> str:
    import torch

    try:
        torch.load(path, weights_only=True)
    except BaseException:
        return "refused"
    return "loads"


def by_picklescan(path: str) -> str:
    from picklescan.scanner import SafetyLevel, scan_file_path

    found = scan_file_path(path)
    if found.issues_count or any(each.safety == SafetyLevel.Dangerous for each in found.globals):
        return "alarm"
    return "error" if found.scan_err else "-"


def by_fickling(path: str) -> str:
    from fickling.analysis import Severity, check_safety
    from fickling.fickle import Pickled

    try:
        worst = Severity.LIKELY_SAFE
        for data in pickles(path):
            worst = max(worst, check_safety(Pickled.load(data)).severity)
    except BaseException:
        return "error"
    return "alarm" if worst > Severity.LIKELY_SAFE else "-"


def by_modelscan(path: str) -> str:
    from modelscan.modelscan import ModelScan

    found = ModelScan().scan(path)
    if found["summary"]["total_issues"]:
        return "alarm"
    return "error" if found.get("errors") or not found["summary"]["scanned"]["total_scanned"] else "-"


def by_anyckpt(path: str) -> str:
    from anyckpt.errors import AnyckptError
    from anyckpt.operations.verify import verify

    try:
        found = verify(path)
    except AnyckptError as error:
        return "refused, named" if "weights_only=False" in str(error) else "refused"
    return "named" if not found.safe else "-" if found.sound else "damaged"


JUDGES: dict[str, Callable[[str], str]] = {
    "running": by_running, "torch": by_torch, "picklescan": by_picklescan, "fickling": by_fickling,
    "modelscan": by_modelscan, "anyckpt": by_anyckpt,
}  # fmt: skip


def pickles(path: str) -> list[bytes]:
    if not zipfile.is_zipfile(path):
        return [Path(path).read_bytes()]
    with zipfile.ZipFile(path) as archive:
        return [archive.read(entry) for entry in archive.infolist() if entry.filename.endswith("data.pkl")]


def judge(tool: str, paths: list[str]) -> None:
    """Print version and verdicts; a crash of the tool is its verdict."""
    package = "torch" if tool == "running" else tool
    try:
        print(json.dumps(importlib.metadata.version(package)))
    except importlib.metadata.PackageNotFoundError:
        print(json.dumps(""))
    here = os.getcwd()
    for path in paths:
        os.chdir(here)
        try:
            verdict = JUDGES[tool](path)
        except BaseException:
            verdict = "error"
        print("\n" + json.dumps({"verdict": verdict}), flush=True)


# -- all of them ------------------------------------------------------------------------------------------------------


def verdicts(python: str, tool: str, paths: list[str]) -> tuple[str, list[str]]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}
    command = [python, __file__, "--judge", tool, *paths]
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(command, capture_output=True, text=True, cwd=folder, env=environment)
    lines = done.stdout.splitlines()
    found = [json.loads(line)["verdict"] for line in lines if line.startswith('{"verdict"')]
    assert len(found) == len(paths), (tool, len(found), len(paths), done.stderr[-2000:])
    return json.loads(lines[0]), found


def injected(folder: Path) -> list[Path]:
    """A state dict of torch's with a call put into its pickle: in four ways, as tools for that do it, and others."""
    source = zipfile.ZipFile(FIXTURES / "legacy" / "zoo_views" / "zip.pt")
    pickle = next(source.read(entry) for entry in source.infolist() if entry.filename.endswith("data.pkl"))
    ways = {
        "injected_call_popped": pickle[:2] + CALL + b"0" + pickle[2:],
        "injected_call_left_on_stack": pickle[:2] + CALL + pickle[2:],
        "injected_call_overwritten_key": pickle[:-1] + b"(Vx\n" + CALL + b"Vx\nK\x01u.",
        "injected_call_kept_in_value": pickle[:-1] + b"(Vx\n" + CALL + b"u.",
        "injected_class_opens_file": pickle[:2] + WRITES + b"0" + pickle[2:],
    }
    for name, function in _COMPUTED.items():
        call = function + f"(Vopen('{MARKER}','w')\ntR0".encode()
        ways[f"computed_call_by_{name}"] = pickle[:2] + call + pickle[2:]
    files = []
    for name, changed in ways.items():
        out = io.BytesIO()
        with zipfile.ZipFile(out, "w") as target:
            for entry in source.infolist():
                raw = source.read(entry)
                if entry.filename.endswith("data.pkl"):
                    raw = changed
                target.writestr(entry.filename, raw)
        files.append(folder / f"{name}.pt")
        files[-1].write_bytes(out.getvalue())
    return files


def tables(torch: str, scanners: str) -> str:
    pythons = {"running": torch, "torch": torch, "anyckpt": sys.executable}
    with tempfile.TemporaryDirectory() as folder:
        hostile = [*injected(Path(folder)), *sorted((FIXTURES / "legacy" / "malicious").glob("*.pt"))]
        paths = [str(path) for path in hostile]
        runs = verdicts(torch, "running", paths)[1]
        columns = {tool: verdicts(pythons.get(tool, scanners), tool, paths) for tool in TOOLS}
    others = (
        path
        for path in FIXTURES.rglob("*")
        if path.suffix in BENIGN and "malicious" not in path.parts and path.is_file()
    )
    benign = sorted(str(path) for path in others)
    counted = {tool: verdicts(pythons.get(tool, scanners), tool, benign)[1] for tool in TOOLS}
    versions = ", ".join(f"{tool} {columns[tool][0]}" for tool in TOOLS if tool != "anyckpt")
    lines = [
        f"Measured on {datetime.date.today()} with {versions}, each as it comes.",
        "",
        "| file | `weights_only=False` | `weights_only=True` | picklescan | fickling | modelscan | anyckpt `verify` |",
        "|---|---|---|---|---|---|---|",
    ]
    for number, path in enumerate(hostile):
        cells = [columns[tool][1][number] for tool in TOOLS]
        lines.append(f"| `{path.stem}` | {' | '.join([runs[number], *cells])} |")
    ran = [number for number, verdict in enumerate(runs) if verdict == "runs"]
    missed = {
        tool: sum(columns[tool][1][number] in ("-", "loads", "error", "damaged") for number in ran) for tool in TOOLS
    }
    lines += [
        "",
        f"Of the {len(ran)} files that ran something, and of {len(benign)} that torch, Lightning, NeMo, Megatron and",
        "trainers wrote (whole modules, TorchScript and states of optimizers among them; `meta.pt` of a folder is read",
        "with its folder only):",
        "",
        "| | `weights_only=True` | picklescan | fickling | modelscan | anyckpt `verify` |",
        "|---|---|---|---|---|---|",
        f"| ran, no alarm | {' | '.join(str(missed[tool]) for tool in TOOLS)} |",
        f"| false alarms | {' | '.join(str(alarms(tool, counted[tool])) for tool in TOOLS)} |",
        f"| could not be read | {' | '.join(str(unread(tool, counted[tool])) for tool in TOOLS)} |",
    ]
    return "\n".join(lines) + "\n"


def alarms(tool: str, found: list[str]) -> int:
    """How often a tool warns; a loader that loads weights only does so by refusing."""
    return sum(
        verdict in ("alarm", "named", "refused, named", "refused" if tool == "torch" else "") for verdict in found
    )


def unread(tool: str, found: list[str]) -> int:
    return sum(verdict in ("error", "" if tool == "torch" else "refused") for verdict in found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--torch", default=sys.executable)
    parser.add_argument("--scanners", default=sys.executable)
    parser.add_argument("--judge", choices=JUDGES, help=argparse.SUPPRESS)
    parser.add_argument("paths", nargs="*", help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.judge:
        judge(chosen.judge, chosen.paths)
        return
    text = PAGE.read_text(encoding="utf-8")
    before, _, rest = text.partition(BEGIN)
    after = rest.partition(END)[2]
    PAGE.write_text(before + BEGIN + tables(chosen.torch, chosen.scanners) + END + after, encoding="utf-8")


if __name__ == "__main__":
    main()
