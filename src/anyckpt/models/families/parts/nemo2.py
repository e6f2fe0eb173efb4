"""NeMo 2's classes that are of no family."""

from __future__ import annotations

from anyckpt.config.spellings import NeMo2


def general() -> NeMo2:
    """NeMo 2's general GPT class, for families that have none of their own."""
    return NeMo2(
        module="nemo.collections.llm.gpt.model.base",
        model="GPTModel",
        configs=("GPTConfig*",),
    )
