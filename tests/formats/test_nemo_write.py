"""The structure of the ``.nemo`` files that we write, against those that NeMo wrote."""

from __future__ import annotations

import json
import re
import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from tests.support import assert_tensors_equal_expected, expected_of, file_bytes, fixture_path, write_plan

from anyckpt.checkpoint import Checkpoint, Tokenizer, storage_key
from anyckpt.engine.execute import execute
from anyckpt.engine.plan import Literal, SourceData
from anyckpt.errors import FormatError, UsageError
from anyckpt.formats.format import WriteOptions
from anyckpt.formats.nemo import FORMAT
from anyckpt.formats.nemo.config import GPT_TARGET
from anyckpt.formats.registry import look_at
from anyckpt.formats.shared.archive import ArchiveWriter
from anyckpt.plain_yaml import load_yaml
from anyckpt.storage.local_file import LocalFile
from anyckpt.storage.source import ByteSource, MemorySource
from anyckpt.storage.tar import read_tar
from anyckpt.tensor import Constant, from_array

FLAT = ["nemo1_basic_v2_5_3", "nemo1_basic_v3_0_0", "asr_ctc_conformer_v3_0_0"]
SHARDED = ["nemo1_dist_tp1", "nemo1_dist_tp2"]


def opened(path: Path) -> Checkpoint:
    return FORMAT.read(look_at(path))


def fixture(name: str) -> Path:
    return next(fixture_path(f"nemo/{name}").glob("*.nemo"))


def written(checkpoint: Checkpoint, path: Path, **options: bool) -> Path:
    assert FORMAT.plan is not None
    return write_plan(FORMAT.plan(checkpoint, WriteOptions(**options)), path)  # type: ignore[arg-type]


def structure(path: Path) -> dict[str, str]:
    with tarfile.open(path, "r:") as tar:
        return {m.name: "dir" if m.isdir() else "file" for m in tar.getmembers()}


@pytest.mark.parametrize("name", FLAT)
def test_flat_archive_has_the_members_that_nemo_wrote(name: str, tmp_path: Path) -> None:
    expected = expected_of(f"nemo/{name}")
    path = written(opened(fixture(name)), tmp_path / "m.nemo")
    if isinstance(expected["members"][0], dict):
        assert structure(path) == {member["name"]: member["type"] for member in expected["members"]}
    assert structure(path) == structure(fixture(name))
    original, ours = read_tar(LocalFile(fixture(name))), read_tar(LocalFile(path))
    for member in original.values():
        if member.name != "model_weights.ckpt":
            assert ours[member.name].source.read_all() == member.source.read_all(), member.name
    again = opened(path)
    assert_tensors_equal_expected(again.tensors, expected["tensors"])
    assert again.config == expected["config"] and again.warnings == []


@pytest.mark.parametrize("name", SHARDED)
def test_sharded_archive_has_the_members_that_nemo_wrote(name: str, tmp_path: Path) -> None:
    expected = expected_of(f"nemo/{name}")
    path = written(opened(fixture(name)), tmp_path / "m.nemo", sharded=True)
    shards = re.compile(r"\./model_weights/__\d+_\d+\.distcp")
    assert {n for n in structure(path) if not shards.fullmatch(n)} == {
        n for n in expected["members"] if not shards.fullmatch(n)
    }
    members = read_tar(LocalFile(path))
    assert json.loads(members["model_weights/metadata.json"].source.read_all()) == expected["metadata_json"]
    original = read_tar(LocalFile(fixture(name)))
    assert members["model_weights/metadata.json"].source.read_all() == (
        original["model_weights/metadata.json"].source.read_all()
    )
    again = opened(path)
    assert_tensors_equal_expected(again.tensors, expected["global_tensors_by_sharded_key"])
    assert again.config == expected["config"]
    assert set(again.ignored) >= set(opened(fixture(name)).ignored)


def test_tied_weights_stay_tied(tmp_path: Path) -> None:
    tensors = opened(written(opened(fixture(FLAT[1])), tmp_path / "m.nemo")).tensors
    assert storage_key(tensors["emb.weight"]) == storage_key(tensors["head.weight"])


def test_configuration_first_and_weights_last(tmp_path: Path) -> None:
    names = list(structure(written(opened(fixture(FLAT[0])), tmp_path / "m.nemo")))
    assert names[:2] == [".", "./model_config.yaml"] and names[-1] == "./model_weights.ckpt"


def test_same_input_gives_the_same_bytes(tmp_path: Path) -> None:
    first = written(opened(fixture(FLAT[0])), tmp_path / "a.nemo").read_bytes()
    assert written(opened(fixture(FLAT[0])), tmp_path / "b.nemo").read_bytes() == first


