"""Tar archives: what Python's tarfile and hand-made headers hold, and everything that must be refused."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

from anyckpt.errors import FormatError, UnsafeError
from anyckpt.storage.local_file import LocalFile
from anyckpt.storage.source import ByteSource, MemorySource
from anyckpt.storage.tar import TarFolder, looks_like_tar, read_tar
from anyckpt.storage.tar_headers import BLOCK, tar_end, tar_header, tar_padding

FORMATS = [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]
FILES = {
    "./model_config.yaml": b"a: 1\n",
    "./model_weights.ckpt": bytes(range(256)) * 5,
    "./empty": b"",
    "./model_weights/__0_0.distcp": b"x" * 512,
}


def archive(files: dict[str, bytes], form: int = tarfile.PAX_FORMAT) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:", format=form) as tar:
        add_directory(tar, ".")
        for name, data in files.items():
            add(tar, name, data)
    return buffer.getvalue()


def add(tar: tarfile.TarFile, name: str, data: bytes, **attributes: object) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    for key, value in attributes.items():
        setattr(info, key, value)
    tar.addfile(info, io.BytesIO(data))


def add_directory(tar: tarfile.TarFile, name: str) -> None:
    info = tarfile.TarInfo(name)
    info.type = tarfile.DIRTYPE
    tar.addfile(info)


def made_by(change: Callable[[tarfile.TarFile], None], form: int = tarfile.PAX_FORMAT) -> MemorySource:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:", format=form) as tar:
        add(tar, "./model_config.yaml", b"a: 1\n")
        change(tar)
    return MemorySource(buffer.getvalue(), "hostile.nemo")


def rewritten(block: bytearray) -> bytes:
    """A header with the checksum that its bytes have."""
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


@pytest.mark.parametrize("form", FORMATS)
def test_members_are_those_that_tarfile_wrote(form: int) -> None:
    source = MemorySource(archive(FILES, form))
    members = read_tar(source)
    assert looks_like_tar(source.read(0, 512))
    assert {f"./{m.name}": m.source.read_all() for m in members.values() if not m.is_directory} == FILES
    assert members[""].is_directory
    assert [m.stored_name for m in members.values() if not m.is_directory] == list(FILES)


@pytest.mark.parametrize("form", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
@pytest.mark.parametrize("name", ["d/" + "long" * 40, "ü" * 60, "x" * 300, "a" * 99 + "é"])
def test_long_and_foreign_names(form: int, name: str) -> None:
    members = read_tar(MemorySource(archive({f"./{name}": b"data", "./after": b"more"}, form)))
    assert members[name].source.read_all() == b"data"
    assert members["after"].source.read_all() == b"more"


def test_split_ustar_name() -> None:
    name = "/".join(["directory" * 3] * 5) + "/file"
    members = read_tar(MemorySource(archive({name: b"data"}, tarfile.USTAR_FORMAT)))
    assert members[name].source.read_all() == b"data"


def test_float_times_do_not_disturb() -> None:
    source = made_by(lambda tar: add(tar, "./weights", b"w", mtime=1234.5))
    assert read_tar(source)["weights"].mtime == 1234


def test_v7_directory_is_told_by_its_slash() -> None:
    block = bytearray(tar_header("folder/", 0))
    block[156] = 0
    block[257:265] = bytes(8)
    members = read_tar(MemorySource(rewritten(block) + tar_end(512)))
    assert members["folder"].is_directory


def test_base_256_size() -> None:
    data = bytearray(archive({"./big": b"q" * 700}, tarfile.GNU_FORMAT))
    at = data.index(b"./big")
    block = data[at : at + BLOCK]
    block[124:136] = b"\x80" + (700).to_bytes(11, "big")
    data[at : at + BLOCK] = rewritten(block)
    assert read_tar(MemorySource(data))["big"].source.read_all() == b"q" * 700


def test_global_pax_header_is_skipped() -> None:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:", pax_headers={"comment": "git archive"}) as tar:
        add(tar, "a", b"1")
    assert read_tar(MemorySource(buffer.getvalue()))["a"].source.read_all() == b"1"


HAZARDS: dict[str, Callable[[tarfile.TarFile], None]] = {
    "absolute": lambda tar: add(tar, "/etc/passwd", b"x"),
    "climbs": lambda tar: add(tar, "../evil", b"x"),
    "climbs from within": lambda tar: add(tar, "./a/../../evil", b"x"),
    "climbs with backslashes": lambda tar: add(tar, "a\\..\\..\\evil", b"x"),
    "drive": lambda tar: add(tar, "C:\\evil", b"x"),
    "climbing directory": lambda tar: add_directory(tar, "../evil"),
    "control character": lambda tar: add(tar, "a\nb", b"x"),
    "symlink": lambda tar: add(tar, "link", b"", type=tarfile.SYMTYPE, linkname="/etc/passwd"),
    "inner symlink": lambda tar: add(tar, "link", b"", type=tarfile.SYMTYPE, linkname="model_config.yaml"),
    "hard link": lambda tar: add(tar, "link", b"", type=tarfile.LNKTYPE, linkname="./model_config.yaml"),
    "character device": lambda tar: add(tar, "null", b"", type=tarfile.CHRTYPE),
    "block device": lambda tar: add(tar, "disk", b"", type=tarfile.BLKTYPE),
    "pipe": lambda tar: add(tar, "pipe", b"", type=tarfile.FIFOTYPE),
    "sparse": lambda tar: add(tar, "sparse", b"", type=tarfile.GNUTYPE_SPARSE),
    "twice": lambda tar: add(tar, "./model_config.yaml", b"other"),
    "twice, spelled otherwise": lambda tar: add(tar, "model_config.yaml", b"other"),
    "file and directory": lambda tar: add(tar, "./model_config.yaml/inner", b"other"),
    "file and directory of one name": lambda tar: add_directory(tar, "./model_config.yaml"),
    "nameless file": lambda tar: add(tar, "./.", b"x"),
}


@pytest.mark.parametrize("hazard", HAZARDS)
@pytest.mark.parametrize("form", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_hazards_are_refused(hazard: str, form: int) -> None:
    with pytest.raises(UnsafeError, match=r"^hostile\.nemo: ") as caught:
        read_tar(made_by(HAZARDS[hazard], form))
    assert "\n" not in str(caught.value)


def test_pax_path_counts_rather_than_the_header() -> None:
    with pytest.raises(UnsafeError):
        read_tar(made_by(lambda tar: add(tar, "fine", b"x", pax_headers={"path": "../../evil"})))


def test_repeated_directory_is_harmless() -> None:
    assert read_tar(made_by(lambda tar: (add_directory(tar, "d"), add_directory(tar, "d/"))[0]))["d"].is_directory


def test_truncation_anywhere_is_found() -> None:
    whole = archive({"./a": b"x" * 700, "./" + "n" * 200: b"y" * 100})
    end = len(whole.rstrip(b"\0")) // BLOCK * BLOCK + BLOCK + 2 * BLOCK
    for length in [*range(1, end, 128), *range(BLOCK, end, BLOCK)]:
        with pytest.raises(FormatError, match="truncated"):
            read_tar(MemorySource(whole[:length]))
    assert len(read_tar(MemorySource(whole[:end]))) == 3


def test_truncated_payload_names_the_member() -> None:
    whole = archive({"./a": b"x" * 700, "./weights": b"y" * 5000})
    with pytest.raises(FormatError, match=r"member './weights'.*expected at least.*found"):
        read_tar(MemorySource(whole[: whole.index(b"yyyy") + 100]))


def damaged(offset: int, data: bytes, *, mend: bool = True) -> MemorySource:
    whole = bytearray(archive({"./weights": b"y" * 100}))
    at = whole.index(b"./weights")
    block = whole[at : at + BLOCK]
    block[offset : offset + len(data)] = data
    whole[at : at + BLOCK] = rewritten(block) if mend else block
    return MemorySource(whole, "damaged.nemo")


@pytest.mark.parametrize(
    "source",
    [
        damaged(0, b"./weightz", mend=False),
        damaged(124, b"\xff" * 12),
        damaged(124, b"\x80" + b"\xff" * 11),
        damaged(124, b"99999999999\0"),
        damaged(124, b"77777777777\0"),
        damaged(124, b"\x81" + b"\0" * 11),
        damaged(156, b"9"),
        damaged(156, b"x"),
        damaged(156, b"L"),
        damaged(0, b"\xff\xfe"),
    ],
    ids=range(10),
)
def test_damaged_headers(source: MemorySource) -> None:
    with pytest.raises(FormatError, match=r"^damaged\.nemo: "):
        read_tar(source)


@pytest.mark.parametrize(
    "record",
    [
        b"12 path=a\n",
        b"9 path=a",
        b"x path=a\n",
        b"9999999999 path=a\n",
        b"-9 path=a\n",
        b"10 pathxxa\n",
        b"9path=abc\n",
    ],
)
def test_damaged_pax_records(record: bytes) -> None:
    header = bytearray(tar_header("x", len(record)))
    header[156] = ord("x")
    data = rewritten(header) + record + tar_padding(len(record)) + tar_header("a", 0) + tar_end(3 * BLOCK)
    with pytest.raises(FormatError, match="extended header"):
        read_tar(MemorySource(data))


@pytest.mark.parametrize("size", ["-1", "1e3", "9" * 30, "9" * 18])
def test_lying_pax_sizes(size: str) -> None:
    source = made_by(lambda tar: add(tar, "w", b"", pax_headers={"size": size}))
    with pytest.raises(FormatError):
        read_tar(source)


def test_huge_extended_header_is_not_read() -> None:
    header = bytearray(tar_header("x", 1 << 30))
    header[156] = ord("L")
    with pytest.raises(UnsafeError, match="too large"):
        read_tar(MemorySource(rewritten(header) + bytes(4096)))


def test_zero_block_between_members() -> None:
    data = tar_header("a", 0) + bytes(BLOCK) + tar_header("b", 0) + tar_end(3 * BLOCK)
    with pytest.raises(FormatError, match="missing"):
        read_tar(MemorySource(data))


def test_extended_header_without_member() -> None:
    record = b"10 path=a\n"
    header = bytearray(tar_header("x", len(record)))
    header[156] = ord("x")
    with pytest.raises(FormatError, match="no member"):
        read_tar(MemorySource(rewritten(header) + record + tar_padding(len(record)) + tar_end(2 * BLOCK)))


class Counting(ByteSource):
    """A source that counts what is read of it."""

    __slots__ = ("base", "bytes", "reads")

    def __init__(self, base: ByteSource) -> None:
        self.base, self.name, self.path, self.size = base, base.name, base.path, base.size
        self.bytes = self.reads = 0

    def _read_into(self, offset: int, buffer: memoryview) -> None:
        self.reads += 1
        self.bytes += len(buffer)
        self.base._read_into(offset, buffer)


def test_huge_archive_opens_with_a_few_small_reads(tmp_path: Path) -> None:
    huge = 100 << 30
    path = tmp_path / "huge.nemo"
    with open(path, "wb") as file:
        file.write(tar_header("./model_config.yaml", 5) + b"a: 1\n" + tar_padding(5))
        file.write(tar_header("./model_weights.ckpt", huge))
        file.seek(huge, 1)
        file.write(tar_end(0))
    source = Counting(LocalFile(path))
    members = read_tar(source)
    assert members["model_weights.ckpt"].size == huge
    assert source.reads == 6 and source.bytes <= 6 * BLOCK
    assert tarfile.open(path).getmember("./model_weights.ckpt").size == huge


@pytest.mark.parametrize("name", ["./model_config.yaml", "./" + "n" * 150, "./ü.txt", "./a/" * 40 + "b"])
@pytest.mark.parametrize("size", [0, 5, 8 << 30, 100 << 30])
def test_headers_are_those_of_tarfile(name: str, size: int) -> None:
    info = tarfile.TarInfo(name)
    info.size = size
    assert tar_header(name, size) == info.tobuf(tarfile.PAX_FORMAT)
    data = tar_header(name, size)
    seen = tarfile.TarInfo.frombuf(data[-BLOCK:], "utf-8", "strict")
    assert seen.isreg() and seen.mode == 0o644


@pytest.mark.parametrize("position", [0, 512, 9216, 9728, 10240, 123 * 512])
def test_archive_ends_as_tarfile_ends_it(position: int) -> None:
    end = tar_end(position)
    assert len(end) >= 1024 and (position + len(end)) % 10240 == 0 and not any(end)
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:") as tar:
        if position:
            add(tar, "a", bytes(position - BLOCK))
    assert len(buffer.getvalue()) == position + len(end)


def test_folder_within_an_archive() -> None:
    members = read_tar(MemorySource(archive(FILES), "m.nemo"))
    folder = TarFolder(members, "model_weights", "m.nemo")
    assert folder.name == "m.nemo » model_weights"
    assert folder.names() == ["__0_0.distcp"]
    assert folder.open("__0_0.distcp").read_all() == b"x" * 512
    with pytest.raises(FormatError, match=r"no member '\.metadata'"):
        folder.open(".metadata")
    with pytest.raises(UnsafeError):
        folder.open("../model_config.yaml")
    assert TarFolder(members, "", "m.nemo").names() == sorted(name[2:] for name in FILES)
