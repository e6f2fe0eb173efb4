"""The names that weights are to get, and what a user says of the model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import field, replace
from typing import Any

from anyckpt import models, quantization
from anyckpt.checkpoint import Checkpoint
from anyckpt.config.nemo_speech import CLASSES, class_name
from anyckpt.data_classes import dataclass
from anyckpt.errors import UsageError, about
from anyckpt.formats.format import Format, WriteOptions
from anyckpt.models import Hub, Model
from anyckpt.operations.steps.one_head import heads


def identify(checkpoint: Checkpoint, *, family: str | None = None, config: Any = None) -> Model | None:
    """What ``models.identify`` finds, with the file in errors about a configuration.

    Raises:
        MappingError: the configuration contradicts itself, the tensors, or what the family can be, or the weights
            are quantized.
        UsageError: the family is unknown, or the configuration is of no known kind.
    """
    if checkpoint.quantization is not None:
        raise quantization.refusal(checkpoint.quantization, checkpoint.path)
    with about(checkpoint.path if config is None else "--config"):
        return models.identify(checkpoint, family=family, config=config)


@dataclass(frozen=True)
class Vocabulary:
    """What a user says of a model's vocabulary; None is not said.

    Attributes:
        size: the true one; rows beyond it are padding.
        divisible_by: rows are padded to a multiple of this.
        padding: what fills new rows, ``zeros`` or ``repeat-last-row``.
    """

    size: int | None = None
    divisible_by: int | None = None
    padding: str = "zeros"

    def of(self, hub: Hub) -> Hub:
        """The hub with a model that this is said of."""
        config = hub.model.config
        if self.size is not None:
            config = replace(config, vocab_size=self.size)
        if self.divisible_by is not None:
            config = replace(config, make_vocab_size_divisible_by=self.divisible_by, padded_vocab_size=None)
        return replace(hub, model=replace(hub.model, config=config))


@dataclass(frozen=True)
class Naming:
    """The names that weights are to get, and what the user says of the model.

    Attributes:
        target: the format to write.
        options: what the user asked of it.
        family: the model family, where the checkpoint does not tell.
        config: the model's configuration, where the checkpoint has none.
        dtype: what the weights will be cast to, for the configuration to say so, or None.
        names: dialect that the user asks for, where the target takes any names.
        vocabulary: what the user says of it.
        experts: the form that experts get under Hugging Face's names, ``each`` or ``stacked``; None for the usual one.
    """

    target: Format
    options: WriteOptions = field(default_factory=WriteOptions)
    family: str | None = None
    config: dict[str, Any] | None = None
    dtype: str | None = None
    names: str | None = None
    vocabulary: Vocabulary = field(default_factory=Vocabulary)
    experts: str | None = None

    @property
    def dialect(self) -> str | None:
        """The naming that is written, None for whatever there is.

        Raises:
            UsageError: the target has names of its own.
        """
        own = self.target.dialect(self.options)
        if self.names is not None and own not in (None, self.names):
            raise UsageError(
                f"{self.target.name} has names of its own",
                expected=f"{own} names",
                found=self.names,
                remedy="leave --names out",
            )
        return own if self.names is None else self.names

    @property
    def trims(self) -> bool:
        """Whether the vocabulary gets the size that the user says, as Hugging Face's names and chosen ones have it."""
        return self.vocabulary.size is not None and (self.dialect in (None, "hf") or self.names is not None)

    def described(self, checkpoint: Checkpoint) -> Checkpoint:
        """The checkpoint with the configuration that holds for it.

        Raises:
            UsageError: there is none that a framework can load.
        """
        if self.config is not None:
            return replace(checkpoint, config=self.config, config_kind=models.config_kind(self.config))
        if self.target.config_kind is not None and not self.target.unknown_names:
            _check_described(checkpoint, self.target)
        return checkpoint


def _check_described(checkpoint: Checkpoint, target: Format) -> None:
    """Raise UsageError for what no framework can load: a model with its training code's hyper-parameters alone."""
    name = class_name(checkpoint.config)
    if name and checkpoint.config_kind is None:
        raise UsageError(
            f"is of NeMo's {name[:80]}, of which no family is known: {target.name} has no class for it, or none "
            "that is known",
            path=checkpoint.path,
            expected=f"one of {', '.join(sorted(CLASSES))}, or a Megatron model",
            remedy=_one_of(checkpoint.config) + "convert to safetensors, torch or dcp, which keep names, or to nemo",
        )
    if checkpoint.config and checkpoint.config_kind is None:
        raise UsageError(
            "has hyper-parameters of the code that trained it, and no configuration of the model",
            path=checkpoint.path,
            expected=f"one that {target.name} or another known format has",
            found=", ".join(map(str, list(checkpoint.config)[:5])),
            remedy="give the model's own with --config, or convert to safetensors, torch or dcp, which need none",
        )


def _one_of(config: Mapping[str, Any]) -> str:
    """What to do with a model of two heads, of which a family has one."""
    choices = heads(config)
    return f"take one of its heads with --family {' or --family '.join(choices)}, or " if choices else ""
