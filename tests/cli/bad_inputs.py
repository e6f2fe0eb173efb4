"""Bad inputs, each as a function that builds one in an empty folder and gives the path to open."""

from __future__ import annotations

import gzip
import io
import json
import os
import shutil
import struct
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.support import fixture_path

Build = Callable[[Path], Path]

UNREADABLE: dict[str, tuple[Build, str]] = {}
"""What cannot be opened: name -> how to build it, and what the message must say."""

UNMAPPABLE: dict[str, tuple[Build, str]] = {}
"""What can be opened and not converted to another naming: the same."""

LLAMA = "families/llama/hf"
NEMO = "nemo/nemo1_basic_v3_0_0/toy.nemo"
NEMO2 = "nemo/nemo2_llama_hftok/model"
DCP = "mcore/dcp_fsdp_w2/ckpt"


def bad(table: dict[str, tuple[Build, str]], text: str) -> Callable[[Build], Build]:
    def register(build: Build) -> Build:
        table[build.__name__] = (build, text)
        return build

    return register


unreadable = lambda text: bad(UNREADABLE, text)  # noqa: E731
unmappable = lambda text: bad(UNMAPPABLE, text)  # noqa: E731


# -- missing, empty, truncated, wrong magic ------------------------------------------------------------------


@unreadable("does not exist; check the path")
def missing_path(folder: Path) -> Path:
    return folder / "nothing.nemo"


@unreadable("is not a checkpoint of any known format")
def empty_directory(folder: Path) -> Path:
    (folder / "model").mkdir()
    return folder / "model"


def _of_suffixes(name: str, suffixes: tuple[str, ...], contents: bytes, text: str) -> None:
    for suffix in suffixes:

        def build(folder: Path, suffix: str = suffix) -> Path:
            path = folder / f"model{suffix}"
            path.write_bytes(contents)
            return path

        UNREADABLE[f"{name}_{suffix[1:]}"] = (build, text)


_SUFFIXES = (".nemo", ".pt", ".pth", ".bin", ".ckpt", ".safetensors")
_of_suffixes("empty", _SUFFIXES, b"", "is empty")
_of_suffixes("text", _SUFFIXES, b"This is not a checkpoint. " * 100, "model.")
_of_suffixes("one_byte", _SUFFIXES, b"\x80", "model.")
_of_suffixes("zeros", _SUFFIXES, bytes(4096), "model.")


def _truncations(name: str, relative: str, cuts: tuple[float, ...]) -> None:
    for number, cut in enumerate(cuts):

        def build(folder: Path, cut: float = cut) -> Path:
            source = fixture_path(relative)
            data = source.read_bytes()
            path = folder / source.name
            path.write_bytes(data[: int(cut) if cut >= 1 or cut < 0 else int(cut * len(data))])
            return path

        UNREADABLE[f"truncated_{name}_{number}"] = (build, "")


_truncations("zip", "legacy/zoo_kinds/zip.pt", (2, 30, 0.1, 0.5, 0.9, -1))
_truncations("stream", "legacy/zoo_objects/legacy.pt", (2, 12, 0.1, 0.5, 0.9))
_truncations("tar_of_torch", "legacy/zoo_legacy_tar/old.pt", (2, 200, 0.1, 0.3))
_truncations("nemo", NEMO, (2, 512, 1000, 0.2, 0.5))
_truncations("safetensors", "families/llama/hf/model.safetensors", (4, 8, 100, 0.5, -1))


