"""BERT and Megatron-BERT: heads, old spellings, and what frameworks build besides them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from tests.models.cases import facts, with_weights
from tests.models.encoder_cases import BERT, made, reidentified, renamed

from anyckpt import models
from anyckpt.errors import MappingError
from anyckpt.formats import registry
from anyckpt.operations.steps.naming import Naming
from anyckpt.operations.steps.renaming import rename_for
from anyckpt.tensor import from_array


def test_heads_follow_from_class_and_tensors() -> None:
    """Weights of pre-training under the name of a masked language model, as the first BERT is stored."""
    checkpoint, model = made({**BERT, "architectures": ["BertForPreTraining"]})
    masked = replace(checkpoint, config={**checkpoint.config, "architectures": ["BertForMaskedLM"]})
    config = reidentified(masked, checkpoint.tensors).config
    assert (config.add_pooler, config.add_lm_head, config.bert_binary_head) == (True, True, True)
    assert models.render_config(replace(model, config=config), "hf")["architectures"] == ["BertForPreTraining"]
    bare = {name: tensor for name, tensor in checkpoint.tensors.items() if name.startswith("bert.e")}
    config = reidentified(replace(checkpoint, config=BERT), renamed(bare, lambda name: name[5:])).config
    assert (config.add_pooler, config.add_lm_head, config.bert_binary_head) == (False, False, False)


@pytest.mark.parametrize("change", ["gamma", "positions", "decoder", "wrapped"])
def test_old_spellings_of_bert(change: str) -> None:
    checkpoint, model = made({**BERT, "architectures": ["BertForPreTraining"]})
    old = dict(checkpoint.tensors)
    ignored = {}
    if change == "gamma":
        old = renamed(old, lambda name: name.replace("LayerNorm.weight", "LayerNorm.gamma"))
        old = renamed(old, lambda name: name.replace("LayerNorm.bias", "LayerNorm.beta"))
    elif change == "positions":
        old["bert.embeddings.position_ids"] = from_array(np.arange(16)[None])
        ignored = {"bert.embeddings.position_ids": "numbers of positions, which follow from the configuration"}
    elif change == "decoder":
        old["cls.predictions.decoder.weight"] = old["bert.embeddings.word_embeddings.weight"]
        old["cls.predictions.decoder.bias"] = old["cls.predictions.bias"]
        ignored = {
            "cls.predictions.decoder.weight": "tied to bert.embeddings.word_embeddings.weight",
            "cls.predictions.decoder.bias": "the same tensor as cls.predictions.bias",
        }
    else:
        old = renamed(old, lambda name: f"module.{name}")
    hub = models.to_hub(with_weights(checkpoint, old, "hf"), reidentified(checkpoint, old))
    assert facts(hub.tensors) == facts(models.to_hub(checkpoint, model).tensors)
    assert hub.ignored == ignored


def test_a_copy_alone_and_a_copy_that_differs() -> None:
    checkpoint, model = made({**BERT, "architectures": ["BertForMaskedLM"]})
    alone = renamed(checkpoint.tensors, lambda name: name.replace("predictions.bias", "predictions.decoder.bias"))
    hub = models.to_hub(with_weights(checkpoint, alone, "hf"), model)
    assert facts(hub.tensors) == facts(models.to_hub(checkpoint, model).tensors)
    other = {**checkpoint.tensors, "cls.predictions.decoder.bias": from_array(np.zeros(60, "<f4"))}
    with pytest.raises(MappingError, match="differs from cls.predictions.bias") as caught:
        models.to_hub(with_weights(checkpoint, other, "hf"), model)
    assert "cls.predictions.decoder.bias" in str(caught.value)


def test_an_untied_bert() -> None:
    config = {**BERT, "architectures": ["BertForMaskedLM"], "tie_word_embeddings": False}
    checkpoint, model = made(config)
    assert "cls.predictions.decoder.weight" in checkpoint.tensors
    assert "output_layer.weight" in models.to_hub(checkpoint, model).tensors
    assert models.render_config(model, "megatron-args")["untie_embeddings_and_output_weights"]


def test_an_output_bias_that_nothing_uses() -> None:
    """NeMo 2 builds it for an encoder alone; NVIDIA's converter to NeMo 1 takes it out."""
    checkpoint, model = made({**BERT, "architectures": ["BertModel"]})
    there = models.from_hub(models.to_hub(checkpoint, model), "nemo2").tensors
    assert not there["module.output_layer.bias"].numpy().any()
    named = models.from_hub(models.to_hub(checkpoint, model), "nemo-flat").tensors
    del named["model.output_layer.bias"]
    back = models.to_hub(with_weights(checkpoint, named), model)
    assert facts(models.from_hub(back, "hf").tensors) == facts(checkpoint.tensors)
    trained = {**there, "module.output_layer.bias": from_array(np.ones(64, "<f4"))}
    with pytest.raises(MappingError, match="is not zero"):
        models.from_hub(models.to_hub(with_weights(checkpoint, trained), model), "hf")


