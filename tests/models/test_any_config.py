"""A ``config.json`` whose values are of any type: understood, or refused in words."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from tempfile import gettempdir
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.models import sparse_cases
from tests.models.cases import FAMILIES, open_case
from tests.support import fixture_path

import anyckpt
from anyckpt.checkpoint import Checkpoint
from anyckpt.errors import AnyckptError

KEYS = (
    "architectures", "model_type", "text_config", "quantization_config", "auto_map", "transformers_version", "dtype",
    "torch_dtype", "layer_types", "eos_token_id", "bos_token_id", "rope_scaling", "rope_parameters", "block_configs",
    "tie_word_embeddings", "num_hidden_layers", "hybrid_override_pattern", "vision_config",
)  # fmt: skip
CONFIGS = {name: open_case(name) for name in (*FAMILIES, *sparse_cases.FAMILIES)}
scalars = st.one_of(
    st.none(), st.booleans(), st.integers(-3, 3),
    st.sampled_from([1 << 70, 1e400, float("nan"), -0.5, "", "llama", "x"]),
)  # fmt: skip
values = st.recursive(
    scalars,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(st.sampled_from(["", "a", *KEYS]), inner, max_size=3)
    ),
    max_leaves=5,
)  # fmt: skip


@st.composite
def changed(draw: st.DrawFn) -> tuple[str, dict[str, Any]]:
    """A configuration of a family with some of its values, or values in these, of other types."""
    name = draw(st.sampled_from(sorted(CONFIGS)))
    config = dict(CONFIGS[name].checkpoint.config)
    for key in draw(st.lists(st.sampled_from(sorted({*config, *KEYS})), min_size=1, max_size=3)):
        inner = config.get(key)
        if isinstance(inner, dict) and inner and draw(st.booleans()):
            config[key] = {**inner, draw(st.sampled_from(sorted(inner))): draw(values)}
        else:
            config[key] = draw(values)
    return name, config


@given(changed(), st.sampled_from(["hf", "megatron-core", "nemo2", "nemo"]))
@settings(max_examples=150, suppress_health_check=[HealthCheck.too_slow])
def test_any_value_is_understood_or_refused(case: tuple[str, dict[str, Any]], to: str) -> None:
    name, config = case
    source = Checkpoint(
        str(fixture_path(f"families/{name}")), "hf", dict(CONFIGS[name].checkpoint.tensors), dialect="hf",
        config=config, config_kind="hf",
    )  # fmt: skip
    anyckpt.inspect(source).to_json()
    for told in (None, config):
        with suppress(AnyckptError):
            anyckpt.convert(source, Path(gettempdir()) / "not.written", to=to, config=told, dry_run=True)


@pytest.mark.parametrize("value", [7, "LlamaForCausalLM", {}, [None], [[]], None, True])
def test_architectures_of_any_type(value: Any, tmp_path: Path) -> None:
    case = open_case("llama")
    config = {**case.checkpoint.config, "architectures": value}
    source = Checkpoint(case.checkpoint.path, "hf", case.checkpoint.tensors, config=config, config_kind="hf")
    anyckpt.convert(source, tmp_path / "out", to="hf")
    assert anyckpt.open(tmp_path / "out").config == config
