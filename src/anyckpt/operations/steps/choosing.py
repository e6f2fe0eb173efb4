"""Choosing by name what of a checkpoint is written: weights, or what lies beside them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from anyckpt.checkpoint import Checkpoint
from anyckpt.errors import IncompleteError, UsageError
from anyckpt.models.complete import some
from anyckpt.operations.steps.beside_weights import weights_beside
from anyckpt.operations.steps.globs import as_patterns, matching
from anyckpt.operations.steps.layer_settings import layers_of
from anyckpt.operations.steps.layer_stack import NUMBERED
from anyckpt.operations.steps.naming import Naming
from anyckpt.operations.steps.pipeline import Stepped
from anyckpt.operations.steps.renaming import Renamed, rename_for
from anyckpt.tensor import LazyTensor

_UNWANTED = "not asked for by --include and --exclude"


def choose(
    checkpoint: Checkpoint,
    include: str | Sequence[str] | None,
    exclude: str | Sequence[str] | None,
    *,
    keep_state: bool = False,
    as_weights: bool = False,
) -> Stepped:
    """The checkpoint with the tensors that the user wants as its weights; those that are left out are ignored.

    Globs match a weight's stored name, or that without the prefix that all weights share.  One that matches no weight
    matches the stored names of what is beside them: averaged copies, slots of an optimizer.  Where such are chosen,
    they are the weights, without the names of what they all lie in.

    Args:
        checkpoint: whole.
        include: glob or globs; all weights if none.
        exclude: glob or globs of what is left out of these.
        keep_state: the training state goes along with the weights.
        as_weights: what is beside the weights gets the names of the weights that it is of, because it gets others next.

    Raises:
        UsageError: a glob to include matches nothing, nothing is left, state is chosen and to be kept as state, or
            several tensors are chosen that are of one weight and are to have its name.
    """
    include, exclude = as_patterns(include), as_patterns(exclude)
    if not include and not exclude:
        return Stepped(checkpoint)
    prefix = checkpoint.model_prefix
    weights = [prefix + name for name in checkpoint.weights()]
    own = set(weights)
    others = [name for name in checkpoint.tensors if name not in own]

    def chosen_by(globs: Iterable[str]) -> set[str]:
        found: set[str] = set()
        for glob in globs:
            matched = {name for name in weights if matching((name, name[len(prefix) :]), (glob,))}
            found.update(matched or matching(others, (glob,)))
        return found

    for glob in include:
        if not chosen_by((glob,)):
            raise UsageError(
                f"no tensor matches --include {glob!r}",
                path=checkpoint.path,
                remedy="list the names with anyckpt inspect --tensors '*'",
            )
    chosen = chosen_by(include) if include else own
    notes = []
    for glob in exclude:
        unwanted = chosen_by((glob,))
        if not unwanted:
            such = next(iter(weights), "")
            notes.append(f"--exclude {glob!r} matches no tensor and leaves out nothing: names are such as {such}")
        chosen = chosen - unwanted
    if not chosen:
        raise UsageError("--include and --exclude leave no weight", path=checkpoint.path)
    beside = [name for name in others if name in chosen]
    if not beside:
        left_out = {name: _UNWANTED for name in weights if name not in chosen}
        some_left = replace(checkpoint, tensors=_without(checkpoint.tensors, left_out))
        return Stepped(some_left, left_out, notes=tuple(notes))
    if keep_state:
        raise UsageError(
            "--include chooses training state to be written as weights, which then has no state of its own",
            path=checkpoint.path,
            found=some(beside),
            remedy="leave --optimizer keep out",
        )
    left_out = {name: _UNWANTED for name in checkpoint.tensors if name not in chosen}
    holder = _holder(checkpoint, chosen)
    told = f"--include chooses {len(beside)} tensors that are stored beside the weights, such as {beside[0]}"
    state = replace(checkpoint.training, has_optimizer=False, has_scheduler=False, has_rng=False)
    tensors = _without(checkpoint.tensors, left_out)
    dialect = None
    if as_weights:
        named = weights_beside(checkpoint, tensors)
        if named is not None:
            tensors, holder, dialect = named, "", checkpoint.dialect
    chosen_ones = replace(
        checkpoint,
        tensors=tensors,
        model_prefix=holder,
        state_prefixes=(),
        dialect=dialect,
        optimizer=None,
        training=state,
        warnings=[*checkpoint.warnings, told],
    )
    return Stepped(chosen_ones, left_out, notes=tuple(notes))


def _without(tensors: Mapping[str, LazyTensor], names: Mapping[str, str]) -> dict[str, LazyTensor]:
    return {name: tensor for name, tensor in tensors.items() if name not in names}


def _holder(checkpoint: Checkpoint, names: set[str]) -> str:
    """What precedes the own names of tensors: the keys that lead to what they all lie in, as far as the file tells."""
    paths = checkpoint.key_paths
    held = {tuple(paths.get(name, ("",))[:-1]) for name in names}
    shared = min(held, key=len)
    while any(path[: len(shared)] != shared for path in held):
        shared = shared[:-1]
    prefix = "".join(f"{step}." for step in shared)
    return prefix if all(name.startswith(prefix) for name in names) else ""


def renumbered(checkpoint: Checkpoint, unwanted: Iterable[str], config: Mapping[str, Any] | None) -> Stepped:
    """The checkpoint with its layers numbered anew where whole ones were left out and a configuration counts the rest.

    Args:
        checkpoint: with the chosen weights.
        unwanted: names of the weights that are not wanted.
        config: the one that is given with the choice; without one nothing is numbered anew.
    """
    count = layers_of(config) if config else None
    places = {name: match for name in checkpoint.weights() if (match := NUMBERED.match(name))}
    gone = {(match[1], int(match[2])) for name in unwanted if (match := NUMBERED.match(name))}
    stacks: dict[str, set[int]] = {}
    for match in places.values():
        stacks.setdefault(match[1], set()).add(int(match[2]))
    order = {
        stack: {number: place for place, number in enumerate(sorted(numbers))}
        for stack, numbers in stacks.items()
        if len(numbers) == count
        and max(numbers) >= len(numbers)
        and {number for other, number in gone if other == stack} >= {*range(max(numbers))} - numbers
        and not any((stack, number) in gone for number in numbers)
    }
    if not order:
        return Stepped(checkpoint)
    prefix = checkpoint.model_prefix
    called = {
        prefix + name: f"{prefix}{match[1]}.{order[match[1]][int(match[2])]}.{name[match.end() :]}"
        for name, match in places.items()
        if match[1] in order
    }
    tensors = {called.get(name, name): tensor for name, tensor in checkpoint.tensors.items()}
    notes = [
        f"layers {', '.join(map(str, numbers))} of {stack} are numbered 0 to {len(numbers) - 1}, for the configuration "
        f"has {len(numbers)}"
        for stack, numbers in order.items()
    ]
    return Stepped(replace(checkpoint, tensors=tensors), notes=tuple(notes))


def renamed_choice(
    error: IncompleteError, checkpoint: Checkpoint, unwanted: Mapping[str, LazyTensor], naming: Naming
) -> Renamed:
    """The chosen weights of a model under other names, though they alone are no whole model.

    The model is renamed as it is stored, and what is made of the tensors that are not wanted is then left out.

    Args:
        error: what was said of the chosen weights alone.
        checkpoint: with the chosen weights, and no state.
        unwanted: the other weights, by stored name.
        naming: the names that are asked for.

    Raises:
        IncompleteError: the model is incomplete as it is stored, too.
        UsageError: the target needs a whole model, or a tensor would be made of wanted and unwanted ones.
    """
    try:
        try:
            whole = rename_for(replace(checkpoint, tensors={**checkpoint.tensors, **unwanted}), naming)
        except IncompleteError as other:
            known = {name: tensor for name, tensor in unwanted.items() if name not in other.unknown}
            whole = rename_for(replace(checkpoint, tensors={**checkpoint.tensors, **known}), naming)
    except IncompleteError:
        raise error from None
    if naming.target.dialect(naming.options) is not None:
        raise UsageError(
            f"{naming.target.name} holds whole models, and --include and --exclude leave parts of this one out: "
            f"{error.problem}",
            path=checkpoint.path,
            remedy="choose these too, give the configuration of a model without them with --config, or write what is "
            "chosen to safetensors, torch or dcp",
        )
    kept: dict[str, LazyTensor] = {}
    for name, tensor in whole.checkpoint.tensors.items():
        sources = whole.renaming.sources[name]
        wanted = sources - unwanted.keys()
        if wanted and len(wanted) < len(sources):
            raise UsageError(
                "is made of tensors of which --include and --exclude leave some out",
                path=checkpoint.path,
                tensor=name,
                remedy="choose all of them or none",
            )
        if wanted:
            kept[name] = tensor
    count = f"{len(kept)} of {len(whole.checkpoint.tensors)} tensors"
    note = f"a part of the model, as --include and --exclude say: {count}"
    return replace(whole, checkpoint=replace(whole.checkpoint, tensors=kept), notes=(*whole.notes, note))
