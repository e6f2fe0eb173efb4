"""How Megatron-Bridge, NeMo 2 and NeMo 1 name adapters, and the hub's updates.

Megatron-Bridge 0.1 to 0.4 and NeMo 2 hang an adapter on the layer's linear module
(``self_attention.linear_qkv.adapter.linear_in.weight``, canonical ``...adapter.adapter_q.linear_in.weight``); NeMo 1 on
the module around it (``self_attention.adapter_layer.lora_kqv_adapter.linear_in.weight``).  A distributed checkpoint
stacks layers, as it does the model's.  Sources: ``peft/{lora,canonical_lora,dora,utils}.py`` of Megatron-Bridge,
``collections/llm/peft`` of NeMo 2.5, ``collections/nlp/parts/peft_config.py`` of NeMo 1.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

from anyckpt.errors import MappingError, UsageError, few
from anyckpt.models.adapters.adapter import Adapter, LowRank, Target, check_factors
from anyckpt.models.adapters.saved_rows import SECTIONS, in_true_order
from anyckpt.models.dialects import spellings
from anyckpt.models.dialects.tensors_of_layers import unstacked
from anyckpt.tensor import LazyTensor, stack

_WRAPPERS = re.compile(r"^(?:model\.|module\.)+")
_OLD_STACK = re.compile(r"^language_model\.(?:encoder|transformer)\.")  # NeMo 1's own Megatron modules
_PARTS = r"(?P<part>q|k|v|gate|up)"
_MODULE = re.compile(
    rf"(?P<module>.+?)(?:\.to_wrap)?\.adapter(?:\.adapter_{_PARTS})?"
    rf"\.(?P<what>linear_in\.weight|linear_out\.weight|weight_magnitude)(?:\.(?:{'|'.join(SECTIONS)}))?"
)
_AROUND = re.compile(
    r"(?P<parent>.+)\.adapter_layer\.(?P<name>lora_[a-z0-9_]+_adapter)"
    rf"(?:\.{_PARTS}_adapter)?\.(?P<what>linear_in\.weight|linear_out\.weight)"
)
_NEMO1 = {
    "self_attention.linear_qkv": ("lora_kqv_adapter", "lora_unfused_kqv_adapter"),
    "self_attention.linear_proj": ("lora_dense_attention_adapter", None),
    "mlp.linear_fc1": ("lora_hto4h_adapter", "lora_unfused_hto4h_adapter"),
    "mlp.linear_fc2": ("lora_4htoh_adapter", None),
}
"""Module of a layer -> NeMo 1's name of its adapter, fused and canonical."""

_FROM_NEMO1 = {
    (module.split(".")[0], name): module.split(".")[1] for module, names in _NEMO1.items() for name in names if name
}
_FIELDS = {"linear_in.weight": "down", "linear_out.weight": "up", "weight_magnitude": "magnitude"}
_LOCAL_EXPERT = re.compile(r"(.+\.experts)\.(?:local_experts|experts)\.(\d{1,7})\.(linear_fc[12])")
_EXPERT_WEIGHT = re.compile(r"(.+\.experts)\.(linear_fc[12])\.weight(\d{1,7})")
_ALL_EXPERTS = re.compile(r"(.+\.experts)\.(?:experts\.)?(linear_fc[12])")
_EXPERT_TENSOR = re.compile(r"(.+\.experts)\.local_experts\.(\d{1,7})\.(.+)")
_MOST_EXPERTS = 100_000
_LAYER = re.compile(r"decoder\.layers\.\d+\.(.+)")

SPELLINGS = ("megatron", "nemo1")


class _Found(NamedTuple):
    module: str
    part: str
    field: str


def is_adapter(names: Iterable[str]) -> bool:
    """Whether these are an adapter's names and nothing else."""
    names = list(names)
    if not any(".adapter" in name for name in names):
        return False
    weights = [name for name in names if not any(pattern.fullmatch(name) for pattern, _ in spellings.IGNORED)]
    return bool(weights) and all(_parsed(name) is not None for name in weights)


def is_canonical(names: Iterable[str]) -> bool:
    """Whether parts of fused weights have adapters of their own."""
    found = (_parsed(name) for name in names)
    return any(item is not None and item.part for item in found)


