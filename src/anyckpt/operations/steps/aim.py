"""What is to be written: the format, what its writer is told, and for which ranks its files are cut."""

from __future__ import annotations

from dataclasses import replace

from anyckpt.checkpoint import Checkpoint, ParallelLayout
from anyckpt.data_classes import dataclass
from anyckpt.engine.plan import Plan
from anyckpt.errors import UsageError
from anyckpt.formats.format import Format, WriteOptions
from anyckpt.layout import Parallelism
from anyckpt.operations.steps.joining import parallelism_of
from anyckpt.operations.steps.layout_request import LayoutRequest

_SIZES = {
    "tensor_parallel": ("tensor-parallel", "--tp"),
    "pipeline_parallel": ("pipeline-parallel", "--pp"),
    "virtual_pipeline": ("virtual-pipeline", "--vpp"),
    "expert_parallel": ("expert-parallel", "--ep"),
}
"""Fields of ``ParallelLayout`` in words, and the option of each."""

_ONE_MODEL = (
    "leave it out: nothing but Megatron-Core since 0.18 has a HybridModel of attention and MLPs, and others get the "
    "blocks that it is made of"
)
_ANY_SIZE = "its distributed checkpoints load at any parallel size: the layout asked for needs nothing done"


@dataclass(frozen=True)
class Aim:
    """What is to be written.

    Attributes:
        target: the format.
        options: what its writer is told.
        cut: for which ranks the files are cut, None where tensors are whole.
        notes: what a user should know of it.
    """

    target: Format
    options: WriteOptions
    cut: Parallelism | None
    notes: tuple[str, ...]

    def plan(self, ready: Checkpoint) -> Plan:
        """The files of a checkpoint that is named and cut for the target."""
        assert self.target.plan is not None  # ConvertOptions has looked
        return self.target.plan(ready, self.options)


def aim_at(stored: Checkpoint, target: Format, options: WriteOptions, request: LayoutRequest, keep: bool) -> Aim:
    """What is to be written of a checkpoint.

    Args:
        stored: the source, as it is stored.
        target: the format to write.
        options: what the user asks of the writer.
        request: the layout that the user asks for.
        keep: whether what it does not say is as the source's files have it.

    Raises:
        UsageError: a layout, kind of layers or state is asked for that the target's files cannot have.
    """
    spread = replace(options, sharded=True)
    if keep and stored.dialect == target.dialect(spread) != target.dialect(options):
        options = spread
    present = present_layout(stored) if keep else Parallelism()
    cut_for, notes = wanted_layout(request, present, target, options)
    if cut_for is not None or target.divides:
        options = replace(options, layout=sizes_of(request.over(present) if cut_for is None else cut_for))
    return Aim(target, options, cut_for, notes)


def wanted_layout(
    request: LayoutRequest, present: Parallelism, target: Format, options: WriteOptions
) -> tuple[Parallelism | None, tuple[str, ...]]:
    """For which ranks the target's files are cut, None if it keeps whole tensors, and what the user should know.

    Args:
        request: what the user says.
        present: what holds where the user says nothing.
        target: the format to write.
        options: of the writer, without ``layout``.

    Raises:
        UsageError: a layout, kind of layers or state is asked for that the target's files cannot have.
    """
    if target.config_kind != "megatron-args":
        for option, said in (
            ("--transformer-impl", request.transformer_impl is not None),
            ("--keep-extra-state", request.keep_extra_state),
            ("--megatron-model", request.megatron_model is not None),
        ):
            if said:
                raise UsageError(
                    f"{option} means nothing for {target.name}",
                    expected="one of Megatron's own formats, such as megatron-core or megatron-lm",
                    remedy="leave it out" if option != "--megatron-model" else _ONE_MODEL,
                )
    if not request.megatron_args and not target.leaves_out_arguments:
        raise UsageError(
            f"--no-megatron-args means nothing for {target.name}",
            expected="a distributed checkpoint of Megatron-Core",
            remedy="leave it out",
        )
    if request.megatron_version is not None and not target.by_release:
        raise UsageError(
            f"--megatron-version means nothing for {target.name}",
            expected="a format that differs between releases of Megatron-Core: megatron-core or megatron-bridge",
            remedy="leave it out",
        )
    parallelism = request.over(present)
    parallelism.check()
    layout = sizes_of(parallelism)
    if target.dialect(options) == "hub" or (
        layout != ParallelLayout() and target.dialect(replace(options, layout=layout)) == "hub"
    ):
        return parallelism, ()
    if not request.asks_for_ranks or layout == ParallelLayout():
        return None, ()
    divided = ParallelLayout(**{name: getattr(layout, name) for name in target.divides})
    if target.divides and layout == divided:
        return None, ()
    if target.config_kind in (None, "hf") or target.divides:
        kinds = " and a ".join(_SIZES[name][0] for name in target.divides)
        raise UsageError(
            f"{target.name} has no parallel layout but a {kinds} one"
            if target.divides
            else f"{target.name} keeps whole tensors and has no parallel layout",
            found=f"tensor, pipeline, virtual, expert {tuple(vars(layout).values())}",
            remedy="leave "
            + ", ".join(option for name, (_, option) in _SIZES.items() if name not in target.divides)
            + " and --etp out",
        )
    return None, (_ANY_SIZE,)


def sizes_of(parallelism: Parallelism) -> ParallelLayout:
    """The sizes alone."""
    return ParallelLayout(
        parallelism.tensor_parallel,
        parallelism.pipeline_parallel,
        parallelism.virtual_pipeline,
        parallelism.expert_parallel,
    )


def present_layout(checkpoint: Checkpoint) -> Parallelism:
    """The layout that a checkpoint's files have; whole tensors if they are not of ranks."""
    return Parallelism() if checkpoint.layout == ParallelLayout() else parallelism_of(checkpoint)
