"""One head of NeMo's hybrids, whose encoder has a transducer and a CTC head behind it.

transformers has a class for either alone, so that ``--family`` says which one is taken.  In NeMo's configuration the
second one is the section ``aux_ctc``, and its weights are in ``ctc_decoder`` (NeMo 3.0).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from anyckpt.checkpoint import Checkpoint
from anyckpt.config.nemo_speech import HYBRIDS, class_name, is_speech, spelling_of
from anyckpt.errors import UsageError
from anyckpt.models.families import by_name, each_family
from anyckpt.models.language.family import Family
from anyckpt.operations.steps.pipeline import Stepped

_SECTION, _SECOND = "aux_ctc", "ctc_decoder."
_TRANSDUCER = ("decoder.", "joint.")
_OF_TRANSDUCER = ("decoder", "joint", "loss", "decoding", "model_defaults", _SECTION)


def is_hybrid(config: Mapping[str, Any]) -> bool:
    """Whether a configuration is of a model with two heads."""
    return class_name(config) in HYBRIDS


def heads(config: Mapping[str, Any]) -> list[str]:
    """Names of families that a hybrid is a model of, with one of its heads."""
    return [family.name for family in each_family() if _of(config, family) is not None]


def one_head(checkpoint: Checkpoint, family: str) -> Stepped:
    """A hybrid with the head of a family alone.

    Args:
        checkpoint: of a hybrid.
        family: its name.

    Raises:
        UsageError: there is no such family, or the model has no head of it.
    """
    known = by_name(family)
    config = _of(checkpoint.config, known)
    if config is None:
        raise UsageError(
            f"has no head of family {family}",
            path=checkpoint.path,
            expected=" or ".join(heads(checkpoint.config)) or f"a model of {', '.join(HYBRIDS.values())} besides",
            found=class_name(checkpoint.config),
        )
    second = config["target"].endswith("EncDecCTCModelBPE")
    prefix = checkpoint.model_prefix
    gone = tuple(prefix + word for word in (_TRANSDUCER if second else (_SECOND,)))
    tensors = {
        prefix + "decoder." + name[len(prefix + _SECOND) :]
        if second and name.startswith(prefix + _SECOND)
        else name: tensor
        for name, tensor in checkpoint.tensors.items()
        if not name.startswith(gone)
    }
    left = dict.fromkeys(
        (name for name in checkpoint.tensors if name.startswith(gone)), "the head that is not asked for"
    )
    alone = replace(checkpoint, tensors=tensors, config=config, config_kind="nemo1", dialect="nemo-flat")
    return Stepped(alone, left)


def _of(config: Mapping[str, Any], family: Family) -> dict[str, Any] | None:
    """The configuration of a hybrid with the head of a family alone; None if it has none."""
    known, second = family.nemo_speech, config.get(_SECTION)
    if known is None or not isinstance(second, Mapping):
        return None
    if known.target.endswith(".EncDecCTCModelBPE"):
        made = {key: value for key, value in config.items() if key not in _OF_TRANSDUCER}
        made |= {key: second[key] for key in ("decoder", "decoding") if key in second}
    elif known.target.rpartition(".")[2] == HYBRIDS.get(class_name(config)):
        made = {key: value for key, value in config.items() if key != _SECTION}
    else:
        return None
    made["target"] = known.target
    return made if is_speech(made) and spelling_of(family, made) is not None else None
