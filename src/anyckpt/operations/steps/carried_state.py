"""A checkpoint's training state, carried along while its weights are renamed and cut."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace

from anyckpt.checkpoint import Checkpoint
from anyckpt.errors import UsageError
from anyckpt.formats import registry
from anyckpt.formats.format import Format
from anyckpt.formats.shared.random_states import random_states
from anyckpt.operations.steps.aim import Aim
from anyckpt.operations.steps.layout_request import LayoutRequest
from anyckpt.operations.steps.pipeline import Stepped
from anyckpt.operations.steps.recorded_renaming import Renaming
from anyckpt.optimizer.read import holds_optimizer, with_optimizer
from anyckpt.optimizer.state import DROP, Rename, renamed, with_masters
from anyckpt.optimizer.write import has_another_form, laid_out

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


def with_state(
    source: Checkpoint, ready: Checkpoint, renaming: Renaming, aim: Aim, request: LayoutRequest, unwanted: int
) -> Stepped:
    """The target with the source's training state: as it is stored where that can stay, else by parameter.

    Args:
        source: as opened, with all its state.
        ready: weights under the target's names.
        renaming: what was done to the weights.
        aim: what is to be written.
        request: the layout that the user asks for.
        unwanted: how many of the weights are left out.

    Raises:
        MappingError: it cannot be proved which parameter a state is of; the numbers are told.
        UsageError: there is state that nothing here understands, or the format has no place for it, or weights are
            computed and no state is that of the result.
    """
    trained = source.optimizer is not None or source.training.has_optimizer
    if trained and renaming.computes:
        raise UsageError(
            "weights are computed on the way, and the optimizer's moments do not go with them",
            path=source.path,
            remedy="leave the state out with --optimizer drop",
        )
    if moves_state(source, ready, aim.target, aim.cut is not None):
        if aim.cut is None and request.expert_parallel is not None:
            ready = replace(ready, layout=replace(ready.layout, expert_parallel=request.expert_parallel))
        return carry_optimizer(source, ready, aim.target, renaming)
    if not unwanted or not source.training.has_optimizer:
        return Stepped(ready)
    note = (
        f"{unwanted} weights are left out, and the optimizer's state is kept as it is, of all weights: it fits only a "
        "model that has the others too"
    )
    return Stepped(ready, notes=(note,))


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
    renaming: Rename,
) -> Stepped:
    """The target with the source's training state in the form that its format keeps.

    Args:
        source: as opened, with all its state.
        target: weights under the target's names.
        to: the target's format.
        renaming: what was done to the weights.

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
        return Stepped(target, moved=frozenset(kept.values()))
    if to.optimizer is None or to.optimizer.write is None:
        able = [name for name, known in registry.formats().items() if known.optimizer and known.optimizer.write]
        raise UsageError(
            f"{to.name} has no place for optimizer state",
            path=source.path,
            expected=", ".join(able),
            remedy=DROP,
        )
    weights = source.weights()
    state = renamed(with_masters(found.optimizer(), weights), renaming)
    step = source.training.step if source.training.step is not None else state.step
    training = replace(source.training, step=step, has_rng=bool(random))
    bare = target.with_weights(target.weights())
    ready = laid_out(replace(bare, training=training, optimizer=lambda: state), to.optimizer, to.name)
    own = {source.model_prefix + name for name in weights}
    tensors = {name for name in source.tensors if name not in own}
    objects = {name for name in source.objects if holds_optimizer(name) or name in _COUNTERS}
    moved = frozenset({*kept.values(), *tensors, *objects})
    left = [name for name in source.objects if name not in moved and name not in ready.objects]
    ignored = {name: f"{_LEFT[_tail(name)]}: {to.name} has another, or none" for name in left if _tail(name) in _LEFT}
    ignored.update((name, _RANDOM) for name in left if "rng_state" in name)
    notes = tuple(warning for warning in ready.warnings if warning not in target.warnings)
    return Stepped(ready, ignored, (*state.warnings, *notes), moved=moved)


def _tail(name: str) -> str:
    """The name of what a rank's file holds, without the rank."""
    return name.rpartition("/")[2]
