"""Names of the hub's tensors that are treated apart, wherever that is; all others are told by families' rules."""

from __future__ import annotations

EMBEDDING = "embedding.word_embeddings.weight"
HEAD = "output_layer.weight"
HEAD_BIAS = "output_layer.bias"
HEAD_OF_T5 = "lm_head.output_layer.weight"
HEAD_BIAS_OF_T5 = "lm_head.output_layer.bias"

HEADS = (HEAD, HEAD_OF_T5)
"""The output layer of one stack, and of an encoder-decoder: copies of the embedding where the two are shared."""

FINAL_NORM = "decoder.final_layernorm.weight"
FINAL_NORM_OF_HYBRIDS = "decoder.final_norm.weight"
"""As Megatron-Core names it in a model with Mamba layers."""
FINAL_NORM_OF_ENCODER = "encoder.final_layernorm.weight"

LANGUAGE = "language_model."
"""What the text part's names begin with in Megatron's multimodal models."""
