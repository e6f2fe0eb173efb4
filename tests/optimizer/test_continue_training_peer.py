"""Training goes on bit for bit after its checkpoint went through Megatron's formats at another layout and back."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
lightning = pytest.importorskip("lightning")
transformers = pytest.importorskip("transformers")

from anyckpt.errors import MappingError  # noqa: E402
from anyckpt.operations.convert import convert  # noqa: E402
from anyckpt.operations.reshard import reshard  # noqa: E402
from anyckpt.operations.steps.layout_request import LayoutRequest  # noqa: E402

pytestmark = pytest.mark.peer

STEPS = 3
TOKENS = 99  # padded to 128 rows where Megatron wants 64 x TP 2
CONFIG: dict[str, Any] = {
    "vocab_size": TOKENS, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "tie_word_embeddings": False,
}  # fmt: skip


class Llama(lightning.LightningModule):  # type: ignore[misc,name-defined]
    """A tiny Llama whose state dict has the names of Hugging Face's."""

    def __init__(self, groups: int, tied: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        whole = transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**CONFIG, "tie_word_embeddings": tied}))
        self.model, self.lm_head, self.groups = whole.model, whole.lm_head, groups
        self.losses: list[float] = []

    def training_step(self, batch: Any, index: int) -> Any:
        (tokens,) = batch
        logits = self.lm_head(self.model(input_ids=tokens[:, :-1]).last_hidden_state)
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self) -> Any:
        if self.groups == 1:
            return torch.optim.AdamW(self.parameters(), lr=1e-2, betas=(0.9, 0.97), weight_decay=0.1)
        matrices = [parameter for parameter in self.parameters() if parameter.ndim > 1]
        rest = [parameter for parameter in self.parameters() if parameter.ndim == 1]
        return torch.optim.AdamW(
            [{"params": matrices, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0, "lr": 3e-3}], lr=1e-2
        )


def batches(first: int) -> Any:
    tokens = torch.randint(0, TOKENS, (2 * STEPS, 2, 12), generator=torch.Generator().manual_seed(1))
    data = torch.utils.data.TensorDataset(tokens[first : first + STEPS])
    return torch.utils.data.DataLoader(data, batch_size=None)


def trained(path: Path, groups: int, tied: bool = False) -> Path:
    """What Lightning saves after a few steps."""
    trainer = made(path.parent)
    trainer.fit(Llama(groups, tied), batches(0))
    trainer.save_checkpoint(path)
    return path


def made(folder: Path) -> Any:
    """A trainer for a few steps."""
    return lightning.Trainer(
        max_steps=STEPS, accelerator="cpu", devices=1, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, default_root_dir=folder,
    )  # fmt: skip


Change = Callable[[dict[str, Any]], None]


def resumed(
    path: Path, groups: int, change: Change | None = None, tied: bool = False
) -> tuple[list[float], dict[str, Any]]:
    """Losses of the next steps in plain PyTorch, and the state after them."""
    saved = torch.load(path, weights_only=True)
    if change is not None:
        change(saved)
    model = Llama(groups, tied)
    missing, unknown = model.load_state_dict(saved["state_dict"], strict=not tied)
    assert not unknown and missing in ([], ["lm_head.weight"] if tied else [])
    optimizer = model.configure_optimizers()
    optimizer.load_state_dict(saved["optimizer_states"][0])
    for batch in batches(STEPS):
        optimizer.zero_grad()
        model.training_step(batch, 0).backward()
        optimizer.step()
    after = {f"weight {name}": tensor for name, tensor in model.state_dict().items()}
    for index, own in optimizer.state_dict()["state"].items():
        after.update({f"{index} {slot}": value for slot, value in own.items()})
    return model.losses, after


def through(source: Path, formats: Sequence[str], folder: Path) -> Path:
    """Out to each format at tensor parallel 2, and back to a Lightning file with its own names."""
    config = folder / "config.json"
    config.write_text(json.dumps({"architectures": ["LlamaForCausalLM"], "model_type": "llama", **CONFIG}))
    path = source
    request = LayoutRequest(tensor_parallel=2, make_vocab_size_divisible_by=32)
    for number, name in enumerate(formats):
        done = folder / f"{path.stem}-{name}"
        known = {"config": config} if number == 0 else {}
        convert(path, done, to=name, optimizer="keep", layout=request, **known)  # type: ignore[arg-type]
        path = done
    back = folder / "back.ckpt"
    convert(path, back, to="lightning", names="hf", optimizer="keep")
    return back


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize(
    "formats", [["megatron-core"], ["megatron-lm"], ["megatron-core", "megatron-lm"], ["megatron-lm", "megatron-core"]]
)
def test_training_continues_bit_for_bit(formats: list[str], groups: int, tmp_path: Path) -> None:
    source = trained(tmp_path / "source.ckpt", groups)
    back = through(source, formats, tmp_path)
    original, returned = (torch.load(path, weights_only=True) for path in (source, back))
    assert list(returned["state_dict"]) == list(original["state_dict"])
    assert returned["global_step"] == original["global_step"] == STEPS
    ours, theirs = returned["optimizer_states"][0], original["optimizer_states"][0]
    assert ours["param_groups"] == theirs["param_groups"]
    for index, own in theirs["state"].items():
        assert ours["state"][index].keys() == own.keys()
        assert all(torch.equal(ours["state"][index][slot], value) for slot, value in own.items())
    expected, after = resumed(source, groups)
    found, again = resumed(back, groups)
    assert found == expected
    assert again.keys() == after.keys()
    assert all(torch.equal(again[name], value) for name, value in after.items())


