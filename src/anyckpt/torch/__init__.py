"""Checkpoints in training: live state of torch saved and restored through the same plans, writers and commit as files.

The only package here that imports torch (``pip install anyckpt[torch]``).  Its names are imported when first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from anyckpt.on_demand import on_demand
from anyckpt.torch.missing import told_of

if TYPE_CHECKING:
    from anyckpt.operations.retention import Retention
    from anyckpt.operations.run_folder import latest
    from anyckpt.operations.run_upkeep import clean
    from anyckpt.torch import dcp, megatron
    from anyckpt.torch.async_saving import SaveHandle, async_save
    from anyckpt.torch.classes import register_class
    from anyckpt.torch.from_another import initialise, perception_settings
    from anyckpt.torch.loading import LoadReport, load
    from anyckpt.torch.module_state import Fitted, StateMismatchError
    from anyckpt.torch.options import Options
    from anyckpt.torch.restorable import Restorable
    from anyckpt.torch.saver import Saver
    from anyckpt.torch.saving import SaveReport, save
    from anyckpt.torch.settings import Settings

__all__ = [
    "Fitted",
    "LoadReport",
    "Options",
    "Restorable",
    "Retention",
    "SaveHandle",
    "SaveReport",
    "Saver",
    "Settings",
    "StateMismatchError",
    "async_save",
    "clean",
    "dcp",
    "initialise",
    "latest",
    "load",
    "megatron",
    "perception_settings",
    "register_class",
    "save",
]

_WHERE: dict[str, str] = {
    **{name: f"torch.{name}:" for name in ("dcp", "megatron")},
    "Retention": "operations.retention",
    "clean": "operations.run_upkeep",
    "latest": "operations.run_folder",
    **dict.fromkeys(("Fitted", "StateMismatchError"), "torch.module_state"),
    **dict.fromkeys(("LoadReport", "load"), "torch.loading"),
    "Options": "torch.options",
    "Restorable": "torch.restorable",
    **dict.fromkeys(("SaveHandle", "async_save"), "torch.async_saving"),
    **dict.fromkeys(("SaveReport", "save"), "torch.saving"),
    "Saver": "torch.saver",
    "Settings": "torch.settings",
    **dict.fromkeys(("initialise", "perception_settings"), "torch.from_another"),
    "register_class": "torch.classes",
}

_find, __dir__ = on_demand(__name__, _WHERE)
__getattr__ = told_of(_find, __name__, "torch")
