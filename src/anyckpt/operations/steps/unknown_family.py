"""What to tell a user whose model is of no family that anyckpt knows."""

from __future__ import annotations

from anyckpt.checkpoint import Checkpoint
from anyckpt.errors import UsageError, few
from anyckpt.models.recognise import resemblance

_SHOWN = 8
_WRITE = "write the family down (python -m pydoc anyckpt.extend says how)"
_KEEP = "convert to safetensors, torch or dcp, which keep names"


def unknown_family(checkpoint: Checkpoint, target: str, wanted: str, known: str | None) -> UsageError:
    """The error of a conversion that needs the family: what the names resemble, and what to do.

    Args:
        checkpoint: whose family is unknown.
        target: name of the format to write.
        wanted: the naming that it needs.
        known: the checkpoint's own naming, or None.
    """
    nearest = resemblance(checkpoint.weights())
    problem = f"{target} needs a model whose family is known"
    told = checkpoint.config.get("model_type")
    if checkpoint.config_kind is None or not checkpoint.config:
        problem += ", and there is no configuration"
    elif told is not None:
        problem += f", and model_type {told!r} is of none"
    if nearest is None:
        remedy = f"name it with --family and --config, {_WRITE}, or {_KEEP}"
    elif nearest.strange:
        problem += (
            f"; by names it is nearest to {nearest.text}, of whose rules none covers {len(nearest.strange)} tensors: "
            f"{few(nearest.strange, _SHOWN)}"
        )
        remedy = f"{_WRITE}, or {_KEEP}"
    elif checkpoint.config_kind is None or not checkpoint.config:
        problem += f"; by names it looks like {nearest.text}"
        remedy = f"give its configuration with --config: names do not tell the number of heads; or {_KEEP}"
    else:
        problem += f"; by names it looks like {nearest.text}, which does not say that it computes the same"
        remedy = f"if its code does, say so with --family; else {_WRITE}, or {_KEEP}"
    return UsageError(
        problem, path=checkpoint.path, expected=f"{wanted} names", found=f"{known or 'unknown'} names", remedy=remedy
    )
