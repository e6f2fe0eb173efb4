"""Of which weights the tensors are that lie beside them: averaged copies, and what an optimizer keeps of each."""

from __future__ import annotations

from collections.abc import Mapping

from anyckpt.checkpoint import Checkpoint, CompositeTensor, storage_key
from anyckpt.errors import LastingError, UsageError
from anyckpt.models.complete import some
from anyckpt.optimizer.read import with_optimizer
from anyckpt.tensor import LazyTensor


def objects_in_modules(checkpoint: Checkpoint) -> list[str]:
    """Stored names of objects in the modules that weights are in, such as an extra state; none that hold weights."""
    prefix = checkpoint.model_prefix
    found = [
        name
        for name, value in checkpoint.objects.items()
        if name.startswith(prefix) and not isinstance(value, CompositeTensor)
    ]
    if not found:
        return []
    stored = [prefix + name for name in checkpoint.weights()]
    modules = {name[:end] for name in stored for end, sign in enumerate(name) if sign == "."}
    return [name for name in found if name.rpartition(".")[0] in modules]


def weights_beside(checkpoint: Checkpoint, chosen: Mapping[str, LazyTensor]) -> dict[str, LazyTensor] | None:
    """Tensors by the own names of the weights that they are of; None if that is not known of all of them.

    Args:
        checkpoint: with all its tensors.
        chosen: some of these, by stored name.

    Raises:
        UsageError: several are of one weight.
    """
    weights = checkpoint.weights()
    found = _of_copy(weights, chosen) or _of_optimizer(checkpoint, weights, chosen)
    if found is None:
        return None
    own: dict[str, LazyTensor] = {}
    for stored, name in found.items():
        if name in own:
            several = [other for other, weight in found.items() if weight == name]
            raise UsageError(
                f"--include chooses {len(several)} tensors of one weight, and all would have its name",
                path=checkpoint.path,
                tensor=name,
                found=some(several),
                remedy="choose one kind of them (*.exp_avg.* and not *.exp_avg*), or leave --names out",
            )
        own[name] = chosen[stored]
    order = {name: number for number, name in enumerate(weights)}
    return {name: own[name] for name in sorted(own, key=order.__getitem__)}


def _of_copy(weights: Mapping[str, LazyTensor], chosen: Mapping[str, LazyTensor]) -> dict[str, str] | None:
    """Where names end as weights', after something before them, and shapes are theirs, too; the longest such end."""
    found = {}
    for stored, tensor in chosen.items():
        ends = (stored[at + 1 :] for at, letter in enumerate(stored) if letter == ".")
        own = next((end for end in ends if end in weights and weights[end].shape == tensor.shape), None)
        if own is None:
            return None
        found[stored] = own
    return found


def _of_optimizer(
    checkpoint: Checkpoint, weights: Mapping[str, LazyTensor], chosen: Mapping[str, LazyTensor]
) -> dict[str, str] | None:
    """Where the optimizer's state says whose each tensor is, by number or by name."""
    find = with_optimizer(checkpoint).optimizer
    try:
        slots = {} if find is None else find().slots
    except LastingError:
        return None
    owners = {key: name for own in slots.values() for name, tensor in own.items() if (key := storage_key(tensor))}
    found = {stored: owners.get(storage_key(tensor)) for stored, tensor in chosen.items()}
    known = {stored: name for stored, name in found.items() if name is not None and name in weights}
    return known if len(known) == len(chosen) else None
