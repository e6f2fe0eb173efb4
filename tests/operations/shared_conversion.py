"""The command line with small blocks, so that a small model has many: ``python shared_conversion.py ARGUMENT ...``."""

from __future__ import annotations

import sys

from tests.engine.sample import shrink_blocks

from anyckpt.cli import main

if __name__ == "__main__":
    shrink_blocks(8192, sync_every=100_000)
    print("ready", flush=True)
    main(sys.argv[1:])
