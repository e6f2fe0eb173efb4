"""Meta's own arithmetic on what we write: complex rotary numbers of neighbouring channels, against transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.peer

from tests.support import fixture_path  # noqa: E402

import anyckpt  # noqa: E402


def norm(x: Any, weight: Any, epsilon: float) -> Any:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + epsilon) * weight


def logits(state: dict[str, Any], params: dict[str, Any], tokens: Any) -> Any:
    """The forward pass that Meta's Llama papers and code describe, for one batch and no cache."""
    heads, groups, epsilon = params["n_heads"], params["n_kv_heads"], params["norm_eps"]
    x = state["tok_embeddings.weight"][tokens]
    length, width = tokens.shape[1], x.shape[-1] // heads
    angles = torch.outer(torch.arange(length), params["rope_theta"] ** -(torch.arange(0, width, 2) / width))
    turn = torch.polar(torch.ones_like(angles), angles)[None, :, None]
    mask = torch.full((length, length), float("-inf")).triu(1)
    for layer in range(params["n_layers"]):
        own = {n.removeprefix(f"layers.{layer}."): w for n, w in state.items() if n.startswith(f"layers.{layer}.")}
        h = norm(x, own["attention_norm.weight"], epsilon)
        q, k, v = (
            (h @ own[f"attention.w{part}.weight"].T).unflatten(-1, (count, width))
            for part, count in (("q", heads), ("k", groups), ("v", groups))
        )
        q, k = (
            torch.view_as_real(torch.view_as_complex(part.unflatten(-1, (-1, 2)).contiguous()) * turn).flatten(3)
            for part in (q, k)
        )
        k, v = (part.repeat_interleave(heads // groups, 2) for part in (k, v))
        scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / width**0.5 + mask
        mixed = torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v).flatten(2)
        x = x + mixed @ own["attention.wo.weight"].T
        h = norm(x, own["ffn_norm.weight"], epsilon)
        gate, up = (h @ own[f"feed_forward.w{number}.weight"].T for number in (1, 3))
        x = x + (torch.nn.functional.silu(gate) * up) @ own["feed_forward.w2.weight"].T
    return norm(x, state["norm.weight"], epsilon) @ state["output.weight"].T


def test_logits_are_those_of_transformers(tmp_path: Path) -> None:
    source = fixture_path("families/llama/hf")
    anyckpt.convert(source, tmp_path / "meta", to="meta")
    state = torch.load(tmp_path / "meta" / "consolidated.00.pth", weights_only=True, mmap=True)
    params = json.loads((tmp_path / "meta" / "params.json").read_text())
    tokens = torch.arange(24).reshape(2, 12) * 5 % 151
    model = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32, attn_implementation="eager")
    with torch.no_grad():
        expected = model(tokens).logits
        found = logits(state, params, tokens)
    assert (found - expected).abs().max() < 1e-5 * expected.abs().max()
