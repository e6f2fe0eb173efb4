"""Training state that is no tensor: what of two checkpoints' objects differs, by what they mean."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import field
from typing import Any

from anyckpt.checkpoint import Checkpoint
from anyckpt.data_classes import dataclass
from anyckpt.errors import FormatError, LastingError
from anyckpt.formats.shared.random_states import random_states
from anyckpt.formats.shared.rank_folders import parse_folder
from anyckpt.models.complete import some
from anyckpt.operations.steps.compare_objects import compare_objects
from anyckpt.operations.steps.configurations import Setting
from anyckpt.optimizer.read import holds_optimizer

_COUNTERS = frozenset({"iteration", "global_step", "epoch"})
"""Objects that readers take positions from."""
_OF_WRITER = frozenset({"checkpoint_version", "pytorch-lightning_version", "content_metadata"})
_OF_RUN = frozenset({"args", "hyper_parameters", "hparams_name", "hparams_type"})
"""Where formats keep configurations, among a run's paths, ranks and sizes of batches."""
_TOLD_BY_PARAMETER = re.compile(
    r"(?:.*[./])?(?:param_groups|grad_scaler|step|state|param_state|param_state_sharding_type)(?:\..*)?"
)
"""What is compared by parameter, and which form it is kept in."""
_NUMBERS = re.compile(r".*[./](?:param_groups\.\d+\.(?!params\b)|grad_scaler\b|step\b).*")
"""Of what is told by parameter, what every rank has alike."""
_SCHEDULERS = frozenset({"opt_param_scheduler", "lr_scheduler", "lr_schedulers"})


@dataclass
class TrainingObjects:
    """What was found.

    Attributes:
        different: what differs.
        not_compared: what was not compared, and why.
    """

    different: list[Setting] = field(default_factory=list)
    not_compared: list[str] = field(default_factory=list)


def compare_training_objects(a: Checkpoint, b: Checkpoint, *, by_parameter: bool, configured: bool) -> TrainingObjects:
    """What differs of the objects by what they mean; with ``diff --raw`` they are compared as they are stored.

    Of one format all are compared.  Of two, those that have the same name in both; of the others is told.  States of
    random numbers are of the ranks of a layout, and so is what else a rank's file has of its own.

    Args:
        a: a checkpoint.
        b: another.
        by_parameter: the optimizers' state was compared by parameter, or one has none.
        configured: the configurations were compared by what they mean.
    """
    result = TrainingObjects()
    random = [random_states(checkpoint.objects, checkpoint.layout) for checkpoint in (a, b)]
    _compare_random(a, b, random, result)
    aside = {name for c in (a, b) for name in c.objects if _is_of_run(name, configured)}
    without = aside | _COUNTERS | {name for own in random for name in own.values()}
    names = [[name for name in c.objects if name not in without] for c in (a, b)]
    alike = a.format == b.format and a.layout == b.layout
    if not alike or not all(any(map(holds_optimizer, own)) for own in names):
        names = [[name for name in own if not holds_optimizer(name)] for own in names]
    if a.layout != b.layout:
        names = [_of_all_ranks(own, result) for own in names]
    if a.format != b.format:
        names = _of_both_formats(a, b, names, result)
    held = [{name: c.objects[name] for name in own} for c, own in zip((a, b), names, strict=True)]
    result.different += _compare(held, by_parameter, sequences_alike=a.format != b.format)
    _compare_extra(a, b, result)
    if aside:
        heads = sorted({name.partition(".")[0] for name in aside})
        result.not_compared.append(f"versions and arguments of the runs ({', '.join(heads)}), which --raw compares")
    return result


def _is_of_run(name: str, configured: bool) -> bool:
    head = name.partition(".")[0]
    return head in _OF_WRITER or (configured and head in _OF_RUN)


