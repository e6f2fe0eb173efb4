"""Why some stored entries of Megatron's models are no weights."""

from __future__ import annotations

EXTRA_STATE_REASON = "Transformer Engine's own state (FP8 scaling); carries no weights"
FREQUENCIES_REASON = "computed from the configuration"
