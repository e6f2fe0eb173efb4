"""What of a checkpoint a conversion takes: tensors by name, layers, and rows for new tokens."""

from __future__ import annotations

from dataclasses import replace

from anyckpt.checkpoint import Checkpoint
from anyckpt.data_classes import dataclass
from anyckpt.operations.options import ConvertOptions
from anyckpt.operations.steps.account import nothing_to_write
from anyckpt.operations.steps.aim import Aim
from anyckpt.operations.steps.choosing import choose, renumbered
from anyckpt.operations.steps.full_precision import in_full_precision
from anyckpt.operations.steps.layer_choice import choose_layers
from anyckpt.operations.steps.pipeline import Pipeline
from anyckpt.tensor import LazyTensor


@dataclass(frozen=True)
class ChosenParts:
    """What is taken.

    Attributes:
        checkpoint: with what is chosen.
        unwanted: the weights that are not, by their own names.
        options: what the user asks for, with the configuration of what is chosen where one was given of the whole.
    """

    checkpoint: Checkpoint
    unwanted: dict[str, LazyTensor]
    options: ConvertOptions


def chosen_parts(whole: Checkpoint, options: ConvertOptions, aim: Aim, steps: Pipeline) -> ChosenParts:
    """The parts that a user wants.

    Args:
        whole: the source with the tensors of all ranks.
        options: what the user asks for.
        aim: what the target is.
        steps: gets what is left out and noted.

    Raises:
        UsageError: there are no such parts, or nothing is left.
    """
    request, keeps = options.request, options.keeps_state
    names_given = options.names is not None or aim.target.dialect(aim.options) is not None
    chosen = steps.take(choose(whole, options.include, options.exclude, keep_state=keeps, as_weights=names_given))
    own = chosen.weights()
    left_out = {name: t for name, t in whole.weights().items() if whole.model_prefix + name in steps.ignored}
    unwanted = {name: tensor for name, tensor in left_out.items() if name not in own}
    if not keeps and not own:
        raise nothing_to_write(whole)
    given = None
    layers = options.layers
    if layers is not None:
        if options.cast_to is not None:  # while what says which weights are codes has the layers' old numbers
            chosen = steps.take(in_full_precision(chosen, options.cast_to, options.given))
            options = options.for_numbers()
        fewer = choose_layers(chosen, layers, options.given, options.family, unwanted)
        chosen, unwanted, given = steps.take(fewer), dict(fewer.others(unwanted)), fewer.given
    elif not keeps:
        chosen = steps.take(renumbered(chosen, unwanted, options.given))
    if given is not None:
        options = replace(options, config=given, model_id=None)
    if request.new_rows is not None and request.vocab_size is not None:
        from anyckpt.operations.steps.grown_vocabulary import grow_vocabulary

        grown = grow_vocabulary(chosen, request.vocab_size, request.new_rows, options.given, options.family)
        chosen = steps.take(grown)
        if grown.given is not None:
            options = replace(options, config=grown.given, model_id=None)
    return ChosenParts(chosen, unwanted, options)
