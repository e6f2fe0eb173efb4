"""Low-rank updates in files of tensors that no settings go with, as trainers of diffusion models write them.

- kohya's scripts: ``lora_unet_down_blocks_0_proj_in.lora_down.weight``, ``.lora_up.weight`` and ``.alpha``, the
  module's dots replaced by underscores behind ``lora_`` and the part of the pipeline.
- diffusers and others with dotted names: ``unet.down_blocks.0.attn.to_q.lora_A.weight``, in older files
  ``.lora.down.weight``, ``.lora_linear_layer.down.weight`` or ``.processor.to_q_lora.down.weight``.
- cloneofsimo's: ``unet:0:up``, numbered by the order in which its code walks through the modules.

Where a file says no alpha, diffusers takes the rank; kohya's files always say it.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from anyckpt.checkpoint import AdapterSettings, Checkpoint
from anyckpt.errors import FormatError, MappingError
from anyckpt.models.adapters.by_name import Names
from anyckpt.models.adapters.rows import PREFIX
from anyckpt.tensor import LazyTensor

SPELLINGS = ("kohya", "plain", "numbered")

_SLOT = re.compile(
    r"(?P<module>.+?)(?:(?:\.(?:lora|lora_linear_layer)|(?P<processor>_lora))\.(?P<factor>down|up)\.weight"
    r"|\.(?P<slot>lora_(?:down|up|mid)\.weight|lora_[AB](?:\.[^.]+)?\.(?:weight|bias)|alpha|dora_scale"
    r"|lora_magnitude_vector(?:\.[^.]+)*|(?:hada|lokr|oft|diff)(?:_\w+|\.\w+)*))"
)
_NUMBERED = re.compile(r"(?P<part>\w+):(?P<number>\d+):(?P<slot>up|down)")
_KOHYA = re.compile(r"lora_[a-z]+\d*_[^.]+")
_KIND = re.compile(r"(hada|lokr|oft|diff)")
_NAMED_KINDS = {"hada": "loha"}
_DEEPEST = 4
_METADATA = "lora_adapter_metadata"


class _Slot(NamedTuple):
    module: str
    slot: str


def _parsed(name: str) -> _Slot | None:
    match = _SLOT.fullmatch(name)
    if match is None:
        return None
    module = match["module"]
    if match["processor"]:
        module = re.sub(r"\.to_out$", ".to_out.0", module.replace(".processor.", "."))
    return _Slot(module, match["slot"] or f"lora_{match['factor']}.weight")


def spelling(names: Iterable[str]) -> str | None:
    """Which of ``SPELLINGS`` all of these names are of, None if of none; a file of something else has others."""
    names = list(names)
    if any(_NUMBERED.fullmatch(name) for name in names):
        return "numbered" if all(_NUMBERED.fullmatch(name) or name.startswith("<") for name in names) else None
    factors, underscored = False, True
    for name in names:
        found = _parsed(name)
        if found is None:
            return None
        factors = factors or found.slot.startswith(("lora_", "hada", "lokr"))
        underscored = underscored and _KOHYA.fullmatch(found.module) is not None
    return None if not factors else "kohya" if underscored else "plain"


def settings(checkpoint: Checkpoint) -> AdapterSettings:
    """What a file of such names says: by its tensors, and in diffusers' metadata.

    Raises:
        FormatError: an alpha is no number.
    """
    kinds: set[str] = set()
    ranks: set[int] = set()
    alphas: dict[str, float] = {}
    targets: dict[str, None] = {}
    for name, tensor in checkpoint.weights().items():
        numbered = _NUMBERED.fullmatch(name)
        if numbered is not None:
            targets[numbered["part"]] = None
            if numbered["slot"] == "down" and tensor.ndim:
                ranks.add(tensor.shape[0])
            continue
        found = _parsed(name)
        if found is None:
            continue
        targets[_target(found.module)] = None
        other = _KIND.match(found.slot)
        if other is not None:
            kinds.add(_NAMED_KINDS.get(other[1], other[1]))
        elif found.slot in ("dora_scale", "lora_mid.weight"):
            kinds.add(f"lora with {found.slot.removesuffix('.weight')}")
        elif found.slot.startswith("lora_magnitude"):
            kinds.add("dora")
        elif found.slot == "alpha":
            alphas[found.module] = _alpha(name, tensor)
        elif found.slot.startswith(("lora_down", "lora_A")) and tensor.ndim:
            ranks.add(tensor.shape[0])
    told = _told(checkpoint.details.get("metadata"))
    single = set(alphas.values())
    return AdapterSettings(
        kind=", ".join(sorted(kinds)) or "lora",
        rank=ranks.pop() if len(ranks) == 1 else None,
        alpha=single.pop() if len(single) == 1 else None if alphas else told,
        alphas={re.escape(module): alpha for module, alpha in alphas.items()} if len(set(alphas.values())) > 1 else {},
        targets=tuple(targets),
    )


def _target(module: str) -> str:
    """What kind of module it is: the name behind the last number, or the last component."""
    if "." in module:
        parts = module.split(".")
        return ".".join(parts[-2:]) if parts[-1].isdigit() else parts[-1]
    return re.split(r"_\d+_(?=\D)", module)[-1]


def _alpha(name: str, tensor: LazyTensor) -> float:
    if tensor.size != 1 or not (tensor.dtype.is_floating or tensor.dtype.kind in "iu") or tensor.dtype.numpy is None:
        raise FormatError("an adapter's alpha is no number", tensor=name, found=f"{tensor.dtype.name} {tensor.shape}")
    value = float(tensor.numpy().astype("f8").reshape(()))
    if not math.isfinite(value):
        raise FormatError("an adapter's alpha is no number", tensor=name, found=value)
    return value


def _told(metadata: Any) -> float | None:
    """The one alpha that diffusers' metadata says, None if it says none, or more than that."""
    try:
        values = json.loads(metadata[_METADATA])
        facts = {key.rpartition(".")[2]: value for key, value in values.items() if value}
        alphas = {value for key, value in values.items() if key.rpartition(".")[2] == "lora_alpha"}
    except (TypeError, KeyError, ValueError, AttributeError):
        return None
    if len(alphas) != 1 or facts.keys() & {"alpha_pattern", "use_rslora"}:
        return None
    alpha = alphas.pop()
    return float(alpha) if type(alpha) in (int, float) else None


