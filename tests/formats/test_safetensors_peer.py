"""The real safetensors library reads what we write, and we read what it writes."""

from __future__ import annotations

from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.peer

from safetensors import safe_open  # noqa: E402
from safetensors.torch import save_file  # noqa: E402
from tests.support import file_bytes, write_plan  # noqa: E402

from anyckpt.containers.safetensors import safetensors_parts  # noqa: E402
from anyckpt.dtypes import BY_NAME  # noqa: E402
from anyckpt.formats.format import WriteOptions  # noqa: E402
from anyckpt.formats.registry import look_at  # noqa: E402
from anyckpt.formats.safetensors import FORMAT  # noqa: E402
from anyckpt.tensor import LazyTensor  # noqa: E402

DTYPES = [
    name
    for name, entry in BY_NAME.items()
    if (entry.safetensors or name == "float4_e2m1fn_x2") and hasattr(torch, name)
]


def tensors_of_every_dtype() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    raw = torch.randint(0, 2, (48,), dtype=torch.uint8, generator=generator)
    tensors = {f"t/{name}": raw.view(getattr(torch, name)).reshape(2, -1).clone() for name in DTYPES}
    return {**tensors, 'é "\x01': torch.zeros(()), "empty": torch.zeros(0, 3), "z": torch.ones(3)}


def test_every_element_type_both_ways(tmp_path: Path) -> None:
    theirs = tensors_of_every_dtype()
    path = tmp_path / "theirs.safetensors"
    save_file(theirs, path, metadata={"format": "pt"})
    checkpoint = FORMAT.read(look_at(path))
    assert {name: t.dtype.name for name, t in checkpoint.tensors.items()} == {
        name: str(t.dtype).removeprefix("torch.") for name, t in theirs.items()
    }
    assert FORMAT.plan is not None
    plan = FORMAT.plan(checkpoint, WriteOptions())
    assert file_bytes(plan.files[0]) == path.read_bytes()
    ours = write_plan(plan, tmp_path / "ours.safetensors")
    with safe_open(ours, framework="pt") as file:
        assert file.metadata() == {"format": "pt"}
        for name, tensor in theirs.items():
            found = file.get_tensor(name)
            assert found.dtype == tensor.dtype
            assert found.shape == tensor.shape
            assert torch.equal(found.reshape(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8))


def test_order_is_that_of_the_library() -> None:
    names = ["b", "a", "c.10", "c.2"]
    theirs = {f"{name}.{kind}": torch.zeros(2, dtype=getattr(torch, kind)) for name in names for kind in DTYPES}
    from safetensors.torch import save

    ours: dict[str, LazyTensor] = {}
    from anyckpt.tensor import Constant

    for name, tensor in theirs.items():
        ours[name] = Constant(BY_NAME[str(tensor.dtype).removeprefix("torch.")], tuple(tensor.shape))
    written = b"".join(
        part.data if hasattr(part, "data") else bytes(part.nbytes) for part in safetensors_parts(ours, None)
    )
    assert written == save(theirs)
