"""A model without some of its layers: numbered anew, with the configuration and the optimizer's state of those kept."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from anyckpt import models
from anyckpt.checkpoint import Checkpoint, OptimizerState
from anyckpt.config.model import ModelConfig
from anyckpt.data_classes import dataclass
from anyckpt.errors import LastingError, MappingError, UsageError
from anyckpt.operations.steps.layer_request import LayerRequest
from anyckpt.operations.steps.layer_settings import inside_with_layers, layers_of, with_layers, with_stack_layers
from anyckpt.operations.steps.layer_stack import Stack, find_stack, two_stacked, two_stacks
from anyckpt.operations.steps.pipeline import Stepped
from anyckpt.operations.steps.user_names import with_modules
from anyckpt.optimizer.read import with_optimizer
from anyckpt.optimizer.state import DROP
from anyckpt.tensor import LazyTensor

_LEFT_OUT = "of a layer that is left out"


@dataclass(frozen=True)
class WithLayers(Stepped):
    """A model without some layers.

    Attributes:
        given: the configuration that the user gave, of the layers that are left; None if none was given.
        others: the same done to the weights that are not wanted.
    """

    given: dict[str, Any] | None = None
    others: Callable[[Mapping[str, LazyTensor]], Mapping[str, LazyTensor]] = dict


def choose_layers(
    checkpoint: Checkpoint,
    request: LayerRequest,
    given: Mapping[str, Any] | None,
    family: str | None,
    unwanted: Collection[str] = (),
) -> WithLayers:
    """The model with the layers that a user wants, its configuration, and its optimizer's state.

    Args:
        checkpoint: whole.
        request: the layers.
        given: the configuration of the whole model, where the user gives one.
        family: the model family, where the checkpoint does not tell.
        unwanted: own names of the weights that are not wanted, which tell of the layers, too.

    Raises:
        UsageError: there are no such layers, or what is left is no model of the family.
    """
    done = _of_stack(checkpoint, request, given, family, unwanted)
    for other in request.others:
        before, done = done, _of_stack(done.checkpoint, other, done.given, family, unwanted)
        done = replace(
            done,
            ignored={**before.ignored, **done.ignored},
            notes=(*before.notes, *done.notes),
            others=partial(_one_after_the_other, before.others, done.others),
        )
    return done


def _one_after_the_other(
    first: Callable[[Mapping[str, LazyTensor]], Mapping[str, LazyTensor]],
    second: Callable[[Mapping[str, LazyTensor]], Mapping[str, LazyTensor]],
    tensors: Mapping[str, LazyTensor],
) -> Mapping[str, LazyTensor]:
    return second(first(tensors))


def _stack_of(
    checkpoint: Checkpoint, request: LayerRequest, config: Mapping[str, Any], unwanted: Collection[str]
) -> Stack:
    """The layers that a request is about.

    Raises:
        UsageError: the model has two stacks and the request names none, or the other way round, or their layers are
            in one tensor each.
    """
    weights = checkpoint.weights()
    two, together = two_stacks(weights), two_stacked(weights)
    option = "--drop-layers" if request.drop else "--keep-layers"
    if request.stack is None and two:
        raise UsageError(
            "has several stacks of layers, and which are meant is not clear",
            path=checkpoint.path,
            found=", ".join(sorted(f"{stack.name} (0 to {stack.count - 1})" for stack in two.values())),
            remedy=f"say of which with {option} encoder:{request.said}, decoder:{request.said}, or both with a comma",
        )
    if together:
        raise UsageError(
            "has two stacks, with all layers of each in one tensor",
            path=checkpoint.path,
            found=", ".join(together),
            remedy="convert it to hf first, and choose layers of that",
        )
    if request.stack is None:
        return find_stack(weights, layers_of(config), checkpoint.path)
    if request.stack not in two:
        raise UsageError(
            f"{option} {request.said} names the {request.stack} of a model without two numbered stacks",
            path=checkpoint.path,
            remedy="give the numbers alone",
        )
    stack = two[request.stack]
    whole = two_stacks([*weights, *unwanted]).get(request.stack, stack)
    return replace(stack, of_first=whole.of_first)


def _of_stack(
    checkpoint: Checkpoint,
    request: LayerRequest,
    given: Mapping[str, Any] | None,
    family: str | None,
    unwanted: Collection[str],
) -> WithLayers:
    path, weights, prefix = checkpoint.path, checkpoint.weights(), checkpoint.model_prefix
    config = checkpoint.config if given is None else given
    stack = _stack_of(checkpoint, request, config, unwanted)
    kept = request.kept(stack.count, path)
    if len(kept) == stack.count:
        return WithLayers(checkpoint, given=None if given is None else dict(given))
    _check_codes(checkpoint)
    names = stack.renumbered(weights, kept)
    own = {prefix + name for name in weights}
    tensors = {prefix + name: tensor for name, tensor in stack.chosen(weights, kept).items()}
    alone = request.stack is None
    changed, notes = (
        with_layers(config, kept, path)
        if request.stack is None
        else with_stack_layers(config, request.stack, kept, stack.count, path)
    )
    state = with_optimizer(checkpoint).optimizer
    objects, gone = _objects(checkpoint, stack, kept, alone)
    after = replace(
        checkpoint,
        tensors={**tensors, **{name: tensor for name, tensor in checkpoint.tensors.items() if name not in own}},
        objects=objects,
        config=changed if given is None else checkpoint.config,
        details=dict(inside_with_layers(checkpoint.details, kept, stack.count, path) if alone else checkpoint.details),
        trainer=inside_with_layers(checkpoint.trainer, kept, stack.count, path) if alone else checkpoint.trainer,
        optimizer=None if state is None else partial(_state, checkpoint, stack, tuple(kept)),
        extra_states=None,
    )
    after = _adapter_of(after, names, kept)
    before = checkpoint if given is None else _described(checkpoint, given)
    told, changed = _checked(before, _described(after, changed) if config else after, kept, changed, family)
    if given is None and checkpoint.adapter is None:
        after = replace(after, config=changed)
    lost = dict.fromkeys([*(prefix + name for name in weights if name not in names), *gone], _LEFT_OUT)
    of = "" if request.stack is None else f" of the {request.stack}"
    if stack.of_first and kept[0]:
        notes = [
            f"the relative positions that the first layer{of} keeps for all go to the one that is first now",
            *notes,
        ]
    first = f"{stack.count - len(kept)} of {stack.count} layers{of} are left out, and {len(kept)} numbered from 0 on"
    unsaid = (
        ()
        if config or checkpoint.adapter is not None
        else ("no configuration says how many layers there are: change yours",)
    )
    return WithLayers(
        after,
        lost,
        (first, *notes, *told, *unsaid),
        given=None if given is None else changed,
        others=partial(stack.chosen, kept=kept),
    )


def _adapter_of(checkpoint: Checkpoint, names: Mapping[str, str], kept: Sequence[int]) -> Checkpoint:
    """An adapter that speaks of these layers; a model as it is."""
    if checkpoint.adapter is None:
        return checkpoint
    named = with_modules(checkpoint, names)
    layers = named.config.get("layers_to_transform")
    if isinstance(layers, list):
        place = {layer: number for number, layer in enumerate(kept)}
        named = replace(named, config={**named.config, "layers_to_transform": [place[n] for n in layers if n in place]})
    return named


def _described(checkpoint: Checkpoint, config: Mapping[str, Any]) -> Checkpoint:
    kind = models.config_kind(config) if config is not checkpoint.config else checkpoint.config_kind
    return replace(checkpoint, config=dict(config), config_kind=checkpoint.config_kind or kind)


def _objects(
    checkpoint: Checkpoint, stack: Stack, kept: Sequence[int], alone: bool
) -> tuple[dict[str, Any], list[str]]:
    """Objects as they are of the layers that stay, and names of those that are of others.

    What lies among the weights, as a module's extra state, is numbered as they are; mappings beside them that say how
    many layers there are, as Lightning's ``hyper_parameters`` do, are cut as the configuration is.
    """
    prefix = checkpoint.model_prefix
    among = {name.removeprefix(prefix): name for name in checkpoint.objects if name.startswith(prefix)}
    of_layers = {own: name for own, name in among.items() if stack.layer(own) is not None}
    names = stack.renumbered(of_layers, kept)
    called = {stored: prefix + names[own] if own in names else None for own, stored in of_layers.items()}
    objects = {
        called.get(name, name): value
        if name in called or not alone
        else inside_with_layers(value, kept, stack.count, checkpoint.path)
        for name, value in checkpoint.objects.items()
    }
    return (
        {name: value for name, value in objects.items() if name is not None},
        [name for name, new in called.items() if new is None],
    )


def _state(checkpoint: Checkpoint, stack: Stack, kept: Sequence[int]) -> OptimizerState:
    """The optimizer's state of the layers that are kept.

    Raises:
        UsageError: it has values for all layers together that have not the weights' shape.
    """
    find = with_optimizer(checkpoint).optimizer
    assert find is not None
    state = find()
    odd = next((name for own in state.others.values() for name in own if stack.holds(name)), None)
    if odd is not None or state.ranks:
        raise UsageError(
            "the optimizer's state is not told apart by layer", path=checkpoint.path, tensor=odd, remedy=DROP
        )

    def of(values: Mapping[str, Any]) -> dict[str, Any]:
        return {new: values[old] for old, new in stack.renumbered(values, kept).items()}

    order = stack.renumbered(state.order, kept).values()
    return replace(
        state,
        slots={slot: stack.chosen(tensors, kept) for slot, tensors in state.slots.items()},
        others={slot: of(values) for slot, values in state.others.items()},
        group_of=of(state.group_of),
        order=tuple(order) if any(stack.layer(name) is not None for name in state.order) else (),
    )


def _check_codes(checkpoint: Checkpoint) -> None:
    """Raise UsageError for a quantized model that names layers in what it says of its codes."""
    if checkpoint.quantization is not None and re.search(r"layers\\?\.\d", repr(dict(checkpoint.quantization))):
        raise UsageError(
            "is quantized in a way that names layers by their numbers",
            path=checkpoint.path,
            remedy="make it numbers with --dtype bf16, and quantize it again with --quantize",
        )


def _checked(
    before: Checkpoint, after: Checkpoint, kept: Sequence[int], config: dict[str, Any], family: str | None
) -> tuple[list[str], dict[str, Any]]:
    """Notes, and the configuration, which says of the layers what code says of them by their number.

    Raises:
        UsageError: what is left is no model of its family.
    """
    try:
        old = models.identify(before, family=family)
        if old is None:
            return [], config
        models.to_hub(before, old)
    except LastingError:
        return [], config  # not even the whole was one: whoever needs to know says so
    wanted = [_kind(old.config, layer) for layer in kept]
    stated = config
    if after.config_kind == "hf" and wanted != _kinds(after, family):
        windows = [window for window, _, _ in wanted]
        ropes = [rope for _, rope, _ in wanted]
        more: dict[str, Any] = {}
        if any(windows) and not all(windows):
            more["layer_types"] = ["sliding_attention" if window else "full_attention" for window in windows]
        if not all(ropes):
            more["no_rope_layers"] = [int(rope) for rope in ropes]
        stated = _with(config, more)
        after = replace(after, config=stated)
    try:
        new = models.identify(after, family=family)
        fits = new is not None and [_kind(new.config, layer) for layer in range(len(kept))] == wanted
        if new is not None and fits:
            models.to_hub(after, new)
    except MappingError as error:
        raise UsageError(
            f"the layers that are left make no model of family {old.family}: {error}", path=before.path
        ) from None
    if not fits:
        raise UsageError(
            f"the layers that are left would be of other kinds than they were, which a configuration of {old.family} "
            "cannot say",
            path=before.path,
            remedy="leave out layers so that each kind stays at its place",
        )
    said = [key for key in ("layer_types", "no_rope_layers") if stated is not config and key in stated]
    return ([f"{', '.join(said)} of the configuration says of each layer what its number said"] if said else []), stated


def _with(config: dict[str, Any], more: Mapping[str, Any]) -> dict[str, Any]:
    part = config.get("text_config")
    if layers_of({**config, "text_config": None}) is None and isinstance(part, Mapping):
        return {**config, "text_config": {**part, **more}}
    return {**config, **more}


def _kinds(checkpoint: Checkpoint, family: str | None) -> list[tuple[bool, bool, bool]] | None:
    try:
        model = models.identify(checkpoint, family=family)
    except LastingError:
        return None
    return None if model is None else [_kind(model.config, layer) for layer in range(model.config.num_layers)]


def _kind(config: ModelConfig, layer: int) -> tuple[bool, bool, bool]:
    """Whether a layer has a window, a rotary embedding, and experts."""
    skipped = config.window_attn_skip_freq
    if config.window_size is None:
        window = False
    elif skipped is None:
        window = True
    else:
        window = bool((layer + 1) % skipped) if isinstance(skipped, int) else bool(skipped[layer])
    rope = config.no_rope_freq is None or not config.no_rope_freq[layer]
    return window, rope, config.is_sparse(layer)
