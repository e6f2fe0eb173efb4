"""What calibration says of a checkpoint, under the names of the target that it is quantized for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from anyckpt.checkpoint import Checkpoint
from anyckpt.operations.steps.naming import Naming
from anyckpt.operations.steps.renaming import rename_for
from anyckpt.quantization.calibrated import Calibration, calibrate_weights, under_names
from anyckpt.quantization.choosing import choose_linear
from anyckpt.quantization.forms import layout_of
from anyckpt.quantization.statistics import check_is_of
from anyckpt.quantization.stored import Request
from anyckpt.tensor import LazyTensor


def linear_weights(hub: Checkpoint) -> dict[str, LazyTensor]:
    """The weights of linear modules that calibration looks at, of a model under Hugging Face's names."""
    weights = hub.weights()
    return {name: weights[name] for name in choose_linear(weights).weights}


def calibration_of(hub: Checkpoint, ready: Checkpoint, naming: Naming, request: Request) -> Calibration:
    """What the request's statistics say of the weights that are quantized.

    Args:
        hub: the source under Hugging Face's names, as ``statistics`` have them.
        ready: the same under its target's.
        naming: which these are.
        request: what is asked of quantizing.

    Raises:
        UsageError: the statistics are of another model, or have not what is needed.
    """
    statistics = request.statistics
    assert statistics is not None
    check_is_of(statistics, linear_weights(hub), hub.path)
    layout = layout_of(request)
    weights = hub.weights()
    renaming = rename_for(hub, naming).renaming
    order = {name: number for number, name in enumerate(statistics.modules)}
    chosen = layout.choose(ready.weights(), request.exclude).weights
    sources = {
        name: sorted((one.removesuffix(".weight") for one in made), key=lambda one: order.get(one, len(order)))
        for name in chosen
        if (made := renaming.sources.get(name))
    }
    if layout.key:
        together = [shared.modules for shared in statistics.shared]
    else:
        together = [tuple(several) for several in sources.values()]
    needed = dict.fromkeys(f"{one}.weight" for several in sources.values() for one in several)
    found = calibrate_weights(
        weights,
        needed,
        statistics,
        layout.smoothing,
        alpha=request.alpha,
        together=together,
        fold=layout.folded,
    )
    named = under_names(found, sources, renaming.anew, weights, _attentions(statistics.caches, sources))
    if layout.folded:  # which forms do that have Hugging Face's names
        named = replace(named, norms=found.norms, folded=found.folded)
    return named


def _attentions(caches: Mapping[str, object], sources: Mapping[str, list[str]]) -> dict[str, str]:
    """The name that the target has for each attention: the parent of what is made of its modules."""
    parents = {one.rpartition(".")[0]: name for name, several in sources.items() for one in several}
    return {module: parents[module].rsplit(".", 2)[0] for module in caches if module in parents}
