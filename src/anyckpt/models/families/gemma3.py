"""Gemma 3, text: Gemma 2 with normalised queries and keys, without soft caps, five layers of six with a window.

Layers with a window have a theta of their own, and scaling of rope is for the others alone.  NeMo 2 has both thetas in
one field, an integer for the window, and applies it as (W, 0), one token more than transformers; the hub says what
transformers does.  Tensors were checked against Megatron-Bridge 0.3.1, logits on its model with window and the outer
norms' epsilon put right.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from anyckpt.config.encoder_keys import SOFTMAX_SCALE
from anyckpt.config.fields import Codec
from anyckpt.config.model import ModelConfig, whole
from anyckpt.config.reader import Reader
from anyckpt.config.spellings import NeMo2
from anyckpt.config.windows import AllBut, LayerWindow, windowed_layers
from anyckpt.errors import MappingError
from anyckpt.models.families import gemma2
from anyckpt.models.families.parts import decoder
from anyckpt.models.families.parts.local_theta import LocalTheta
from anyckpt.models.language.family import Family

_LOCAL, _GLOBAL = 10_000.0, 1_000_000.0
_PERIOD = 6


def _caveats(config: ModelConfig, kind: str) -> Iterator[str]:
    if kind == "nemo1":
        yield "NeMo 1 has no Gemma 3: its layers with a window have no theta of their own, and no norms after them"
    if kind == "megatron-args":
        yield from gemma2.caveats(config, kind)
        yield "Megatron-LM has one theta, and scales rope in all layers: set rotary_base_local up in the model"


class _OfNeMo2(Codec):
    """Windows, both thetas and the scores' scale in NeMo 2's words, which has two fields for a window of its own."""

    hubs = (
        "rotary_base", "rotary_base_local", "window_size", "window_attn_skip_freq", "rope_scaling",
        "query_pre_attn_scalar",
    )  # fmt: skip

    def read(self, reader: Reader, defaults: Mapping[str, Any], found: Mapping[str, Any]) -> Mapping[str, Any]:
        bases = reader.pair("rotary_base") if "rotary_base" in reader.values else (int(_LOCAL), int(_GLOBAL))
        length = reader.integer("window_size") if "window_size" in reader.values else defaults.get("window_size", 512)
        pattern = reader.pair("interleaved_attn_pattern") or (_PERIOD - 1, 1)
        factor = reader.number("rope_scaling_factor") or defaults.get("rope_scaling_factor", 1.0)
        scale = reader.number("softmax_scale") or defaults.get("softmax_scale")
        if pattern[0] < 1 or pattern[1] != 1 or length is None or length < 0:
            raise MappingError(
                "NeMo 2's interleaved_attn_pattern is not possible", expected="layers with a window, then 1",
                found=pattern,
            )  # fmt: skip
        local, everywhere = bases or (int(_LOCAL), int(_GLOBAL))
        return {
            "rotary_base": float(everywhere),
            "rotary_base_local": float(local),
            "window_size": (length, 0),
            "window_attn_skip_freq": None if sum(pattern) > found["num_layers"] else sum(pattern),
            "rope_scaling": None if factor == 1.0 else {"rope_type": "linear", "factor": factor},
            "query_pre_attn_scalar": None if not scale or scale < 0 else whole(round(scale**-2, 6)),
        }

    def write(self, config: ModelConfig, notes: list[str]) -> Mapping[str, Any]:
        layers = windowed_layers(config)
        period = config.window_attn_skip_freq
        period = len(layers) + 1 if period is None and all(layers) else period
        bases = [whole(config.rotary_base_local or _LOCAL), whole(config.rotary_base)]
        if not isinstance(period, int) or period < 2 or not all(isinstance(base, int) for base in bases):
            raise MappingError(
                "NeMo 2's Gemma 3 cannot express these layers",
                expected="a window in all but every N-th, whole thetas",
                found=f"{config.window_attn_skip_freq}, {bases}", remedy="convert to megatron-core or megatron-lm",
            )  # fmt: skip
        return {
            "rotary_base": bases,
            "window_size": config.window_size[0] if config.window_size else None,
            "interleaved_attn_pattern": [period - 1, 1],
            "rope_scaling_factor": (config.rope_scaling or {}).get("factor", 1.0),
            "seq_len_interpolation_factor": None,
            **SOFTMAX_SCALE.write(config, notes),
        }


FAMILY = Family(
    name="gemma3",
    title="Gemma 3 (text)",
    rules=(*gemma2.RULES, *decoder.QUERY_KEY_NORMS),
    ignorable=decoder.IGNORABLE,
    traits={**gemma2.FAMILY.traits, "qk_layernorm": True},
    caveats=_caveats,
    nemo1_keys=lambda config: {"apply_embedding_scaling": True},
    hugging_face=replace(
        gemma2.FAMILY.hugging_face,
        model_types=("gemma3_text",),
        defaults_of="gemma3_text",
        architectures=("Gemma3ForCausalLM",),
        rotary_base=_GLOBAL,
        codecs=(
            LayerWindow(AllBut(_PERIOD, ("sliding_window_pattern", "_sliding_window_pattern")), unset=4096),
            LocalTheta(_LOCAL, "rope_local_base_freq"),
        ),
    ),
    nemo2=NeMo2(
        module="nemo.collections.llm.gpt.model.gemma3",
        model="Gemma3Model",
        configs=("Gemma3Config*",),
        implied={"qk_layernorm": True},
        codecs=(_OfNeMo2(),),
    ),
)  # fmt: skip
