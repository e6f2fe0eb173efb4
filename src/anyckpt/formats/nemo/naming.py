"""How a ``.nemo`` names weights."""

from __future__ import annotations

from anyckpt.formats.format import WriteOptions

FLAT, _SHARDED = "nemo-flat", "nemo-sharded"


def dialect(options: WriteOptions) -> str | None:
    """Megatron names begin with ``model.``; layers are stacked in a distributed checkpoint only.

    Ranks are cut under the hub's names.
    """
    if options.layout is not None and not options.sharded:
        return "hub"
    return _SHARDED if options.sharded else FLAT
