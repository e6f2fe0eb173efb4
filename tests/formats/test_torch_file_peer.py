"""Against torch itself: it loads what is written, and what it writes is read."""

from __future__ import annotations

import io
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

torch = pytest.importorskip("torch")

from tests.formats.torch_archives import archive, storage, tensor  # noqa: E402
from tests.support import file_bytes, fixture_path, write_plan  # noqa: E402

import anyckpt  # noqa: E402
from anyckpt.checkpoint import storage_key  # noqa: E402
from anyckpt.containers.torch_file import read_torch, zip_parts  # noqa: E402
from anyckpt.containers.torch_file.values import DistributedTensor, QuantizedTensor, SparseTensor  # noqa: E402
from anyckpt.engine.plan import OutputFile  # noqa: E402
from anyckpt.formats import registry  # noqa: E402
from anyckpt.formats.format import WriteOptions  # noqa: E402
from anyckpt.formats.registry import look_at  # noqa: E402
from anyckpt.formats.torch import FORMAT  # noqa: E402
from anyckpt.pickling import Global, Record  # noqa: E402
from anyckpt.storage.local_file import LocalFile  # noqa: E402
from anyckpt.storage.source import MemorySource  # noqa: E402
from anyckpt.tensor import LazyTensor, from_array  # noqa: E402

pytestmark = [pytest.mark.peer, pytest.mark.filterwarnings("ignore")]


def raw(value: Any) -> bytes:
    """The bytes of a torch tensor in C order, conjugation and the like resolved."""
    plain = value.detach().resolve_conj().resolve_neg().clone(memory_format=torch.contiguous_format)
    return plain.flatten().view(torch.uint8).numpy().tobytes() if plain.numel() else b""


def raw_lazy(value: LazyTensor) -> bytes:
    return b"".join(chunk.tobytes() for chunk in value.chunks())


def same(value: Any, lazy: LazyTensor) -> None:
    assert (str(value.dtype), tuple(value.shape)) == (f"torch.{lazy.dtype.name}", lazy.shape)
    assert raw(value) == raw_lazy(lazy)


def saved(value: Any, **options: Any) -> Any:
    out = io.BytesIO()
    torch.save(value, out, **options)
    return read_torch(MemorySource(out.getvalue(), "a.pt"))


def loaded(root: Any, path: Path, **options: Any) -> Any:
    path.write_bytes(file_bytes(OutputFile("", zip_parts(root))))
    return torch.load(path, **{"weights_only": True, "mmap": True, **options})


def test_torch_loads_every_dtype(tmp_path: Path) -> None:
    source = fixture_path("legacy/zoo_dtypes/zip.pt")
    root = read_torch(LocalFile(source)).root
    ours, theirs = loaded(root, tmp_path / "a.pt"), torch.load(source, weights_only=True)
    assert list(ours) == list(theirs)
    assert len(ours) == 22
    for name, value in theirs.items():
        assert (ours[name].dtype, ours[name].shape) == (value.dtype, value.shape)
        same(ours[name], root[name])


def test_torch_loads_every_view(tmp_path: Path) -> None:
    source = fixture_path("legacy/zoo_views/zip.pt")
    root = read_torch(LocalFile(source)).root
    ours, theirs = loaded(root, tmp_path / "a.pt"), torch.load(source, weights_only=True)
    for name, value in theirs.items():
        if isinstance(value, torch.Tensor):
            assert raw(ours[name]) == raw(value), name
    assert ours["expanded"].stride() == (0, 0)


def test_torch_loads_every_kind(tmp_path: Path) -> None:
    source = fixture_path("legacy/zoo_kinds/zip.pt")
    root = read_torch(LocalFile(source)).root
    ours, theirs = loaded(root, tmp_path / "a.pt"), torch.load(source, weights_only=True)
    for name in ("sparse_coo", "sparse_csr"):
        assert ours[name].layout == theirs[name].layout
        assert torch.equal(ours[name].to_dense(), theirs[name].to_dense())
    for name in ("quint8", "qint8_ch"):
        assert ours[name].qscheme() == theirs[name].qscheme()
        assert torch.equal(ours[name].dequantize(), theirs[name].dequantize())
    assert (ours["meta"].device.type, ours["meta"].shape) == ("meta", theirs["meta"].shape)
    assert [t.tolist() for t in ours["nested"].unbind()] == [t.tolist() for t in theirs["nested"].unbind()]
    assert list(ours["untyped_storage"]) == list(theirs["untyped_storage"])
    assert list(ours["typed_storage"]) == list(theirs["typed_storage"])


