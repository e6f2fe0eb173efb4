"""Tensors of several parts in formats that hold tensors only: nothing that they need is lost, or it is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from tests.support import fixture_path

import anyckpt
from anyckpt.containers.torch_file.values import QuantizedTensor
from anyckpt.errors import UsageError
from anyckpt.formats import registry

QUANTIZED = fixture_path("legacy/modules/quantized_dynamic_state_dict.pt")
KINDS = fixture_path("legacy/zoo_kinds/zip.pt")


def test_quantized_weights_keep_scale_and_zero_point(tmp_path: Path) -> None:
    out = tmp_path / "out.safetensors"
    done = anyckpt.convert(QUANTIZED, out, to="safetensors")
    assert any("quantized" in note and "head._packed_params" in note for note in done.notes)
    source, written = registry.read(QUANTIZED), registry.read(out).tensors
    for name, value in source.objects.items():
        if not isinstance(value, QuantizedTensor):
            continue
        assert name not in done.ignored
        integers, scale, zero = (written[f"{name}.{part}"].numpy() for part in ("int_repr", "scale", "zero_point"))
        assert (scale.item(), zero.item()) == (value.scale, value.zero_point) and scale.dtype == np.float64
        assert np.array_equal(integers, value.int_repr.numpy())


def test_every_kind_of_several_parts_is_whole_or_refused(tmp_path: Path) -> None:
    out = tmp_path / "out.safetensors"
    with pytest.raises(UsageError, match="sparse_csr") as caught:
        anyckpt.convert(KINDS, out, to="safetensors")
    assert caught.value.tensor == "sparse_csr" and "--exclude" in str(caught.value)
    anyckpt.convert(KINDS, out, to="safetensors", exclude="sparse_csr*")
    written = {name: tensor.numpy().tolist() for name, tensor in registry.read(out).tensors.items()}
    source = registry.read(KINDS).objects
    assert written["sparse_coo.shape"] == list(source["sparse_coo"].shape)
    assert written["quint8.scale"] == source["quint8"].scale and written["quint8.zero_point"] == 3
    assert written["qint8_ch.axis"] == source["qint8_ch"].axis and len(written["qint8_ch.scale"]) == 2
    assert {f"nested.{part}" for part in ("buffer", "sizes", "strides", "offsets")} <= written.keys()
    with pytest.raises(UsageError, match="some are left out"):
        anyckpt.convert(KINDS, tmp_path / "x", to="safetensors", include=["quint8*", "nested.buffer"])


def test_formats_with_objects_keep_them_whole(tmp_path: Path) -> None:
    for target in ("torch", "lightning"):
        anyckpt.convert(QUANTIZED, tmp_path / target, to=target)
        objects = registry.read(tmp_path / target).objects
        assert sum(isinstance(value, QuantizedTensor) for value in objects.values()) == 2


def test_what_a_quantized_module_says_besides_tensors_stays_in_a_copy(tmp_path: Path) -> None:
    done = anyckpt.convert(QUANTIZED, tmp_path / "copy.pt", to="torch")
    assert done.ignored == {}
    assert registry.read(tmp_path / "copy.pt").objects.keys() == registry.read(QUANTIZED).objects.keys()
    assert not anyckpt.diff(QUANTIZED, tmp_path / "copy.pt", raw=True)
    done = anyckpt.convert(QUANTIZED, tmp_path / "part.pt", to="torch", exclude="conv1*")
    assert "conv1.0._packed_params.dtype" in done.ignored
    written = registry.read(tmp_path / "part.pt").objects
    assert written.keys() == {"head._packed_params.dtype", "head._packed_params._packed_params.0"}
