"""The model families that anyckpt knows: its own, and those that other packages register.

A family is a ``models.family.Family``.  Another package adds one through an entry point of the group
``anyckpt.families``, named as the family, whose value is a ``Family``; it is tried after ours.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from functools import cache
from importlib import import_module
from typing import TYPE_CHECKING, Any

from anyckpt.config import own_part
from anyckpt.entry_points import loaded, registered
from anyckpt.errors import UsageError, did_you_mean
from anyckpt.models.language.family import Family

if TYPE_CHECKING:
    from anyckpt.facts import FamilyFacts

_BUILT_IN = (
    "mixtral", "llama4", "qwen3_next", "qwen3_5_moe", "qwen3_5", "qwen3_moe", "qwen2_moe", "deepseek_v32",
    "glm_moe_dsa", "deepseek_v3", "deepseek_v2", "gpt_oss", "mamba2", "nemotron_h", "qwen2", "qwen3", "gemma3",
    "gemma2", "gemma", "recurrent_gemma", "phi3", "starcoder2", "nemotron", "gpt2", "gpt_bigcode", "gpt_neox", "mpt",
    "falcon", "mistral", "llama_nemotron", "smollm3", "llama", "baichuan", "chatglm", "glm", "megatron_bert", "bert",
    "t5", "clip_vision", "vit", "glm4_moe", "glm4_moe_lite", "seed_oss", "olmo2", "olmo3", "olmoe", "granite",
    "granitemoe", "exaone4", "ernie4_5", "ernie4_5_moe", "cohere2", "hunyuan_dense", "internlm2", "internlm3",
    "ministral3", "minimax_m2",
    "roberta", "xlm_roberta", "distilbert", "lfm2",
    "modernbert", "falcon_h1", "whisper", "clip", "clip_text", "siglip", "siglip_text", "siglip_vision",
    "gemma3n", "gemma4", "mllama", "granitemoehybrid", "parakeet_ctc", "parakeet_rnnt", "parakeet_tdt", "canary",
    "nemotron_asr_streaming", "nemotron3_5_asr",
)  # fmt: skip
"""Modules of this package, each with ``FAMILY``; where several fit a configuration, the first is it."""


@cache
def _registered() -> tuple[Family, ...]:
    return tuple(loaded(point, Family) for point in registered("anyckpt.families").values())


def each_family() -> Iterator[Family]:
    """Families in the order in which a configuration is tried; those of other packages last, for they take a search."""
    yield from built_in()
    yield from _registered()


def built_in() -> Iterator[Family]:
    """The families of this package, in the order in which a configuration is tried."""
    yield from map(_of_module, _BUILT_IN)


def _of_module(module: str) -> Family:
    family: Family = import_module(f"anyckpt.models.families.{module}").FAMILY
    return family


def _likely(name: object) -> Family | None:
    """The family whose module is called as a family or a ``model_type`` is: often the one, found without the others."""
    module = re.sub(r"\W", "_", name) if isinstance(name, str) else ""
    return _of_module(module) if module in _BUILT_IN else None


def of_config(config: Mapping[str, Any]) -> Family | None:
    """The first family that a ``config.json``, or its text part, is of."""
    if not own_part.any_text_part(config):
        likely = _likely(config.get("model_type"))
        if likely is not None and own_part.is_known(likely, config):
            return likely  # no two families have the same type
    return next((family for family in each_family() if own_part.is_known(family, config)), None)


def known_families() -> dict[str, Family]:
    """Every family by name."""
    return {family.name: family for family in each_family()}


def facts() -> dict[str, FamilyFacts]:
    """Every model family whose weights can be renamed, by name.

    Raises:
        UsageError: a package that is installed registers one that cannot be loaded.
    """
    from anyckpt.facts import FamilyFacts

    own = {family.name for family in built_in()}
    return {
        name: FamilyFacts(
            name=name,
            title=family.title,
            model_types=family.hugging_face.model_types,
            architectures=family.hugging_face.architectures,
            megatron=family.megatron,
            nemo1=family.nemo1,
            nemo2=family.nemo2 is not None,
            meta=family.meta is not None,
            trtllm=family.trtllm is not None,
            own=name in own,
        )
        for name, family in sorted(known_families().items())
    }


def by_name(name: str) -> Family:
    """The family called ``name``.

    Raises:
        UsageError: there is none.
    """
    likely = _likely(name)
    if likely is not None and likely.name == name:
        return likely
    for family in each_family():
        if family.name == name:
            return family
    known = known_families()
    question = did_you_mean(name, {family: known[family].title for family in sorted(known)})
    raise UsageError(
        f"unknown model family {name!r}",
        expected=f"one of {', '.join(sorted(known))}",
        remedy=question
        or "leave --family out to convert names unchanged, or write the family down (python -m pydoc anyckpt.extend)",
    )
