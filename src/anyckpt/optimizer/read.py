"""Finding optimizer state in a checkpoint of any format that does not bring a finder of its own."""

from __future__ import annotations

import re
from dataclasses import replace
from functools import partial

from anyckpt.checkpoint import Checkpoint

_OBJECT = re.compile(
    r"(?:.*/)?(?:chained_\d+\.)?(?:optimizers?|optim|optimizer_states|optimizer_\d+|distrib_optim|content_metadata"
    r"|original_param_groups)(?:[./].*)?"
)


def holds_optimizer(name: str) -> bool:
    """A stored object of this name is of an optimizer's state, by the names that containers keep it under."""
    return _OBJECT.fullmatch(name) is not None


def with_optimizer(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint with ``optimizer`` set, if it has state that is understood; itself otherwise.

    The state has the names of ``weights()``; it is looked for when ``optimizer`` is called, which raises MappingError
    where names, counts or shapes do not prove which parameter a state is of.
    """
    if checkpoint.optimizer is not None:
        return checkpoint
    from anyckpt.optimizer.flat_buffers import has_flat_buffers, read_flat_buffers
    from anyckpt.optimizer.model_space import has_model_space, read_model_space
    from anyckpt.optimizer.named import has_named, read_named
    from anyckpt.optimizer.numbered import has_numbered, read_numbered

    readers = (
        (has_flat_buffers, read_flat_buffers),
        (has_model_space, read_model_space),
        (has_numbered, read_numbered),
        (has_named, read_named),
    )
    reader = next((read for has, read in readers if has(checkpoint)), None)
    return checkpoint if reader is None else replace(checkpoint, optimizer=partial(reader, checkpoint))
