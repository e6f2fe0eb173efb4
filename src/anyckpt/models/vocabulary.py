"""How many rows of a vocabulary are true, and embeddings with more rows or fewer."""

from __future__ import annotations

from anyckpt.config.model import ModelConfig, padded
from anyckpt.errors import MappingError
from anyckpt.tensor import LazyTensor, concatenate


def true_vocabulary(rows: int, config: ModelConfig, tokens: int | None) -> tuple[int, str | None]:
    """The true vocabulary of a Megatron checkpoint that has so many rows, and a note on how it was concluded.

    The tokenizer's count is taken if padding it by Megatron's rule, at some power-of-two tensor parallel size, gives
    the stored rows; a vocabulary may be larger than its tokenizer, so otherwise all rows are taken to be true.
    """
    if tokens is not None and tokens < rows:
        multiples = (config.make_vocab_size_divisible_by << shift for shift in range(8))
        if any(padded(tokens, multiple) == rows for multiple in multiples):
            return tokens, f"the vocabulary is taken to be the tokenizer's {tokens} tokens, padded to {rows} rows"
    if tokens == rows:
        return rows, None
    return rows, f"the true vocabulary is not recorded: all {rows} rows of the embedding are taken to be it"


def misfit(rows: int, config: ModelConfig, tokens: int | None) -> str | None:
    """A note where a tokenizer has tokens that the embedding has no row for; None where it fits, or is not known."""
    if tokens is None or tokens <= rows:
        return None
    said = "" if config.vocab_size in (None, rows) else f", and the configuration says {config.vocab_size}"
    return (
        f"the tokenizer has {tokens} tokens and the embedding {rows} rows{said}: it is another model's tokenizer, or "
        "rows are missing"
    )


def resized(
    name: str, tensor: LazyTensor, rows: int | None, config: ModelConfig, notes: list[str], padding: str
) -> LazyTensor:
    """A tensor with this many rows, padded with ``zeros`` or by ``repeat-last-row``, or as it is for None.

    Raises:
        MappingError: the true vocabulary is larger than what is stored.
    """
    stored = tensor.shape[0]
    true = config.vocab_size
    if rows is None or stored == rows:
        return tensor
    if true is not None and stored < true:
        raise MappingError(
            "has fewer rows than the vocabulary",
            tensor=name,
            expected=f"at least {true}",
            found=stored,
            remedy="give the right size with --vocab-size, or let the vocabulary grow with --new-rows mean",
        )
    if stored > rows:
        notes.append(f"{name}: {stored - rows} padding rows of the vocabulary are cut off")
        return tensor.narrow(0, 0, rows)
    if padding == "repeat-last-row" and stored:
        notes.append(f"{name}: {rows - stored} copies of the last row pad the vocabulary to {rows}")
        return concatenate([tensor] + [tensor.narrow(0, stored - 1, 1)] * (rows - stored), 0)
    notes.append(f"{name}: {rows - stored} zero rows pad the vocabulary to {rows}")
    return tensor.pad(0, rows)
