"""What frameworks' configuration classes take where they are told nothing: ``data/*.json``.

``tools/framework_defaults.py`` writes these files from the libraries; each says of which releases.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any, Literal

Framework = Literal["transformers", "nemo2"]


@cache
def of_class(framework: Framework, name: str) -> Mapping[str, Any]:
    """A class's defaults by field, with those of its bases; nothing of a class that is not known.

    Args:
        framework: whose class.
        name: of the class, without its module; of transformers its ``model_type``.
    """
    entry = _classes(framework).get(name)
    if entry is None:
        return {}
    inherited = {} if entry["base"] is None else of_class(framework, entry["base"])
    return {**inherited, **{key: _frozen(value) for key, value in entry["fields"].items()}}


def is_known(framework: Framework, name: str) -> bool:
    """Whether a framework has a class of this name."""
    return name in _classes(framework)


@cache
def _classes(framework: Framework) -> dict[str, Any]:
    path = Path(__file__).parent / "data" / f"{framework}.json"
    classes: dict[str, Any] = json.loads(path.read_text("utf-8"))["classes"]
    return classes


def _frozen(value: Any) -> Any:
    return tuple(map(_frozen, value)) if isinstance(value, list) else value
