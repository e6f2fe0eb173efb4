"""The parallel layout that a user asks for."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal

from anyckpt.checkpoint import Checkpoint
from anyckpt.data_classes import dataclass
from anyckpt.errors import UsageError
from anyckpt.layout import Parallelism, parse_layout
from anyckpt.layout.division import Padding
from anyckpt.operations.steps.naming import Vocabulary

NewRows = Literal["mean", "zeros"]

_RELEASE = re.compile(r"v?(\d{1,4})\.(\d{1,4})(?:[.\w+-]{0,40})?", re.ASCII)


@dataclass(frozen=True)
class LayoutRequest:
    """The layout that a user asks for; None is not said.

    Attributes:
        tensor_parallel: ``--tp``.
        pipeline_parallel: ``--pp``.
        virtual_pipeline: ``--vpp``, chunks per stage.
        expert_parallel: ``--ep``.
        expert_tensor_parallel: ``--etp``.
        first_stage_layers: ``--first-stage-layers``.
        last_stage_layers: ``--last-stage-layers``.
        account_for_embedding: ``--account-for-embedding``: the embedding takes a layer's place.
        account_for_loss: ``--account-for-loss``: the output layer takes a layer's place.
        pipeline_layout: ``--pipeline-layout``, as Megatron's ``--pipeline-model-parallel-layout``.
        vocab_size: ``--vocab-size``, without padding rows.
        make_vocab_size_divisible_by: rows are padded to a multiple of this times the tensor-parallel size.
        padding: what fills new padding rows.
        new_rows: ``--new-rows``: ``mean`` or ``zeros``, what fills the rows of tokens that the model has not yet; None
            where ``vocab_size`` is that of the model.
        rules: pattern -> partition kind, for names that the built-in table does not have.
        transformer_impl: ``--transformer-impl``: ``local`` or ``transformer_engine``, what the model that will load
            the output is built of.
        keep_extra_state: ``--keep-extra-state``: carry modules' own states.
        megatron_args: ``--no-megatron-args`` is False: ``megatron-core`` without what Megatron-LM reads besides the
            model.
        megatron_version: ``--megatron-version``: the release of Megatron-Core that will load the output, such as
            ``0.19``.
        megatron_model: ``--megatron-model``: ``gpt`` or ``hybrid``, which of Megatron-Core's models a decoder is
            written as.
    """

    tensor_parallel: int | None = None
    pipeline_parallel: int | None = None
    virtual_pipeline: int | None = None
    expert_parallel: int | None = None
    expert_tensor_parallel: int | None = None
    first_stage_layers: int | None = None
    last_stage_layers: int | None = None
    account_for_embedding: bool = False
    account_for_loss: bool = False
    pipeline_layout: str | None = None
    vocab_size: int | None = None
    make_vocab_size_divisible_by: int | None = None
    padding: Padding = "zeros"
    new_rows: NewRows | None = None
    rules: Mapping[str, str] | None = None
    transformer_impl: str | None = None
    keep_extra_state: bool = False
    megatron_args: bool = True
    megatron_version: str | None = None
    megatron_model: str | None = None

    def __post_init__(self) -> None:
        if self.new_rows not in (None, "mean", "zeros"):
            raise UsageError("no such rows for new tokens", expected="mean or zeros", found=self.new_rows)
        if self.new_rows is not None and self.vocab_size is None:
            raise UsageError("--new-rows needs to know how many tokens there are to be", remedy="say --vocab-size")
        if self.megatron_model not in (None, "gpt", "hybrid"):
            raise UsageError("no such model of Megatron-Core", expected="gpt or hybrid", found=self.megatron_model)
        _ = self.release

    @property
    def release(self) -> tuple[int, int] | None:
        """The release of Megatron-Core that is said, without what only mends it.

        Raises:
            UsageError: it is not one.
        """
        if self.megatron_version is None:
            return None
        found = _RELEASE.fullmatch(self.megatron_version)
        if found is None:
            raise UsageError(
                "--megatron-version is not a release of Megatron-Core",
                expected="such as 0.16 or 0.19.2",
                found=self.megatron_version[:40],
            )
        return int(found[1]), int(found[2])

    @property
    def vocabulary(self) -> Vocabulary:
        """What is said of the vocabulary."""
        return Vocabulary(self.vocab_size, self.make_vocab_size_divisible_by, self.padding)

    @property
    def asks_for_ranks(self) -> bool:
        """Whether any parallel size is said."""
        sizes = (
            self.tensor_parallel,
            self.pipeline_parallel,
            self.virtual_pipeline,
            self.expert_parallel,
            self.expert_tensor_parallel,
            self.first_stage_layers,
            self.last_stage_layers,
            self.pipeline_layout,
        )
        return any(size is not None for size in sizes) or self.account_for_embedding or self.account_for_loss

    def over(self, present: Parallelism) -> Parallelism:
        """The layout asked for, with what is not said taken from ``present``."""
        stages_change = any(
            value is not None
            for value in (
                self.pipeline_parallel,
                self.virtual_pipeline,
                self.first_stage_layers,
                self.last_stage_layers,
                self.pipeline_layout,
                self.account_for_embedding or None,
                self.account_for_loss or None,
            )
        )
        changed: dict[str, Any] = {}
        if stages_change:
            changed = {
                "num_layers_in_first_pipeline_stage": self.first_stage_layers,
                "num_layers_in_last_pipeline_stage": self.last_stage_layers,
                "account_for_embedding": self.account_for_embedding,
                "account_for_loss": self.account_for_loss,
                "pipeline_layout": self.pipeline_layout,
                "virtual_pipeline": self.virtual_pipeline or 1,
            }
        if self.pipeline_layout is not None:
            stages = present.pipeline_parallel if self.pipeline_parallel is None else self.pipeline_parallel
            changed["virtual_pipeline"] = self._chunks(self.pipeline_layout, stages)
        sizes = {
            "tensor_parallel": self.tensor_parallel,
            "pipeline_parallel": self.pipeline_parallel,
            "expert_parallel": self.expert_parallel,
            "expert_tensor_parallel": self.expert_tensor_parallel,
        }
        changed.update({name: size for name, size in sizes.items() if size is not None})
        if present.expert_tensor_parallel == present.tensor_parallel:
            changed.setdefault("expert_tensor_parallel", None)
        return replace(present, **changed)

    def _chunks(self, layout: str, stages: int) -> int:
        """Chunks of a stage in a pipeline layout: as many as fit, which is how Megatron-LM counts them.

        Raises:
            UsageError: other options say otherwise.
        """
        numbers = (self.first_stage_layers, self.last_stage_layers)
        if any(number is not None for number in numbers) or self.account_for_embedding or self.account_for_loss:
            raise UsageError(
                "--pipeline-layout says what each stage has, and other options say so of the first or last one",
                found=layout,
                remedy="give one of the two",
            )
        parts = len(parse_layout(layout))
        chunks = self.virtual_pipeline or max(1, parts // max(1, stages))
        if parts != stages * chunks or (stages == 1 and chunks > 1):
            virtual = f" --vpp {self.virtual_pipeline}" if self.virtual_pipeline is not None else ""
            raise UsageError(
                "--pipeline-layout and --pp do not fit one another",
                expected=f"--pp {parts}, or a part of it",
                found=f"{parts} stages in {layout!r}, and --pp {stages}{virtual}",
                remedy="give as many stages as --pp, or for virtual stages a multiple of it",
            )
        return chunks

    def described(self, checkpoint: Checkpoint) -> Checkpoint:
        """The checkpoint with the vocabulary that the user says in its configuration, where that is of ranks."""
        if (
            checkpoint.config_kind in (None, "hf") or self.new_rows is not None
        ):  # None: none, or the hyper-parameters of training code
            return checkpoint
        said = {"vocab_size": self.vocab_size, "make_vocab_size_divisible_by": self.make_vocab_size_divisible_by}
        config = {**checkpoint.config, **{name: value for name, value in said.items() if value is not None}}
        return replace(checkpoint, config=config)

    def built(self, checkpoint: Checkpoint) -> Checkpoint:
        """The checkpoint whose arguments say what the user says of the layers."""
        if self.transformer_impl is None:
            return checkpoint
        return replace(checkpoint, config={**checkpoint.config, "transformer_impl": self.transformer_impl})