def _compare_random(a: Checkpoint, b: Checkpoint, random: list[dict[str, str]], result: TrainingObjects) -> None:
    """States that ranks of one place have; those of another layout are of other ranks."""
    if not any(random):
        if a.format != b.format and a.training.has_rng != b.training.has_rng:
            result.different.append(
                Setting("random states", *("there" if c.training.has_rng else None for c in (a, b)))
            )
        return
    if not all(random):
        said = [f"of {len(own)} ranks" if own else None for own in random]
        result.different.append(Setting("random states", said[0], said[1]))
    elif random[0].keys() != random[1].keys():
        result.not_compared.append("random states, which belong to the ranks of different layouts")
    else:
        held = [{name: _alone(c.objects[own[name]]) for name in own} for c, own in zip((a, b), random, strict=True)]
        result.different += compare_objects(held[0], held[1], tensors=True, sequences_alike=a.format != b.format)


def _alone(state: Any) -> Any:
    """A rank's state: Megatron-Core has a list of those of all data-parallel ranks, mostly of one, and DCP has not."""
    return state[0] if isinstance(state, (list, tuple)) and len(state) == 1 else state


def _of_all_ranks(names: list[str], result: TrainingObjects) -> list[str]:
    """What is of no one rank; of what is left out is told."""
    shared = [name for name in names if not _is_of_rank(name)]
    text = "what each rank's file has of its own, for the layouts differ"
    if len(shared) < len(names) and text not in result.not_compared:
        result.not_compared.append(text)
    return shared


def _is_of_rank(name: str) -> bool:
    folder, slash, _ = name.partition("/")
    try:
        return bool(slash) and parse_folder(folder) is not None
    except FormatError:  # a name like those of FSDP's shards
        return False


def _of_both_formats(a: Checkpoint, b: Checkpoint, names: list[list[str]], result: TrainingObjects) -> list[list[str]]:
    """What both formats have a name for; a scheduler that one alone has is a difference, and of the rest is told."""
    shared = {*names[0]} & {*names[1]}
    alone = {*names[0]} ^ {*names[1]}
    there = ["there" if _has_scheduler(c) else None for c in (a, b)]
    if there[0] != there[1]:
        result.different.append(Setting("scheduler", there[0], there[1]))
        alone = {name for name in alone if name.partition(".")[0] not in _SCHEDULERS}
    if alone:
        heads = {name.partition(".")[0] for name in alone}
        result.not_compared.append(f"what {a.format} and {b.format} keep each in its own way: {some(heads)}")
    return [[name for name in own if name in shared] for own in names]


def _has_scheduler(checkpoint: Checkpoint) -> bool:
    return checkpoint.training.has_scheduler or any(
        name.partition(".")[0] in _SCHEDULERS and checkpoint.objects[name] for name in checkpoint.objects
    )


def _compare_extra(a: Checkpoint, b: Checkpoint, result: TrainingObjects) -> None:
    """The states that modules have beside their weights, which not every format keeps."""
    try:
        first, second = ({} if c.extra_states is None else c.extra_states() for c in (a, b))
    except LastingError as error:
        result.not_compared.append(f"modules' states beside their weights: {error}")
        return
    if (first and second) or a.format == b.format:
        result.different += compare_objects(first, second, tensors=True)
    elif first or second:
        result.not_compared.append("modules' states beside their weights, which one of the formats does not keep so")


def _compare(held: list[dict[str, Any]], by_parameter: bool, *, sequences_alike: bool) -> Iterator[Setting]:
    """Differences of objects; of optimizers that were compared by parameter, what else they keep."""
    for of_optimizers in (False, True):
        chosen = [{name: obj for name, obj in own.items() if holds_optimizer(name) == of_optimizers} for own in held]
        told = of_optimizers and by_parameter
        first = next((name.partition("/")[0] for name in chosen[0] if _is_of_rank(name)), None)
        for setting in compare_objects(chosen[0], chosen[1], tensors=not told, sequences_alike=sequences_alike):
            if not (told and _TOLD_BY_PARAMETER.fullmatch(setting.name)) or _is_of_another_rank(setting, first):
                yield setting


def _is_of_another_rank(setting: Setting, first: str | None) -> bool:
    """Whether it is a number that a rank keeps of an optimizer whose state by parameter has the first rank's."""
    both = setting.a is not None and setting.b is not None
    return (
        both
        and _is_of_rank(setting.name)
        and setting.name.partition("/")[0] != first
        and (_NUMBERS.fullmatch(setting.name) is not None)
    )
