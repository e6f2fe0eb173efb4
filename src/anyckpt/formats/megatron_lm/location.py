"""Finding the ranks of a Megatron-LM checkpoint: tracker file, iteration directory, one directory per rank.

Facts: ``megatron/training/checkpointing.py`` of Megatron-LM 1.0 to core 0.16 (``get_checkpoint_name``,
``read_metadata``).
"""

from __future__ import annotations

import re

from anyckpt.data_classes import dataclass
from anyckpt.errors import FormatError
from anyckpt.formats.shared.tracker import TRACKER, iteration_folder, iteration_number
from anyckpt.storage.location import Location
from anyckpt.storage.source import ByteSource

MODEL_FILE = "model_optim_rng.pt"
MODEL_FILES = (MODEL_FILE, "model_rng.pt")
"""What holds a rank's model; the second name is of 2022-12 to 2023-06, with the distributed optimizer."""
OPTIMIZER_FILE = "distrib_optim.pt"
OPTIMIZER_PART = "optim.pt"
"""What a data-parallel rank's own folder holds, in 2022 and early 2023."""
_RANK = re.compile(r"mp_rank_(\d{2,5})(?:_(\d{3,5}))?(?:_(\d{3,5}))?", re.ASCII)


@dataclass(frozen=True)
class RankFolder:
    """One rank's directory.

    Attributes:
        name: as it is called.
        location: the directory.
        digits: the numbers in its name; the first is the tensor-parallel rank, and what the others are depends on
            the arguments inside the file.
        model: the file that holds the model, or None where only optimizer state lies here.
        files: every file in it.
    """

    name: str
    location: Location
    digits: tuple[int, ...]
    model: ByteSource | None
    files: tuple[str, ...]

    @property
    def path(self) -> str:
        return self.location.path


@dataclass(frozen=True)
class Iteration:
    """An iteration of a training run, or its release.

    Attributes:
        location: its directory.
        tracker: what the tracker file says, if that was followed.
        number: the iteration that the directory's name tells, or None.
    """

    location: Location
    tracker: str | None
    number: int | None

    @property
    def path(self) -> str:
        return self.location.path

    @property
    def is_release(self) -> bool:
        return self.location.name == "release"


def detect(location: Location) -> bool:
    """Whether ranks are here, or in the iteration that the tracker file names, or in any where that one is missing."""
    if not location.is_directory:
        return False
    if _has_ranks(location):
        return True
    if TRACKER not in location.names:
        return False
    try:
        return _has_ranks(find_iteration(location).location)
    except FormatError:
        # A tracker that leads nowhere is for the reader to explain.
        return any(iteration_number(name) is not None and _any_rank(location, name) for name in location.names)


def _any_rank(location: Location, name: str) -> bool:
    return location.is_folder(name) and _has_ranks(location.at(name))


def _has_ranks(location: Location) -> bool:
    folders = [name for name in location.names if _RANK.fullmatch(name)]
    return any(location.is_file(folder, file) for folder in folders for file in MODEL_FILES)


def find_iteration(location: Location) -> Iteration:
    """The directory of the ranks: ``location`` itself, or what its tracker file names.

    Raises:
        FormatError: the tracker is empty or unreadable, or what it names is missing.
    """
    if any(_RANK.fullmatch(name) for name in location.names):
        return Iteration(location, None, iteration_number(location.name))
    inner = iteration_folder(location)
    number = iteration_number(inner.name)
    return Iteration(inner, "release" if number is None else str(number), number)


def rank_folders(location: Location) -> list[RankFolder]:
    """The ranks in an iteration's directory, sorted by their digits.

    Raises:
        FormatError: there are none, a directory cannot be listed, or no directory holds a model.
    """
    found: list[RankFolder] = []
    for name in location.names:
        match = _RANK.fullmatch(name)
        if match is None or not location.is_folder(name):
            continue
        inner = location.at(name)
        model = next((file for file in MODEL_FILES if file in inner.names), None)
        source = None if model is None else inner.open(model)
        digits = tuple(int(group) for group in match.groups() if group is not None)
        found.append(RankFolder(name, inner, digits, source, inner.names))
    if not any(folder.model is not None for folder in found):
        raise FormatError(
            "holds no ranks",
            path=location.path,
            expected=f"mp_rank_00/{MODEL_FILE}",
            found=", ".join(folder.name for folder in found[:5]) or ", ".join(location.names[:5]) or "nothing",
            remedy="the save was interrupted; use the iteration before it",
        )
    return sorted(found, key=lambda folder: folder.digits)
