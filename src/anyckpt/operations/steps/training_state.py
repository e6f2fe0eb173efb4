"""A checkpoint without its training state."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from anyckpt.checkpoint import Checkpoint
from anyckpt.operations.steps.pipeline import Stepped

_STATE = "state besides the weights; --optimizer keep carries it where the target can hold it"


def without_state(checkpoint: Checkpoint, left_out: Iterable[str], to: str) -> Stepped:
    """The weights alone under their own names.

    A weight of several parts (sparse, quantized) is an object besides its tensors, and stays, and so does what is
    attached to weights where the format stays the same.

    Args:
        checkpoint: as opened, with the chosen weights.
        left_out: stored names of the other ones.
        to: name of the target's format.
    """
    again = to == checkpoint.format
    weights, prefix = checkpoint.weights(), checkpoint.model_prefix
    wholes = _holders(weights)
    attached = _attached(checkpoint, left_out) if again else []
    wholes |= {name[len(prefix) :] for name in attached if name.startswith(prefix)}
    held = [name for name in checkpoint.objects if name.startswith(prefix) and name[len(prefix) :] in wholes]
    composite = {name[len(prefix) :]: checkpoint.objects[name] for name in held}
    stored = {prefix + name for name in (*weights, *composite)}
    dropped = {name: _STATE for name in (*checkpoint.tensors, *checkpoint.objects) if name not in stored}
    if checkpoint.optimizer is not None:
        dropped.setdefault("optimizer", _STATE)
    training = replace(checkpoint.training, has_optimizer=False, has_scheduler=False, has_rng=False)
    bare = checkpoint.with_weights(weights, objects=composite, training=training, optimizer=None)
    written_back = checkpoint.written_back if again else frozenset()
    return Stepped(bare, {name: reason for name, reason in dropped.items() if name not in written_back})


def _attached(checkpoint: Checkpoint, left_out: Iterable[str]) -> list[str]:
    """What is attached to weights but to those alone that are left out: in the innermost thing that holds any."""
    kept, gone = _holders(checkpoint.tensors), _holders(left_out)

    def stays(name: str) -> bool:
        parents = [name[:end] for end, letter in enumerate(name) if letter == "."]
        holder = next((parent for parent in reversed(parents) if parent in kept or parent in gone), None)
        return holder is None or holder in kept

    return [name for name in checkpoint.attached if stays(name)]


def _holders(names: Iterable[str]) -> set[str]:
    """Every beginning of the names that ends before a dot."""
    found: set[str] = set()
    for name in names:
        end = name.rfind(".")
        while end >= 0 and name[:end] not in found:
            found.add(name[:end])
            end = name.rfind(".", 0, end)
    return found
