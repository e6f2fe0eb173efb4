"""Formats stand by themselves: the contract that says so knows all of them."""

from __future__ import annotations

import re
from pathlib import Path

from anyckpt.formats import registry

ROOT = Path(__file__).resolve().parent.parent.parent


def test_the_import_contract_has_every_format() -> None:
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    contract = text.split('type = "independence"')[1].split("ignore_imports")[0]
    listed = set(re.findall(r'"anyckpt\.formats\.(\w+)"', contract))
    assert listed == set(registry._BUILT_IN.values())