def test_through_the_engine(tmp_path: Path) -> None:
    for name in (*FLAT, *SHARDED):
        assert FORMAT.plan is not None
        plan = FORMAT.plan(opened(fixture(name)), WriteOptions(sharded=name in SHARDED))
        execute(plan, str(tmp_path / f"{name}.nemo"))
        assert (tmp_path / f"{name}.nemo").read_bytes() == file_bytes(plan.files[0])


# -- what is made for other sources ----------------------------------------------------------------------------

GPT = {"num_layers": 1, "hidden_size": 4, "num_attention_heads": 2, "encoder_seq_length": 8}
SPM = MemorySource(b"\x0a\x0e\x0a\x05<unk>\x15\x00", "tokenizer.model")
JSON = MemorySource(b'{"version": "1.0"}', "tokenizer.json")


def made(**changes: object) -> Checkpoint:
    base = Checkpoint(
        path="source",
        format="hf",
        tensors={"model.decoder.final_layernorm.weight": from_array(np.ones(4, "float32"))},
        dialect="nemo-flat",
        config=dict(GPT),
        config_kind="nemo1",
    )
    return replace(base, **changes)  # type: ignore[arg-type]


def test_class_and_version_are_added(tmp_path: Path) -> None:
    config = opened(written(made(), tmp_path / "m.nemo")).config
    assert config == {**GPT, "target": GPT_TARGET, "nemo_version": "2.0.0"}
    assert list(config)[-2:] == ["target", "nemo_version"]
    kept = {**GPT, "target": "a.B", "nemo_version": "1.23.0"}
    assert opened(written(made(config=kept), tmp_path / "n.nemo")).config == kept


def test_sentencepiece_tokenizer(tmp_path: Path) -> None:
    tokenizer = Tokenizer("sentencepiece", {"tokenizer.model": SPM}, "tokenizer.model", {"legacy": True})
    path = written(made(tokenizer=tokenizer), tmp_path / "m.nemo")
    section = opened(path).config["tokenizer"]
    assert section["library"] == "sentencepiece" and section["type"] is None
    assert section["sentencepiece_legacy"] is True
    member = section["model"].removeprefix("nemo:")
    assert re.fullmatch(r"[0-9a-f]{32}_tokenizer\.model", member)
    assert read_tar(LocalFile(path))[member].source.read_all() == SPM.read_all()
    again = opened(path).tokenizer
    assert again is not None and (again.library, again.model_file) == ("sentencepiece", member)
    assert again.settings == {"legacy": True}
    twice = opened(written(opened(path), tmp_path / "n.nemo"))
    assert twice.config["tokenizer"] == section and structure(tmp_path / "n.nemo") == structure(path)


def test_hugging_face_tokenizer(tmp_path: Path) -> None:
    tokenizer = Tokenizer("huggingface", {"tokenizer.json": JSON, "tokenizer_config.json": JSON}, hub_name="org/m")
    assert FORMAT.plan is not None
    plan = FORMAT.plan(made(tokenizer=tokenizer), WriteOptions())
    assert any("org/m" in note for note in plan.notes)
    again = opened(write_plan(plan, tmp_path / "m.nemo"))
    section = again.config["tokenizer"]
    assert (section["library"], section["type"], section["model"]) == ("huggingface", "org/m", None)
    assert again.tokenizer is not None and again.tokenizer.library == "huggingface"
    assert {name: source.read_all() for name, source in again.tokenizer.files.items()} == {
        name: source.read_all() for name, source in tokenizer.files.items()
    }
    assert again.tokenizer.hub_name == "org/m" and again.warnings == []


def test_hugging_face_tokenizer_with_a_sentencepiece_model(tmp_path: Path) -> None:
    files: dict[str, ByteSource] = {"tokenizer.json": JSON, "tokenizer.model": SPM}
    again = opened(written(made(tokenizer=Tokenizer("huggingface", files)), tmp_path / "m.nemo"))
    assert again.config["tokenizer"]["library"] == "sentencepiece"
    assert again.config["tokenizer"]["model"].endswith("_tokenizer.model")
    assert again.tokenizer is not None and set(again.tokenizer.files) == set(files)


def test_tiktoken_table_is_not_taken_for_sentencepiece(tmp_path: Path) -> None:
    table = MemorySource(b"IQ== 0\nIg== 1\n", "tokenizer.model")
    tokenizer = Tokenizer("huggingface", {"tokenizer.json": JSON, "tokenizer.model": table}, hub_name="org/m")
    config = opened(written(made(tokenizer=tokenizer), tmp_path / "m.nemo")).config
    assert (config["tokenizer"]["library"], config["tokenizer"]["model"]) == ("huggingface", None)


