"""Pickles without executing them: a reader that gives inert records, and a writer that takes them."""

from anyckpt.pickling.calls import Callee, Calls, recording
from anyckpt.pickling.reader import load, load_prefix
from anyckpt.pickling.records import DictRecord, Global, PersistentId, Record
from anyckpt.pickling.writer import dumps

__all__ = [
    "Callee",
    "Calls",
    "DictRecord",
    "Global",
    "PersistentId",
    "Record",
    "dumps",
    "load",
    "load_prefix",
    "recording",
]
