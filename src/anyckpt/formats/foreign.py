"""Files of other software that are not read, recognised by how they begin so that an error can name them."""

from __future__ import annotations

from anyckpt.data_classes import dataclass
from anyckpt.errors import UnknownFormatError


@dataclass(frozen=True)
class _Foreign:
    """A kind of file that is not read.

    Attributes:
        title: what it is, with its article.
        magic: how it begins, after ``offset`` bytes.
        remedy: what to do.
        offset: bytes before ``magic``.
    """

    title: str
    magic: bytes
    remedy: str
    offset: int = 0


_DECOMPRESS = "decompress it first"
_ARRAYS = "save its arrays as safetensors (safetensors.numpy.save_file)"
_KINDS = (
    _Foreign("a GGML file (llama.cpp)", b"tjgg", "open the checkpoint that it was made of"),
    _Foreign("a GGML file (whisper.cpp)", b"lmgg", "open the checkpoint that it was made of"),
    _Foreign("an HDF5 file (Keras)", b"\x89HDF\r\n\x1a\n", _ARRAYS),
    _Foreign("a NumPy array", b"\x93NUMPY", _ARRAYS),
    _Foreign("a TensorFlow Lite model", b"TFL3", "open the checkpoint that it was made of", offset=4),
    _Foreign("compressed by gzip", b"\x1f\x8b", _DECOMPRESS),
    _Foreign("compressed by bzip2", b"BZh", _DECOMPRESS),
    _Foreign("compressed by xz", b"\xfd7zXZ\0", _DECOMPRESS),
    _Foreign("compressed by zstd", b"\x28\xb5\x2f\xfd", _DECOMPRESS),
    _Foreign("a 7z archive", b"7z\xbc\xaf\x27\x1c", "unpack it first"),
)


def refusal(head: bytes, path: str) -> UnknownFormatError | None:
    """The error for a file that begins with ``head`` and is of no format here; None if nothing tells what it is."""
    kind = next((kind for kind in _KINDS if head[kind.offset :].startswith(kind.magic)), None)
    if kind is None:
        return None
    return UnknownFormatError(f"is {kind.title}, which is not read", path=path, remedy=kind.remedy)
