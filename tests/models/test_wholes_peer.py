"""transformers' multimodal classes, without memory for their weights: names are taken apart and put together again."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.peer

from tests.models.cases import with_weights  # noqa: E402
from tests.models.larger_models import NAMED  # noqa: E402

from anyckpt import models  # noqa: E402
from anyckpt.checkpoint import Checkpoint  # noqa: E402
from anyckpt.dtypes import BY_NAME  # noqa: E402
from anyckpt.tensor import Constant  # noqa: E402


@pytest.mark.parametrize("model_type", NAMED)
def test_names_come_back(model_type: str) -> None:
    config = transformers.AutoConfig.for_model(model_type)
    text = config.get_text_config()
    text.num_hidden_layers = 2
    for key in ("layer_types", "mlp_layer_types"):
        if getattr(text, key, None):
            setattr(text, key, getattr(text, key)[:2])
    kind = getattr(transformers, NAMED[model_type])
    with torch.device("meta"):
        whole = kind._from_config(config)
    shapes = {name: tuple(tensor.shape) for name, tensor in whole.state_dict().items()}
    if getattr(config, "tie_word_embeddings", False):
        shapes.pop("lm_head.weight", None)
    source = Checkpoint(
        model_type,
        "hf",
        {name: Constant(BY_NAME["float32"], shape) for name, shape in shapes.items()},
        dialect="hf",
        config={**json.loads(config.to_json_string(use_diff=False)), "architectures": [kind.__name__]},
        config_kind="hf",
    )
    model = models.identify(source)
    assert model is not None
    named = models.from_hub(models.to_hub(source, model), "megatron-core", in_place=True).tensors
    assert sum(tensor.size for tensor in named.values()) == sum(tensor.size for tensor in source.tensors.values())
    arguments = json.loads(json.dumps(models.render_config(model, "megatron-args")))
    there = replace(with_weights(source, named, "megatron-core"), config=arguments, config_kind="megatron-args")
    again = models.identify(there)
    assert again is not None
    assert again.family == model.family
    back = models.from_hub(models.to_hub(there, again), "hf", in_place=True).tensors
    assert {name: tensor.shape for name, tensor in back.items()} == shapes
