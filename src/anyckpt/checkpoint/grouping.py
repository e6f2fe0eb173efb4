"""Names that differ in numbers only, such as those of a model's layers, as one: ``layers.{0-31}.mlp.up_proj.weight``.

A group is a box: each of its numbers takes each value of its set, whatever the others are.  Groups are disjoint and
together have every name once, so that a list of groups says what a list of names does.
"""

from __future__ import annotations

import re
from collections.abc import Hashable, Iterator, Mapping, Sequence
from itertools import pairwise, product

from anyckpt.data_classes import dataclass

_NUMBER = re.compile(r"(?<![0-9])(0|[1-9][0-9]{0,8})(?![0-9])")
_AROUND = "._/-:"
_FEWEST_WITHIN_A_WORD = 3
_FEWEST_OF_A_STEP = 4


@dataclass(frozen=True)
class NameGroup:
    """Names that differ in numbers only.

    Attributes:
        pieces: what stands before, between and behind the numbers; one more than there are numbers.
        numbers: the values that each number takes, in ascending order.
    """

    pieces: tuple[str, ...]
    numbers: tuple[tuple[int, ...], ...]

    @property
    def name(self) -> str:
        """One name for all: ``model.layers.{0-31}.mlp.up_proj.weight``; of a single name, that name."""
        told = [_told(values) for values in self.numbers]
        return "".join(piece + number for piece, number in zip(self.pieces, [*told, ""], strict=True))

    @property
    def count(self) -> int:
        """How many names it stands for."""
        count = 1
        for values in self.numbers:
            count *= len(values)
        return count

    def __iter__(self) -> Iterator[str]:
        """The names, the last number fastest."""
        for chosen in product(*self.numbers):
            yield "".join(piece + number for piece, number in zip(self.pieces, [*map(str, chosen), ""], strict=True))


def numbers_told(values: Sequence[int]) -> str:
    """Whole numbers in ascending order as people write them: ``0-31``, ``0,2,...,30``, ``0-2,5,8-11``."""
    step = values[1] - values[0] if len(values) >= _FEWEST_OF_A_STEP else 1
    if step > 1 and all(after - before == step for before, after in pairwise(values)):
        return f"{values[0]},{values[1]},...,{values[-1]}"
    runs: list[list[int]] = []
    for value in values:
        if runs and value == runs[-1][1] + 1:
            runs[-1][1] = value
        else:
            runs.append([value, value])
    return ",".join(f"{a}" if a == b else f"{a}-{b}" for a, b in runs)


def grouped(looks: Mapping[str, Hashable]) -> list[NameGroup]:
    """Groups of the names whose looks are equal, in the order in which their first names come.

    A number that is a word of its own (between dots, say) may take any values; one within a word, such as that of
    ``weight0`` or ``conv1``, at least three.  Digits with leading zeros are text.

    Args:
        looks: name -> whatever must be the same within a group, such as type and shape.
    """
    alike: dict[tuple[tuple[str, ...], Hashable], list[tuple[int, ...]]] = {}
    order: dict[tuple[tuple[str, ...], Hashable], list[int]] = {}
    for position, (name, look) in enumerate(looks.items()):
        parts = _NUMBER.split(name)
        key = tuple(parts[::2]), look
        alike.setdefault(key, []).append(tuple(map(int, parts[1::2])))
        order.setdefault(key, []).append(position)
    found = []
    for key, numbers in alike.items():
        pieces = key[0]
        place = dict(zip(numbers, order[key], strict=True))
        for box in _boxes(numbers, _fewest(pieces)):
            found.append((min(place[chosen] for chosen in product(*box)), NameGroup(*_without_fixed(pieces, box))))
    return [group for _, group in sorted(found, key=lambda item: item[0])]


def _told(values: Sequence[int]) -> str:
    return str(values[0]) if len(values) == 1 else f"{{{numbers_told(values)}}}"


def _fewest(pieces: Sequence[str]) -> list[int]:
    """How many values each number must take for names to be put together."""
    return [
        2 if (not before or before[-1] in _AROUND) and (not after or after[0] in _AROUND) else _FEWEST_WITHIN_A_WORD
        for before, after in pairwise(pieces)
    ]


def _boxes(numbers: Sequence[tuple[int, ...]], fewest: Sequence[int]) -> list[tuple[tuple[int, ...], ...]]:
    """Disjoint boxes that hold exactly these points: points are put together along one axis after another."""
    boxes: list[tuple[tuple[int, ...], ...]] = [tuple((value,) for value in point) for point in numbers]
    for axis in reversed(range(len(fewest))):
        lines: dict[tuple[tuple[int, ...], ...], list[int]] = {}
        for box in boxes:
            lines.setdefault(box[:axis] + box[axis + 1 :], []).extend(box[axis])
        boxes = []
        for rest, values in lines.items():
            together = [tuple(sorted(values))] if len(values) >= fewest[axis] else [(value,) for value in values]
            boxes += [(*rest[:axis], part, *rest[axis:]) for part in together]
    return boxes


def _without_fixed(
    pieces: Sequence[str], box: Sequence[tuple[int, ...]]
) -> tuple[tuple[str, ...], tuple[tuple[int, ...], ...]]:
    """The pieces and numbers of a box, numbers that do not vary made text."""
    texts, numbers = [pieces[0]], []
    for values, after in zip(box, pieces[1:], strict=True):
        if len(values) == 1:
            texts[-1] += f"{values[0]}{after}"
        else:
            numbers.append(values)
            texts.append(after)
    return tuple(texts), tuple(numbers)
