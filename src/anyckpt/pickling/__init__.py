"""Pickles without executing them: a reader that gives inert records, and a writer that takes them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from anyckpt.on_demand import on_demand

if TYPE_CHECKING:
    from anyckpt.pickling.calls import Callee, Calls, recording
    from anyckpt.pickling.reader import load, load_prefix
    from anyckpt.pickling.records import DictRecord, Filled, Global, PersistentId, Record, Template
    from anyckpt.pickling.writer import dumps

__all__ = [
    "Callee",
    "Calls",
    "DictRecord",
    "Filled",
    "Global",
    "PersistentId",
    "Record",
    "Template",
    "dumps",
    "load",
    "load_prefix",
    "recording",
]

__getattr__, __dir__ = on_demand(
    __name__,
    {
        **dict.fromkeys(("Callee", "Calls", "recording"), "pickling.calls"),
        **dict.fromkeys(("load", "load_prefix"), "pickling.reader"),
        **dict.fromkeys(("DictRecord", "Filled", "Global", "PersistentId", "Record", "Template"), "pickling.records"),
        "dumps": "pickling.writer",
    },
)
