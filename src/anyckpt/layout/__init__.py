"""Parallel layouts: joining what ranks hold into global tensors, and cutting global tensors for ranks.

Names are the hub's (Megatron-Core, Transformer-Engine spelling); see ``geometry`` for what must be known of a model
and of a layout, ``partition`` for how each kind of parameter is divided.
"""

from anyckpt.layout.cut import cut
from anyckpt.layout.geometry import Delta, Geometry, Latent, Mamba, Parallelism
from anyckpt.layout.join import join
from anyckpt.layout.pipeline import hybrid_layout, parse_layout
from anyckpt.layout.replicas import compare

__all__ = [
    "Delta",
    "Geometry",
    "Latent",
    "Mamba",
    "Parallelism",
    "compare",
    "cut",
    "hybrid_layout",
    "join",
    "parse_layout",
]
