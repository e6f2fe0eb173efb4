"""CLIP whole: a text and a vision transformer, their projections into one space, and the scale of what they agree.

Checked against transformers 5.24.  What NeMo's own CLIP calls its tensors is not known here, so that the family goes
to containers alone.
"""

from __future__ import annotations

from anyckpt.config.fields import Field
from anyckpt.config.spellings import HuggingFace
from anyckpt.models.families import clip_text, clip_vision
from anyckpt.models.families.parts import towers
from anyckpt.models.families.parts.modules import alone
from anyckpt.models.language.family import Family
from anyckpt.models.language.rules import Rule

_TOWERS = {towers.TEXT: clip_text.FAMILY, towers.VISION: clip_vision.FAMILY}
_VISION = tuple(rule for rule in clip_vision.RULES if rule.hub != "visual_projection.weight")

FAMILY = Family(
    name="clip",
    title="CLIP",
    rules=(
        *clip_text.RULES,
        *towers.of_vision(_VISION),
        Rule(("visual_projection.weight",), "visual_projection.weight", ("output", "seen")),
        *alone(
            Rule(("text_projection.weight",), "text_projection.weight", ("output", "hidden")),
            Rule(("logit_scale",), "logit_scale", ()),
        ),
    ),
    ignorable=tuple(
        (f"{tower}.embeddings.position_ids", "numbers of positions, which follow from the configuration")
        for tower in ("text_model", "vision_model")
    ),
    traits=clip_text.TRAITS,
    recognise=lambda config: False,
    nemo1=False,
    unmapped=frozenset({"NeMo 1", "NeMo 2"}),
    megatron=False,
    dimensions={
        **clip_vision.FAMILY.dimensions,
        **clip_text.FAMILY.dimensions,
        "seen": lambda config: config.towers[towers.VISION].hidden_size,
    },
    hugging_face=HuggingFace(
        model_types=("clip",),
        architectures=("CLIPModel",),
        fields=(Field("output_dim", "projection_dim"),),
        attention_bias=None,
        activation_key=None,
        codecs=(towers.Towers(_TOWERS),),
    ),
)
