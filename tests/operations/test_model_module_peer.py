"""A SpeechLM2 model put together as NeMo 3.0 does, saved by the hub's own mixin: its language model in transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tests.support import fixture_path

import anyckpt

pytestmark = pytest.mark.peer

TOKENS = [[1, 2, 3, 4, 5, 6, 7]]


def logits(model: Any) -> Any:
    import torch

    with torch.no_grad():
        return model.eval()(input_ids=torch.tensor(TOKENS), use_cache=False).logits


@pytest.mark.parametrize("family", ["llama", "llama_tied_bf16", "qwen2"])
def test_outputs_are_those_of_the_model_inside(family: str, tmp_path: Path) -> None:
    import peft
    import torch
    from huggingface_hub import PyTorchModelHubMixin
    from transformers import AutoModelForCausalLM

    source = fixture_path(f"families/{family}/hf")
    settings = {"r": 2, "lora_alpha": 6, "target_modules": ["q_proj", "down_proj"], "init_lora_weights": False}

    class Speech(torch.nn.Module, PyTorchModelHubMixin):
        def __init__(self) -> None:
            super().__init__()
            self.llm: Any = AutoModelForCausalLM.from_pretrained(source, dtype="float32")
            self.embed_tokens = self.llm.model.embed_tokens
            torch.manual_seed(0)
            self.llm = peft.get_peft_model(self.llm, peft.LoraConfig(**settings))
            del self.llm.base_model.model.model.embed_tokens
            self.perception = torch.nn.ModuleDict({"encoder": torch.nn.Linear(3, 3), "proj": torch.nn.Linear(3, 64)})

    speech = Speech()
    config = {"model_type": "nemo_speechlm", "pretrained_llm": str(source), "lora": settings}
    speech.save_pretrained(tmp_path / "speech", config=config)
    assert json.loads((tmp_path / "speech" / "config.json").read_text())["lora"]["lora_alpha"] == 6
    inside = speech.llm.base_model.model
    inside.model.embed_tokens = speech.embed_tokens
    anyckpt.convert(tmp_path / "speech", tmp_path / "llm", to="hf", module="llm", config=source, dtype="fp32")
    loaded, told = AutoModelForCausalLM.from_pretrained(tmp_path / "llm", dtype="float32", output_loading_info=True)
    assert not any(told.values()), told
    assert (logits(loaded) - logits(inside)).abs().max() < 1e-5
    anyckpt.convert(tmp_path / "speech", tmp_path / "adapter", to="peft", module="llm", config=source)
    adapted = peft.PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(source, dtype="float32"), tmp_path / "adapter"
    )
    assert (logits(adapted) - logits(inside)).abs().max() < 1e-5
