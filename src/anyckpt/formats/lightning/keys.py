"""Names that Lightning 1.x and 2.x use in their checkpoints (``CheckpointConnector.dump_checkpoint``)."""

from __future__ import annotations

VERSION = "pytorch-lightning_version"
STATE_DICT = "state_dict"
HYPER_PARAMETERS = "hyper_parameters"
OPTIMIZER_STATES = "optimizer_states"
LR_SCHEDULERS = "lr_schedulers"
TRAINING_STATE = (OPTIMIZER_STATES, LR_SCHEDULERS, "callbacks", "MixedPrecision", "native_amp_scaling_state")
"""Top-level entries that a checkpoint saved with ``save_weights_only=True`` lacks."""
META = "meta.pt"
"""What makes a directory a sharded checkpoint: everything but weights and optimizer states."""
