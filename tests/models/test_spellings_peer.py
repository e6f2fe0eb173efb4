"""Every spelling on disk that transformers converts when it loads a model of a family is read here as the same tensors.

Its own table of conversions says which there are, so that a release that knows another one fails here.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.peer

from tests.models.cases import facts, with_weights  # noqa: E402
from tests.models.proofs import PROOFS, Fixture, Sample  # noqa: E402
from tests.support import fixture_path  # noqa: E402
from transformers.conversion_mapping import (  # noqa: E402
    _MODEL_TO_CONVERSION_PATTERN,
    _build_checkpoint_conversion_mapping,
)
from transformers.core_model_loading import PrefixChange, WeightConverter, WeightRenaming  # noqa: E402

from anyckpt import models  # noqa: E402
from anyckpt.checkpoint import Checkpoint  # noqa: E402
from anyckpt.formats.hf import FORMAT  # noqa: E402
from anyckpt.formats.registry import look_at  # noqa: E402
from anyckpt.models import Model  # noqa: E402

_TABLE: Mapping[str, list[Any]] = _build_checkpoint_conversion_mapping()


def conversions(checkpoint: Checkpoint) -> list[Any]:
    """What transformers does to stored names of a model, by its type and by its class."""
    keys = (checkpoint.config["model_type"], checkpoint.config["architectures"][0])
    found = (_TABLE.get(key) or _TABLE.get(_MODEL_TO_CONVERSION_PATTERN.get(key, "")) or [] for key in keys)
    return [conversion for each in found for conversion in each]


@cache
def opened(name: str) -> tuple[Checkpoint, Model]:
    return _SAMPLES[name].open()


_SAMPLES: dict[str, Sample] = {sample.name: sample for proof in PROOFS.values() for sample in proof.samples}
CONVERTED = [name for name in _SAMPLES if conversions(opened(name)[0])]


def hub_of(source: Checkpoint) -> dict[str, Any]:
    model = models.identify(source)
    assert model is not None
    return facts(models.to_hub(source, model).tensors)


def stored(name: str, folder: Path) -> tuple[Checkpoint, Checkpoint]:
    """A model as transformers publishes it, and as it has it in memory."""
    source = opened(name)[0]
    kind = getattr(transformers, source.config["architectures"][0])
    if isinstance(_SAMPLES[name], Fixture):
        theirs = kind.from_pretrained(fixture_path(f"families/{name}") / "hf")
    else:
        values = {key: value for key, value in source.config.items() if key not in ("model_type", "architectures")}
        torch.manual_seed(0)
        theirs = kind._from_config(transformers.AutoConfig.for_model(source.config["model_type"], **values))
    theirs.save_pretrained(folder / "stored")
    theirs.save_pretrained(folder / "memory", save_original_format=False)
    published, in_memory = (FORMAT.read(look_at(folder / form)) for form in ("stored", "memory"))
    return published, in_memory


def test_transformers_converts_models_of_ours() -> None:
    assert len({opened(name)[1].family for name in CONVERTED}) >= 20


@pytest.mark.parametrize("name", CONVERTED)
def test_every_spelling_is_read(name: str, tmp_path: Path) -> None:
    published, in_memory = stored(name, tmp_path)
    expected = hub_of(published)
    assert hub_of(in_memory) == expected
    others = [one for one in conversions(published) if not isinstance(one, PrefixChange)]
    assert all(isinstance(one, (WeightConverter, WeightRenaming)) for one in others)
    for conversion in conversions(published):
        if isinstance(conversion, PrefixChange):
            (pattern,), (target,) = conversion.source_patterns, conversion.target_patterns
            before, after = (re.sub(r"[\\^]|\(\.\+\)|1$", "", text) for text in (pattern, target))
            spelled = {re.sub(f"^{re.escape(after)}", before, key): t for key, t in in_memory.tensors.items()}
            assert spelled.keys() != in_memory.tensors.keys()
            assert hub_of(with_weights(in_memory, spelled, "hf")) == expected