def test_torch_loads_large_tensors_from_whole_pages(tmp_path: Path) -> None:
    big = from_array(np.arange(1 << 19, dtype=np.float32))
    root = {"a": from_array(np.float32(7).reshape(())), "big": big, "tied": big, "none": from_array(np.zeros((0, 4)))}
    ours = loaded(root, tmp_path / "a.pt")
    same(ours["big"], big)
    assert ours["big"].data_ptr() == ours["tied"].data_ptr()
    assert ours["big"].data_ptr() % 4096 == 0
    assert (ours["a"].item(), ours["none"].shape) == (7, (0, 4))
    plain = torch.load(tmp_path / "a.pt", weights_only=True)
    assert torch.equal(plain["big"], ours["big"])


@pytest.mark.parametrize("size", [10, 1 << 19])
def test_torch_finds_contents_by_its_own_arithmetic(size: int, tmp_path: Path, monkeypatch: Any) -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.utils.serialization import config

    root = {str(i): from_array(np.full(size + i, i, np.float32)) for i in range(4)}
    monkeypatch.setenv("TORCH_SERIALIZATION_DEBUG", "1")
    for mmap in (True, False):
        with config.patch("load.calculate_storage_offsets", True):
            ours = loaded(root, tmp_path / "a.pt", mmap=mmap)
        for name, lazy in root.items():
            same(ours[name], lazy)
    data = (tmp_path / "a.pt").read_bytes()
    with FakeTensorMode():
        fake = torch.load(tmp_path / "a.pt")
    for name, lazy in root.items():
        at = fake[name].untyped_storage()._checkpoint_offset
        assert data[at : at + lazy.nbytes] == raw_lazy(lazy)


def test_torch_loads_objects(tmp_path: Path) -> None:
    plain = {
        "epoch": 3,
        "lr": 1e-3,
        "names": ["a", ("b", None, True)],
        "big": 1 << 70,
        "blob": b"\x00\xff",
        5: {"x": -1},
    }
    assert loaded(plain, tmp_path / "a.pt") == plain


@pytest.mark.parametrize("options", [{}, {"_use_new_zipfile_serialization": False}, {"pickle_protocol": 4}])
def test_modules_that_torch_saves(options: dict[str, Any]) -> None:
    torch.manual_seed(1)
    module = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4), torch.nn.Embedding(5, 3))
    optimizer = torch.optim.AdamW(module.parameters())
    module[1](module[0](torch.randn(6, 3))).sum().backward()
    optimizer.step()
    contents = saved({"model": module.state_dict(), "optimizer": optimizer.state_dict()}, **options)
    for name, value in module.state_dict().items():
        same(value, contents.root["model"][name])
    state = contents.root["optimizer"]["state"]
    for number, slots in optimizer.state_dict()["state"].items():
        for slot, value in slots.items():
            same(value, state[number][slot])
    assert contents.root["model"].state["_metadata"][""]["version"] == 1


def test_attributes_of_parameters() -> None:
    parameter = torch.nn.Parameter(torch.arange(6.0).reshape(2, 3))
    parameter.tensor_model_parallel, parameter.partition_dim = True, 1
    master = torch.arange(3.0)
    master.sequence_parallel = True
    contents = saved({"p": parameter, "m": master, "d": parameter.data})
    facts = contents.facts_of(contents.root["p"])
    assert facts.parameter
    assert facts.requires_grad
    assert facts.attributes == {"tensor_model_parallel": True, "partition_dim": 1}
    assert contents.facts_of(contents.root["m"]).attributes == {"sequence_parallel": True}
    assert not contents.facts_of(contents.root["d"]).parameter
    assert storage_key(contents.root["p"]) == storage_key(contents.root["d"])


@pytest.mark.parametrize("layout", ["csr", "csc", "bsr", "bsc", "coo"])
def test_sparse_layouts(layout: str, tmp_path: Path) -> None:
    dense = torch.zeros(4, 6)
    dense[0, 1], dense[3, 4], dense[2, 5] = 1, 2, 3
    block = {"blocksize": (2, 3)} if layout in ("bsr", "bsc") else {}
    sparse = dense.to_sparse() if layout == "coo" else getattr(dense, f"to_sparse_{layout}")(**block)
    contents = saved({"s": sparse})
    value = contents.root["s"]
    assert isinstance(value, SparseTensor)
    assert value.dense().tolist() == dense.tolist()
    assert torch.equal(loaded(contents.root, tmp_path / "a.pt")["s"].to_dense(), dense)


def test_a_coo_tensor_adds_what_is_there_twice() -> None:
    sparse = torch.sparse_coo_tensor([[0, 0, 1], [2, 2, 0]], [1.0, 2.0, 5.0], (2, 3))
    assert saved(sparse).root.dense().tolist() == sparse.to_dense().tolist() == [[0, 0, 3], [5, 0, 0]]


