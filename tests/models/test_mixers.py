"""Mamba-2 mixers in distributed checkpoints: in sections, and refused where these do not fit together."""

from __future__ import annotations

import numpy as np
import pytest
from tests.models.cases import facts, open_case, with_weights

from anyckpt import models
from anyckpt.errors import MappingError
from anyckpt.models.dialects import spellings
from anyckpt.models.dialects.mamba_sections import joined_mixers, separate_mixers
from anyckpt.tensor import LazyTensor, from_array

MIXER = "decoder.layers.0.mixer"


def test_sections_are_those_of_megatron_core() -> None:
    case = open_case("nemotron_h")
    out = models.from_hub(case.hub(), "megatron-core").tensors
    shapes = {name[len(MIXER) + 1 :]: t.shape for name, t in out.items() if name.startswith(f"{MIXER}.")}
    assert {name: shape for name, shape in shapes.items() if name.count(".") == 2} == {
        "in_proj.weight.z": (64, 48), "in_proj.weight.x": (64, 48), "in_proj.weight.B": (16, 48),
        "in_proj.weight.C": (16, 48), "in_proj.weight.dt": (8, 48),
        "conv1d.weight.x": (64, 1, 4), "conv1d.weight.B": (16, 1, 4), "conv1d.weight.C": (16, 1, 4),
        "conv1d.bias.x": (64,), "conv1d.bias.B": (16,), "conv1d.bias.C": (16,),
    }  # fmt: skip
    assert "decoder.layers.3.mixer.A_log" in out, "layers are numbered"
    assert facts(models.from_hub(case.hub(), "hub").tensors) == facts(case.megatron)


def mixer(**changed: tuple[int, ...]) -> dict[str, LazyTensor]:
    shapes: dict[str, tuple[int, ...]] = {"A_log": (2,), "in_proj.weight": (18, 3), "conv1d.weight": (12, 1, 4)}
    shapes |= {name.replace("__", "."): shape for name, shape in changed.items()}
    return {
        f"{MIXER}.{name}": from_array(np.arange(np.prod(shape), dtype=np.float32).reshape(shape))
        for name, shape in shapes.items()
    }


def test_there_and_back_in_any_order() -> None:
    whole = mixer()
    apart = separate_mixers(whole)
    assert apart[f"{MIXER}.in_proj.weight.dt"].shape == (2, 3)
    assert facts(joined_mixers(dict(reversed(apart.items())))) == facts(whole)


@pytest.mark.parametrize("missing", ["in_proj.weight.z", "in_proj.weight.dt", "conv1d.weight.B"])
def test_a_missing_section_is_named(missing: str) -> None:
    apart = separate_mixers(mixer())
    del apart[f"{MIXER}.{missing}"]
    with pytest.raises(MappingError, match="a section of a mixer's projection is missing") as caught:
        joined_mixers(apart)
    assert missing in str(caught.value)


def test_sections_beside_the_whole() -> None:
    with pytest.raises(MappingError, match="two stored tensors are the same"):
        joined_mixers({**mixer(), **separate_mixers(mixer())})


@pytest.mark.parametrize(
    "changed", [{"A_log": (7,)}, {"in_proj__weight": (14, 3)}, {"conv1d__weight": (17, 1, 4)}, {"A_log": ()}]
)
def test_shapes_that_do_not_fit_together(changed: dict[str, tuple[int, ...]]) -> None:
    with pytest.raises(MappingError, match="sections of its rows do not follow"):
        separate_mixers(mixer(**changed))


def test_other_spellings() -> None:
    """Megatron-Core's main branch, older pure Mamba models and Megatron-Bridge."""
    case = open_case("nemotron_h")
    spelled = {
        name.replace("conv1d.", "conv1d_")
        .replace("mixer.in_proj.layer_norm_weight", "norm.weight")
        .replace("final_norm", "final_layernorm"): tensor
        for name, tensor in case.megatron.items()
    }
    assert "decoder.layers.0.norm.weight" in spelled
    assert spellings.detect(spelled) == "hub"
    hub = models.to_hub(with_weights(case.checkpoint, spelled), case.padded())
    assert facts(hub.tensors) == facts(case.megatron)
