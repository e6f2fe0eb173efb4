"""XLM-RoBERTa, and the sentence encoders made of it: RoBERTa under a type and with classes of its own."""

from __future__ import annotations

from anyckpt.models.families import roberta

FAMILY = roberta.family("xlm-roberta", "XLM-RoBERTa", "xlm-roberta", "XLMRoberta", like="roberta")
