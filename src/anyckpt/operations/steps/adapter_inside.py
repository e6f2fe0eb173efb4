"""Models whose files still have their adapter beside the weights: merged, or the adapter alone, while converting."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

from anyckpt.checkpoint import AdapterSettings, Checkpoint
from anyckpt.dtypes import DType
from anyckpt.errors import UsageError, about
from anyckpt.models.adapters import Placed, Target, merged_by_name
from anyckpt.models.adapters.by_name import placed
from anyckpt.models.adapters.peft_names import StoredAdapter
from anyckpt.models.adapters.peft_writer import plain
from anyckpt.models.adapters.rows import PREFIX
from anyckpt.models.adapters.settings import scale_of, with_alpha
from anyckpt.models.adapters.wrapped import Wrapped, is_wrapped, taken_apart
from anyckpt.operations.steps.adapters import AdapterRequest
from anyckpt.operations.steps.casts import ChangedType
from anyckpt.operations.steps.naming import Naming
from anyckpt.operations.steps.pipeline import Stepped
from anyckpt.tensor import LazyTensor

_UNTRAINED = "the untrained copy of a module that the adapter has trained as a whole"
HOW_TO_MERGE = "--alpha merges it, --to peft takes it out, --exclude '*.lora_*' leaves it out"
_IN_THE_ADAPTER = "a weight of the model, and the adapter alone is written"


def holds_adapter(checkpoint: Checkpoint) -> bool:
    """Whether a checkpoint is a whole model with its adapter still in it."""
    return checkpoint.adapter is None and checkpoint.dialect != "peft" and is_wrapped(checkpoint.weights())


def facts_inside(checkpoint: Checkpoint) -> dict[str, Any] | None:
    """What ``inspect`` says of the adapter in a model, None if there is none in it."""
    apart = taken_apart(checkpoint.weights()) if holds_adapter(checkpoint) else Wrapped()
    if not apart.adapter:
        return None
    modules = apart.stored().modules
    ranks = {own.down[1].shape[0] for own in modules.values() if own.down is not None and own.down[1].ndim}
    return {
        "kind": "dora" if any(own.magnitude is not None for own in modules.values()) else "lora",
        "rank": ranks.pop() if len(ranks) == 1 else None,
        "alpha": None,
        "rank_stabilized": False,
        "form": "inside",
        "names": "peft",
        "targets": target_modules(modules, apart.base),
        "base": None,
    }


def without_adapter(
    checkpoint: Checkpoint, naming: Naming, request: AdapterRequest, cast: ChangedType, *, keep_state: bool
) -> Stepped:
    """The model with its adapter merged, or the adapter alone, as the target needs it; else both as they are.

    Args:
        checkpoint: a model of which ``holds_adapter`` is true.
        naming: what is to be written.
        request: what the user says of the adapter.
        cast: element type that a changed weight gets.
        keep_state: the training state is to go along.

    Raises:
        MappingError: a factor is missing, or does not fit.
        UsageError: the alpha is needed and not said, or there is state, which is that of the adapter's factors.
    """
    if keep_state:
        raise UsageError(
            "the optimizer's state is that of an adapter's factors",
            path=checkpoint.path,
            remedy="leave the state out with --optimizer drop",
        )
    if naming.target.adapters == naming.target.name:
        return adapter_inside(checkpoint, request.alpha)
    if request.alpha is not None or naming.dialect is not None:
        return merged_inside(checkpoint, request.alpha, cast)
    note = f"a LoRA adapter is in it beside the weights, and stays so: {HOW_TO_MERGE}"
    return Stepped(checkpoint, notes=(note,))


def merged_inside(checkpoint: Checkpoint, alpha: float | None, cast: Callable[[str, LazyTensor], DType]) -> Stepped:
    """The model with its adapter in the weights, under the model's own names.

    Args:
        checkpoint: a model of which ``holds_adapter`` is true.
        alpha: the adapter's, as the user says it.
        cast: element type that a changed weight gets.

    Raises:
        MappingError: a factor is missing, or does not fit.
        UsageError: the alpha is needed and not said.
    """
    apart = taken_apart(checkpoint.weights())
    left_out = dict.fromkeys((checkpoint.model_prefix + name for name in apart.left_out), _UNTRAINED)
    bare = checkpoint.with_weights(apart.base, objects={}, dialect=None, optimizer=None)
    if not apart.adapter:
        note = "the names are those of a model that peft has wrapped: base_layer is taken out of them"
        return Stepped(bare, left_out, (note,))
    with about(checkpoint.path):
        found = _placed(apart, apart.stored(), with_alpha(AdapterSettings(), alpha))
        tensors = merged_by_name(apart.base, found, scale=1.0, cast=cast)
    ranks = sorted({update.rank for update in found.adapter.updates.values()})
    note = (
        f"the adapter in it is merged: {len(found.adapter.updates)} updates of rank {', '.join(map(str, ranks))}, "
        f"alpha {alpha:g} over the rank"
    )
    return Stepped(replace(bare, tensors=tensors), left_out, (note,))


def _placed(apart: Wrapped, stored: StoredAdapter, settings: AdapterSettings) -> Placed:
    def find(name: str) -> str | None:
        return name if name in apart.base else None

    def scale(module: str, rank: int) -> float:
        if settings.alpha is None:
            raise UsageError(
                f"the model holds a LoRA adapter of rank {rank} beside its weights, and nothing says its alpha",
                expected="lora_alpha of the training's LoraConfig",
                remedy="give it with --alpha; or leave the adapter out with --exclude '*.lora_*', or convert the model "
                "to safetensors, torch or dcp, which keep names",
            )
        return scale_of(settings, module, rank)

    return placed(stored, apart.adapter, apart.base, settings, scale, find)


def adapter_inside(checkpoint: Checkpoint, alpha: float | None) -> Stepped:
    """The adapter alone, as peft would have saved it; the model's tensors are ignored.

    Args:
        checkpoint: a model of which ``holds_adapter`` is true.
        alpha: the adapter's, as the user says it.

    Raises:
        MappingError: a factor is missing, or does not fit.
        UsageError: the alpha is not said, or no adapter is left in it.
    """
    apart = taken_apart(checkpoint.weights())
    if not apart.adapter:
        raise UsageError("holds no adapter any more", path=checkpoint.path, remedy="convert it to hf")
    stored = apart.stored()
    with about(checkpoint.path):
        found = _placed(apart, stored, with_alpha(AdapterSettings(), alpha))
    ranks = {module: found.adapter.updates[Target(f"{module}.weight")].rank for module in stored.modules}
    rank = max(ranks.values(), default=1)
    dora = any(own.magnitude is not None for own in stored.modules.values())
    config: dict[str, Any] = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": None if alpha is None else plain(alpha),
        "target_modules": target_modules(stored.modules, apart.base),
        "rank_pattern": {module: own for module, own in ranks.items() if own != rank},
        "use_dora": dora,
        "modules_to_save": sorted({name.rpartition(".")[0] for name in apart.trained}) or None,
    }
    if any(own.bias is not None for own in stored.modules.values()):
        config["lora_bias"] = True
    tensors = {_saved_name(name): tensor for name, tensor in apart.adapter.items()}
    tensors |= {PREFIX + name: apart.base[name] for name in apart.trained}
    settings = AdapterSettings("dora" if dora else "lora", rank, alpha, targets=tuple(config["target_modules"]))
    alone = checkpoint.with_weights(
        tensors,
        format="peft",
        objects={},
        dialect="peft",
        config=config,
        config_kind=None,
        adapter=settings,
        optimizer=None,
        artifacts={},
    )
    stored_names = (name for own, name in apart.names.items() if own not in apart.trained)
    left_out = (checkpoint.model_prefix + name for name in (*stored_names, *apart.left_out))
    return Stepped(alone, dict.fromkeys(left_out, _IN_THE_ADAPTER))


def _saved_name(name: str) -> str:
    """A live model's name as ``save_pretrained`` stores it: without the adapter's own name."""
    head, _, tail = name.rpartition(".lora_")
    parts = tail.split(".")
    ends = parts[-1:] if len(parts) > 1 and parts[-1] in ("weight", "bias") else []
    return f"{head}.lora_{'.'.join([parts[0], *(ends if not parts[0].startswith(('embedding', 'magnitude')) else [])])}"


def target_modules(modules: Iterable[str], base: Iterable[str]) -> list[str]:
    """The shortest names that mean these modules and no others of the model."""
    adapted = set(modules)
    result: dict[str, None] = {}
    for module in adapted:
        last = module.rpartition(".")[2]
        alike = {name[:-7] for name in base if name.endswith(f".{last}.weight") or name == f"{last}.weight"}
        result[last if alike <= adapted else module] = None
    return sorted(result)