def as_peft(tensors: Mapping[str, LazyTensor]) -> dict[str, LazyTensor]:
    """The factors under peft's names; alphas are left to ``settings``.

    Raises:
        MappingError: updates are numbered, and nothing says by which modules.
    """
    result: dict[str, LazyTensor] = {}
    for name, tensor in tensors.items():
        found = _parsed(name)
        if found is None:
            raise MappingError(
                "numbers its updates by the order in which the trainer's code walked through the model's modules, "
                "which no file says",
                tensor=name,
                expected="names of modules",
                remedy="merge it with the code that made it",
            )
        if found.slot == "alpha":
            continue
        slot = found.slot.replace("lora_down", "lora_A").replace("lora_up", "lora_B")
        result[f"{PREFIX}{found.module.removeprefix(PREFIX)}.{slot}"] = tensor  # copies of peft's files have it
    return result


def check_numbered(names: Iterable[str]) -> list[str]:
    """What is odd of numbered updates, of which each must have both factors.

    Raises:
        MappingError: a factor is missing.
    """
    known = set(names)
    for name in known:
        stem, _, slot = name.rpartition(":")
        other = f"{stem}:{'down' if slot == 'up' else 'up'}"
        if slot in ("up", "down") and other not in known:
            raise MappingError(f"the update has no {other}", tensor=name, remedy="copy the whole adapter")
    return []


class Underscored:
    """A base's names of tensors, to be found by kohya's names of modules.

    Args:
        names: the base's.
    """

    def __init__(self, names: Iterable[str]) -> None:
        self._levels: list[dict[str, list[str]]] = [{} for _ in range(_DEEPEST)]
        for name in names:
            parts = name.removesuffix(".weight").split(".")
            for level in range(min(_DEEPEST, len(parts))) if name.endswith(".weight") else ():
                self._levels[level].setdefault("_".join(parts[level:]), []).append(name)

    def find(self, name: str) -> str | None:
        """The base's weight of a module ``lora_PART_NAME.weight``, None if it has none.

        Raises:
            MappingError: several fit.
        """
        module = name.removesuffix(".weight").partition("_")[2].partition("_")[2]
        for level in self._levels:
            found = level.get(module, [])
            if len(found) > 1:
                raise MappingError(
                    "fits more than one module of the base model",
                    tensor=name.removesuffix(".weight"),
                    found=", ".join(found[:4]),
                )
            if found:
                return found[0]
        return None


def finder(spelled: str, base: Iterable[str]) -> Underscored | Names:
    """What finds the base's names of an adapter of this spelling."""
    return Underscored(base) if spelled == "kohya" else Names(base)
