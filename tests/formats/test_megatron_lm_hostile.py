"""Rank files in which any one thing is something else: an error of ours, or no error, and never another."""

from __future__ import annotations

import copy
import random
from pathlib import Path
from typing import Any

import pytest
from tests.formats.megatron_lm_files import FILE, copy_fixture, root_of, write_torch

from anyckpt.dtypes import BY_NAME
from anyckpt.errors import AnyckptError
from anyckpt.operations.steps.joining import open_checkpoint
from anyckpt.pickling import Global, Record
from anyckpt.tensor import Constant, LazyTensor

JUNK: tuple[Any, ...] = (
    None, True, -1, 0, 1, 1 << 70, float("nan"), float("inf"), "", "x", b"x", [], {}, (), [[]], {"a": {}}, {1: 2},
    Global("torch", "float32"), Record(Global("a", "b"), (1,)),
    Record(Global("argparse", "Namespace"), (), True, state=3), Constant(BY_NAME["float32"], (8,)),
    Constant(BY_NAME["int64"], ()), Constant(BY_NAME["bfloat16"], (0, 3)),
)  # fmt: skip


def places(root: Any) -> list[tuple[Any, Any]]:
    """Every (container, key) that a value can be put at."""
    found: list[tuple[Any, Any]] = []
    todo = [root]
    while todo:
        value = todo.pop()
        if isinstance(value, Record):
            value = value.fields()
        if isinstance(value, dict):
            parts = list(value.items())
        elif isinstance(value, list):
            parts = list(enumerate(value))
        else:
            continue
        for key, part in parts:
            found.append((value, key))
            if not isinstance(part, LazyTensor):
                todo.append(part)
    return found


def damage(root: dict[Any, Any], chance: random.Random) -> None:
    for _ in range(chance.choice((1, 1, 1, 3))):
        container, key = chance.choice(places(root))
        if chance.random() < 0.2:
            del container[key]
        else:
            junk = chance.choice(JUNK)
            container[key] = junk if isinstance(junk, (LazyTensor, Global, Record)) else copy.deepcopy(junk)


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("gpt_fp32_optim_tp2", FILE),
        ("gpt_tp2_pp2_vpp2", FILE),
        ("oldnames_v0", FILE),
        ("distopt_tp2_dp2", "distrib_optim.pt"),
        ("distopt_tp2_dp2", FILE),
    ],
)
def test_anything_may_be_anything(name: str, file: str, tmp_path: Path) -> None:
    root = copy_fixture(f"megatron_{name}", tmp_path)
    paths = sorted(root.glob(f"*/*/{file}"))
    sound = [path.read_bytes() for path in paths]
    chance = random.Random(name + file)
    refused = 0
    for _ in range(40):
        changed = paths if chance.random() < 0.5 else paths[:1]
        seed = chance.random()
        for path in changed:
            contents = root_of(path)
            damage(contents, random.Random(seed))
            write_torch(path, contents)
        try:
            checkpoint = open_checkpoint(root)
            if checkpoint.optimizer is not None:
                checkpoint.optimizer()
        except AnyckptError as error:
            assert "\n" not in str(error)
            refused += 1
        for path, data in zip(paths, sound, strict=True):
            path.write_bytes(data)
    assert refused > 5
