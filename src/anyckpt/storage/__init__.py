"""Where bytes live: local files, members of an archive, memory.  Reads are ranged and checked."""

from anyckpt.storage.source import ByteSource, LocalFile, MemorySource, SlicedSource

__all__ = ["ByteSource", "LocalFile", "MemorySource", "SlicedSource"]
