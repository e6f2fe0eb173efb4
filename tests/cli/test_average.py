"""``anyckpt average``: options, JSON, refusals."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.cli.runner import Runner
from tests.support import assert_tensors_equal_expected, expected_of, fixture_path

import anyckpt as api

WORDS = [fixture_path(f"legacy/averaging/m--epoch={number}.ckpt") for number in range(3)]
WITHOUT = ("--exclude", "steps", "--exclude", "mask")


def test_the_json_is_that_of_convert(anyckpt: Runner, tmp_path: Path) -> None:
    out = tmp_path / "mean.ckpt"
    words = ("average", *WORDS, "-o", out, *WITHOUT, "--json")
    planned = anyckpt(*words, "--dry-run").json
    assert planned["dry_run"] is True and not out.exists()
    found = anyckpt(*words).json
    assert found["output"] == str(out) and found["tensors"] == 3
    assert found.keys() | {"files"} == planned.keys()
    assert_tensors_equal_expected(api.open(out).weights(), expected_of("legacy/averaging")["exact_mean_rounded_once"])


def test_weights_and_format(anyckpt: Runner, tmp_path: Path) -> None:
    out = tmp_path / "mean.safetensors"
    words = ("average", *WORDS, "-o", out, *WITHOUT, "--to", "safetensors")
    assert anyckpt(*words, "--weights", "0,2,0").code == 0
    only = api.open(WORDS[1]).weights()
    for name, tensor in api.open(out).tensors.items():
        assert tensor.numpy().tobytes() == only[name].numpy().tobytes()
    text = anyckpt(*words, "--weights", "1,2,1", "--overwrite")
    assert text.code == 0 and "weighted 1, 2, 1" in text.err + text.out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((*WORDS, "-o", "x", "--weights", "1,a,2"), "--weights"),
        ((*WORDS, "-o", "x", "--weights", "1,2"), "every checkpoint needs a weight"),
        ((WORDS[0], "-o", "x"), "nothing to average"),
        (("-o", "x"), "SRC"),
        (tuple(WORDS), "-o"),
        ((*WORDS, "-o", "x", "--to", "strange"), "unknown format"),
        ((*WORDS, "-o", "x"), "not averaged"),
    ],
)
def test_refusals(anyckpt: Runner, words: tuple[str | Path, ...], message: str) -> None:
    assert message in anyckpt("average", *words).error
