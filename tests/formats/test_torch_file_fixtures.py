"""Torch files that torch itself wrote, of all generations: every tensor, view, object and flag is found."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.support import expected_of, fixture_path, sha256_of

from anyckpt.checkpoint import Checkpoint, storage_key
from anyckpt.containers.torch_file import TorchContents, read_torch
from anyckpt.containers.torch_file.values import MetaTensor, NestedTensor, QuantizedTensor, SparseTensor, Storage
from anyckpt.formats.registry import look_at
from anyckpt.formats.torch import FORMAT
from anyckpt.pickling import Global, Record
from anyckpt.pickling.plain import simplify
from anyckpt.storage.local_file import LocalFile
from anyckpt.tensor import from_array

ZOOS = ("zoo_dtypes", "zoo_views", "zoo_kinds", "zoo_objects", "zoo_handmade_zip", "zoo_legacy_tar")
FILES = [(zoo, file) for zoo in ZOOS for file in expected_of(f"legacy/{zoo}")["files"]]


def opened(zoo: str, file: str) -> tuple[TorchContents, Checkpoint]:
    path = fixture_path(f"legacy/{zoo}/{file}")
    return read_torch(LocalFile(path)), FORMAT.read(look_at(path))


@pytest.mark.parametrize(("zoo", "file"), FILES)
def test_every_tensor_has_its_values(zoo: str, file: str) -> None:
    path = fixture_path(f"legacy/{zoo}/{file}")
    assert FORMAT.detect(look_at(path))
    checkpoint = FORMAT.read(look_at(path))
    expected = expected_of(f"legacy/{zoo}")["tensors"]
    for name, facts in expected.items():
        tensor = checkpoint.tensors[name]
        found = {"dtype": tensor.dtype.name, "shape": list(tensor.shape), "sha256": sha256_of(tensor)}
        assert found == {key: facts[key] for key in found}, name
    if zoo != "zoo_kinds":  # it has tensors of several parts too
        assert sorted(checkpoint.tensors) == sorted(expected)


@pytest.mark.parametrize("file", ["zip.pt", "legacy.pt"])
def test_views_keep_what_is_known_of_them(file: str) -> None:
    contents, _ = opened("zoo_views", file)
    expected = expected_of("legacy/zoo_views")
    tensors = dict(contents.root)
    tensors.update({f"same_twice.{i}": tensor for i, tensor in enumerate(tensors.pop("same_twice"))})
    for name, facts in expected["tensors"].items():
        found = contents.facts_of(tensors[name])
        assert found.requires_grad == facts["requires_grad"], name
        assert (found.conjugate, found.negative) == (facts["is_conj"], facts["is_neg"]), name
        assert (found.offset, list(found.strides)) == (facts["storage_offset"], facts["stride"]), name
    groups = expected["same_storage_groups"]
    for group in groups:
        assert len({contents.facts_of(tensors[name]).storage for name in group}) == 1
    assert len({contents.facts_of(tensors[group[0]]).storage for group in groups}) == len(groups)
    assert storage_key(tensors["same_twice.0"]) == storage_key(tensors["same_twice.1"]) is not None


def test_slices_that_drag_their_storage_along_are_pointed_out() -> None:
    _, checkpoint = opened("zoo_views", "zip.pt")
    assert any("bytes that no tensor shows" in warning for warning in checkpoint.warnings)
    _, checkpoint = opened("zoo_dtypes", "zip.pt")
    assert checkpoint.warnings == []


def test_a_strided_view_reads_only_its_part() -> None:
    contents, _ = opened("zoo_views", "zip.pt")
    base, transposed = contents.root["base"], contents.root["transposed"]
    assert np.array_equal(transposed[1:3].numpy(), base.numpy().T[1:3])


def test_parameters_and_tensors_with_attributes() -> None:
    contents, _ = opened("zoo_kinds", "zip.pt")
    root, expected = contents.root, expected_of("legacy/zoo_kinds")["tensors"]
    assert contents.facts_of(root["param"]).parameter
    assert contents.facts_of(root["param_with_attrs"]).parameter
    for name in ("param_with_attrs", "tensor_with_attr"):
        attributes = contents.facts_of(root[name]).attributes
        assert {key: attributes[key] for key in expected[name]["attrs"]} == expected[name]["attrs"]
    assert not contents.facts_of(root["tensor_with_attr"]).parameter


def test_tensors_of_several_parts() -> None:
    contents, checkpoint = opened("zoo_kinds", "zip.pt")
    root, expected = contents.root, expected_of("legacy/zoo_kinds")
    for name, layout in (("sparse_coo", "sparse_coo"), ("sparse_csr", "sparse_csr")):
        value = root[name]
        assert isinstance(value, SparseTensor)
        assert value.layout == layout
        assert sha256_of(from_array(value.dense())) == expected[name]["dense"]["sha256"]
    assert root["sparse_coo"].coalesced is True
    quantized = root["quint8"]
    assert isinstance(quantized, QuantizedTensor)
    assert sha256_of(quantized.int_repr) == expected["quint8"]["int_repr"]["sha256"]
    assert (quantized.scale, quantized.zero_point) == (expected["quint8"]["scale"], expected["quint8"]["zero_point"])
    assert root["qint8_ch"].axis == 0
    assert root["qint8_ch"].scale.shape == (2,)
    assert isinstance(root["nested"], NestedTensor)
    assert sha256_of(root["nested"].buffer) == expected["nested"]["buffer"]["sha256"]
    meta = root["meta"]
    assert isinstance(meta, MetaTensor)
    assert (meta.dtype.name, list(meta.shape)) == (expected["meta"]["dtype"], expected["meta"]["shape"])
    assert isinstance(root["untyped_storage"], Storage)
    assert checkpoint.tensors["typed_storage"].dtype.name == "float32"
    parts = {"sparse_coo.indices", "sparse_csr.plain_indices", "quint8.int_repr", "nested.sizes", "untyped_storage"}
    assert parts <= set(checkpoint.tensors)
    assert "meta" not in checkpoint.tensors
    assert any("'meta'" in warning for warning in checkpoint.warnings)


@pytest.mark.parametrize("file", ["zip.pt", "zip_proto4.pt", "legacy.pt"])
def test_objects_are_data_or_inert(file: str) -> None:
    contents, checkpoint = opened("zoo_objects", file)
    expected = expected_of("legacy/zoo_objects")
    plain: dict[str, Any] = expected["plain"]
    root = simplify(contents.root)
    assert root["big"] == int(plain["big"])
    assert root["bytes"] == bytes.fromhex(plain["bytes_hex"])
    assert root["complex"] == complex(*plain["complex"])
    assert root["device"] == plain["device"]
    assert contents.root["dtype"] == Global("torch", plain["dtype"])
    assert (root["f"], root["neg"], root["none"]) == (plain["f"], plain["neg"], plain["none"])
    namespace = {**root["namespace"], "params_dtype": root["namespace"]["params_dtype"].name}
    assert {key: namespace[key] for key in plain["namespace"]} == plain["namespace"]
    assert root["np_arr"].tolist() == plain["np_arr"]
    assert (root["np_f64"], root["np_i64"]) == (plain["np_f64"], plain["np_i64"])
    assert [list(item) for item in root["odict"].items()] == plain["odict"]
    assert list(root["size"]) == plain["size"]
    assert root["unicode"] == plain["unicode"]
    for name, kind in expected["opaque"].items():
        record = contents.root[name]
        assert isinstance(record, Record)
        if name != "with_reduce":  # a bound method; protocol 4 names its module differently
            assert record.path == kind
    assert checkpoint.objects["weird.n"] == contents.root["weird"].get("n")


def test_generations_and_byte_orders_are_told() -> None:
    assert opened("zoo_views", "zip.pt")[1].details["generation"] == "zip"
    assert opened("zoo_views", "legacy.pt")[1].details["generation"] == "legacy"
    assert opened("zoo_legacy_tar", "old.pt")[1].details["generation"] == "tar"
    assert opened("zoo_handmade_zip", "bigendian.pt")[1].details["byteorder"] == "big"
    assert any("compressed" in text for text in opened("zoo_handmade_zip", "deflated.pt")[1].warnings)
    assert any("version" in text for text in opened("zoo_handmade_zip", "no_version.pt")[1].warnings)


def test_training_checkpoints_tell_where_training_stood() -> None:
    path = fixture_path("legacy/averaging/m--epoch=1.ckpt")
    checkpoint = FORMAT.read(look_at(path))
    assert checkpoint.training.epoch == 1
    assert checkpoint.model_prefix == "state_dict."
    assert set(checkpoint.weights()) >= {"w", "h", "half"}


def test_other_archives_are_not_torch_files() -> None:
    for other in ("nemo/nemo1_basic_v3_0_0/toy.nemo", "legacy/zoo_dtypes/expected.json", "legacy/zoo_dtypes"):
        assert not FORMAT.detect(look_at(fixture_path(other)))


def test_a_plain_zip_is_not_a_torch_file(tmp_path: Path) -> None:
    import zipfile

    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("readme.txt", "x")
    assert not FORMAT.detect(look_at(tmp_path / "a.zip"))