def _parsed(name: str) -> _Found | None:
    plain = _OLD_STACK.sub("decoder.", _WRAPPERS.sub("", name, count=1))
    match = _MODULE.fullmatch(plain)
    if match is not None:
        return _Found(match["module"].replace(".to_wrap.", "."), match["part"] or "", _FIELDS[match["what"]])
    match = _AROUND.fullmatch(plain)
    if match is None:
        return None
    parent = match["parent"]
    module = _FROM_NEMO1.get((parent.rpartition(".")[2], match["name"]))
    return None if module is None else _Found(f"{parent}.{module}", match["part"] or "", _FIELDS[match["what"]])


def from_megatron(
    tensors: Mapping[str, LazyTensor],
    scale: Callable[[str, int], float],
    experts: int | None = None,
    gated: bool | None = None,
) -> Adapter:
    """The updates that an adapter's tensors are.

    Args:
        tensors: weights by stored name.
        scale: of an update of a weight, from that weight's name and the rank.
        experts: how many a layer has, for adapters that all of them share; None if that is not known.
        gated: whether the model's MLP is gated; None if that is not known.

    Raises:
        MappingError: a name is none of an adapter's, or a factor is missing or does not fit.
    """
    fields: dict[Target, dict[str, tuple[str, LazyTensor]]] = {}
    strange: list[str] = []
    for stored, tensor in in_true_order(tensors, gated).items():
        if any(pattern.fullmatch(stored) for pattern, _ in spellings.IGNORED):
            continue
        found = _parsed(stored)
        if found is None:
            strange.append(stored)
            continue
        for module, layer in unstacked(found.module, tensor):
            for weight, value in _weights(module, layer, stored, experts):
                own = fields.setdefault(Target(weight, found.part), {})
                if found.field in own:
                    raise MappingError(
                        "two stored tensors are the same one of the adapter", tensor=stored, found=own[found.field][0]
                    )
                own[found.field] = (stored, value)
    if strange:
        raise MappingError(
            f"{len(strange)} tensors are not of an adapter: {few(strange)}",
            tensor=strange[0],
            expected="names such as ...linear_qkv.adapter.linear_in.weight",
            remedy="leave them out with --exclude",
        )
    return Adapter({target: _update(target, own, scale) for target, own in fields.items()})


def _update(target: Target, own: Mapping[str, tuple[str, LazyTensor]], scale: Callable[[str, int], float]) -> LowRank:
    names = tuple(name for name, _ in own.values())
    for field, tail in (("down", "linear_in.weight"), ("up", "linear_out.weight")):
        if field not in own:
            raise MappingError(
                f"the adapter of this tensor has no {tail}",
                tensor=names[0],
                found=str(target),
                remedy="copy the whole adapter",
            )
    down, up = own["down"][1], own["up"][1]
    magnitude = own["magnitude"][1] if "magnitude" in own else None
    check_factors(LowRank(down, up, 1.0), names[0])
    return LowRank(down, up, scale(target.weight, down.shape[0]), magnitude, names=names)


def _weights(module: str, tensor: LazyTensor, stored: str, experts: int | None) -> list[tuple[str, LazyTensor]]:
    """The hub's weights that a module's adapter changes; all experts' where these share one or are stacked."""
    local = _LOCAL_EXPERT.fullmatch(module)
    if local is not None:
        return [(f"{local[1]}.{local[3]}.weight{local[2]}", tensor)]
    shared = _ALL_EXPERTS.fullmatch(module)
    if shared is None:
        return [(f"{module}.weight", tensor)]
    if tensor.ndim == 3 and tensor.shape[0] <= _MOST_EXPERTS:
        return [(f"{shared[1]}.{shared[2]}.weight{number}", tensor[number]) for number in range(tensor.shape[0])]
    if experts is None:
        raise MappingError(
            "is an adapter that all experts share, and how many there are is not known",
            tensor=stored,
            remedy="give the base model's configuration with --config",
        )
    return [(f"{shared[1]}.{shared[2]}.weight{number}", tensor) for number in range(experts)]