def test_other_artifacts_stay_behind() -> None:
    config = {**GPT, "vocab": "vocab.txt"}
    artifacts = {"README.md": JSON, "vocab.txt": SPM}
    assert FORMAT.plan is not None
    plan = FORMAT.plan(made(config=config, artifacts=artifacts), WriteOptions())
    assert list(plan.ignored) == ["README.md"]
    assert any(isinstance(part, SourceData) and part.source is SPM for part in plan.files[0].parts)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"config": {}}, UsageError, "needs a model configuration"),
        ({"config": {"hidden_size": 4}, "config_kind": "hf"}, UsageError, "is not translated"),
        ({"config": {**GPT, "vocab": "nemo:gone.txt"}}, FormatError, r"vocab refers to 'gone\.txt'"),
    ],
)
def test_what_cannot_be_written(changes: dict[str, object], error: type[Exception], message: str) -> None:
    assert FORMAT.plan is not None
    with pytest.raises(error, match=message):
        FORMAT.plan(made(**changes), WriteOptions())


def test_model_without_class_gets_a_note() -> None:
    assert FORMAT.plan is not None
    plan = FORMAT.plan(made(config={"encoder": {"layers": 1}}, config_kind=None), WriteOptions())
    assert any("target" in note for note in plan.notes)


# -- large archives --------------------------------------------------------------------------------------------


def test_sizes_beyond_8_gib(tmp_path: Path) -> None:
    """Everything but the tensor's own bytes, on a sparse file; Python's tarfile finds the members."""
    assert FORMAT.plan is not None
    from anyckpt.dtypes import dtype

    big = Constant(dtype("uint8"), (9 << 30,))
    plan = FORMAT.plan(made(tensors={"big": big, "small": big.narrow(0, 0, 3)}), WriteOptions())
    path = tmp_path / "m.nemo"
    with open(path, "wb") as file:
        for part in plan.files[0].parts:
            if isinstance(part, Literal):
                file.write(part.data)
            else:
                file.seek(part.nbytes, 1)
        file.truncate(plan.nbytes)
    weights = read_tar(LocalFile(path))["model_weights.ckpt"]
    assert weights.size > 9 << 30 and plan.nbytes % 10240 == 0
    with tarfile.open(path) as tar:
        member = tar.getmember("./model_weights.ckpt")
        assert (member.size, member.offset_data) == (weights.size, weights.source.locate()[1])
    position = 0
    for part in plan.files[0].parts:
        if part.nbytes == 9 << 30:
            assert position % 4096 == 0
        position += part.nbytes


@pytest.mark.parametrize("excess", [-4000, -1100, -600, -1, 0, 600, 1100, 4000])
def test_member_whose_alignment_decides_its_header(excess: int) -> None:
    """Near 8 GiB the header grows, which moves the contents, which changes their padding."""
    limit = 8 << 30

    def lay_out(offset: int, aligned: bool) -> list[SourceData]:
        return [SourceData(Sized(limit + excess + (-offset % 4096 if aligned else 64)))]

    archive = ArchiveWriter()
    archive.add_directory(".")
    archive.add("./w", lay_out)
    position = 0
    for part in archive.file().parts:
        if isinstance(part, SourceData):
            size = part.nbytes
            header = archive.file().parts[1]
            assert isinstance(header, Literal)
            assert len(header.data) == (512 if size < limit else 1536)
            assert size in (limit + excess + 64, limit + excess + -position % 4096)
        position += part.nbytes
    assert position % 10240 == 0


class Sized(ByteSource):
    """A size without bytes."""

    __slots__ = ()

    def __init__(self, size: int) -> None:
        self.name, self.path, self.size = "sized", None, size

    def _read_into(self, offset: int, buffer: memoryview) -> None:
        raise AssertionError("nothing is read when planning")


@pytest.mark.peer
def test_configuration_is_what_omegaconf_reads(tmp_path: Path) -> None:
    omegaconf = pytest.importorskip("omegaconf")
    tokenizer = Tokenizer("sentencepiece", {"tokenizer.model": SPM}, "tokenizer.model")
    config = {**GPT, "layernorm_epsilon": 1e-05, "rotary_percentage": 1.0, "precision": "bf16", "x": "1e-5"}
    path = written(made(config=config, tokenizer=tokenizer), tmp_path / "m.nemo")
    text = read_tar(LocalFile(path))["model_config.yaml"].source.read_all()
    loaded = omegaconf.OmegaConf.to_container(omegaconf.OmegaConf.create(text.decode()))
    assert loaded == load_yaml(text, "c") and loaded["x"] == "1e-5" and loaded["layernorm_epsilon"] == 1e-05
