"""The checksums that a torch file keeps of its records."""

from __future__ import annotations

from collections.abc import Iterator

from anyckpt.checkpoint import StoredChecksum
from anyckpt.containers.torch_file.contents import TorchContents


def stored_checksums(contents: TorchContents) -> Iterator[StoredChecksum]:
    """The CRC-32s that a zip archive keeps; 0 stands for one that was not computed."""
    for record in contents.records:
        if record.crc or not record.source.size:
            yield StoredChecksum(record.source.name, record.source, record.crc)