def to_megatron(adapter: Adapter, spelling: str, experts: int | None = None) -> dict[str, LazyTensor]:
    """An adapter's tensors under names without a wrapper, one per layer.

    Args:
        adapter: its updates.
        spelling: one of ``SPELLINGS``.
        experts: how many a layer has; where all have updates of one shape, these are stacked, as Megatron-Bridge
            saves those of grouped experts.  None to leave them apart.

    Raises:
        UsageError: there is something that these adapters have no place for.
    """
    for name in adapter.replaced:
        raise UsageError(
            "the adapter replaces a whole tensor, which Megatron's adapters cannot",
            tensor=name,
            remedy="merge it into the base with anyckpt merge-lora",
        )
    tensors: dict[str, LazyTensor] = {}
    for target, update in adapter.updates.items():
        obstacle = _obstacle(target, update, spelling)
        if obstacle is not None:
            problem, remedy = obstacle
            name = (update.names or (str(target),))[0]
            raise UsageError(problem, tensor=name, found=target.weight, remedy=remedy)
        stem = _module_stem(target) if spelling == "megatron" else _around_stem(target)
        tensors[f"{stem}.linear_in.weight"] = update.down
        tensors[f"{stem}.linear_out.weight"] = update.up
        if update.magnitude is not None:
            tensors[f"{stem}.weight_magnitude"] = update.magnitude
    return tensors if experts is None else _with_stacked_experts(tensors, experts)


def _obstacle(target: Target, update: LowRank, spelling: str) -> tuple[str, str | None] | None:
    """What of an update these adapters have no place for, and what to do; None if they have one for all of it."""
    merge, fuse = "merge it into the base with anyckpt merge-lora", "choose --adapter-form fused"
    if update.bias is not None:
        return "Megatron's adapters have no bias", merge
    if target.weight.startswith("embedding."):
        return "Megatron adapts no embeddings", merge
    if target.part and _EXPERT_WEIGHT.fullmatch(target.weight):
        return "Megatron adapts gate and up projection of an expert as one", fuse
    if update.magnitude is not None and spelling == "nemo1":
        return "NeMo 1 has no DoRA", None
    if update.magnitude is not None and target.part:
        return "Megatron's DoRA adapts fused weights as one", fuse
    if not target.weight.rpartition(".")[2].startswith("weight"):
        return "Megatron has no module for this weight that could be adapted", merge
    return None


def _with_stacked_experts(tensors: Mapping[str, LazyTensor], experts: int) -> dict[str, LazyTensor]:
    stacks: dict[str, dict[int, LazyTensor]] = {}
    result: dict[str, LazyTensor] = {}
    for name, tensor in tensors.items():
        match = _EXPERT_TENSOR.fullmatch(name)
        if match is not None:
            stacks.setdefault(f"{match[1]}.{match[3]}", {})[int(match[2])] = tensor
            result.setdefault(f"{match[1]}.{match[3]}", tensor)
        else:
            result[name] = tensor
    if any(len(own) != experts or len({(t.shape, t.dtype.name) for t in own.values()}) > 1 for own in stacks.values()):
        return dict(tensors)
    return {**result, **{name: stack([own[number] for number in range(experts)]) for name, own in stacks.items()}}


def _module(weight: str) -> str:
    expert = _EXPERT_WEIGHT.fullmatch(weight)
    if expert is not None:
        return f"{expert[1]}.local_experts.{expert[3]}.{expert[2]}"
    return weight.removesuffix(".weight")


def _module_stem(target: Target) -> str:
    return f"{_module(target.weight)}.adapter" + (f".adapter_{target.part}" if target.part else "")


def _around_stem(target: Target) -> str:
    module = _module(target.weight)
    layer = _LAYER.fullmatch(module)
    fused, canonical = _NEMO1.get(layer[1] if layer else "", (None, None))
    name = canonical if target.part else fused
    if name is None:
        raise UsageError(
            "NeMo 1 has no adapter for this module",
            tensor=target.weight,
            expected=", ".join(_NEMO1),
            remedy="choose nemo2 or megatron-bridge",
        )
    around = f"{module.rpartition('.')[0]}.adapter_layer.{name}"
    return f"{around}.{target.part}_adapter" if target.part else around


def modules(adapter: Adapter) -> list[str]:
    """Megatron's names of the kinds of modules that are adapted: ``linear_qkv``; ``linear_q`` where only parts are."""
    names: dict[str, None] = {}
    for target in adapter.updates:
        last = _module(target.weight).rpartition(".")[2]
        if not target.part:
            names[last] = None
        elif last == "linear_fc1":
            names[f"linear_fc1_{target.part}"] = None
        else:
            names[f"linear_{target.part}"] = None
    return list(names)
