"""Models that transformers has no class of, and alibi, which Megatron-Core has not: the same outputs all the same."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.peer

from tests.models.proofs import samples  # noqa: E402
from tests.models.remote_code_references import decilm, inputs  # noqa: E402
from tests.support import write_plan  # noqa: E402
from torch.nn import functional  # noqa: E402
from transformers.models.mpt.modeling_mpt import build_mpt_alibi_tensor  # noqa: E402

import anyckpt  # noqa: E402
from anyckpt import models  # noqa: E402
from anyckpt.formats.format import WriteOptions  # noqa: E402
from anyckpt.formats.hf import FORMAT  # noqa: E402
from anyckpt.formats.registry import look_at  # noqa: E402
from anyckpt.operations.steps.layout_request import LayoutRequest  # noqa: E402

LIMITS = {"llama-nemotron": 2e-5, "baichuan2": 5e-6, "chatglm": 5e-6, "internlm2": 5e-6}
"""Of the difference, as a part of the largest logit."""


def test_megatron_core_loads_our_files_and_computes_the_same() -> None:
    pytest.importorskip("megatron.core")
    root = Path(__file__).parents[2]
    command = [sys.executable, "-W", "ignore", "-m", "tests.models.remote_code_forward", *LIMITS]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=180, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.strip().splitlines()[-1])
    assert found.keys() == LIMITS.keys()
    for name, limit in LIMITS.items():
        assert found[name]["ours"] < limit, found
        assert found[name]["rolled"] > 1000 * limit, "the comparison can fail"


def test_ranks_of_layers_that_differ(tmp_path: Path) -> None:
    """Two ranks of Megatron-Core load our files strictly, and gather what replaced layers compute apart."""
    pytest.importorskip("megatron.core")
    checkpoint, _ = samples()["llama-nemotron"].open()
    assert FORMAT.plan is not None
    source = write_plan(FORMAT.plan(checkpoint, WriteOptions()), tmp_path / "hf")
    anyckpt.convert(source, tmp_path / "ranks", to="megatron-lm", layout=LayoutRequest(tensor_parallel=2))
    command = [sys.executable, "-W", "ignore", "-m", "tests.models.heterogeneous_rank"]
    root = Path(__file__).parents[2]
    with contextlib.ExitStack() as stack:
        ranks = [
            stack.enter_context(
                subprocess.Popen([*command, str(rank), "2", str(tmp_path)], cwd=root, stderr=subprocess.PIPE, text=True)
            )
            for rank in range(2)
        ]
        for rank in ranks:
            errors = rank.communicate(timeout=180)[1]
            assert rank.returncode == 0, errors[-2000:]
    weights = {name: torch.from_numpy(tensor.numpy()) for name, tensor in checkpoint.tensors.items()}
    expected = decilm(weights, checkpoint.config, inputs()[0])
    for rank in range(2):
        found = torch.from_numpy(np.load(tmp_path / f"logits_{rank}.npy"))[..., : expected.shape[-1]]
        assert (found - expected).abs().max() < LIMITS["llama-nemotron"] * expected.abs().max()


def test_mpt_with_heads_as_megatron_reads_them(tmp_path: Path) -> None:
    """Attention by Megatron's layout (a group's query, key and value rows together) and transformers' alibi."""
    torch.manual_seed(0)
    config = transformers.MptConfig(d_model=48, n_heads=6, n_layers=2, vocab_size=64, max_seq_len=32)
    theirs = transformers.MptForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.normal_(std=0.2)
    theirs.save_pretrained(tmp_path)
    tokens = torch.randint(0, 64, (2, 20))
    checkpoint = FORMAT.read(look_at(tmp_path))
    model = models.identify(checkpoint)
    assert model is not None
    hub = {name: torch.from_numpy(t.numpy()) for name, t in models.to_hub(checkpoint, model).tensors.items()}
    expected = theirs(tokens).logits.detach()
    assert torch.allclose(mpt(hub, tokens), expected, atol=1e-4 * float(expected.abs().max()))
    renamed = {
        name: checkpoint.tensors[f"transformer.blocks.{name[15]}.attn.Wqkv.weight"]
        for name in hub
        if "linear_qkv.weight" in name
    }
    mixed = {**hub, **{name: torch.from_numpy(tensor.numpy()) for name, tensor in renamed.items()}}
    difference = (mpt(mixed, tokens) - expected).abs().max()
    assert difference > 0.05 * expected.abs().max(), "what NeMo 1's converter writes mixes heads up"


def mpt(hub: dict[str, torch.Tensor], tokens: torch.Tensor) -> torch.Tensor:
    """A decoder with alibi over the hub's tensors."""
    embedding = hub["embedding.word_embeddings.weight"]
    states, (hidden, heads) = embedding[tokens], (embedding.shape[1], 6)
    length = tokens.shape[1]
    bias = build_mpt_alibi_tensor(heads, length) + torch.full((length, length), float("-inf")).triu(1)

    def norm(inputs: torch.Tensor, name: str) -> torch.Tensor:
        return functional.layer_norm(inputs, (hidden,), hub[f"{name}weight"], hub[f"{name}bias"], 1e-5)

    for layer in range(2):
        name = f"decoder.layers.{layer}"
        fused = norm(states, f"{name}.self_attention.linear_qkv.layer_norm_")
        fused = functional.linear(fused, hub[f"{name}.self_attention.linear_qkv.weight"])
        query, key, value = fused.unflatten(2, (heads, 3, hidden // heads)).permute(3, 0, 2, 1, 4)
        seen = functional.scaled_dot_product_attention(query, key, value, attn_mask=bias)
        seen = seen.transpose(1, 2).flatten(2)
        states = states + functional.linear(seen, hub[f"{name}.self_attention.linear_proj.weight"])
        inner = functional.linear(
            norm(states, f"{name}.mlp.linear_fc1.layer_norm_"), hub[f"{name}.mlp.linear_fc1.weight"]
        )
        states = states + functional.linear(functional.gelu(inner), hub[f"{name}.mlp.linear_fc2.weight"])
    return functional.linear(norm(states, "decoder.final_layernorm."), embedding)
