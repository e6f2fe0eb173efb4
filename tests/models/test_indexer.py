"""Sparse attention's indexer (DeepSeek-V3.2, GLM-5): its names, who has it whole, and what is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tests.models.cases import facts
from tests.models.proofs import samples, values
from tests.support import write_plan

import anyckpt
from anyckpt import models
from anyckpt.errors import MappingError
from anyckpt.formats.format import WriteOptions
from anyckpt.formats.hf import FORMAT
from anyckpt.formats.registry import read
from anyckpt.operations.steps.layout_request import LayoutRequest

NAMES = ("deepseek-v3.2", "glm-5")
INDEXER = {
    "linear_wq_b.weight": "wq_b.weight", "linear_wk.weight": "wk.weight", "k_norm.weight": "k_norm.weight",
    "k_norm.bias": "k_norm.bias", "linear_weights_proj.weight": "weights_proj.weight",
}  # fmt: skip
"""Megatron-Core's names, as Megatron-Bridge 0.6.2 maps them, and Hugging Face's."""


@pytest.mark.parametrize("name", NAMES)
def test_every_rank_has_the_indexer_whole(name: str, tmp_path: Path) -> None:
    checkpoint, _ = samples()[name].open()
    assert FORMAT.plan is not None
    path = write_plan(FORMAT.plan(checkpoint, WriteOptions()), tmp_path / "hf")
    anyckpt.convert(path, tmp_path / "there", to="megatron-lm", layout=LayoutRequest(tensor_parallel=2))
    shards = read(str(tmp_path / "there")).ranks
    assert len(shards) == 2
    for shard in shards:
        found = {key: shard.tensors[f"decoder.layers.1.self_attention.core_attention.indexer.{key}"] for key in INDEXER}
        own = {key: checkpoint.tensors[f"model.layers.1.self_attn.indexer.{name}"] for key, name in INDEXER.items()}
        assert facts(found) == facts(own)


@pytest.mark.parametrize("name", NAMES)
def test_a_layer_of_further_tokens_has_one_too(name: str) -> None:
    checkpoint, _ = samples()[name].open()
    last = "model.layers.3."
    more = {
        key.replace(last, "model.layers.4."): tensor
        for key, tensor in checkpoint.tensors.items()
        if key.startswith(last)
    }
    more |= {f"model.layers.4.{key}.weight": values(key, (32,)) for key in ("enorm", "hnorm", "shared_head.norm")}
    more["model.layers.4.eh_proj.weight"] = values("eh_proj", (32, 64))
    source = replace(
        checkpoint,
        tensors={**checkpoint.tensors, **more},
        config={**checkpoint.config, "num_nextn_predict_layers": 1},
    )
    model = models.identify(source)
    assert model is not None
    hub = models.to_hub(source, model)
    assert "mtp.layers.0.transformer_layer.self_attention.core_attention.indexer.linear_wk.weight" in hub.tensors
    assert facts(models.from_hub(hub, "hf").tensors) == facts(source.tensors)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("glm-5", {"indexer_types": ["full", "shared", "full", "shared"]}),
        ("glm-5", {"index_topk_freq": 2}),
        ("glm-5", {"index_topk_pattern": "FSFS"}),
        ("glm-5", {"indexer_rope_interleave": False}),
        ("deepseek-v3.2", {"layer_types": ["full_attention"] * 4}),
        ("deepseek-v3.2", {"mlp_layer_types": ["sparse"] * 4}),
        ("deepseek-v3.2", {"index_topk": 0}),
    ],
)
def test_other_layers_are_refused(name: str, change: dict[str, Any]) -> None:
    checkpoint, _ = samples()[name].open()
    with pytest.raises(MappingError, match=next(iter(change)).replace("index_topk", "index_topk|dsa_indexer_topk")):
        models.identify(replace(checkpoint, config={**checkpoint.config, **change}))


def test_what_older_releases_compute_otherwise_is_said() -> None:
    model = samples()["glm-5"].open()[1]
    notes: list[str] = []
    arguments = models.render_config(model, "megatron-args", notes=notes)
    assert arguments["dsa_indexer_rope_interleaved"] is True
    assert any("dsa_indexer_rope_interleaved" in note for note in notes)
