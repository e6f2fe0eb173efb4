"""How a Hugging Face checkpoint spells what a family's rules know, and what it holds that no rule knows."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import field, replace

from anyckpt.config.spellings import Variant
from anyckpt.config.starred import starred
from anyckpt.data_classes import dataclass
from anyckpt.models.language.variants import stored_names
from anyckpt.tensor import LazyTensor


@dataclass(frozen=True)
class Spelling:
    """What it takes to put other tensors in the place of a checkpoint's own.

    Attributes:
        part_of: type of the larger model (``llava``) whose text part the family's model is, None if it is the whole.
        parts: stored name -> tensor of that model's other parts (vision tower, projector), which no rule knows.
        buffers: stored name -> tensor that carries no weights and stays valid (rope frequencies, masks).
        variants: the family's, with those marked as written that the checkpoint has.
        stored: the stored name of a tensor from its name in the family.
        notes: of the hub, on what is left out; they hold for other namings alone.
    """

    part_of: str | None
    parts: Mapping[str, LazyTensor] = field(default_factory=dict)
    buffers: Mapping[str, LazyTensor] = field(default_factory=dict)
    variants: tuple[Variant, ...] = ()
    stored: Callable[[str], str] = str
    notes: tuple[str, ...] = ()

    def of(self, tensors: Mapping[str, LazyTensor]) -> dict[str, LazyTensor]:
        """Tensors under the family's names, as the checkpoint spells them."""
        named = stored_names(tensors, self.variants)
        return {self.stored(name): tensor for name, tensor in named.items()}

    def common_parts(self) -> dict[str, LazyTensor]:
        """The other parts under names that do not depend on the release of transformers.

        Release 5 puts ``model.`` before ``vision_tower.`` and ``multi_modal_projector.``, release 4 does not.
        """
        return {name.removeprefix("model."): tensor for name, tensor in self.parts.items()}

    def with_parts(self, common: Mapping[str, LazyTensor]) -> Spelling:
        """The same with other tensors in the place of the parts, from their common names."""
        return replace(self, parts={name: common[name.removeprefix("model.")] for name in self.parts})


def variants_of(tensors: Mapping[str, LazyTensor], variants: tuple[Variant, ...]) -> tuple[Variant, ...]:
    """A family's variants, those marked as written that tensors under unwrapped names have."""
    return tuple(replace(variant, written=any(map(starred(variant.stored).fullmatch, tensors))) for variant in variants)