def test_packed_quantized_tensors(tmp_path: Path) -> None:
    values = torch.arange(15.0).reshape(3, 5)
    packed = torch.quantize_per_channel(values, torch.ones(3), torch.zeros(3), 0, torch.quint4x2)
    contents = saved({"q": packed})
    quantized = contents.root["q"]
    assert isinstance(quantized, QuantizedTensor)
    assert (quantized.dtype.name, quantized.shape, quantized.int_repr.shape) == ("quint4x2", (3, 5), (8,))
    assert torch.equal(loaded(contents.root, tmp_path / "a.pt")["q"].dequantize(), packed.dequantize())


def test_a_distributed_tensor(tmp_path: Path) -> None:
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1, 1), mesh_dim_names=("dp", "tp"))
        whole = torch.arange(12.0).reshape(3, 4)
        contents = saved({"w": distribute_tensor(whole, mesh, [Replicate(), Shard(1)])})
        value = contents.root["w"]
        assert isinstance(value, DistributedTensor)
        assert value.shape == (3, 4)
        assert value.placements[0].startswith("Replicate")
        assert value.placements[1] == "Shard(1)"
        same(whole, value.local)
        again = loaded(contents.root, tmp_path / "a.pt", mmap=False, weights_only=False)["w"]
        assert again.placements == (Replicate(), Shard(1))
        assert torch.equal(again.to_local(), whole)
    finally:
        dist.destroy_process_group()


def test_checksums_that_torch_did_not_compute() -> None:
    torch.serialization.set_crc32_options(False)
    try:
        contents = saved({"w": torch.ones(3)})
    finally:
        torch.serialization.set_crc32_options(True)
    assert not any(record.check() for record in contents.records)
    assert all(record.check() for record in saved({"w": torch.ones(3)}).records)


def test_forms_of_old_torch_mean_what_torch_takes_them_for(tmp_path: Path) -> None:
    """``_rebuild_tensor`` of 0.3, and ``FloatTensor()`` with a state, of 0.1."""
    reference = storage()
    forms = {
        "0.3": Record(Global("torch._utils", "_rebuild_tensor"), (reference, 1, (2, 3), (5, 2))),
        "0.1": Record(Global("torch", "FloatTensor"), (), True, state=(reference, 1, (2, 3), (5, 2))),
    }
    path = tmp_path / "a.pt"
    path.write_bytes(archive(forms))
    ours = read_torch(LocalFile(path)).root
    theirs = torch.load(path, weights_only=False)
    for name in forms:
        same(theirs[name], ours[name])


def test_a_parameter_of_old_torch() -> None:
    data = tensor(0, (2, 2), (2, 1))
    parameter = Record(Global("torch.nn.parameter", "Parameter"), (data,), True, state=(True, False, None))
    contents = read_torch(MemorySource(archive({"p": parameter})))
    facts = contents.facts_of(contents.root["p"])
    assert facts.parameter
    assert facts.requires_grad
    assert contents.root["p"].numpy().tolist() == [[0, 1], [2, 3]]


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_view_of_any_storage(data: st.DataObject) -> None:
    kinds = [torch.float32, torch.bfloat16, torch.int8, torch.complex64, torch.bool, torch.float8_e4m3fn, torch.uint16]
    kind = data.draw(st.sampled_from(kinds))
    count = data.draw(st.integers(0, 40))
    base = torch.arange(count * 8).to(torch.uint8).view(torch.uint8)[: count * kind.itemsize]
    base = (
        (base % 2).view(torch.bool) if kind is torch.bool else base.view(kind) if count else torch.empty(0, dtype=kind)
    )
    shape = data.draw(st.lists(st.integers(0, 5), max_size=4))
    strides = [data.draw(st.integers(0, 7)) for _ in shape]
    offset = data.draw(st.integers(0, 10))
    reach = 0 if 0 in shape else 1 + offset + sum((n - 1) * s for n, s in zip(shape, strides, strict=True))
    if reach > count:
        return
    view = base.as_strided(shape, strides, offset)
    if kind is torch.complex64 and data.draw(st.booleans()):
        view = view.conj()
    zip_generation = data.draw(st.booleans())
    contents = saved({"v": view}, _use_new_zipfile_serialization=zip_generation)
    same(view, contents.root["v"])
    again = torch.load(io.BytesIO(file_bytes(OutputFile("", zip_parts(contents.root)))), weights_only=True)["v"]
    assert raw(again) == raw(view)


