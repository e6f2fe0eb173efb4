"""What a TensorRT-LLM checkpoint is on disk: a folder, or NeMo's tar of one (``.qnemo``), plain or gzip.

NeMo up to 2.1 writes gzip, later versions plain tar; members are called ``./config.json`` and so on.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from anyckpt.errors import FormatError
from anyckpt.storage.inflate import GZIP, InflatedSource
from anyckpt.storage.location import Location, look_in
from anyckpt.storage.members import SEPARATOR, inflated_head, is_gzip
from anyckpt.storage.source import ByteSource
from anyckpt.storage.tar import looks_like_tar, read_tar
from anyckpt.storage.tree import ArchivePlace

CONFIG = "config.json"
LAYERS = "quant_cfg.json"
"""Which layer is quantized how; ModelOpt writes it for unquantized models, too."""
TOKENIZER = "tokenizer_config.yaml"
SUFFIX = ".qnemo"

RANK = re.compile(r"rank(\d{1,6})\.safetensors")
_PEEK = 4 << 20


def rank_file(number: int) -> str:
    """The name of a rank's file."""
    return f"rank{number}.safetensors"


def detect(location: Location) -> bool:
    """A folder with ``config.json`` and ``rank0.safetensors``, an archive of these, or any archive ``*.qnemo``."""
    if location.is_directory:
        return _are_ours(location.names)
    gzip = is_gzip(location.head)
    if not gzip and not looks_like_tar(location.head):
        return False
    if location.suffix == SUFFIX:
        return True
    try:
        return _gzip_is_ours(location.open()) if gzip else _are_ours(read_tar(location.open()))
    except FormatError:
        return False


def _are_ours(names: Iterable[str]) -> bool:
    return {CONFIG, rank_file(0)} <= set(names)


def _gzip_is_ours(file: ByteSource) -> bool:
    """Whether a gzip file is a tar of these; no more than its beginning is inflated where that tells."""
    head = inflated_head(file, _PEEK, _PEEK)
    if not looks_like_tar(head) or f"{CONFIG}\0".encode() not in head:
        return False
    return f"{rank_file(0)}\0".encode() in head or _are_ours(read_tar(InflatedSource(file, None, GZIP)))


def opened(location: Location) -> tuple[Location, str]:
    """The folder that holds the files, within the archive if it is one, and what it is: for ``inspect``.

    Raises:
        FormatError: it is an archive of something else, or damaged.
        UnsafeError: it has members that a checkpoint has no business containing.
    """
    if location.is_directory:
        return location, "directory"
    place = ArchivePlace(location.path, location.open(), location.place, location.path)
    inside = look_in(place, f"{location.path}{SEPARATOR}")
    if not _are_ours(inside.names):
        raise FormatError(
            "is an archive of no TensorRT-LLM checkpoint",
            path=location.path,
            expected=f"{CONFIG} and {rank_file(0)} at its top",
            found=", ".join(inside.names[:5]) or "no files",
        )
    return inside, "gzip tar" if is_gzip(location.head) else "tar"
