"""Where bytes live: local files, members of an archive, memory.  Reads are ranged and checked."""

from anyckpt.storage.local_file import LocalFile
from anyckpt.storage.source import ByteSource, MemorySource

__all__ = ["ByteSource", "LocalFile", "MemorySource"]
