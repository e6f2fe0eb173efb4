"""Checkpoints in training: live state of torch saved and restored through the same plans, writers and commit as files.

The only package here that imports torch (``pip install anyckpt[torch]``).  Its names are imported when first used.
"""

from __future__ import annotations

from anyckpt.on_demand import on_demand

_WHERE: dict[str, str] = {
    "Retention": "operations.retention",
    "clean": "operations.run_upkeep",
    "latest": "operations.run_folder",
}

__getattr__, __dir__ = on_demand(__name__, _WHERE)
