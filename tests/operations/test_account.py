"""Every operation on a model with parts that no rule knows: each source tensor is written, told, or all is refused."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.operations.parts import PARTS, RELEASE_4, RELEASE_5, folder, parts, seeing
from tests.support import fixture_path, write_plan

import anyckpt
from anyckpt.checkpoint import Checkpoint
from anyckpt.containers.torch_file import read_torch, zip_parts
from anyckpt.engine.plan import OutputFile, Plan
from anyckpt.errors import AnyckptError, UsageError
from anyckpt.formats import registry
from anyckpt.formats.format import WriteOptions
from anyckpt.operations.convert import Conversion
from anyckpt.operations.steps.account import unaccounted
from anyckpt.operations.steps.joining import open_checkpoint
from anyckpt.operations.steps.layout_request import LayoutRequest
from anyckpt.storage.local_file import LocalFile
from anyckpt.tensor import LazyTensor, from_array

LLAMA = fixture_path("families/llama/hf")
ADAPTER = fixture_path("families/lora_llama/hf_adapter")
TARGETS = (
    "hf", "safetensors", "torch", "dcp", "lightning", "nemo", "nemo2", "megatron-core", "megatron-core-zarr",
    "megatron-lm", "megatron-bridge",
)  # fmt: skip
SOURCES = ("hf", "safetensors", "torch", "dcp", "lightning", "megatron-core", "megatron-lm")
OTHER = st.from_regex(r"[a-z_]{1,9}(\.[a-z0-9_]{1,9}){0,3}\.(weight|bias|inv_freq)", fullmatch=True)


def digest(tensor: LazyTensor) -> str:
    return f"{tensor.dtype.name} {tensor.shape} {hashlib.sha256(tensor.numpy().tobytes()).hexdigest()}"


def others(names: list[str]) -> dict[str, LazyTensor]:
    numbers = np.random.default_rng(len(names))
    return {name: from_array(numbers.standard_normal((2, 3)).astype("<f4")) for name in names}


def assert_accounted(sources: list[Path], done: Conversion, output: Path, extra: list[str]) -> None:
    """What no rule knows is told, or in the output bit for bit; nothing else is forgotten (see the account's test)."""
    written = open_checkpoint(output)
    found = {digest(tensor) for tensor in written.tensors.values()}
    for path in sources:
        source = open_checkpoint(path)
        for name, tensor in source.tensors.items():
            if name.endswith(tuple(PARTS)) or any(f".{name}".endswith(f".{own}") for own in extra):
                told = {name, name.removeprefix(source.model_prefix)} & done.ignored.keys()
                assert told or digest(tensor) in found, name
    assert "nothing of it is in the output" not in done.ignored.values()
    assert written.weights()


def source_of(root: Path, kind: str, extra: list[str], spelling: tuple[str, str, str]) -> Path:
    """A model with parts that no rule knows, in a format: Hugging Face's names, or Megatron's with more tensors."""
    if kind in ("hf", "safetensors", "torch", "dcp", "lightning"):
        whole = registry.read(seeing(root / "whole", spelling=spelling))
        more = {name: tensor for name, tensor in others(extra).items() if name not in whole.tensors}
        path = folder(root / "made", {**whole.tensors, **more}, whole.config)
    else:
        path = LLAMA
    if kind != "hf":
        anyckpt.convert(path, root / kind, to=kind)
        path = root / kind
    if kind == "megatron-lm" and extra:
        return with_more(path, root / "more", extra)
    return path


def with_more(path: Path, out: Path, extra: list[str]) -> Path:
    file = next(path.rglob("model_optim_rng.pt"))
    root = read_torch(LocalFile(str(file))).root
    root["model"].update(others(extra))
    target = out / file.relative_to(path)
    target.parent.mkdir(parents=True)
    (out / "latest_checkpointed_iteration.txt").write_text((path / "latest_checkpointed_iteration.txt").read_text())
    write_plan(Plan("torch", (OutputFile("", zip_parts(root)),)), target)
    return out


@settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_nothing_is_lost_without_a_word(data: st.DataObject) -> None:
    kind = data.draw(
        st.sampled_from(["hf", "safetensors", "torch", "dcp", "lightning", "megatron-core", "megatron-lm"])
    )
    extra = data.draw(st.lists(OTHER, max_size=3, unique=True))
    spelling = data.draw(st.sampled_from([RELEASE_4, RELEASE_5]))
    target = data.draw(st.sampled_from(TARGETS))
    operation = data.draw(st.sampled_from(["convert", "told", "reshard", "average", "mixed", "merge-lora"]))
    with TemporaryDirectory() as name:
        root, out = Path(name), Path(name) / "out"
        given_config = {"config": str(root / "made")} if kind in ("safetensors", "torch", "dcp", "lightning") else {}
        try:
            source = source_of(root, kind, extra, spelling)
            sources = [source]
            if operation in ("convert", "told"):
                told: dict[str, Any] = {"family": "llama"} if operation == "told" else {}
                done = anyckpt.convert(source, out, to=target, **given_config, **told)
            elif operation == "reshard":
                done = anyckpt.reshard(source, out, layout=LayoutRequest(tensor_parallel=2))
            elif operation == "average":
                sources = [source, source]
                done = anyckpt.average(sources, out, to=target, **given_config)
            elif operation == "mixed":
                sources = [source, LLAMA] if data.draw(st.booleans()) else [LLAMA, source]
                done = anyckpt.average(sources, out, to=target, **given_config)
            else:
                done = anyckpt.merge_lora(source, ADAPTER, out, to=target, **given_config)
        except AnyckptError:
            assert not out.exists()
            return
        assert_accounted(sources, done, out, extra)


@pytest.mark.parametrize("operation", ["convert", "average", "merge-lora"])
def test_the_operations_that_go_through(operation: str, tmp_path: Path) -> None:
    """The property holds of refusals, too: these must not be one."""
    base, out = seeing(tmp_path / "base"), tmp_path / "out"
    if operation == "convert":
        done = anyckpt.convert(base, out, to="hf", family="llama")
    elif operation == "average":
        done = anyckpt.average([base, LLAMA], out)
    else:
        done = anyckpt.merge_lora(base, ADAPTER, out)
    assert_accounted([base], done, out, [])
    assert registry.read(out).tensors.keys() >= PARTS.keys()


def test_what_an_operation_forgets_is_told() -> None:
    """The account is of bytes: it needs no operation's word."""
    held = {**parts(), "empty": from_array(np.zeros((0, 3), "<f4"))}
    source = Checkpoint("made", "safetensors", held)
    plan = registry.by_name("safetensors").plan
    assert plan is not None
    for forgotten in PARTS:
        some = {name: tensor[1:] for name, tensor in held.items() if name not in (forgotten, "empty")}
        planned = plan(replace(source, tensors=some), WriteOptions())
        assert list(unaccounted([source], planned)) == [forgotten]
        assert not unaccounted([source], replace(planned, ignored={forgotten: "why"}))


# -- sources without weights ---------------------------------------------------------------------------------


def test_a_source_without_weights_is_refused(tmp_path: Path) -> None:
    root = {"epoch": 3, "names": ["a"]}
    source = write_plan(Plan("torch", (OutputFile("", zip_parts(root)),)), tmp_path / "state.pt")
    for to in ("safetensors", "torch", "hf", "dcp"):
        with pytest.raises(UsageError, match=r"holds no weights.*0 tensors of training state and 2 objects: epoch"):
            anyckpt.convert(source, tmp_path / "out", to=to)
    for to in ("safetensors", "dcp"):
        with pytest.raises(AnyckptError):
            anyckpt.convert(source, tmp_path / "out" / to, to="safetensors", optimizer="keep")
    with pytest.raises(UsageError, match="holds no weights"):
        anyckpt.average([source, source], tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["state.pt"]
    anyckpt.convert(source, tmp_path / "copy.pt", to="torch", optimizer="keep")
    assert anyckpt.diff(source, tmp_path / "copy.pt", raw=True).equal
    empty = folder(tmp_path / "empty", {}, registry.read(LLAMA).config)
    with pytest.raises(UsageError, match="holds no weights.*nothing at all"):
        anyckpt.convert(empty, tmp_path / "out", to="safetensors")


@pytest.mark.parametrize("to", ["torch", "safetensors", "dcp"])
def test_weights_without_elements_are_weights(to: str, tmp_path: Path) -> None:
    root = {"a": from_array(np.zeros((0, 4), "<f4")), "b": from_array(np.zeros((3, 0), "i1"))}
    source = write_plan(Plan("torch", (OutputFile("", zip_parts(root)),)), tmp_path / "empty.pt")
    anyckpt.convert(source, tmp_path / "out", to=to)
    assert {name: (t.dtype.name, t.shape) for name, t in registry.read(tmp_path / "out").tensors.items()} == {
        "a": ("float32", (0, 4)), "b": ("int8", (3, 0)),
    }  # fmt: skip


def test_verify_says_complete_of_the_text_alone(tmp_path: Path) -> None:
    found = anyckpt.verify(seeing(tmp_path / "whole"))
    assert found.sound
    assert (found.checked.model, found.checked.text) == (False, True)
    assert any("multi_modal_projector, vision_tower of the seeing model" in text for text in found.unchecked)
    source = registry.read(tmp_path / "whole")
    text = {name: tensor for name, tensor in source.tensors.items() if name not in PARTS}
    bare = anyckpt.verify(folder(tmp_path / "bare", text, source.config))
    assert (bare.checked.model, bare.checked.text) == (False, True)
    assert any("no tensor is of another part" in warning for warning in bare.warnings)
    assert anyckpt.verify(LLAMA).checked.model


def test_planning_reads_no_chunk_of_a_distributed_checkpoint(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The index tells where bytes lie; to open a million archives for it would take longer than the work."""
    path = fixture_path("nemo/nemo2_llama_spm/model")
    read: list[str] = []
    honest = LocalFile._read_into

    def noted(self: LocalFile, offset: int, buffer: memoryview) -> None:
        read.append(str(self.path))
        honest(self, offset, buffer)

    checkpoint = anyckpt.open(path)
    monkeypatch.setattr(LocalFile, "_read_into", noted)
    assert checkpoint.parameters > 0
    done = anyckpt.convert(checkpoint, tmp_path / "out", to="hf", dry_run=True)
    assert done.tensors > 10
    assert not [name for name in read if name.endswith(".distcp")]
