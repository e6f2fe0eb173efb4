"""Names of models whose configuration is known: those that NeMo 2's migration from NeMo 1 takes, and their classes.

Source: NeMo 2.4, ``scripts/checkpoint_converters/convert_nemo1_to_nemo2.py``; what each class says is in
``data/nemo2.json``.
"""

from __future__ import annotations

import json
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from typing import Any

from anyckpt.errors import UsageError

_MODULE = "nemo.collections.llm.gpt.model"


def configuration_of(model_id: str) -> dict[str, Any]:
    """The configuration of a model by its name, as ``model.yaml`` of NeMo 2 spells it: classes, all else their own.

    Raises:
        UsageError: the name is not known; the message lists those that are.
    """
    classes = _classes().get(model_id)
    if classes is None:
        near = get_close_matches(model_id, _classes(), 1)
        raise UsageError(
            "unknown model id" + (f"; did you mean {near[0]}?" if near else ""),
            expected=", ".join(_classes()),
            found=model_id,
            remedy="give a folder of NeMo 2 in place of an id, or the model's configuration with --config",
        )
    model, config = classes
    return {"_target_": f"{_MODULE}.{model}", "config": {"_target_": f"{_MODULE}.{config}"}}


def known() -> tuple[str, ...]:
    """The names that ``configuration_of`` takes."""
    return tuple(_classes())


@cache
def _classes() -> dict[str, list[str]]:
    path = Path(__file__).parent / "data" / "model_ids.json"
    classes: dict[str, list[str]] = json.loads(path.read_text("utf-8"))
    return classes