def test_a_converted_stream_is_loaded_with_mmap(tmp_path: Path) -> None:
    source = fixture_path("legacy/zoo_views/legacy.pt")
    write_plan(FORMAT.plan(FORMAT.read(look_at(source)), WriteOptions()), tmp_path / "new.pt")  # type: ignore[misc]
    ours = torch.load(tmp_path / "new.pt", weights_only=True, mmap=True)
    theirs = torch.load(source, weights_only=True)
    assert list(ours) == list(theirs)
    for name, value in theirs.items():
        if isinstance(value, torch.Tensor):
            assert raw(ours[name]) == raw(value), name
    assert (tmp_path / "new.pt").stat().st_size < source.stat().st_size + 3000


@pytest.mark.parametrize("case", ["dcp_fsdp_w2", "dcp_hsdp_tp_w4"])
def test_a_distributed_checkpoint_gets_its_nesting_back(case: str, tmp_path: Path) -> None:
    """As by torch's own ``dcp_to_torch_save``."""
    from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

    source = fixture_path(f"mcore/{case}/ckpt")
    dcp_to_torch_save(source, tmp_path / "theirs.pt")
    checkpoint = registry.read(source)
    write_plan(FORMAT.plan(checkpoint, WriteOptions()), tmp_path / "ours.pt")  # type: ignore[misc]
    theirs, ours = (torch.load(tmp_path / name, weights_only=False) for name in ("theirs.pt", "ours.pt"))
    assert equal(ours, theirs)


def equal(a: Any, b: Any) -> bool:
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        return len(a) == len(b) and all(map(equal, a, b))
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    return type(a) is type(b) and bool(a == b)


@pytest.mark.parametrize("target", ["torch", "lightning"])
def test_a_quantized_weight_stays_whole_without_training_state(tmp_path: Path, target: str) -> None:
    source, out = tmp_path / "in.pt", tmp_path / "out.pt"
    weight = torch.quantize_per_tensor(torch.linspace(-1, 1, 6), 0.1, 3, torch.qint8)
    torch.save({"epoch": 1, "state_dict": {"w": weight, "s": torch.eye(3).to_sparse(), "b": torch.ones(2)}}, source)
    anyckpt.convert(source, out, to=target)
    found = torch.load(out)
    found = found if target == "torch" else found["state_dict"]
    assert set(found) == {"w", "s", "b"}
    assert found["w"].q_scale() == weight.q_scale()
    assert torch.equal(found["w"].int_repr(), weight.int_repr())
    assert torch.equal(found["s"].to_dense(), torch.eye(3))


@pytest.mark.parametrize("new", [True, False])
def test_empty_storages_of_several_types_have_one_address(new: bool) -> None:
    whole = torch.TypedStorage(wrap_storage=torch.tensor([]).storage().untyped(), dtype=torch.int8)
    contents = saved([torch.tensor([]), whole, torch.empty(0, dtype=torch.int64)], _use_new_zipfile_serialization=new)
    empty, storage_, numbers = contents.root
    assert (empty.shape, empty.dtype.name, numbers.dtype.name) == ((0,), "float32", "int64")
    assert (storage_.dtype.name, storage_.count) == ("int8", 0)


class Inner(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = torch.nn.BatchNorm1d(3)
        self.lists = torch.nn.ModuleList([torch.nn.Linear(3, 2, bias=False)])
        self.register_buffer("cache", torch.ones(2), persistent=False)
        self.plain = torch.ones(3)
        self.shared = self.lists[0]
        self.values = torch.nn.ParameterList([torch.nn.Parameter(torch.rand(2))])


@pytest.mark.parametrize("new", [True, False])
def test_whole_modules_are_named_as_state_dict_names_them(new: bool, tmp_path: Path) -> None:
    inner = Inner()
    inner.register_forward_hook(torch.nn.functional.relu)
    network = torch.nn.DataParallel(torch.nn.Sequential(inner, torch.nn.Embedding(4, 2)))
    expected = network.state_dict()
    path = tmp_path / "whole.pt"
    torch.save({"model": network, "epoch": 3}, path, _use_new_zipfile_serialization=new)
    weights = registry.read(path).weights()
    assert list(weights) == list(expected)
    for name, value in expected.items():
        same(value, weights[name])


@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_bare_pickles_of_tensors(protocol: int, tmp_path: Path) -> None:
    base = torch.arange(3000, dtype=torch.float32).reshape(30, 100)
    values = {
        "a": base,
        "view": base[3:5].t(),
        "half": torch.ones(2, dtype=torch.float16),
        "p": torch.nn.Parameter(base),
    }
    path = tmp_path / "bare.pkl"
    path.write_bytes(pickle.dumps({"model": values, "iteration": 7}, protocol))
    checkpoint = registry.read(path)
    for name, value in values.items():
        same(value, checkpoint.weights()[name])
    assert checkpoint.training.step == 7
