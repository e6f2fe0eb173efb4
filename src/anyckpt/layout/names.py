"""What a name of the hub says: which layer of which stack, which expert, and how it is divided."""

from __future__ import annotations

import re
from collections.abc import Iterable

from anyckpt.data_classes import dataclass
from anyckpt.errors import MappingError
from anyckpt.layout import experts
from anyckpt.layout.geometry import Geometry
from anyckpt.layout.partition import Division, Rules, division, unknown

_LAYER = re.compile(r"(encoder|decoder|mtp)\.layers\.(\d{1,7})\.(.+)")


@dataclass(frozen=True, eq=False)
class Name:
    """A name, understood; made once, so that names are compared by identity.

    Attributes:
        text: the name, without an expert's index.
        stack: ``decoder``, ``encoder`` or ``mtp``; None outside layers.
        layer: index in the stack, as numbered where the name comes from.
        rest: the name behind the layer.
        of_expert: it is an expert's.
        place: where it is in the pipeline (see ``partition.PLACES``); None where a user's rule does not say.
        division: how tensor parallelism divides it, None if it carries no weights.
    """

    text: str
    stack: str | None
    layer: int
    rest: str
    of_expert: bool
    place: str | None
    division: Division | None

    def at(self, layer: int) -> str:
        """The name with another layer's number."""
        return self.text if self.stack is None else f"{self.stack}.layers.{layer}.{self.rest}"


class Names:
    """Understands names, each once.

    Args:
        rules: how tensors are divided.
        geometry: of the model.
    """

    def __init__(self, rules: Rules, geometry: Geometry) -> None:
        self._rules = rules
        self._geometry = geometry
        self._known: dict[str, tuple[Name, int | None] | None] = {}
        self._experts: dict[str, Name | None] = {}

    def all(self, texts: Iterable[str], source: str | None = None) -> list[tuple[Name, int | None]]:
        """Every name in order, and the index of the expert whose it is.

        Raises:
            MappingError: names that no rule covers, or an expert in a dense model.
        """
        found, strange = [], []
        for text in texts:
            if text not in self._known:
                self._known[text] = self._understand(text)
            name = self._known[text]
            if name is None:
                strange.append(text)
            else:
                found.append(name)
        if strange:
            raise unknown(strange, source)
        return found

    def _understand(self, text: str) -> tuple[Name, int | None] | None:
        expert = experts.parse(text)
        if expert is None:
            dense = self._made(text, of_expert=False)
            return None if dense is None else (dense, None)
        if expert.base not in self._experts:
            self._experts[expert.base] = self._made(expert.base, of_expert=True)
        name = self._experts[expert.base]
        return None if name is None else (name, expert.number)

    def _made(self, text: str, of_expert: bool) -> Name | None:
        kind = self._rules.kind(text, of_expert)
        if kind is None:
            return None
        if of_expert and self._geometry.num_experts is None and kind.name != "dropped":
            raise MappingError(
                "is an expert's, but the model's configuration says that it is dense",
                tensor=text,
                remedy="give a complete configuration with --config",
            )
        divided = None if kind.name == "dropped" else division(kind, text, self._geometry)
        layered = _LAYER.fullmatch(text)
        if layered:
            return Name(text, layered[1], int(layered[2]), layered[3], of_expert, "layer", divided)
        return Name(text, None, 0, text, of_expert, None if kind.place == "layer" else kind.place, divided)


def check_parallel(geometry: Geometry, tensor_parallel: int, expert_parallel: int) -> None:
    """Raise MappingError unless query groups and experts can be spread over so many ranks."""
    for groups in sorted(geometry.query_groups):
        if not groups % tensor_parallel or not tensor_parallel % groups:
            continue
        raise MappingError(
            "query groups cannot be spread over the tensor-parallel ranks",
            expected=f"{tensor_parallel} ranks to divide the groups, or the groups the ranks",
            found=f"{groups} query groups",
            remedy="choose another --tp",
        )
    mamba = geometry.mamba
    if mamba is not None and (mamba.num_groups % tensor_parallel or mamba.num_heads % tensor_parallel):
        raise MappingError(
            "the groups of Mamba mixers cannot be spread over the tensor-parallel ranks",
            expected=f"heads and groups in multiples of {tensor_parallel}",
            found=f"{mamba.num_heads} heads in {mamba.num_groups} groups",
            remedy="choose another --tp",
        )
    delta = geometry.delta
    if delta is not None and (delta.num_key_heads % tensor_parallel or delta.num_value_heads % tensor_parallel):
        raise MappingError(
            "the heads of gated delta nets cannot be spread over the tensor-parallel ranks",
            expected=f"heads of keys and of values in multiples of {tensor_parallel}",
            found=f"{delta.num_key_heads} heads of keys and {delta.num_value_heads} of values",
            remedy="choose another --tp",
        )
    if (geometry.num_experts or 0) % expert_parallel:
        raise MappingError(
            "experts cannot be spread over the expert-parallel ranks",
            expected=f"a multiple of {expert_parallel}",
            found=f"{geometry.num_experts} experts",
            remedy="choose another --ep",
        )


def stack_sizes(names: Iterable[Name], geometry: Geometry) -> dict[str, int]:
    """Layers of each stack: as configured, else one more than the highest index that the names mention.

    Which of ``encoder`` and ``decoder`` a model has, the names tell; the highest index is the size only where names
    number layers globally.
    """
    seen: dict[str, int] = {}
    for name in names:
        if name.stack is not None and name.division is not None:
            seen[name.stack] = max(seen.get(name.stack, 0), name.layer + 1)
    main = [stack for stack in ("encoder", "decoder") if stack in seen] or ["decoder"]
    configured: dict[str, int | None] = dict.fromkeys(main, geometry.num_layers)
    if len(main) == 2 and geometry.encoder_num_layers is not None:
        configured["encoder"] = geometry.encoder_num_layers
    configured["mtp"] = geometry.mtp_num_layers
    return {stack: seen.get(stack, 0) if stated is None else stated for stack, stated in configured.items()}


def listed(numbers: Iterable[int]) -> str:
    """Numbers, in runs."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ", ".join(str(a) if a == b else f"{a} to {b}" for a, b in runs[:8]) + (" ..." if runs[8:] else "") or "none"