def test_lightning_itself_continues(tmp_path: Path) -> None:
    source = trained(tmp_path / "source.ckpt", 2)
    back = through(source, ["megatron-core"], tmp_path)
    model = Llama(2)
    made(tmp_path).fit(model, batches(STEPS), ckpt_path=back, weights_only=True)
    assert model.losses == resumed(source, 2)[0]


def test_through_other_layouts_of_rank_files(tmp_path: Path) -> None:
    source = trained(tmp_path / "source.ckpt", 1)
    config = tmp_path / "config.json"
    config.write_text(json.dumps({"model_type": "llama", **CONFIG}))
    request = LayoutRequest(tensor_parallel=2, pipeline_parallel=2)
    convert(source, tmp_path / "a", to="megatron-lm", config=config, optimizer="keep", layout=request)
    reshard(tmp_path / "a", tmp_path / "b", layout=LayoutRequest(tensor_parallel=4, pipeline_parallel=1))
    convert(tmp_path / "b", tmp_path / "back.ckpt", to="lightning", names="hf", optimizer="keep")
    assert resumed(tmp_path / "back.ckpt", 1)[0] == resumed(source, 1)[0]


def test_a_run_of_megatrons_goes_on_in_pytorch(tmp_path: Path) -> None:
    """What Megatron saves says nothing of PyTorch's order and groups: the family and Megatron's rule do."""
    source = trained(tmp_path / "source.ckpt", 2)
    request = LayoutRequest(tensor_parallel=2)
    config = {"model_type": "llama", **CONFIG}
    convert(source, tmp_path / "ranks", to="megatron-lm", config=config, optimizer="keep", layout=request)
    for path in tmp_path.glob("ranks/iter_*/*/model_optim_rng.pt"):
        contents = torch.load(path, weights_only=False)
        del contents["original_param_groups"]
        torch.save(contents, path)
    back = tmp_path / "back.ckpt"
    convert(tmp_path / "ranks", back, to="lightning", names="hf", optimizer="keep")
    assert resumed(back, 2)[0] == resumed(source, 2)[0]


def test_a_tied_model(tmp_path: Path) -> None:
    source = trained(tmp_path / "source.ckpt", 2, tied=True)
    config = {"model_type": "llama", **CONFIG, "tie_word_embeddings": True}
    request = LayoutRequest(tensor_parallel=2, pipeline_parallel=2)
    convert(source, tmp_path / "a", to="megatron-lm", config=config, optimizer="keep", layout=request)
    done = convert(tmp_path / "a", tmp_path / "back.ckpt", to="lightning", names="hf", optimizer="keep")
    assert any("lm_head.weight is tied to model.embed_tokens.weight" in note for note in done.notes)
    assert resumed(tmp_path / "back.ckpt", 2, tied=True)[0] == resumed(source, 2, tied=True)[0]


def test_parameters_that_pytorch_was_told_the_names_of(tmp_path: Path) -> None:
    """Groups that nothing else tells apart: of the attention, and of the rest."""
    model = Llama(1)
    named = list(model.named_parameters())
    groups = [[(n, p) for n, p in named if ("self_attn" in n) == attention] for attention in (True, False)]
    optimizer = torch.optim.AdamW([{"params": group} for group in groups], lr=1e-2)
    for batch in batches(0):
        optimizer.zero_grad()
        model.training_step(batch, 0).backward()
        optimizer.step()
    state = optimizer.state_dict()
    saved = {"pytorch-lightning_version": "2.6.0", "global_step": 3, "state_dict": model.state_dict()}
    torch.save({**saved, "optimizer_states": [state]}, tmp_path / "source.ckpt")
    back = torch.load(through(tmp_path / "source.ckpt", ["megatron-lm"], tmp_path), weights_only=True)
    for index, own in back["optimizer_states"][0]["state"].items():
        assert all(torch.equal(own[slot], value) for slot, value in state["state"][index].items())
    for group in state["param_groups"]:
        del group["param_names"]
    torch.save({**saved, "optimizer_states": [state]}, tmp_path / "unnamed.ckpt")
    with pytest.raises(MappingError, match="nothing tells which parameters are in which group.*--optimizer drop"):
        through(tmp_path / "unnamed.ckpt", ["megatron-lm"], tmp_path)


def test_what_is_compared_depends_on_every_part_of_the_state(tmp_path: Path) -> None:
    """Without a moment, with two that are exchanged, or with another step, the losses are others."""
    source = trained(tmp_path / "source.ckpt", 2)
    expected, _ = resumed(source, 2)

    def of(saved: dict[str, Any]) -> dict[int, dict[str, Any]]:
        state = saved["optimizer_states"][0]["state"]
        assert isinstance(state, dict)
        return state

    names = [name for name, tensor in torch.load(source, weights_only=True)["state_dict"].items() if tensor.ndim > 1]
    gate, up = (names.index(f"model.layers.0.mlp.{kind}_proj.weight") for kind in ("gate", "up"))

    def exchange(saved: dict[str, Any]) -> None:
        of(saved)[gate]["exp_avg"], of(saved)[up]["exp_avg"] = of(saved)[up]["exp_avg"], of(saved)[gate]["exp_avg"]

    changes: list[Change] = [
        lambda saved: of(saved)[gate]["exp_avg"].zero_(),
        lambda saved: of(saved)[gate]["exp_avg_sq"].mul_(2),
        lambda saved: of(saved)[gate]["step"].add_(1),
        exchange,
    ]
    for change in changes:
        assert resumed(source, 2, change)[0] != expected
