"""Which files a checkpoint of GPT-NeoX consists of.

``latest`` names the folder of the newest save (``global_step1000``), in which there is
``layer_LL-model_RR-model_states.pt`` for each layer of the pipeline and each tensor-parallel rank, whatever the stages
were, beside ``mp_rank_RR_model_states.pt`` with the rest.  Without a pipeline (``pipe-parallel-size: 0``) the latter
have all, under ``sequential.LL.``.  The YAML files of the run are in ``configs/``.

Facts: ``megatron/checkpointing.py`` and ``tools/ckpts/convert_neox_to_hf.py`` of GPT-NeoX (2026-05), and
``runtime/pipe/module.py`` of DeepSpeed 0.16.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

from anyckpt.data_classes import dataclass
from anyckpt.errors import FormatError, few
from anyckpt.storage.folder import check_inside
from anyckpt.storage.location import Location, look_in
from anyckpt.storage.zip import read_zip

_LATEST = "latest"
_LAYER = re.compile(r"layer_(\d{2,4})-model_(\d{2,4})-model_states\.pt", re.ASCII)
_RANK = re.compile(r"mp_rank_(\d{2,4})_model_states\.pt", re.ASCII)
_PEEK = 64 << 10
_EMBEDDING, _ATTENTION = b"word_embeddings.weight", b"attention.query_key_value.weight"
_CONFIGURATIONS = ("configs", "config")
FIRST_LAYER = 2
"""The first transformer layer's number: behind the embedding and a function that turns axes."""


@dataclass(frozen=True)
class Files:
    """The files of one save.

    Attributes:
        folder: the save's.
        layers: number of a layer -> its files, by rank; empty if the ranks' files have all.
        ranks: the ranks' files, by rank.
        settings: the YAML files of the run.
    """

    folder: Location
    layers: dict[int, tuple[str, ...]]
    ranks: tuple[str, ...]
    settings: tuple[str, ...]


def detect(location: Location) -> bool:
    """A folder of layer files that are GPT-NeoX's by what the first ones hold, or one whose ``latest`` names such."""
    return location.is_directory and (_is_save(location) or _newest(location) is not None)


def _is_save(location: Location) -> bool:
    names = set(location.names)
    first, layer = "layer_00-model_00-model_states.pt", f"layer_{FIRST_LAYER:02d}-model_00-model_states.pt"
    if first in names:
        return layer in names and _EMBEDDING in _head(location, first) and _is_attention(_head(location, layer))
    return "mp_rank_00_model_states.pt" in names and b"sequential.0." + _EMBEDDING in _head(
        location, "mp_rank_00_model_states.pt"
    )


def _is_attention(head: bytes) -> bool:
    """Megatron-DeepSpeed's layers have ``self_attention``, and their embedding is elsewhere."""
    return _ATTENTION in head and b"self_" + _ATTENTION not in head


def _head(location: Location, name: str) -> bytes:
    """How the pickle in a torch file begins; nothing if it is none."""
    try:
        for member, record in read_zip(location.open(name)).items():
            if member.endswith("/data.pkl"):
                return record.source.read(0, min(record.source.size, _PEEK))
    except FormatError:
        pass
    return b""


def _newest(location: Location) -> Location | None:
    if _LATEST not in location.names or not location.is_file(_LATEST):
        return None
    try:
        tag = location.open(_LATEST).read_all(1024).decode("utf-8", "replace").strip()
        inner = location.at(check_inside(tag, location.path))
    except FormatError:
        return None
    return inner if inner.is_directory and _is_save(inner) else None


def find(location: Location) -> Files:
    """The files of the save that is at a location, or of the newest.

    Raises:
        FormatError: a file is missing.
    """
    folder = location if _is_save(location) else _newest(location) or location
    layers: dict[int, dict[int, str]] = {}
    for name in folder.names:
        match = _LAYER.fullmatch(name)
        if match is not None:
            layers.setdefault(int(match[1]), {})[int(match[2])] = name
    ranks = {int(match[1]): name for name in folder.names if (match := _RANK.fullmatch(name))}
    count = 1 + max((rank for files in layers.values() for rank in files), default=max(ranks, default=0))

    def every(files: dict[int, str], called: Callable[[int], str]) -> tuple[str, ...]:
        missing = [called(rank) for rank in range(count) if rank not in files]
        if missing:
            raise FormatError(
                f"files of tensor-parallel ranks are missing: {few(missing, 4)}",
                path=folder.path,
                expected=f"those of ranks 0 to {count - 1}",
                remedy="copy the missing files here too",
            )
        return tuple(folder.join(files[rank]) for rank in range(count))

    found = {
        number: every(files, lambda rank, number=number: f"layer_{number:02d}-model_{rank:02d}-model_states.pt")  # type: ignore[misc]
        for number, files in sorted(layers.items())
    }
    whole = (
        tuple(folder.join(name) for _, name in sorted(ranks.items()))
        if layers
        else every(ranks, lambda rank: f"mp_rank_{rank:02d}_model_states.pt")
    )
    return Files(folder, found, whole, _settings(folder))


def _settings(folder: Location) -> tuple[str, ...]:
    """The run's YAML files: in the save, or beside it."""
    around = [folder]
    if folder.parent is not None:
        around.append(look_in(folder.place, folder.parent))
    for there in around:
        for inner in _CONFIGURATIONS:
            found = _yaml(there.names_in(inner))
            if found:
                return tuple(there.join(inner, name) for name in found)
        found = _yaml(there.names)
        if found:
            return tuple(there.join(name) for name in found)
    return ()


def _yaml(names: Sequence[str]) -> list[str]:
    return [name for name in names if name.endswith((".yml", ".yaml"))]
