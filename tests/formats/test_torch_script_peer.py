"""TorchScript archives of torch itself: names and values are those of ``torch.jit.load(...).state_dict()``."""

from __future__ import annotations

import io
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from anyckpt.checkpoint import Checkpoint  # noqa: E402
from anyckpt.containers.torch_file import read_torch  # noqa: E402
from anyckpt.containers.torch_file.flatten import flatten  # noqa: E402
from anyckpt.containers.torch_file.values import QuantizedTensor  # noqa: E402
from anyckpt.formats.torch import torch_checkpoint  # noqa: E402
from anyckpt.storage.source import MemorySource  # noqa: E402

pytestmark = [pytest.mark.peer, pytest.mark.filterwarnings("ignore")]


class Inner(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = torch.nn.BatchNorm1d(3)
        self.parts = torch.nn.ModuleList([torch.nn.Linear(3, 3, bias=False), torch.nn.Linear(3, 3)])
        self.shared = self.parts[0]
        self.values = torch.nn.ParameterList([torch.nn.Parameter(torch.rand(3))])
        self.register_buffer("cache", torch.ones(3), persistent=False)
        self.plain = torch.full((3,), 2.0)
        self.table = [torch.ones(1), torch.zeros(2)]
        self.named = {"a": torch.ones(1)}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for part in self.parts:
            x = part(x)
        return self.norm(x) + self.shared(x) + self.values[0] + self.cache + self.plain + self.table[0]


def archived(program: Any) -> tuple[Checkpoint, Any]:
    out = io.BytesIO()
    torch.jit.save(program, out)
    contents = read_torch(MemorySource(out.getvalue(), "a.pt"))
    out.seek(0)
    return torch_checkpoint("a.pt", contents, flatten(contents.root, "a.pt")), torch.jit.load(out)


def assert_same(checkpoint: Checkpoint, expected: Any) -> None:
    weights = checkpoint.weights()
    assert sorted(weights) == sorted(expected)
    for name, value in expected.items():
        assert weights[name].dtype.name == str(value.dtype).removeprefix("torch.")
        assert weights[name].numpy().tolist() == value.tolist(), name


@pytest.mark.parametrize("how", ["script", "trace"])
def test_programs_are_named_as_their_state_dict(how: str) -> None:
    network = torch.nn.Sequential(Inner(), torch.nn.Embedding(4, 2))[:1].eval()
    program = torch.jit.script(network) if how == "script" else torch.jit.trace(network, torch.ones(2, 3))
    checkpoint, loaded = archived(program)
    assert_same(checkpoint, loaded.state_dict())
    if how == "script":
        others = set(checkpoint.tensors) - set(checkpoint.weights())
        assert {"0.table.0", "0.named.a"} <= others


def test_a_frozen_program_has_all_its_weights() -> None:
    network = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2)).eval()
    checkpoint, loaded = archived(torch.jit.freeze(torch.jit.script(network)))
    assert not loaded.state_dict()
    found = sorted(str(tensor.numpy().tolist()) for tensor in checkpoint.weights().values())
    assert found == sorted(str(value.tolist()) for value in network.state_dict().values())


def test_a_quantized_program_has_its_integers_scales_and_biases() -> None:
    network = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.ReLU())
    quantized = torch.ao.quantization.quantize_dynamic(network, {torch.nn.Linear}, dtype=torch.qint8)
    checkpoint, _ = archived(torch.jit.script(quantized))
    weight, bias = quantized[0].weight(), quantized[0].bias()
    packed = checkpoint.objects["0._packed_params._packed_params.0"]
    assert isinstance(packed, QuantizedTensor)
    assert packed.int_repr.numpy().tolist() == weight.int_repr().tolist()
    assert (packed.scale, packed.zero_point) == (weight.q_scale(), weight.q_zero_point())
    assert checkpoint.weights()["0._packed_params._packed_params.1"].numpy().tolist() == bias.tolist()
