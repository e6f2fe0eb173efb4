"""transformers finds every weight of what is written for it from modules that were saved inside others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.peer

import anyckpt  # noqa: E402

_SIZES = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 32,
    "num_key_value_heads": 2, "max_position_embeddings": 32, "pad_token_id": 0, "tie_word_embeddings": False,
}  # fmt: skip


def model_of(kind: str) -> Any:
    return transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(kind, **_SIZES))


class Holding(torch.nn.Module):
    """A module that holds another by an attribute's name, as torch.compile (``_orig_mod``) and trainers do."""

    def __init__(self, name: str, module: Any) -> None:
        super().__init__()
        self.add_module(name, module)


def each_layer(model: Any) -> dict[str, Any]:
    for number, layer in enumerate(model.model.layers):
        model.model.layers[number] = Holding("_orig_mod", layer)
    return dict(model.state_dict())


SAVED = {
    "compiled": lambda model: Holding("_orig_mod", model).state_dict(),
    "data parallel": lambda model: torch.nn.DataParallel(model).state_dict(),
    "in a module": lambda model: Holding("model", model).state_dict(),
    "each layer compiled": each_layer,
}


@pytest.mark.parametrize("saved", SAVED)
@pytest.mark.parametrize("kind", ["llama", "olmo2"])
def test_every_weight_is_found(kind: str, saved: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = model_of(kind)
    model.config.save_pretrained(tmp_path)
    expected = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    whole = {"state_dict": SAVED[saved](model), "pytorch-lightning_version": "2.5.0", "hyper_parameters": {"lr": 0.1}}
    torch.save(whole, tmp_path / "x.ckpt")
    anyckpt.convert(tmp_path / "x.ckpt", tmp_path / "out", to="hf", config=tmp_path / "config.json")
    loaded, told = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not told["missing_keys"]
    assert not told["unexpected_keys"]
    assert expected.keys() == loaded.state_dict().keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in loaded.state_dict().items())


@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("AutoModel", "llama"), ("AutoModelForSequenceClassification", "llama"), ("AutoModel", "qwen2"),
        ("AutoModelForTokenClassification", "qwen2"), ("AutoModelForSequenceClassification", "bert"),
        ("AutoModelForImageClassification", "vit"),
    ],
)  # fmt: skip
def test_every_weight_of_another_class_is_found(name: str, kind: str, wrapped: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "image_size": 8, "patch_size": 4} if kind == "vit" else _SIZES
    config = transformers.AutoConfig.for_model(kind, **{**sizes, "num_attention_heads": 2})
    auto = getattr(transformers, name)
    model = auto.from_config(config)
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(tmp_path)
    state = model.state_dict()
    saved = {f"model.{key}": tensor for key, tensor in state.items()} if wrapped else state
    whole = {"state_dict": saved, "pytorch-lightning_version": "2.5.0"} if wrapped else saved
    torch.save(whole, tmp_path / "x.ckpt")
    anyckpt.convert(tmp_path / "x.ckpt", tmp_path / "out", to="hf", config=tmp_path)
    loaded, told = auto.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not told["missing_keys"] and not told["unexpected_keys"]
    assert all(torch.equal(tensor, loaded.state_dict()[key]) for key, tensor in state.items())
