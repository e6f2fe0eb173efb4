"""Names of what the engine itself adds to what it writes."""

MANIFEST_NAME = ".anyckpt-manifest.json"
"""What the engine adds to a directory that it writes; readers leave it out of what they list."""

UNFINISHED_NAME = ".anyckpt-unfinished"
"""What lies in a folder of an object store as long as not all of an output is there."""

PARTIAL = ".anyckpt-partial"
"""How the name ends of what lies beside an output that is being written."""
