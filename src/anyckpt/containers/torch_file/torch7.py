"""Files of Torch7, torch's ancestor in Lua, which are recognised so that an error can name them."""

from __future__ import annotations

import re

from anyckpt.errors import FormatError

_BINARY = re.compile(rb"\x04\0\0\0.{4}\x03\0\0\0V 1(.)\0\0\0", re.DOTALL)
_BINARY_TABLE = re.compile(rb"\x03\0\0\0\x01\0\0\0.\0\0\0[\x01\x02]\0\0\0", re.DOTALL)
_TEXT = re.compile(rb"(4\n\d+\n3\nV 1\n\d+\n(?P<kind>[\w.]+)\n|3\n1\n\d+\n[12]\n)")


def is_torch7(head: bytes) -> bool:
    """Whether a file that begins with ``head`` begins as ``torch.save`` of Lua writes an object or a table."""
    return any(pattern.match(head) for pattern in (_BINARY, _BINARY_TABLE, _TEXT))


def refusal(head: bytes, path: str) -> FormatError:
    """Why such a file is not opened."""
    kind = None
    binary, text = _BINARY.match(head), _TEXT.match(head)
    if binary is not None:
        kind = head[binary.end() : binary.end() + binary[1][0]].decode("latin-1")
    elif text is not None and text["kind"]:
        kind = text["kind"].decode("latin-1")
    return FormatError(
        "is a file of Torch7 (Lua), not of PyTorch",
        path=path,
        found=None if kind is None else f"an object of class {kind}",
        remedy="load it with the torchfile package and save its tensors with torch.save",
    )
