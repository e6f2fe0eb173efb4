"""GLM-4.7-Flash: DeepSeek-V3's map and fields, and a list of which layers have experts.

Names are those of Megatron-Bridge 0.6; outputs were checked against transformers 5.24.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from anyckpt.config.model import ModelConfig
from anyckpt.config.possible import layers_of
from anyckpt.config.reader import Reader
from anyckpt.config.spellings import HuggingFace
from anyckpt.errors import MappingError
from anyckpt.models.families import deepseek_v3
from anyckpt.models.families.parts import caveats
from anyckpt.models.families.parts import experts as sparse
from anyckpt.models.language.family import Family

_KINDS = ("dense", "sparse")
_EXPECTED = {"norm_topk_prob": True, "rope_interleave": True}


class _Layers(deepseek_v3.Layers):
    """Released files count the dense layers; what transformers 5 writes lists all, and that is stronger."""

    keys = (*deepseek_v3.Layers.keys, "mlp_layer_types")

    def read(self, reader: Reader, defaults: Mapping[str, Any], found: Mapping[str, Any]) -> Mapping[str, Any]:
        said, listed = super().read(reader, defaults, found), reader.values.get("mlp_layer_types")
        if listed is None:
            return said
        if (
            not isinstance(listed, list)
            or len(listed) != len(layers_of(found["num_layers"]))
            or set(map(str, listed)) - {*_KINDS}
        ):
            raise MappingError(
                "config.json's mlp_layer_types is not that of the model",
                expected=f"{' or '.join(_KINDS)} for each of {found['num_layers']} layers",
                found=repr(listed)[:80],
            )
        return {**said, "moe_layer_freq": sparse.pattern(each == "sparse" for each in listed)}

    def write(self, config: ModelConfig, notes: list[str]) -> Mapping[str, Any]:
        kinds = [_KINDS[config.is_sparse(layer)] for layer in range(config.num_layers)]
        return {**super().write(config, notes), "mlp_layer_types": kinds}


FAMILY = Family(
    name="glm4-moe-lite",
    title="GLM-4.7-Flash",
    rules=deepseek_v3.FAMILY.rules,
    ignorable=deepseek_v3.FAMILY.ignorable,
    traits=deepseek_v3.FAMILY.traits,
    features=deepseek_v3.FAMILY.features,
    recognise=lambda config: False,  # nothing but its name tells it from DeepSeek-V3
    caveats=caveats.best_of_each_group(2),
    nemo1=False,
    like="deepseek-v3",
    dimensions=deepseek_v3.DIMENSIONS,
    hugging_face=HuggingFace(
        model_types=("glm4_moe_lite",),
        architectures=("Glm4MoeLiteForCausalLM",),
        fields=deepseek_v3.FIELDS,
        constants=_EXPECTED,
        expected=_EXPECTED,
        codecs=(
            *(row for row in deepseek_v3.CODECS if not isinstance(row, deepseek_v3.Layers)),
            _Layers("GLM"),
            deepseek_v3.SIGMOID,
            *deepseek_v3.MULTI_TOKEN,
        ),
        keys=deepseek_v3.KEYS,
        variants=sparse.STACKED,
    ),
)
