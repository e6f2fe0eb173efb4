"""The text transformer of SigLIP, alone: that of CLIP with a projection that has a bias and is part of it.

Checked against transformers 5.24.
"""

from __future__ import annotations

from dataclasses import replace

from anyckpt.config.codecs import Implied
from anyckpt.config.fields import Field
from anyckpt.models.families import clip_text
from anyckpt.models.families.clip_text import PREFIX
from anyckpt.models.families.parts.modules import alone, linear
from anyckpt.models.language.family import Family

RULES = (*clip_text.RULES, *alone(linear(f"{PREFIX}head", "text_projection", ("output", "hidden"))))

FAMILY: Family = replace(
    clip_text.FAMILY,
    name="siglip-text",
    title="SigLIP's text transformer",
    rules=RULES,
    refine=lambda config, shapes: config,
    hugging_face=replace(
        clip_text.FAMILY.hugging_face,
        model_types=("siglip_text_model",),
        defaults_of="siglip_text_model",
        architectures=("SiglipTextModel",),
        fields=(
            *clip_text.FIELDS,
            Field("output_dim", "projection_size", default=lambda found: found["hidden_size"]),
        ),
        codecs=(Implied({"share_embeddings_and_output_weights": True}),),
        headless=lambda config: True,
    ),
)
