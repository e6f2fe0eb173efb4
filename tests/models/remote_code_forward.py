"""Prints how far Megatron-Core models with our files and arguments are from what the models' own code computes.

A program of its own, as ``megatron_forward``.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tests.models.megatron_forward as forward
import torch
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.models.gpt.heterogeneous.heterogeneous_layer_specs import get_gpt_heterogeneous_layer_spec
from megatron.core.transformer.heterogeneous.heterogeneous_config import HeterogeneousTransformerConfig
from megatron.core.transformer.transformer_config import TransformerConfig
from tests.models.proofs import samples
from tests.models.remote_code_references import REFERENCES, inputs
from tests.support import write_plan
from torch.nn import functional

import anyckpt
from anyckpt import models
from anyckpt.formats.format import WriteOptions
from anyckpt.formats.hf import FORMAT
from anyckpt.tensor import from_array


def built(arguments: Mapping[str, Any], **options: Any) -> Any:
    """As Megatron-LM builds it from its arguments, with layers of their own where these say so."""
    values = {
        **{name: arguments[name] for name in forward.SAME},
        **dict.fromkeys(forward.OFF, False),
        "layernorm_epsilon": arguments["norm_epsilon"],
        "gated_linear_unit": arguments["swiglu"],
        "activation_func": functional.silu,
        "rotary_interleaved": arguments["rotary_interleaved"],
        "use_cpu_initialization": True,
        "gradient_accumulation_fusion": False,
        **options,
    }
    encoded = arguments.get("heterogeneous_layers_config_encoded_json")
    if encoded:
        config = HeterogeneousTransformerConfig(**values, heterogeneous_layers_config_encoded_json=encoded)
        spec = get_gpt_heterogeneous_layer_spec(config, use_te=False)
    else:
        config = TransformerConfig(**values)
        spec = get_gpt_layer_local_spec(normalization=arguments["normalization"])
    return GPTModel(
        config,
        spec,
        vocab_size=arguments["padded_vocab_size"],
        max_sequence_length=arguments["max_position_embeddings"],
        parallel_output=False,
        share_embeddings_and_output_weights=not arguments["untie_embeddings_and_output_weights"],
        position_embedding_type=arguments["position_embedding_type"],
        rotary_base=arguments["rotary_base"],
        rotary_percent=arguments["rotary_percent"],
        rope_scaling=arguments["use_rope_scaling"],
        rope_scaling_factor=arguments["rope_scaling_factor"],
    ).eval()


def difference(name: str, folder: Path, head: float) -> dict[str, float]:
    """From the reference's logits: of our model, and of it with one matrix of attention rolled by a row.

    Args:
        name: of the sample.
        folder: for files.
        head: what the source's output layer is multiplied by.
    """
    checkpoint, _ = samples()[name].open()
    if head != 1:
        checkpoint.tensors["lm_head.weight"] = from_array(checkpoint.tensors["lm_head.weight"].numpy() * head)
    assert FORMAT.plan is not None
    source = write_plan(FORMAT.plan(checkpoint, WriteOptions()), folder / "hf")
    anyckpt.convert(source, folder / "core", to="megatron-core")
    identified = models.identify(anyckpt.open(folder / "core"))
    assert identified is not None
    model = built(models.render_config(identified, "megatron-args"))
    files = next((folder / "core").rglob("metadata.json")).parent
    loaded = dist_checkpointing.load(model.sharded_state_dict(), str(files))
    model.load_state_dict({key: loaded[key] for key in model.sharded_state_dict()})
    weights = {key: torch.from_numpy(tensor.numpy()) for key, tensor in checkpoint.tensors.items()}
    with torch.no_grad():
        expected = REFERENCES[name](weights, checkpoint.config, inputs()[0])
        found = model(*inputs())
        attention = next(p for key, p in model.named_parameters() if key.endswith("linear_qkv.weight"))
        attention.copy_(attention.roll(1, 0))
        changed = model(*inputs())
    scale = float(expected.abs().max())
    return {
        "ours": float((found - expected).abs().max()) / scale,
        "rolled": float((changed - expected).abs().max()) / scale,
    }


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as directory:
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"
        torch.distributed.init_process_group("gloo", init_method=f"file://{directory}/group", rank=0, world_size=1)
        parallel_state.initialize_model_parallel()
        results = {}  # the length of rows of Baichuan 2's output layer must not matter
        for sample in sys.argv[1:]:
            path = Path(directory) / sample
            path.mkdir()
            results[sample] = difference(sample, path, 3.0 if sample == "baichuan2" else 1.0)
        print(json.dumps(results))
