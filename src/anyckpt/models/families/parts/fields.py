"""Fields of ``config.json`` that have one name in many families."""

from __future__ import annotations

from anyckpt.config.fields import Field
from anyckpt.config.hugging_face import COMMON

LLAMA_FIELDS = (*COMMON, Field("layernorm_epsilon", "rms_norm_eps", "number"))
"""Of Llama, and of what was made after it."""


def llama_fields_without(*hubs: str) -> tuple[Field, ...]:
    """``LLAMA_FIELDS`` without some of the hub's fields, which the family has in other ways."""
    return tuple(row for row in LLAMA_FIELDS if row.hub not in hubs)


VOCABULARY = Field("vocab_size", "vocab_size")
TIED_AND_TOKENS = (
    Field("share_embeddings_and_output_weights", "tie_word_embeddings", "flag", True),
    Field("bos_token_id", "bos_token_id", "tokens", None),
    Field("eos_token_id", "eos_token_id", "tokens", None),
    Field("pad_token_id", "pad_token_id", "tokens", None),
)
"""Whether the embedding is the output layer, too, as it is by default; and the tokens of special meaning."""

BIAS_OF_ALL = Field("add_bias_linear", "mlp_bias", "flag", False)
"""Of families that have biases in all linear layers or in none."""
