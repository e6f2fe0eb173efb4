"""OLMo 3: OLMo 2 with a window in three layers of four; rope is scaled in the others alone.

Checked against transformers 5.24.
"""

from __future__ import annotations

from anyckpt.config.spellings import HuggingFace
from anyckpt.config.windows import AllBut, LayerWindow
from anyckpt.models.families import olmo2
from anyckpt.models.families.parts import decoder
from anyckpt.models.families.parts.fields import LLAMA_FIELDS
from anyckpt.models.families.parts.local_theta import LocalTheta
from anyckpt.models.language.family import Family

_THETA = 500_000.0

FAMILY = Family(
    name="olmo3",
    title="OLMo 3",
    rules=olmo2.RULES,
    ignorable=decoder.IGNORABLE,
    traits=olmo2.TRAITS,
    recognise=lambda config: False,
    nemo1=False,
    megatron=False,
    like="olmo2",
    hugging_face=HuggingFace(
        model_types=("olmo3",),
        architectures=("Olmo3ForCausalLM",),
        fields=LLAMA_FIELDS,
        rotary_base=_THETA,
        codecs=(LayerWindow(AllBut(4), unset=4096), LocalTheta(_THETA, "rope_theta")),
    ),
)
