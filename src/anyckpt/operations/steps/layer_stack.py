"""Which of a model's names are of its layers, and the same tensors with other layers in their place."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence

from anyckpt.data_classes import dataclass
from anyckpt.errors import UsageError
from anyckpt.models.complete import some
from anyckpt.tensor import LazyTensor, concatenate

NUMBERED = re.compile(r"(.*?)\.(0|[1-9]\d{0,6})\.")
"""What a name of a layer begins with: what it is a layer of, and its number; 00 is another name than 0."""
_STACKED = re.compile(r"(.*?\.layers|layers)\.(?!\d)")
_OF_TWO = re.compile(r"(.*\.)?(encoder|decoder)\.(?:block|layers?)")
_OTHER_PARTS = re.compile(r"vision|visual|audio|speech|image|tower|sam\b|perception|projector")
"""Names of what a larger model has besides its text."""

Tensors = Mapping[str, LazyTensor]


@dataclass(frozen=True)
class Stack:
    """The layers of a model by their names.

    Attributes:
        name: what precedes the number, or the rest of the name where all layers are in one tensor.
        count: layers.
        stacked: all layers are in one tensor, along its first axis.
        of_first: ends of names that the first layer has for all, and which go to the one that is first then.
    """

    name: str
    count: int
    stacked: bool = False
    of_first: frozenset[str] = frozenset()

    def layer(self, name: str) -> int | None:
        """The number in a name of one of the layers; None of any other."""
        match = None if self.stacked else NUMBERED.match(name)
        return int(match[2]) if match is not None and match[1] == self.name else None

    def at(self, name: str, layer: int) -> str:
        """A layer's name with another number."""
        match = NUMBERED.match(name)
        assert match is not None
        return f"{match[1]}.{layer}.{name[match.end() :]}"

    def holds(self, name: str) -> bool:
        """Whether a tensor has a row for each layer."""
        match = _STACKED.match(name) if self.stacked else None
        return match is not None and match[1] == self.name

    def chosen(self, tensors: Tensors, kept: Sequence[int]) -> dict[str, LazyTensor]:
        """The tensors with these layers alone, numbered anew; layers behind the last follow those that are kept."""
        names = self.renumbered(tensors, kept)
        return {new: _rows(tensors[old], kept) if self.holds(old) else tensors[old] for old, new in names.items()}

    def renumbered(self, names: Iterable[str], kept: Sequence[int]) -> dict[str, str]:
        """What names become; those of layers that are left out are not among them."""
        place = {layer: number for number, layer in enumerate(kept)}
        result: dict[str, str] = {}
        for name in names:
            layer = self.layer(name)
            if layer is None:
                result[name] = name
            elif layer >= self.count:
                result[name] = self.at(name, layer - self.count + len(kept))
            elif layer in place:
                result[name] = self.at(name, place[layer])
            elif layer == 0 and name.removeprefix(f"{self.name}.0.") in self.of_first:
                result[name] = name
        return result


def two_stacks(tensors: Iterable[str]) -> dict[str, Stack]:
    """``encoder`` and ``decoder`` of a model that has both; nothing of any other."""
    numbers: dict[str, set[int]] = {}
    ends: dict[tuple[str, int], set[str]] = {}
    for name in tensors:
        if (match := NUMBERED.match(name)) and _OF_TWO.fullmatch(match[1]) and not _OTHER_PARTS.search(match[1]):
            numbers.setdefault(match[1], set()).add(int(match[2]))
            ends.setdefault((match[1], int(match[2])), set()).add(name[match.end() :])
    found: dict[str, dict[str, Stack]] = {}
    for name, layers in numbers.items():
        match = _OF_TWO.fullmatch(name)
        if match is None or layers != {*range(len(layers))}:
            continue
        others = set().union(*(ends[name, layer] for layer in layers if layer))
        alone = {end for end in ends[name, 0] if "relative_attention_bias" in end and end not in others}
        found.setdefault(match[1] or "", {})[match[2]] = Stack(name, len(layers), of_first=frozenset(alone))
    return next((stacks for stacks in found.values() if len(stacks) > 1), {})


def two_stacked(tensors: Iterable[str]) -> list[str]:
    """``encoder`` and ``decoder`` of a model that has all layers of each in one tensor; nothing of any other."""
    found: dict[str, dict[str, str]] = {}
    for name in tensors:
        match = _STACKED.match(name)
        if match is not None and (own := _OF_TWO.fullmatch(match[1])) and not _OTHER_PARTS.search(match[1]):
            found.setdefault(own[1] or "", {})[own[2]] = match[1]
    return next((sorted(stacks.values()) for stacks in found.values() if len(stacks) > 1), [])


def _rows(tensor: LazyTensor, kept: Sequence[int]) -> LazyTensor:
    """Some rows, neighbours together."""
    runs: list[list[int]] = []
    for row in kept:
        if runs and row == runs[-1][1]:
            runs[-1][1] += 1
        else:
            runs.append([row, row + 1])
    return concatenate([tensor.narrow(0, start, stop - start) for start, stop in runs], 0)


def find_stack(tensors: Tensors, count: int | None, path: str) -> Stack:
    """The layers of a model's text, or of all of it.

    Args:
        tensors: the weights by name.
        count: layers, as the configuration has it; None if it does not say.
        path: of the checkpoint, for messages.

    Raises:
        UsageError: there are no layers of that number, or several kinds of them.
    """
    numbers: dict[str, set[int]] = {}
    rows: dict[str, set[int]] = {}
    for name, tensor in tensors.items():
        if match := NUMBERED.match(name):
            numbers.setdefault(match[1], set()).add(int(match[2]))
        elif (match := _STACKED.match(name)) and tensor.ndim:
            rows.setdefault(match[1], set()).add(tensor.shape[0])
    whole = {name: found for name, found in numbers.items() if found == {*range(len(found))}}
    fits = _fitting(whole, lambda found: count is None or len(found) == count)
    fits = fits or _fitting(whole, lambda found: count is not None and len(found) > count)
    stacked = [name for name in rows if rows[name] == {count}] if count is not None else []
    if not fits and len(stacked) == 1 and count is not None:
        return Stack(stacked[0], count, stacked=True)
    if len(fits) == 1:
        return Stack(fits[0], len(whole[fits[0]]) if count is None else count)
    if not fits and not stacked:
        raise UsageError(
            "no layers are found by their names",
            path=path,
            expected="names such as layers.0." if count is None else f"names such as layers.0. to layers.{count - 1}.",
            found=some([*whole, *rows]) or some(list(tensors)),
            remedy="give the model's configuration with --config",
        )
    raise UsageError(
        "has several stacks of layers, and which are meant is not clear",
        path=path,
        found=some([f"{name} (0 to {len(whole[name]) - 1})" for name in fits] or stacked),
        remedy="leave layers out by name with --exclude, or convert one part alone with --include",
    )


def _fitting(stacks: Mapping[str, Collection[int]], fits: Callable[[Collection[int]], bool]) -> list[str]:
    found = [name for name, layers in stacks.items() if len(layers) and fits(layers)]
    own = [name for name in found if not _OTHER_PARTS.search(name)]
    return own or found
