"""``model_config.yaml``: what it says about the model, and the files of the archive that it refers to."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

from anyckpt.checkpoint import AdapterSettings
from anyckpt.errors import FormatError

ARTIFACT_SCHEME = "nemo:"
"""A text that begins with this names a member of the archive (NeMo's ``register_artifact``)."""

GPT_TARGET = "nemo.collections.nlp.models.language_modeling.megatron_gpt_model.MegatronGPTModel"
"""The class that ``restore_from`` builds from a Megatron GPT configuration."""

NEMO_VERSION = "2.0.0"
"""Written where the configuration has none: the last release with ``MegatronGPTModel``, so the newest that fits."""

_LARGEST_RANK = 1 << 31
_GPT_KEYS = ("num_layers", "hidden_size", "num_attention_heads")


def is_megatron_config(config: dict[str, Any]) -> bool:
    """Whether a configuration is that of a Megatron model: these are at its top level, or in a T5's ``encoder``."""
    stack = config.get("encoder")
    sections = [config, *([stack] if isinstance(stack, dict) and isinstance(config.get("decoder"), dict) else [])]
    return any(all(type(section.get(key)) is int for key in _GPT_KEYS) for section in sections)


def uses_megatron_core(config: dict[str, Any]) -> bool:
    """Whether the model is made of Megatron-Core's modules, as each of NeMo's classes has its own key for."""
    return any(config.get(key) for key in ("mcore_gpt", "mcore_bert", "mcore_t5"))


def module_name(config: dict[str, Any]) -> str:
    """What NeMo 1's class calls its module of Megatron-Core: the first part of names in a flat ``.nemo``."""
    return "enc_dec_model" if config.get("mcore_t5") else "model"


def adapter_settings(config: dict[str, Any], path: str) -> AdapterSettings | None:
    """What the section ``peft`` says of a LoRA adapter; None if there is none.

    NeMo takes alpha to be ``adapter_dim`` where it is missing or null.

    Raises:
        FormatError: a number is not possible.
    """
    section = config.get("peft")
    tuning = section.get("lora_tuning") if isinstance(section, dict) else None
    if not isinstance(tuning, dict) or section is None or section.get("peft_scheme") not in ("lora", "qlora"):
        return None
    rank = tuning.get("adapter_dim")
    alpha = rank if tuning.get("alpha") is None else tuning["alpha"]
    if type(rank) is not int or not isinstance(alpha, (int, float)) or not 0 < rank < _LARGEST_RANK > alpha:
        raise FormatError(
            "peft.lora_tuning is not possible",
            path=path,
            expected="adapter_dim, a positive whole number, and alpha",
            found=f"{rank!r:.40} and {alpha!r:.40}",
        )
    targets, dropout = tuning.get("target_modules"), tuning.get("adapter_dropout")
    return AdapterSettings(
        rank=rank,
        alpha=alpha,
        dropout=float(dropout) if isinstance(dropout, (int, float)) else 0.0,
        targets=tuple(map(str, targets)) if isinstance(targets, list) else (),
        base=base if isinstance(base := config.get("restore_from_path"), str) else None,
    )


def adapter_section(settings: AdapterSettings, canonical: bool) -> dict[str, Any]:
    """The section ``peft`` of an adapter; ``targets`` are Megatron's names of modules."""
    known = {
        "linear_qkv": "attention_qkv",
        "linear_proj": "attention_dense",
        "linear_fc1": "mlp_fc1",
        "linear_fc2": "mlp_fc2",
        "linear_q": "attention_qkv",
        "linear_k": "attention_qkv",
        "linear_v": "attention_qkv",
        "linear_fc1_up": "mlp_fc1",
        "linear_fc1_gate": "mlp_fc1",
    }
    return {
        "peft_scheme": "lora",
        "restore_from_path": None,
        "lora_tuning": {
            "variant": "canonical" if canonical else "nemo",
            "target_modules": list(dict.fromkeys(known.get(target, target) for target in settings.targets)),
            "adapter_dim": settings.rank,
            "alpha": settings.alpha,
            "adapter_dropout": settings.dropout,
            "column_init_method": "xavier",
            "row_init_method": "zero",
            "layer_selection": None,
            "weight_tying": False,
            "position_embedding_strategy": None,
        },
    }


def texts(value: Any, path: tuple[str | int, ...] = ()) -> Iterator[tuple[tuple[str | int, ...], str]]:
    """Every text in a configuration, with the keys and indices that lead to it."""
    if isinstance(value, str):
        yield path, value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from texts(item, (*path, key))
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from texts(item, (*path, index))


def replaced(value: Any, change: Callable[[str], str]) -> Any:
    """A copy of a configuration with every text changed."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, dict):
        return {key: replaced(item, change) for key, item in value.items()}
    if isinstance(value, list):
        return [replaced(item, change) for item in value]
    return value


def missing_artifacts(config: dict[str, Any], names: Iterable[str]) -> dict[str, str]:
    """Dotted key -> member, for each ``nemo:`` reference to a file or folder that the archive lacks."""
    known = {"/".join(parts[:end]) for name in names for parts in [name.split("/")] for end in range(1, len(parts) + 1)}
    return {
        ".".join(map(str, path)): text[len(ARTIFACT_SCHEME) :]
        for path, text in texts(config)
        if text.startswith(ARTIFACT_SCHEME) and text[len(ARTIFACT_SCHEME) :] not in known
    }


def referenced_names(config: dict[str, Any]) -> set[str]:
    """Members that the configuration refers to: ``nemo:`` references, and the bare base names of older archives."""
    return {text.removeprefix(ARTIFACT_SCHEME).rpartition("/")[2] for _, text in texts(config)}
