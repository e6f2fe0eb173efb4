"""Carrying an optimizer's state along while its weights are renamed and cut."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace

from anyckpt.checkpoint import Checkpoint
from anyckpt.errors import UsageError
from anyckpt.formats import registry
from anyckpt.formats.registry import Format
from anyckpt.formats.shared.random_states import random_states
from anyckpt.optimizer import has_another_form, holds_optimizer, laid_out, renamed, with_masters, with_optimizer
from anyckpt.optimizer.parameters import buffers
from anyckpt.optimizer.state import DROP, tag, tagged
from anyckpt.tensor import LazyTensor

_KEPT_OBJECTS = ("args", "opt_param_scheduler", "num_floating_point_operations_so_far")
"""Objects that Megatron's formats read again, whatever the weights are called."""
_COUNTERS = ("iteration", "global_step", "epoch", "checkpoint_version", "pytorch-lightning_version")
"""What every format says in a place of its own, or of itself."""
_LEFT = {
    "opt_param_scheduler": "the state of Megatron's learning-rate scheduler",
    "lr_scheduler": "the state of an old Megatron's learning-rate scheduler",
    "lr_schedulers": "the state of Lightning's learning-rate schedulers",
    "loops": "where Lightning's loops stood",
    "callbacks": "the state of Lightning's callbacks",
}
_RANDOM = "random states, which belong to the ranks of the source's layout"


@dataclass(frozen=True)
class Carried:
    """What became of a source's training state.

    Attributes:
        checkpoint: the target with it.
        moved: stored names of the source that it has in another form, or that say nothing.
        ignored: stored names that it has not -> reason.
        notes: what a user should know.
    """

    checkpoint: Checkpoint
    moved: frozenset[str] = frozenset()
    ignored: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def moves_state(source: Checkpoint, target: Checkpoint, to: Format, cut: bool) -> bool:
    """Whether state cannot stay as it is stored: weights have other names or are cut, ranks held it, or forms differ.

    Args:
        source: as opened.
        target: under the target's names.
        to: the target's format.
        cut: the target is cut for ranks.
    """
    renamed_weights = not set(source.tensors) <= set(target.tensors)
    other_form = source.training.has_optimizer and _has_another_form(source, to)
    return cut or source.optimizer is not None or renamed_weights or other_form


def _has_another_form(source: Checkpoint, to: Format) -> bool:
    """Whether the target keeps state otherwise than the source, which may be of no format that is known."""
    own = None
    with suppress(UsageError):
        own = registry.by_name(source.format).optimizer
    return source.format != to.name and has_another_form(to.optimizer, own)


def carry_optimizer(
    source: Checkpoint,
    target: Checkpoint,
    to: Format,
    rename: Callable[[dict[str, LazyTensor]], Mapping[str, LazyTensor]],
) -> Carried:
    """The target with the source's training state in the form that its format keeps.

    Args:
        source: as opened, with all its state.
        target: weights under the target's names.
        to: the target's format.
        rename: what was done to the weights.

    Raises:
        MappingError: it cannot be proved which parameter a state is of; the numbers are told.
        UsageError: there is state that nothing here understands, or the format has no place for it.
    """
    found = with_optimizer(source)
    random = random_states(source.objects, source.layout)
    kept = {name: name for name in _KEPT_OBJECTS if name in source.objects} | random
    gone = {name for name in source.objects if name in random.values() or ("/" in name and _tail(name) in _LEFT)}
    if found.optimizer is not None:
        gone |= {name for name in source.objects if holds_optimizer(name)}
    others = {name: target.objects[name] for name in target.objects if name not in gone}
    target = replace(target, objects={**{new: source.objects[name] for new, name in kept.items()}, **others})
    if found.optimizer is None:
        if source.training.has_optimizer:
            raise UsageError(
                "the optimizer's state is of a kind that is not understood",
                path=source.path,
                remedy=DROP,
            )
        return Carried(target, frozenset(kept.values()))
    if to.optimizer is None or to.optimizer.write is None:
        able = [name for name, known in registry.formats().items() if known.optimizer and known.optimizer.write]
        raise UsageError(
            f"{to.name} has no place for optimizer state", path=source.path, expected=", ".join(able),
            remedy=DROP,
        )  # fmt: skip
    weights = source.weights()
    state = renamed(with_masters(found.optimizer(), weights), _with_buffers(rename, weights))
    step = source.training.step if source.training.step is not None else state.step
    training = replace(source.training, step=step, has_rng=bool(random))
    bare = replace(target, tensors=target.weights(), model_prefix="", state_prefixes=())
    ready = laid_out(replace(bare, training=training, optimizer=lambda: state), to.optimizer, to.name)
    own = {source.model_prefix + name for name in weights}
    tensors = {name for name in source.tensors if name not in own}
    objects = {name for name in source.objects if holds_optimizer(name) or name in _COUNTERS}
    moved = frozenset({*kept.values(), *tensors, *objects})
    left = [name for name in source.objects if name not in moved and name not in ready.objects]
    ignored = {name: f"{_LEFT[_tail(name)]}: {to.name} has another, or none" for name in left if _tail(name) in _LEFT}
    ignored.update((name, _RANDOM) for name in left if "rng_state" in name)
    notes = tuple(warning for warning in ready.warnings if warning not in target.warnings)
    return Carried(ready, moved, ignored, (*state.warnings, *notes))


def _tail(name: str) -> str:
    """The name of what a rank's file holds, without the rank."""
    return name.rpartition("/")[2]


def _with_buffers(
    rename: Callable[[dict[str, LazyTensor]], Mapping[str, LazyTensor]], weights: Mapping[str, LazyTensor]
) -> Callable[[dict[str, LazyTensor]], Mapping[str, LazyTensor]]:
    """A renaming of a whole model, for its parameters alone: buffers have no state; they go along and are left out."""
    without_state = buffers(weights)
    if not without_state:
        return rename

    def apply(tensors: dict[str, LazyTensor]) -> Mapping[str, LazyTensor]:
        lacking = {name: tensor for name, tensor in without_state.items() if name not in tensors}
        whole = rename({**tensors, **lacking})
        marks = {name: tag(tensor.shape, 0) for name, tensor in tensors.items()}
        marked = rename({**marks, **{name: tag(tensor.shape, 1) for name, tensor in lacking.items()}})
        return {name: tensor for name, tensor in whole.items() if not marked[name].size or not tagged(marked[name])}

    return apply
