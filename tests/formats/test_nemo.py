"""Reading ``.nemo`` files that NeMo 2.5.3 and 3.0.0 wrote, and refusing damaged and hostile ones."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.support import assert_tensors_equal_expected, expected_of, fixture_path

from anyckpt import verify
from anyckpt.checkpoint import Checkpoint, storage_key
from anyckpt.errors import AnyckptError, FormatError, UnsafeError
from anyckpt.formats.nemo import FORMAT
from anyckpt.formats.registry import look_at
from anyckpt.storage.tar_headers import tar_end, tar_header, tar_padding

BASIC = ["nemo1_basic_v2_5_3", "nemo1_basic_v3_0_0"]
SHARDED = ["nemo1_dist_tp1", "nemo1_dist_tp2"]
ASR = "asr_ctc_conformer_v3_0_0"
WHOLE = [*BASIC, *SHARDED, ASR]
Members = dict[str, bytes]


def archive_of(name: str) -> Path:
    return next(fixture_path(f"nemo/{name}").glob("*.nemo"))


def opened(path: Path) -> Checkpoint:
    location = look_at(path)
    assert FORMAT.detect(location)
    return FORMAT.read(location)


def members_of(name: str) -> Members:
    with tarfile.open(archive_of(name)) as tar:
        return {m.name: tar.extractfile(m).read() for m in tar.getmembers() if m.isfile()}  # type: ignore[union-attr]


def packed(members: Members, path: Path, mode: str = "w:") -> Path:
    with tarfile.open(path, mode) as tar:  # type: ignore[call-overload]
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def unpacked(members: Members, path: Path) -> Path:
    for name, data in members.items():
        file = path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(data)
    return path


def check(checkpoint: Checkpoint, name: str) -> None:
    expected = expected_of(f"nemo/{name}")
    tensors = expected.get("tensors") or expected["global_tensors_by_sharded_key"]
    assert_tensors_equal_expected(checkpoint.tensors, tensors)
    assert checkpoint.config == expected["config"]
    assert checkpoint.warnings == []


@pytest.mark.parametrize("name", WHOLE)
def test_fixture(name: str) -> None:
    checkpoint = opened(archive_of(name))
    expected = expected_of(f"nemo/{name}")
    check(checkpoint, name)
    files = [m if isinstance(m, str) else m["name"] for m in expected["members"]]
    listed = {f"./{member['name']}" for member in checkpoint.details["members"]}
    assert listed == {file for file in files if file not in (".", "./model_weights")}
    assert checkpoint.details["target"] == expected["config"]["target"]
    assert checkpoint.format_version == expected["config"]["nemo_version"]


@pytest.mark.parametrize("name", WHOLE)
@pytest.mark.parametrize("form", ["gzip", "directory", "no prefix", "gnu"])
def test_other_containers(name: str, form: str, tmp_path: Path) -> None:
    members = members_of(name)
    if form == "gzip":
        path = packed(members, tmp_path / "old.nemo", "w:gz")
    elif form == "directory":
        path = unpacked(members, tmp_path / "unpacked")
    elif form == "no prefix":
        path = packed({name.removeprefix("./"): data for name, data in members.items()}, tmp_path / "m.nemo")
    else:
        path = tmp_path / "m.nemo"
        with tarfile.open(path, "w:", format=tarfile.GNU_FORMAT) as tar:
            tar.add(unpacked(members, tmp_path / "unpacked"), arcname=".")
    check(opened(path), name)


@pytest.mark.parametrize("name", BASIC)
def test_tied_weights_share_their_bytes(name: str) -> None:
    tensors = opened(archive_of(name)).tensors
    for names in expected_of(f"nemo/{name}")["tied"]:
        assert len({storage_key(tensors[tied]) for tied in names}) == 1
    assert storage_key(tensors["bn.weight"]) != storage_key(tensors["emb.weight"])


def test_nested_models_and_artifacts() -> None:
    checkpoint = opened(archive_of("nemo1_basic_v3_0_0"))
    members = members_of("nemo1_basic_v3_0_0")
    assert "child_model.lin.weight" in checkpoint.tensors
    assert checkpoint.config["child"]["target"] == "tests.core.toy_models.ToyChild"
    vocabulary = checkpoint.config["child"]["vocab_file"].removeprefix("nemo:")
    assert checkpoint.artifacts[vocabulary].read_all() == members[f"./{vocabulary}"]
    assert checkpoint.tokenizer is not None and checkpoint.tokenizer.model_file is not None
    model = checkpoint.tokenizer.files[checkpoint.tokenizer.model_file]
    assert model.read_all() == members[f"./{checkpoint.tokenizer.model_file}"]
    assert checkpoint.config_kind is None and checkpoint.dialect is None


def test_megatron_model_is_recognised() -> None:
    for name, ranks in (("nemo1_dist_tp1", 1), ("nemo1_dist_tp2", 2)):
        checkpoint = opened(archive_of(name))
        assert (checkpoint.config_kind, checkpoint.dialect) == ("nemo1", "nemo-sharded")
        assert checkpoint.layout.tensor_parallel == ranks
        assert checkpoint.tokenizer is not None and checkpoint.tokenizer.library == "sentencepiece"
        assert checkpoint.ignored and all(key.endswith("_extra_state") for key in checkpoint.ignored)


def test_sharded_plain_tar_is_read_in_place() -> None:
    path = archive_of("nemo1_dist_tp2")
    for tensor in opened(path).tensors.values():
        assert {piece.source.locate()[0] for piece in tensor.pieces()} == {str(path.resolve())}


# -- bad input -------------------------------------------------------------------------------------------------


def without(*names: str) -> Callable[[Members], Members]:
    return lambda members: {name: data for name, data in members.items() if name not in names}


def with_config(data: bytes) -> Callable[[Members], Members]:
    return lambda members: {**members, "./model_config.yaml": data}


DAMAGES: dict[str, tuple[Callable[[Members], Members], str]] = {
    "no config": (without("./model_config.yaml"), "has no model_config.yaml"),
    "no weights": (without("./model_weights.ckpt"), "has no weights"),
    "something else": (lambda members: {"./readme": b""}, "has no model_config.yaml"),
    "below a folder": (lambda members: {f"./top/{n}": d for n, d in members.items()}, "found top/model_config.yaml"),
    "empty weights": (lambda members: {**members, "./model_weights.ckpt": b""}, "is empty"),
    "text weights": (lambda members: {**members, "./model_weights.ckpt": b"hello"}, "is not a torch file"),
    "empty config": (with_config(b""), "is not a configuration"),
    "list config": (with_config(b"- 1\n"), "is not a configuration"),
    "broken config": (with_config(b"a: [1"), "is not valid YAML"),
    "binary config": (with_config(bytes(range(256))), "is not valid YAML"),
    "object config": (with_config(b"a: !!python/object/apply:os.system [id]\n"), "asks to build an object"),
    "two layouts": (
        lambda members: {**members, "./model_weights/.metadata": b"x"},
        "more than one layout",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("container", ["tar", "gzip", "directory"])
def test_damaged_contents(damage: str, container: str, tmp_path: Path) -> None:
    change, message = DAMAGES[damage]
    members = change(members_of("nemo1_basic_v3_0_0"))
    if container == "directory":
        path = tmp_path / "unpacked"
        path.mkdir()
        unpacked(members, path)
    else:
        path = packed(members, tmp_path / "bad.nemo", "w:" if container == "tar" else "w:gz")
    with pytest.raises(FormatError, match=message) as caught:
        FORMAT.read(look_at(path))
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_missing_artifact_is_damage(tmp_path: Path) -> None:
    members = {n: d for n, d in members_of("nemo1_basic_v3_0_0").items() if "child_vocab" not in n}
    checkpoint = opened(packed(members, tmp_path / "m.nemo"))
    (warning,) = checkpoint.warnings
    assert "child.vocab_file" in warning and "child_vocab.txt" in warning
    found = verify(tmp_path / "m.nemo")
    assert not found.sound and [problem.problem for problem in found.problems] == [warning]
    assert warning not in found.warnings
    members[f"{warning.split(chr(39))[1]}/part"] = b"x"
    assert verify(packed(members, tmp_path / "folder.nemo")).sound  # the reference is to a folder, which is there


@pytest.mark.parametrize(
    ("name", "compress"), [("bzip2", bz2.compress), ("xz", lzma.compress), ("zip", lambda data: b"PK\x03\x04" + data)]
)
def test_other_compressions_are_named(name: str, compress: Callable[[bytes], bytes], tmp_path: Path) -> None:
    path = tmp_path / "m.nemo"
    path.write_bytes(compress(archive_of(ASR).read_bytes()))
    assert FORMAT.detect(look_at(path))
    with pytest.raises(FormatError, match=f"is a {name} file"):
        FORMAT.read(look_at(path))


@pytest.mark.parametrize("data", [b"version https://git-lfs.github.com/spec/v1\n", b"x", bytes(512), bytes(20000)])
def test_not_an_archive(data: bytes, tmp_path: Path) -> None:
    path = tmp_path / "m.nemo"
    path.write_bytes(data)
    with pytest.raises(FormatError, match="is not a tar archive"):
        FORMAT.read(look_at(path))


@pytest.mark.parametrize("name", ["nemo1_basic_v3_0_0", "nemo1_dist_tp1"])
def test_truncated_anywhere(name: str, tmp_path: Path) -> None:
    whole = archive_of(name).read_bytes()
    end = len(whole.rstrip(b"\0")) // 512 * 512 + 512
    path = tmp_path / "m.nemo"
    for length in range(1, end + 512, max(97, end // 60)):
        path.write_bytes(whole[:length])
        with pytest.raises(FormatError, match=r"m\.nemo"):
            FORMAT.read(look_at(path))


def test_truncated_gzip(tmp_path: Path) -> None:
    whole = gzip.compress(archive_of("nemo1_basic_v3_0_0").read_bytes())
    path = tmp_path / "m.nemo"
    for length in range(3, len(whole) - 8, len(whole) // 25):
        path.write_bytes(whole[:length])
        with pytest.raises(FormatError, match=r"m\.nemo"):
            FORMAT.read(look_at(path))


def test_flipped_bytes_never_escape(tmp_path: Path) -> None:
    whole = archive_of("nemo1_dist_tp1").read_bytes()
    path = tmp_path / "m.nemo"
    for position in range(0, len(whole), 401):
        changed = bytearray(whole)
        changed[position] ^= 0xFF
        path.write_bytes(changed)
        try:
            for tensor in FORMAT.read(look_at(path)).tensors.values():
                tensor.numpy()
        except AnyckptError as error:
            assert "\n" not in str(error)


def test_lying_config_size(tmp_path: Path) -> None:
    path = tmp_path / "m.nemo"
    with open(path, "wb") as file:
        file.write(tar_header("./model_config.yaml", 50 << 30))
        file.seek(50 << 30, 1)
        file.write(tar_header("./model_weights.ckpt", 0) + tar_end(0))
    with pytest.raises(FormatError, match="too large"):
        FORMAT.read(look_at(path))


def test_gzip_of_zeros_is_not_unpacked_to_memory(tmp_path: Path) -> None:
    path = tmp_path / "m.nemo"
    with gzip.open(path, "wb", compresslevel=9) as file:
        file.write(tar_header("./model_config.yaml", 200 << 20))
        for _ in range(200):
            file.write(bytes(1 << 20))
        file.write(tar_end(0))
    with pytest.raises(FormatError, match="too large"):
        FORMAT.read(look_at(path))


def test_link_to_elsewhere(tmp_path: Path) -> None:
    path = tmp_path / "m.nemo"
    with tarfile.open(path, "w:") as tar:
        tar.add(archive_of(ASR), arcname="./model_weights.ckpt")
        info = tarfile.TarInfo("./model_config.yaml")
        info.type, info.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(info)
    with pytest.raises(UnsafeError, match="symbolic link"):
        FORMAT.read(look_at(path))


# -- what is and what is not a .nemo ---------------------------------------------------------------------------


def test_detection(tmp_path: Path) -> None:
    members = members_of("nemo1_basic_v3_0_0")
    assert FORMAT.detect(look_at(packed(members, tmp_path / "model.tar")))
    assert FORMAT.detect(look_at(packed(members, tmp_path / "model.tar.gz", "w:gz")))
    other = {"readme.txt": b"hello"}
    assert not FORMAT.detect(look_at(packed(other, tmp_path / "other.tar")))
    assert not FORMAT.detect(look_at(packed(other, tmp_path / "other.tar.gz", "w:gz")))
    assert FORMAT.detect(look_at(packed(other, tmp_path / "other.nemo")))
    torch_tar = dict.fromkeys(("sys_info", "pickle", "storages", "tensors"), b"")
    assert not FORMAT.detect(look_at(packed(torch_tar, tmp_path / "old.pt")))
    (tmp_path / "weights.bin").write_bytes(gzip.compress(b"not a tar"))
    assert not FORMAT.detect(look_at(tmp_path / "weights.bin"))
    assert not FORMAT.detect(look_at(tmp_path))


def test_huge_sparse_archive(tmp_path: Path) -> None:
    """100 GB of weights: the member is found without reading it, and its archive directory is at its end."""
    weights = members_of("nemo1_basic_v3_0_0")["./model_weights.ckpt"]
    config = members_of("nemo1_basic_v3_0_0")["./model_config.yaml"]
    huge = 100 << 30
    path = tmp_path / "huge.nemo"
    with open(path, "wb") as file:
        file.write(tar_header("./filler.bin", huge))
        file.seek(huge, 1)
        for name, data in (("./model_config.yaml", config), ("./model_weights.ckpt", weights)):
            file.write(tar_header(name, len(data)) + data + tar_padding(len(data)))
        file.write(tar_end(0))
    from anyckpt.storage import read_count

    before = read_count.bytes_read()
    checkpoint = FORMAT.read(look_at(path))
    assert_tensors_equal_expected(checkpoint.tensors, expected_of("nemo/nemo1_basic_v3_0_0")["tensors"])
    assert read_count.bytes_read() - before < 40_000
