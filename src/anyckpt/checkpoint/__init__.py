"""What every format's reader returns and every format's writer receives."""

from anyckpt.checkpoint.beside import AdapterSettings, CompositeTensor, ObjectForms, Part, StoredChecksum, Tokenizer
from anyckpt.checkpoint.form import OptimizerForm
from anyckpt.checkpoint.opened import Checkpoint, storage_key
from anyckpt.checkpoint.ranks import ParallelLayout, RankShard
from anyckpt.checkpoint.training import GROUP, OptimizerState, TrainingState

__all__ = [
    "GROUP",
    "AdapterSettings",
    "Checkpoint",
    "CompositeTensor",
    "ObjectForms",
    "OptimizerForm",
    "OptimizerState",
    "ParallelLayout",
    "Part",
    "RankShard",
    "StoredChecksum",
    "Tokenizer",
    "TrainingState",
    "storage_key",
]