@unreadable("model.nemo")
def truncated_gzip(folder: Path) -> Path:
    data = gzip.compress(fixture_path(NEMO).read_bytes())
    path = folder / "model.nemo"
    path.write_bytes(data[: len(data) // 2])
    return path


_POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab2935\nsize 12345\n"
_of_suffixes("git_lfs_pointer", _SUFFIXES, _POINTER, "Git LFS pointer")


@unreadable("Git LFS pointer")
def git_lfs_pointer_in_a_folder(folder: Path) -> Path:
    (folder / "model").mkdir()
    shutil.copy(fixture_path(LLAMA) / "config.json", folder / "model")
    (folder / "model" / "pytorch_model.bin").write_bytes(_POINTER)
    return folder / "model"


@unreadable("is not a regular file")
def named_pipe(folder: Path) -> Path:
    os.mkfifo(folder / "model.nemo")
    return folder / "model.nemo"


# -- safetensors ---------------------------------------------------------------------------------------------


def safetensors(path: Path, header: Any, data: bytes, length: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path


def entry(shape: list[int], begin: int, end: int) -> dict[str, Any]:
    return {"dtype": "F32", "shape": shape, "data_offsets": [begin, end]}


@unreadable("tensor 'b'")
def overlapping_ranges(folder: Path) -> Path:
    return safetensors(folder / "m.safetensors", {"a": entry([2], 0, 8), "b": entry([2], 4, 12)}, bytes(12))


@unreadable("tensor 'a'")
def offsets_past_the_end(folder: Path) -> Path:
    return safetensors(folder / "m.safetensors", {"a": entry([4], 0, 16)}, bytes(8))


@unreadable("m.safetensors")
def header_of_many_gigabytes(folder: Path) -> Path:
    return safetensors(folder / "m.safetensors", {"a": entry([2], 0, 8)}, bytes(8), length=1 << 40)


@unreadable("tensor 'a'")
def negative_shape(folder: Path) -> Path:
    return safetensors(folder / "m.safetensors", {"a": entry([-2], 0, 8)}, bytes(8))


@unreadable("tensor 'a'")
def overflowing_shape(folder: Path) -> Path:
    return safetensors(folder / "m.safetensors", {"a": entry([1 << 62, 4], 0, 0)}, b"")


@unreadable("is not valid JSON")
def header_that_is_no_json(folder: Path) -> Path:
    return safetensors(folder / "m.safetensors", b'{"a": ', b"")


@unreadable("is not valid JSON")
def header_nested_deeply(folder: Path) -> Path:
    return safetensors(folder / "m.safetensors", b'{"a":' + b"[" * 100_000, b"")


@unreadable("occurs twice")
def duplicate_names_in_a_header(folder: Path) -> Path:
    one = json.dumps(entry([1], 0, 4)).encode()
    return safetensors(folder / "m.safetensors", b'{"a":' + one + b',"a":' + one + b"}", bytes(4))


# -- folders -------------------------------------------------------------------------------------------------


def copied(relative: str, folder: Path) -> Path:
    target = folder / "model"
    shutil.copytree(fixture_path(relative), target)
    return target


@unreadable("model-00002-of-00002.safetensors")
def missing_shard(folder: Path) -> Path:
    model = copied(LLAMA, folder)
    (model / "model.safetensors").rename(model / "model-00001-of-00002.safetensors")
    names = {"model.norm.weight": "model-00001-of-00002.safetensors", "x": "model-00002-of-00002.safetensors"}
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    return model


@unreadable("is not valid JSON")
def broken_config(folder: Path) -> Path:
    model = copied(LLAMA, folder)
    (model / "config.json").write_text("{'num_layers'")
    return model


@unreadable("io.json")
def empty_io_json(folder: Path) -> Path:
    model = copied(NEMO2, folder)
    (model / "context/io.json").write_bytes(b"")
    return model


@unreadable(".distcp")
def missing_file_of_a_distributed_checkpoint(folder: Path) -> Path:
    model = copied(DCP, folder)
    next(model.glob("*.distcp")).unlink()
    return model


@unreadable(".distcp")
def truncated_file_of_a_distributed_checkpoint(folder: Path) -> Path:
    model = copied(DCP, folder)
    path = next(model.glob("*.distcp"))
    path.write_bytes(path.read_bytes()[:100])
    return model


@unreadable(".metadata")
def empty_metadata_of_a_distributed_checkpoint(folder: Path) -> Path:
    model = copied(DCP, folder)
    (model / ".metadata").write_bytes(b"")
    return model


# -- NeMo archives -------------------------------------------------------------------------------------------


def members(relative: str = NEMO) -> list[tuple[tarfile.TarInfo, bytes]]:
    with tarfile.open(fixture_path(relative)) as tar:
        return [(info, tar.extractfile(info).read() if info.isfile() else b"") for info in tar.getmembers()]  # type: ignore[union-attr]


def archive(path: Path, listed: list[tuple[tarfile.TarInfo, bytes]]) -> Path:
    with tarfile.open(path, "w") as tar:
        for info, data in listed:
            tar.addfile(info, io.BytesIO(data))
    return path


def info(name: str, size: int = 0, kind: bytes = tarfile.REGTYPE, target: str = "") -> tarfile.TarInfo:
    made = tarfile.TarInfo(name)
    made.size, made.type, made.linkname = size, kind, target
    return made


@unreadable("model_config.yaml")
def nemo_without_config(folder: Path) -> Path:
    return archive(folder / "m.nemo", [(i, d) for i, d in members() if not i.name.endswith("model_config.yaml")])


@unreadable("weights")
def nemo_without_weights(folder: Path) -> Path:
    return archive(folder / "m.nemo", [(i, d) for i, d in members() if not i.name.endswith(".ckpt")])


@unreadable("model_config.yaml")
def nemo_with_two_configs(folder: Path) -> Path:
    listed = members()
    return archive(folder / "m.nemo", [*listed, *(x for x in listed if x[0].name.endswith("model_config.yaml"))])


def _with_member(name: str, member: tarfile.TarInfo, text: str) -> None:
    def build(folder: Path) -> Path:
        return archive(folder / "m.nemo", [*members(), (member, bytes(member.size))])

    UNREADABLE[name] = (build, text)


_with_member("nemo_with_an_absolute_member", info("/etc/anyckpt-was-here", 3), "/etc/anyckpt-was-here")
_with_member("nemo_with_a_member_that_climbs_out", info("../anyckpt-was-here", 3), "anyckpt-was-here")
_with_member("nemo_with_a_member_that_climbs_inside", info("a/../../anyckpt-was-here", 3), "anyckpt-was-here")
_with_member("nemo_with_a_symbolic_link", info("./link", kind=tarfile.SYMTYPE, target="/etc/passwd"), "link")
_with_member("nemo_with_a_hard_link", info("./link", kind=tarfile.LNKTYPE, target="./model_config.yaml"), "link")
_with_member("nemo_with_a_device", info("./device", kind=tarfile.CHRTYPE), "device")
_with_member("nemo_with_a_pipe", info("./pipe", kind=tarfile.FIFOTYPE), "pipe")


# -- models --------------------------------------------------------------------------------------------------


def edited(folder: Path, change: Callable[[dict[str, tuple[str, list[int], bytes]]], None]) -> Path:
    """A copy of the Llama fixture with other tensors, as name -> (dtype, shape, bytes)."""
    model = copied(LLAMA, folder)
    data = (model / "model.safetensors").read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + length])
    header.pop("__metadata__", None)
    base = 8 + length
    tensors = {
        name: (e["dtype"], e["shape"], data[base + e["data_offsets"][0] : base + e["data_offsets"][1]])
        for name, e in header.items()
    }
    change(tensors)
    made, blob = {}, b""
    for name, (kind, shape, raw) in tensors.items():
        made[name] = {"dtype": kind, "shape": shape, "data_offsets": [len(blob), len(blob) + len(raw)]}
        blob += raw
    safetensors(model / "model.safetensors", made, blob)
    return model


@unmappable("layer 1 is missing")
def missing_layer(folder: Path) -> Path:
    def change(tensors: dict[str, Any]) -> None:
        for name in [n for n in tensors if ".layers.1." in n]:
            del tensors[name]

    return edited(folder, change)


@unmappable("model.layers.0.mlp.up_proj.weight")
def missing_tensor(folder: Path) -> Path:
    return edited(folder, lambda tensors: tensors.pop("model.layers.0.mlp.up_proj.weight") and None)


@unmappable("model.layers.0.surprise.weight")
def unknown_tensor_name(folder: Path) -> Path:
    return edited(folder, lambda t: t.update({"model.layers.0.surprise.weight": ("F32", [1], bytes(4))}))


@unmappable("model.layers.0.self_attn.k_proj.weight")
def shape_against_config(folder: Path) -> Path:
    def change(tensors: dict[str, Any]) -> None:
        name = "model.layers.0.self_attn.k_proj.weight"
        kind, shape, raw = tensors[name]
        tensors[name] = (kind, [shape[0] // 2, shape[1]], raw[: len(raw) // 2])

    return edited(folder, change)


@unmappable("model.layers.0.self_attn.q_proj.weight")
def config_without_heads(folder: Path) -> Path:
    model = copied(LLAMA, folder)
    config = json.loads((model / "config.json").read_text())
    del config["num_attention_heads"]
    (model / "config.json").write_text(json.dumps(config))
    return model


@unmappable("num_hidden_layers")
def config_of_absurd_size(folder: Path) -> Path:
    model = copied(LLAMA, folder)
    config = json.loads((model / "config.json").read_text())
    config["num_hidden_layers"] = 10**30
    (model / "config.json").write_text(json.dumps(config))
    return model


@unmappable("--family")
def unknown_family(folder: Path) -> Path:
    model = copied(LLAMA, folder)
    config = json.loads((model / "config.json").read_text())
    config.update(model_type="mystery", architectures=["MysteryForCausalLM"])
    (model / "config.json").write_text(json.dumps(config))
    return model
