"""transformers' own multimodal models, in every spelling in which it saves them: whole, and their text parts alone."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.peer

from tests.models.larger_models import CLASSES, OF_CONTAINERS, TEXT_ALONE, WHOLES  # noqa: E402
from tests.models.proofs import near_one  # noqa: E402
from tests.peer_defects import broken_by  # noqa: E402
from tests.support import write_plan  # noqa: E402

import anyckpt  # noqa: E402
from anyckpt import models  # noqa: E402
from anyckpt.formats.format import WriteOptions  # noqa: E402
from anyckpt.formats.hf import FORMAT  # noqa: E402
from anyckpt.formats.registry import read  # noqa: E402

NO_IMAGE_OUTPUTS = broken_by(
    "transformers", ">=5.24", AttributeError,
    "Llama4ForConditionalGeneration asks its text model's output for image_outputs, which it does not have",
)  # fmt: skip


TYPES = {**WHOLES, **OF_CONTAINERS}


def saved(model_type: str, folder: Path, original: bool) -> Any:
    torch.manual_seed(0)
    if model_type in CLASSES:
        kind = getattr(transformers, CLASSES[model_type])
        whole = kind._from_config(kind.config_class(**TYPES[model_type]), attn_implementation="eager").eval()
    else:
        config = transformers.AutoConfig.for_model(model_type, **TYPES[model_type])
        whole = transformers.AutoModelForImageTextToText.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for name, parameter in whole.named_parameters():
            parameter.normal_(std=0.2)
            if name.endswith("linear_attn.norm.weight"):  # of which Megatron has 1 less
                parameter.copy_(torch.from_numpy(near_one(parameter.numpy())))
    whole.save_pretrained(folder, save_original_format=original)
    return whole


@pytest.mark.parametrize("original", [True, False])
@pytest.mark.parametrize(
    "model_type", [pytest.param(name, marks=NO_IMAGE_OUTPUTS if name == "llama4" else ()) for name in WHOLES]
)
def test_the_text_part_computes_the_same(model_type: str, original: bool, tmp_path: Path) -> None:
    whole = saved(model_type, tmp_path / "whole", original)
    source = read(str(tmp_path / "whole"))
    model = models.identify(source)
    assert model is not None
    assert model.config.extra["part_of"] == model_type
    anyckpt.convert(str(tmp_path / "whole"), tmp_path / "megatron", to="megatron-lm")
    anyckpt.convert(str(tmp_path / "megatron"), tmp_path / "text", to="hf")
    text = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "text", attn_implementation="eager").eval()
    kind = WHOLES[model_type]["text_config"]["model_type"]
    assert text.config.model_type == TEXT_ALONE.get(kind, kind)
    tokens = torch.randint(3, 60, (2, 24), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        ours, theirs = text(input_ids=tokens).logits, whole(input_ids=tokens).logits
    assert torch.equal(ours, theirs)
    with torch.no_grad():
        text.get_input_embeddings().weight[tokens[0, 0]] += 1
        assert not torch.equal(text(input_ids=tokens).logits, theirs), "the comparison can fail"


@pytest.mark.parametrize("original", [True, False])
@pytest.mark.parametrize("model_type", WHOLES)
def test_the_whole_through_megatron(model_type: str, original: bool, tmp_path: Path) -> None:
    """transformers loads every tensor again as it was, from the names under which the type is published."""
    before = saved(model_type, tmp_path / "whole", original)
    anyckpt.convert(str(tmp_path / "whole"), tmp_path / "megatron", to="megatron-core")
    anyckpt.convert(str(tmp_path / "megatron"), tmp_path / "back", to="hf")
    source, back = read(str(tmp_path / "whole")), read(str(tmp_path / "back"))
    assert back.config == source.config
    if original:
        assert back.tensors.keys() == source.tensors.keys()
    after = type(before).from_pretrained(tmp_path / "back", attn_implementation="eager")
    theirs, ours = before.state_dict(), after.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("model_type", WHOLES)
def test_what_is_left_out_is_said(model_type: str, tmp_path: Path) -> None:
    saved(model_type, tmp_path / "whole", True)
    source = read(str(tmp_path / "whole"))
    model = models.identify(source)
    assert model is not None
    hub = models.to_hub(source, model)
    expected = sum(len(item.sources) for item in model.definition.expected(model.config))
    assert len(hub.ignored) + expected >= len(source.tensors)
    assert all("another part of the" in reason for reason in hub.ignored.values())
    assert any("vis" in name for name in hub.ignored)
    assert any(f"{len(hub.ignored)} tensors of " in note for note in hub.notes)


@pytest.mark.parametrize("original", [True, False])
@pytest.mark.parametrize("model_type", OF_CONTAINERS)
def test_what_megatron_has_no_model_for(model_type: str, original: bool, tmp_path: Path) -> None:
    """The text part alone computes the same, containers keep the whole, and Megatron is refused by name."""
    before = saved(model_type, tmp_path / "whole", original)
    source = read(str(tmp_path / "whole"))
    model = models.identify(source)
    assert model is not None
    hub = models.to_hub(source, model)
    alone = models.from_hub(hub, "hf")
    assert len(alone.tensors) + len(hub.ignored) == len(source.tensors)
    config = models.render_config(model, "hf")
    plain = replace(source, tensors=alone.tensors, config=config, artifacts={}, details={})
    assert FORMAT.plan is not None
    write_plan(FORMAT.plan(plain, WriteOptions()), tmp_path / "text")
    kind = getattr(transformers, config["architectures"][0])
    text = kind.from_pretrained(tmp_path / "text", attn_implementation="eager").eval()
    tokens = torch.randint(3, 60, (2, 24), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        theirs = before(input_ids=tokens).logits
        assert torch.equal(text(input_ids=tokens).logits, theirs)
        text.get_input_embeddings().weight[tokens[0, 0]] += 1
        assert not torch.equal(text(input_ids=tokens).logits, theirs), "the comparison can fail"
    anyckpt.convert(str(tmp_path / "whole"), tmp_path / "dcp", to="dcp")
    anyckpt.convert(str(tmp_path / "dcp"), tmp_path / "back", to="hf", config=tmp_path / "whole" / "config.json")
    after = type(before).from_pretrained(tmp_path / "back", attn_implementation="eager").state_dict()
    assert after.keys() == before.state_dict().keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.state_dict().items())
    with pytest.raises(anyckpt.AnyckptError, match=rf"Megatron-Core has no models of family {model.family}"):
        anyckpt.convert(str(tmp_path / "whole"), tmp_path / "megatron", to="megatron-core")
