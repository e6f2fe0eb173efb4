"""The parts of docs/ that are not typed: code of the examples, and what commands print; ``tools/guides.py [--check]``.

A code block that follows a line with a file's name, as in `` `examples/x.py`: ``, is that file.  A ``console`` block is
a session: each line that begins with ``$ `` is run by a shell in a folder of the page's own, and what follows is what
it prints.  ``<!-- here: NAME = FIXTURE -->`` copies fixtures there first.  A line stays as it is where nothing but
times, speeds and memory is another, which differ from run to run.
"""

from __future__ import annotations

import difflib
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

ROOT = Path(__file__).resolve().parent.parent
FIXTURES = ROOT / "tests" / "fixtures"

_FILE = re.compile(r"(`(examples/\S+)`:\n\n```\w+\n)(.*?)(```\n)", re.DOTALL)
_SESSION = re.compile(r"(```console\n)(.*?)(```\n)", re.DOTALL)
_HERE = re.compile(r"<!-- here: (\S+) = (\S+) -->")
_VARYING = re.compile(r"in [\d.]+ (?:s|min|h)\b(?: \([^)]*peak memory[^)]*\))?")


def pages() -> list[Path]:
    """Every page that has such parts."""
    found = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
    texts = {path: path.read_text(encoding="utf-8") for path in found}
    return [path for path, text in texts.items() if _FILE.search(text) or _SESSION.search(text)]


def made(text: str) -> str:
    """A page with its files as they are and its commands' output as it is now."""
    text = _FILE.sub(lambda match: match[1] + (ROOT / match[2]).read_text(encoding="utf-8") + match[4], text)
    if not _SESSION.search(text):
        return text
    with TemporaryDirectory() as name:
        folder = Path(name) / "work"
        folder.mkdir()
        for wanted, fixture in _HERE.findall(text):
            copy = shutil.copytree if (FIXTURES / fixture).is_dir() else shutil.copy
            copy(FIXTURES / fixture, folder / wanted)
        return _SESSION.sub(lambda match: match[1] + session(match[2], folder) + match[3], text)


def session(text: str, folder: Path) -> str:
    """A session run again: its commands, each with what it prints."""
    lines = []
    for command in re.findall(r"(?m)^\$ (.*(?:\\\n.*)*)$", text):
        lines += [f"$ {command}\n", printed(command, folder)]
    return "".join(lines)


def printed(command: str, folder: Path) -> str:
    """What a command prints, as a terminal shows it."""
    scripts = Path(sys.executable).parent
    environment = {
        **os.environ, "PATH": f"{scripts}{os.pathsep}{os.environ['PATH']}", "COLUMNS": "120", "TERM": "dumb",
        "LC_ALL": "C.UTF-8",
    }  # fmt: skip
    done = subprocess.run(
        command, shell=True, cwd=folder, env=environment, text=True, check=False,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    return done.stdout.replace(f"{folder}/", "")


def current(text: str) -> str:
    """A page as it should be, in which lines that differ in numbers that vary alone stay as they are."""
    old, new = text.splitlines(keepends=True), made(text).splitlines(keepends=True)
    sides = [[_VARYING.sub("N", line) for line in side] for side in (old, new)]
    kept: list[str] = []
    for what, first, last, start, end in difflib.SequenceMatcher(None, *sides, autojunk=False).get_opcodes():
        kept += old[first:last] if what == "equal" else new[start:end]
    return "".join(kept)


def differences(page: Path) -> str:
    """How a page differs from what it should be; empty if it is current."""
    text = page.read_text(encoding="utf-8")
    sides = text.splitlines(), current(text).splitlines()
    return "\n".join(difflib.unified_diff(*sides, str(page), "as it should be", lineterm="", n=1))


def main() -> None:
    if shutil.which("anyckpt", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}") is None:
        sys.exit("there is no anyckpt to run: install it, or put it on the path")
    if "--check" not in sys.argv[1:]:
        for page in pages():
            page.write_text(current(page.read_text(encoding="utf-8")), encoding="utf-8")
        return
    wrong = []
    for page in pages():
        if found := differences(page):
            print(found)
            wrong.append(page.name)
    if wrong:
        sys.exit(f"not current: {', '.join(wrong)}; run python3 tools/guides.py")


if __name__ == "__main__":
    main()
