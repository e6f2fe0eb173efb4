"""Random configurations of every family: every spelling, there and back, with all that matters.

What matters is every field of the hub's configuration and every key of ``config.json``; ``LOST_FIELDS`` and
``LOST_KEYS`` list, by family, what a framework's configuration has no place for, and a note tells the user of each.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.models.proofs import PROOFS
from tests.models.random_configs import configs
from tests.models.test_config import IN_NO_CONFIG_OF_NEMO_2, compared, model_of

from anyckpt import models
from anyckpt.config import hugging_face as config_hf
from anyckpt.errors import MappingError
from anyckpt.models import KINDS, Model

_SEES_NOTHING = {"make_vocab_size_divisible_by", "share_embeddings_and_output_weights"}
_POSITIONS = {"max_position_embeddings"}  # of relative positions, or as many as there are patches

LOST_FIELDS: dict[str, dict[str, set[str]]] = {
    "mamba2": {"nemo1": {"share_embeddings_and_output_weights"}, "nemo2": {"share_embeddings_and_output_weights"}},
    "t5": dict.fromkeys(KINDS, _POSITIONS),
    "clip-vision": {"megatron-args": _POSITIONS, "nemo2": _SEES_NOTHING},
    "vit": {"megatron-args": _POSITIONS},
}
"""Fields that say nothing of such a model there, or that its class fixes (an output layer of its own)."""

OF_TENSORS = {
    "bert": {"vocab_size"},
    "megatron-bert": {"vocab_size"},
    "mamba2": {"vocab_size"},
    "clip-vision": {"add_post_layernorm", "output_dim"},
}
"""Fields that NeMo 2's classes do not say: ``identify`` finds them in the tensors."""

LOST_KEYS: dict[str, set[str]] = {
    "chatglm": {"apply_query_key_layer_scaling", "bias_dropout_fusion"},
    "clip-vision": {"initializer_factor", "projection_dim"},
    "gpt2": {"embd_pdrop"},
    "gpt_bigcode": {"embd_pdrop"},
    "megatron-bert": {"bos_token_id", "eos_token_id"},
    "mamba2": {"tie_word_embeddings"},
    "nemotron-h": {
        "chunk_size", "expand", "mamba_ssm_cache_dtype", "moe_shared_expert_overlap", "n_shared_experts",
        "num_logits_to_keep", "rescale_prenorm_residual", "residual_in_fp32", "time_step_floor", "time_step_limit",
        "time_step_max", "time_step_min", "use_mamba_kernels",
    },
    "phi3": {"original_max_position_embeddings"},
    "starcoder2": {"embedding_dropout"},
    "t5": {"initializer_factor", "decoder_start_token_id"},
    "vit": {"encoder_stride", "pooler_act"},
}  # fmt: skip
"""Keys that no other framework's configuration has: of training, of kernels, or fixed in the model's class there."""

REFUSED: dict[str, str] = {
    "": r"cannot express this rope scaling|scales rope by YaRN alone|has no models of family|no such position embed"
    r"|how NeMo [12] names models of family",
    "falcon": "have no parallel_residual",
    "gpt_neox": "have no parallel_residual",
    "gemma3": r"have no (attn|final)_logit_softcapping",
    "llama-nemotron": "always scales rope as Llama 3.1",
    "llama4": "weights an expert's input only where|cannot express which layers have rotary embedding",
    "parakeet-ctc": "NeMo's last label is the blank",
    "parakeet-rnnt": "NeMo's last label is the blank",
    "parakeet-tdt": "NeMo's last label is the blank",
    "nemotron-asr-streaming": "NeMo's last label is the blank",
    "nemotron3.5-asr": "NeMo's last label is the blank",
    "recurrent-gemma": "has no output layer besides its embedding",
}
"""What a framework cannot express and says so; for every family, and for some."""


@pytest.mark.parametrize("family", PROOFS)
@settings(max_examples=25, suppress_health_check=[HealthCheck.too_slow])
@given(st.data())
def test_there_and_back(family: str, data: st.DataObject) -> None:
    config = data.draw(configs(family))
    model = model_of(config)
    assert model.family == family
    first = models.render_config(model, "hf")
    for kind in KINDS:
        notes: list[str] = []
        try:
            rendered = json.loads(json.dumps(models.render_config(model, kind, notes=notes)))
        except MappingError as error:
            assert kind != "hf"
            assert re.search(f"{REFUSED['']}|{REFUSED.get(family, REFUSED[''])}", str(error)), error
            continue
        assert models.config_kind(rendered) == kind
        back = with_facts_of_tensors(model_of(rendered), model, kind)
        assert back.family == family
        lost = LOST_FIELDS.get(family, {}).get(kind, set())
        found, expected = (said(each, kind) for each in (back, model))
        changed = {name: (value, found[name]) for name, value in expected.items() if found[name] != value}
        assert changed.keys() <= lost, (kind, changed)
        final = models.render_config(back, "hf")
        gone = {key for key, value in first.items() if key not in final or alike(final[key]) != alike(value)}
        gone -= IN_NO_CONFIG_OF_NEMO_2 if kind == "nemo2" else set()
        gone = {key for key in gone - config_hf.WITHOUT_MEANING if first[key] not in (None, False, 0, [], {})}
        assert gone <= (LOST_KEYS.get(family, set()) if kind != "hf" else set()), kind
        told = [key for key in gone if key in config_hf.surplus(model.config)]
        assert all(any(key in note for note in notes) for key in told)


def with_facts_of_tensors(back: Model, model: Model, kind: str) -> Model:
    names = OF_TENSORS.get(model.family, set()) if kind == "nemo2" else set()
    return replace(back, config=replace(back.config, **{name: getattr(model.config, name) for name in names}))


def said(model: Model, kind: str) -> dict[str, Any]:
    fields = compared(model.config, kind)
    return {**fields, "rope_scaling": alike(fields["rope_scaling"])}


def alike(value: Any) -> Any:
    """YaRN with what latent attention takes where it says nothing, in transformers and in Megatron-Core."""
    if isinstance(value, Mapping) and value.get("rope_type") == "yarn":
        return {"mscale": 1.0, "mscale_all_dim": 0.0, **value}
    return value


def test_families_are_told_apart_and_tried() -> None:
    """The lists are of families that there are."""
    for table in (LOST_FIELDS, LOST_KEYS, OF_TENSORS):
        assert table.keys() <= PROOFS.keys()
    assert REFUSED.keys() - {""} <= PROOFS.keys()
