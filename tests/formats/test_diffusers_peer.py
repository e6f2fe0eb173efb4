"""Pipelines that we write, loaded by diffusers."""

from __future__ import annotations

from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
pytestmark = pytest.mark.peer

from tests.support import fixture_path  # noqa: E402

import anyckpt  # noqa: E402


@pytest.mark.parametrize("limit", [None, 20_000])
def test_diffusers_loads_a_pipeline(limit: int | None, tmp_path: Path) -> None:
    source = fixture_path("diffusers/stable_diffusion")
    anyckpt.convert(source, tmp_path / "out", to="diffusers", max_shard_size=limit)
    theirs, ours = (
        diffusers.StableDiffusionPipeline.from_pretrained(folder, local_files_only=True)
        for folder in (source, tmp_path / "out")
    )
    for part in ("unet", "vae", "text_encoder"):
        expected, found = (getattr(pipeline, part).state_dict() for pipeline in (theirs, ours))
        assert expected.keys() == found.keys()
        assert all(torch.equal(tensor, found[name]) for name, tensor in expected.items())
    sample = torch.linspace(-1, 1, 4 * 8 * 8).reshape(1, 4, 8, 8)
    states = torch.linspace(-1, 1, 3 * 16).reshape(1, 3, 16)
    with torch.no_grad():
        outputs = [pipeline.unet(sample, 3, encoder_hidden_states=states).sample for pipeline in (theirs, ours)]
    torch.testing.assert_close(*outputs, rtol=1e-5, atol=1e-6)  # where weights lie in memory decides the last bits
