"""Other models opened for what is to be put into one, and brought under the names that its module has."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import field, replace

from anyckpt.checkpoint import Checkpoint
from anyckpt.data_classes import dataclass
from anyckpt.errors import UsageError
from anyckpt.formats import registry
from anyckpt.operations.convert import prepared
from anyckpt.operations.options import ConvertOptions
from anyckpt.operations.steps.joining import join_ranks
from anyckpt.operations.steps.model_module import LLM, PERCEPTION, is_speech, modules_of, names_inside
from anyckpt.operations.steps.naming import identify
from anyckpt.operations.steps.pipeline import Pipeline, Stepped
from anyckpt.operations.steps.put_module import put_in
from anyckpt.operations.steps.put_request import Put
from anyckpt.tensor import LazyTensor

_ANEW = (
    "of a speech model for transformers all files but the tokenizer are made from NeMo's names and configuration, "
    "under which --put does its work"
)


@dataclass(frozen=True)
class WithModulesPut(Stepped):
    """The model with what was put in, and that by the name of its module."""

    placed: Mapping[str, tuple[LazyTensor, ...]] = field(kw_only=True)

    def check_taken(self, whole: Checkpoint, left: Collection[str]) -> None:
        """Raise UsageError if nothing of a module that was put in is taken.

        Args:
            whole: the model, or what was taken of it.
            left: names in it that are left out.
        """
        taken = {id(tensor) for name, tensor in whole.tensors.items() if name not in left}
        for module, tensors in self.placed.items():
            if tensors and not any(id(tensor) in taken for tensor in tensors):
                raise UsageError(
                    f"--put {module} is for what is not taken",
                    path=self.checkpoint.path,
                    remedy="leave it out, or ask for another part of the model",
                )


def with_modules_put(opened: Checkpoint, puts: Iterable[Put], options: ConvertOptions) -> WithModulesPut:
    """A model with modules of others in the place of its own.

    A speech model of transformers is seen under NeMo's names, of which the modules are.

    Args:
        opened: the model, as it is stored.
        puts: what is put where.
        options: what else is asked for; the layout's rules, the family and the configuration are the model's.

    Raises:
        FormatError: one of the others is damaged.
        MappingError: names or shapes do not fit, or another is incomplete.
        UsageError: the model has no such module.
    """
    steps = Pipeline()
    model = join_ranks(opened, rules=options.request.rules, family=options.family)
    if _hears(model):
        model = replace(_under(model, "nemo", steps, options.force), details=model.details)
        steps.notes.append(_ANEW)
    placed = {}
    for put in sorted(puts, key=lambda put: put.module.rpartition(".")[2] != "preprocessor"):
        before = model.weights()
        model = steps.take(put_in(model, put.module, _other(put, model, steps, options.force)))
        after = model.weights()
        inside = names_inside(model, put.module)
        placed[put.module] = tuple(after[name] for name in inside if after[name] is not before[name])
    return WithModulesPut(model, steps.ignored, tuple(steps.notes), steps.casts, placed=placed)


def _other(put: Put, model: Checkpoint, steps: Pipeline, force: bool) -> Checkpoint:
    other = registry.read(put.path, force=force)
    if other.adapter is not None:
        raise UsageError(
            "is an adapter, and no model", path=other.path, remedy="add it with anyckpt merge-lora, and put in the sum"
        )
    speech = is_speech(_names(other))
    if put.module == LLM and is_speech(model.weights()):
        return _under(other, "hf", steps, force, LLM if speech else None)
    other = join_ranks(other)
    if speech and put.module.partition(".")[0] not in modules_of(other.weights()):
        return _under(other, "safetensors", steps, force, PERCEPTION)
    return _under(other, "nemo", steps, force) if _hears(other) else other


def _names(checkpoint: Checkpoint) -> list[str]:
    return [*checkpoint.weights(), *(name for shard in checkpoint.ranks for name in shard.tensors)]


def _hears(checkpoint: Checkpoint) -> bool:
    """Whether it is a speech model of transformers, whose modules NeMo has under names of its own."""
    if checkpoint.config_kind != "hf" or checkpoint.quantization is not None:
        return False
    model = identify(checkpoint)
    return model is not None and model.definition.nemo_speech is not None


def _under(checkpoint: Checkpoint, target: str, steps: Pipeline, force: bool, module: str | None = None) -> Checkpoint:
    """The model, or a module of it, as another format has it, with what was noted on the way."""
    made = prepared(checkpoint, ConvertOptions(to=target, module=module, force=force))
    if module is None:  # else they tell of what takes the module out
        steps.notes += [f"{checkpoint.path}: {note}" for note in made.steps.notes]
    return made.ready
