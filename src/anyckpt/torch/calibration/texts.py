"""Texts as token ids, with the model's own tokenizer."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from anyckpt.checkpoint import Tokenizer
from anyckpt.errors import UsageError
from anyckpt.operations.steps.calibration_data import cut

_LIMIT = 1 << 30


def token_ids(
    texts: Iterable[str], tokenizer: Tokenizer | None, path: str, length: int, *, stream: bool
) -> Iterator[list[int]]:
    """The ids of each text.

    Args:
        texts: in turn.
        tokenizer: the model's; None if it has none.
        path: the model's, for messages.
        length: tokens of a sample.
        stream: the text is cut into samples.

    Raises:
        UsageError: there is no tokenizer, or transformers does not load it.
    """
    if tokenizer is None or not tokenizer.files:
        raise UsageError(
            f"{path}: has no tokenizer, and texts are no token ids",
            expected="a tokenizer's files",
            remedy="give one with --tokenizer, or token ids with --calib-dataset (.npy, or lists in JSON lines)",
        )
    loaded = _loaded(tokenizer, path)
    for text in texts:
        ids = loaded(text, truncation=False, verbose=False)["input_ids"]
        yield from (list(one) for one in cut(ids, length)) if stream else (ids[:length],)


def _loaded(tokenizer: Tokenizer, path: str) -> Any:
    from transformers import AutoTokenizer

    with tempfile.TemporaryDirectory() as folder:
        for name, source in tokenizer.files.items():
            Path(folder, os.path.basename(name)).write_bytes(source.read_all(_LIMIT))
        if tokenizer.model_file is not None and tokenizer.library == "sentencepiece":
            os.replace(Path(folder, os.path.basename(tokenizer.model_file)), Path(folder, "tokenizer.model"))
        try:
            if tokenizer.library == "sentencepiece":
                return _Pieces(Path(folder, "tokenizer.model"))
            return AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
        except Exception as error:  # whatever its own libraries raise
            raise UsageError(
                f"{path}: transformers does not load the tokenizer",
                expected="files of one that AutoTokenizer loads",
                found=f"{type(error).__name__}: {error}".splitlines()[0][:120],
                remedy="give another with --tokenizer, or token ids with --calib-dataset",
            ) from error


class _Pieces:
    """A sentencepiece model by itself, called as transformers' tokenizers are; a text begins with the first token."""

    def __init__(self, path: Path) -> None:
        from sentencepiece import SentencePieceProcessor

        self._model = SentencePieceProcessor(model_file=str(path))

    def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
        return {"input_ids": self._model.encode(text, add_bos=self._model.bos_id() >= 0)}
