"""Paths on the Hub, and what is said where huggingface_hub is not installed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from tests.cli.runner import Runner
from tests.support import fixture_path

from anyckpt.errors import FormatError, MissingLibraryError
from anyckpt.storage.hub.paths import parse
from anyckpt.storage.location import place_of
from anyckpt.storage.place import scheme_of

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.mark.parametrize(
    ("text", "kind", "repository", "revision", "inner"),
    [
        ("hf://org/name", "model", "org/name", None, ""),
        ("hf:org/name", "model", "org/name", None, ""),
        (str(Path("hf://org/name/x.bin")), "model", "org/name", None, "x.bin"),
        ("hf:org/name/", "model", "org/name", None, ""),
        ("hf:gpt2", "model", "gpt2", None, ""),
        ("hf:gpt2@main/config.json", "model", "gpt2", "main", "config.json"),
        ("hf://org/name@v1.0", "model", "org/name", "v1.0", ""),
        ("hf://org/name@a%2Fb/sub//x.bin", "model", "org/name", "a/b", "sub/x.bin"),
        ("hf://org/name@refs/pr/12/x.bin", "model", "org/name", "refs/pr/12", "x.bin"),
        ("hf://datasets/org/name/x@1.json", "dataset", "org/name", None, "x@1.json"),
        ("hf:spaces/org/name", "space", "org/name", None, ""),
        ("hf://models/org/name", "model", "org/name", None, ""),
        (f"hf://org/name@{COMMIT}", "model", "org/name", COMMIT, ""),
    ],
)
def test_paths_are_taken_apart(text: str, kind: str, repository: str, revision: str | None, inner: str) -> None:
    found = parse(text)
    assert scheme_of(text) == "hf"
    assert (found.kind, found.repository, found.revision, found.inner) == (kind, repository, revision, inner)
    assert text.startswith(found.root)


@pytest.mark.parametrize("text", ["hf://", "hf://a//b", "hf:///a/b", "hf://org/na me", "hf://org/name@", "hf://.x/y"])
def test_what_is_no_path_is_refused(text: str) -> None:
    with pytest.raises(FormatError, match="is not a path on the Hugging Face Hub"):
        parse(text)


def test_other_kinds_are_refused_by_name() -> None:
    with pytest.raises(FormatError, match=r"hf://buckets/org/name/x: is of a kind that is not read here .*buckets"):
        parse("hf://buckets/org/name/x")


def test_without_the_extra_it_is_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(MissingLibraryError, match=r"pip install 'anyckpt\[hub\]'"):
        place_of("hf://org/name")
    assert "pip install 'anyckpt[hub]'" in Runner(capsys)("inspect", "hf:org/name").error


def test_local_paths_need_none_of_it() -> None:
    program = (
        "import sys, anyckpt; anyckpt.open(sys.argv[1])\n"
        "assert not {'huggingface_hub', 'anyckpt.storage.hub'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", program, str(fixture_path("families/llama/hf"))], check=True, timeout=60)
