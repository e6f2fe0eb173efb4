"""Where a Megatron-Bridge checkpoint is, and whether one is."""

from __future__ import annotations

from anyckpt.errors import FormatError
from anyckpt.formats.megatron_core.location import COMMIT, COMMON
from anyckpt.formats.shared.tracker import TRACKER, iteration_folder
from anyckpt.storage.location import Location

RUN_CONFIG = "run_config.yaml"
TRAIN_STATE = "train_state.pt"
LATEST = f"latest_{TRAIN_STATE}"


def detect(location: Location) -> bool:
    """``run_config.yaml`` beside a payload, or a training root whose trackers lead to one."""
    if not location.is_directory:
        return False
    if RUN_CONFIG in location.names:
        return any(name in (COMMIT, ".metadata", COMMON) or name.endswith(".distcp") for name in location.names)
    if LATEST in location.names:
        return True
    if TRACKER not in location.names:
        return False
    try:
        return RUN_CONFIG in iteration_folder(location).names
    except FormatError:
        return False
