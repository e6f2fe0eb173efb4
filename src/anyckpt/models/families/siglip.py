"""SigLIP whole: a text and a vision transformer, and the scale and the bias of what they agree.

Checked against transformers 5.24.
"""

from __future__ import annotations

from anyckpt.config.spellings import HuggingFace
from anyckpt.models.families import siglip_text, siglip_vision
from anyckpt.models.families.parts import towers
from anyckpt.models.families.parts.modules import alone
from anyckpt.models.language.family import Family
from anyckpt.models.language.rules import Rule

_TOWERS = {towers.TEXT: siglip_text.FAMILY, towers.VISION: siglip_vision.FAMILY}

FAMILY = Family(
    name="siglip",
    title="SigLIP, SigLIP 2 of fixed resolution",
    rules=(
        *siglip_text.RULES,
        *towers.of_vision(siglip_vision.RULES),
        *alone(Rule((name,), name, ("one",)) for name in ("logit_scale", "logit_bias")),
    ),
    ignorable=tuple(
        (f"{tower}.embeddings.position_ids", "numbers of positions, which follow from the configuration")
        for tower in ("text_model", "vision_model")
    ),
    traits=siglip_text.FAMILY.traits,
    recognise=lambda config: False,
    nemo1=False,
    megatron=False,
    dimensions={
        **siglip_vision.FAMILY.dimensions,
        "output": lambda config: config.towers[towers.TEXT].output_dim or 0,
    },
    hugging_face=HuggingFace(
        model_types=("siglip",),
        architectures=("SiglipModel",),
        fields=(),
        attention_bias=None,
        activation_key=None,
        codecs=(towers.Towers(_TOWERS),),
    ),
)
