"""Fields of ``config.json`` that have one name in most families, for those that cannot take all of ``COMMON``."""

from __future__ import annotations

from anyckpt.config.fields import Field

VOCABULARY = Field("vocab_size", "vocab_size")
TIED_AND_TOKENS = (
    Field("share_embeddings_and_output_weights", "tie_word_embeddings", "flag", True),
    Field("bos_token_id", "bos_token_id", "tokens", None),
    Field("eos_token_id", "eos_token_id", "tokens", None),
    Field("pad_token_id", "pad_token_id", "tokens", None),
)
"""Whether the embedding is the output layer, too, as it is by default; and the tokens of special meaning."""