@pytest.mark.parametrize(
    ("key", "value"), [("is_decoder", True), ("add_cross_attention", True), ("position_embedding_type", "relative_key")]
)
def test_berts_that_are_no_encoders(key: str, value: Any) -> None:
    with pytest.raises(MappingError, match=f"{key} is not that of family bert"):
        made({**BERT, key: value})


def test_what_frameworks_build_besides_a_bert() -> None:
    def said(config: Mapping[str, Any], kind: str) -> str:
        notes: list[str] = []
        models.render_config(made(config)[1], kind, notes=notes)
        return " ".join(notes)

    whole = {**BERT, "architectures": ["BertForPreTraining"]}
    assert "norms elsewhere" in said(whole, "megatron-args")
    assert "final norm" in said(whole, "nemo1")
    assert "output_layer.bias" in said(whole, "nemo2")
    assert said({**BERT, "architectures": ["BertModel"]}, "nemo2") == ""
    assert "has no lm_head" in said({**BERT, "architectures": ["BertModel"]}, "nemo1")
    assert "bert_binary_head: set it to true" in said({**BERT, "architectures": ["BertForMaskedLM"]}, "nemo1")
    assert (
        said({**whole, "model_type": "megatron-bert", "architectures": ["MegatronBertForPreTraining"]}, "nemo1") == ""
    )


LEGACY = {
    "encoder.layers": "language_model.encoder.layers", "encoder.initial": "language_model.encoder.initial",
    "encoder.final": "language_model.encoder.final", "embedding.": "language_model.embedding.",
    "self_attention.linear_qkv.layer_norm_": "input_layernorm.",
    "mlp.linear_fc1.layer_norm_": "post_attention_layernorm.",
    "self_attention.linear_qkv": "self_attention.query_key_value", "self_attention.linear_proj": "self_attention.dense",
    "mlp.linear_fc1": "mlp.dense_h_to_4h", "mlp.linear_fc2": "mlp.dense_4h_to_h",
    "post_att_layernorm": "input_layernorm",
    "post_mlp_layernorm": "post_attention_layernorm", "pooler": "language_model.pooler",
    "output_layer.bias": "lm_head.bias", "lm_head.layer_norm": "lm_head.layernorm",
}  # fmt: skip
"""Megatron-Core's names in NVIDIA's ``convert_bert_hf_to_nemo.py`` -> those it writes without ``--mcore``."""


@pytest.mark.parametrize("prefix", ["model.", "model.module."])
@pytest.mark.parametrize("architecture", ["BertForPreTraining", "BertModel", "MegatronBertForPreTraining"])
def test_names_of_nemo_1_before_megatron_core(architecture: str, prefix: str) -> None:
    family = {"model_type": "megatron-bert"} if architecture.startswith("Megatron") else {}
    checkpoint, model = made({**BERT, **family, "architectures": [architecture]})
    named = models.from_hub(models.to_hub(checkpoint, model), "hub").tensors
    if architecture == "BertModel":
        del named["output_layer.bias"]

    def old(name: str) -> str:
        for new, before in LEGACY.items():
            name = name.replace(new, before, 1) if before not in name else name
        return prefix + name

    config = {**models.render_config(model, "nemo1"), "mcore_bert": False}
    del config["hf_model_type"], config["num_tokentypes"]
    stored = replace(
        checkpoint, format="nemo", tensors=renamed(named, old), dialect=None, config=config, config_kind="nemo1"
    )
    assert any(".input_layernorm." in name for name in stored.tensors)
    hf = rename_for(stored, Naming(registry.by_name("hf"))).checkpoint
    assert facts(hf.tensors) == facts(checkpoint.tensors)
    assert hf.config["architectures"] == [architecture]
