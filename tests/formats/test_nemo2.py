"""NeMo 2 directories that NeMo 2.5.3's converter wrote: reading them, and writing the same again."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tests.support import assert_tensors_equal_expected, expected_of, fixture_path, write_plan

from anyckpt.checkpoint import Checkpoint, Tokenizer
from anyckpt.containers.torch_file import read_torch
from anyckpt.engine.execute import execute
from anyckpt.errors import AnyckptError, FormatError, UnsafeError, UsageError
from anyckpt.formats.format import WriteOptions
from anyckpt.formats.nemo2 import FORMAT
from anyckpt.formats.nemo2.fiddle import Call, Reference, decode, encode, from_plain, reference, to_plain
from anyckpt.formats.registry import detect, look_at
from anyckpt.plain_yaml import load_yaml
from anyckpt.storage.local_file import LocalFile
from anyckpt.storage.source import MemorySource

NAMES = ["nemo2_llama_spm", "nemo2_llama_hftok"]


def model(name: str) -> Path:
    return fixture_path(f"nemo/{name}/model")


def opened(path: Path) -> Checkpoint:
    location = look_at(path)
    assert detect(location) is FORMAT
    return FORMAT.read(location)


def copied(name: str, tmp_path: Path) -> Path:
    return Path(shutil.copytree(model(name), tmp_path / "model"))


def written(checkpoint: Checkpoint, path: Path) -> Path:
    assert FORMAT.plan is not None
    return write_plan(FORMAT.plan(checkpoint, WriteOptions()), path)


def as_if_translated(checkpoint: Checkpoint) -> Checkpoint:
    """The same model as it comes from another format: only what its class was passed, and no trainer."""
    explicit = checkpoint.details["context"]["model"]["config"]
    config = {"_target_": checkpoint.config["_target_"], "config": explicit}
    return replace(checkpoint, format="hf", config=config, details={}, objects={})


# -- reading ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_fixture(name: str) -> None:
    checkpoint, expected = opened(model(name)), expected_of(f"nemo/{name}")
    assert_tensors_equal_expected(checkpoint.tensors, expected["tensors"])
    assert (checkpoint.dialect, checkpoint.config_kind) == ("nemo2", "nemo2")
    assert set(checkpoint.objects) == set(expected["common_pt"])
    assert {f"{key}/shard_{i}_2" for key in checkpoint.ignored for i in range(2)} == set(expected["bytes_entries"])
    assert (checkpoint.training.step, checkpoint.training.epoch) == (0, 0)
    assert not checkpoint.training.has_optimizer and not checkpoint.training.has_scheduler
    assert checkpoint.warnings == []


@pytest.mark.parametrize("name", NAMES)
def test_configuration(name: str) -> None:
    checkpoint = opened(model(name))
    expanded = load_yaml((model(name) / "context/model.yaml").read_bytes(), "model.yaml")
    assert checkpoint.config == expanded
    assert checkpoint.details["model_class"] == "nemo.collections.llm.gpt.model.llama.LlamaModel"
    assert checkpoint.details["config_class"] == "nemo.collections.llm.gpt.model.llama.LlamaConfig"
    explicit = checkpoint.details["context"]["model"]["config"]
    assert len(explicit) == 36 and explicit["hidden_size"] == 16
    assert checkpoint.details["context"]["trainer"]["strategy"]["kwargs"]["plugins"]["precision"] == "bf16-mixed"


def test_sentencepiece_tokenizer() -> None:
    tokenizer = opened(model(NAMES[0])).tokenizer
    assert tokenizer is not None and tokenizer.library == "sentencepiece"
    name = "531550150548489a96de02a607be6cc0_tiny_spm.model"
    assert (tokenizer.model_file, set(tokenizer.files)) == (name, {name})
    assert tokenizer.files[name].read_all() == (model(NAMES[0]) / "context" / name).read_bytes()


def test_hugging_face_tokenizer() -> None:
    tokenizer = opened(model(NAMES[1])).tokenizer
    assert tokenizer is not None and tokenizer.library == "huggingface" and tokenizer.hub_name is None
    folder = model(NAMES[1]) / "context/nemo_tokenizer"
    assert {name: source.read_all() for name, source in tokenizer.files.items()} == {
        file.name: file.read_bytes() for file in folder.iterdir()
    }


@pytest.mark.parametrize("name", NAMES)
def test_weights_at_the_root(name: str, tmp_path: Path) -> None:
    path = copied(name, tmp_path)
    for file in (path / "weights").iterdir():
        file.rename(path / file.name)
    (path / "weights").rmdir()
    checkpoint = opened(path)
    assert_tensors_equal_expected(checkpoint.tensors, expected_of(f"nemo/{name}")["tensors"])
    assert checkpoint.tokenizer is not None and checkpoint.artifacts == {}


def test_without_context(tmp_path: Path) -> None:
    path = copied(NAMES[0], tmp_path)
    shutil.rmtree(path / "context")
    checkpoint = opened(path)
    assert len(checkpoint.tensors) == 9 and checkpoint.config == {} and checkpoint.config_kind is None
    assert any("no context" in warning for warning in checkpoint.warnings)


def test_without_model_yaml_only_what_was_passed_is_known(tmp_path: Path) -> None:
    path = copied(NAMES[0], tmp_path)
    (path / "context/model.yaml").unlink()
    config = opened(path).config
    assert len(config["config"]) == 36 and config["config"]["num_layers"] == 2
    assert config["optim"]["config"]["lr"] == 0.0001


def test_without_io_json(tmp_path: Path) -> None:
    path = copied(NAMES[1], tmp_path)
    (path / "context/io.json").unlink()
    checkpoint = opened(path)
    assert checkpoint.config["config"]["num_layers"] == 2
    assert checkpoint.tokenizer is not None and len(checkpoint.tokenizer.files) == 3
    assert any("io.json" in warning for warning in checkpoint.warnings)


def test_consumed_samples_of_a_data_module(tmp_path: Path) -> None:
    from tests.support import OutputFile, file_bytes

    from anyckpt.containers.torch_file import zip_parts

    path = copied(NAMES[0], tmp_path)
    state = {"epoch": 0, "global_step": 7, "PreTrainingDataModule": {"consumed_samples": 56}, "lr_schedulers": [{}]}
    (path / "weights/common.pt").write_bytes(file_bytes(OutputFile("", zip_parts(state))))
    training = opened(path).training
    assert (training.step, training.consumed_samples, training.has_scheduler) == (7, 56, True)


# -- bad input -------------------------------------------------------------------------------------------------


def test_empty_io_json_has_a_remedy(tmp_path: Path) -> None:
    path = copied(NAMES[0], tmp_path)
    (path / "context/io.json").write_bytes(b"")
    with pytest.raises(FormatError, match=r"io\.json: is empty.*transformers"):
        FORMAT.read(look_at(path))


@pytest.mark.parametrize("through", ["path", "slash", "link"])
def test_unfinished_is_refused(through: str, tmp_path: Path) -> None:
    path = copied(NAMES[0], tmp_path)
    (tmp_path / "model-unfinished").touch()
    (tmp_path / "model-last").symlink_to("model")
    given = {"path": str(path), "slash": f"{path}/", "link": str(tmp_path / "model-last")}[through]
    with pytest.raises(FormatError, match="unfinished"):
        FORMAT.read(look_at(given))


def io_objects(change: Any) -> bytes:
    document = json.loads((model(NAMES[0]) / "context/io.json").read_text())
    change(document)
    return json.dumps(document).encode()


def nested(depth: int) -> bytes:
    objects = {
        f"o{i}": {"type": {"type": "pyref", "module": "builtins", "name": "list"},
                  "items": [["Index(index=0)", {"type": "ref", "key": f"o{i + 1}"}]], "metadata": None}
        for i in range(depth)
    }  # fmt: skip
    objects[f"o{depth}"] = {"type": "leaf", "value": 1}  # type: ignore[dict-item]
    return json.dumps({"root": {"type": "ref", "key": "o0"}, "objects": objects}).encode()


def doubling(levels: int) -> bytes:
    objects = {
        f"o{i}": {"type": {"type": "pyref", "module": "builtins", "name": "list"},
                  "items": [["Index(index=0)", {"type": "ref", "key": f"o{i + 1}"}]] * 4, "metadata": None}
        for i in range(levels)
    }  # fmt: skip
    objects[f"o{levels}"] = {"type": "leaf", "value": 1}  # type: ignore[dict-item]
    return json.dumps({"root": {"type": "ref", "key": "o0"}, "objects": objects}).encode()


BAD_JSON = {
    "not JSON": b"{",
    "a list": b"[]",
    "a number": b"1",
    "deep JSON": b"[" * 200_000,
    "not UTF-8": b"\xff\xfe{}",
    "no objects": b'{"root": {}}',
    "missing object": io_objects(lambda d: d["objects"].pop("llama_config_1")),
    "missing root": io_objects(lambda d: d["root"].update(key="nothing")),
    "root of no key": io_objects(lambda d: d["root"].update(key=[1])),
    "cycle": io_objects(lambda d: d["objects"]["dict_13"]["items"][0][1].update(key="trainer_1")),
    "items of no list": io_objects(lambda d: d["objects"]["llama_model_1"].update(items={"a": 1})),
    "items of no pairs": io_objects(lambda d: d["objects"]["llama_model_1"].update(items=[[1]])),
    "type of no reference": io_objects(lambda d: d["objects"]["llama_model_1"].update(type="x")),
    "type of numbers": io_objects(lambda d: d["objects"]["llama_model_1"]["type"].update(name=3)),
    "object of no dict": io_objects(lambda d: d["objects"].update(llama_config_1=[[[{"type": None}]]])),
    "leaf of a dict": io_objects(lambda d: d["objects"]["trainer_1"]["items"][0][1].update(value={"a": 1})),
    "wrong keys": io_objects(lambda d: d["objects"]["dict_13"].update(metadata=None)),
    "keys of objects": io_objects(lambda d: d["objects"]["tuple_7"]["items"][0].__setitem__(1, [1])),
    "deep": nested(5000),
    "doubling": doubling(40),
}


@pytest.mark.parametrize("problem", BAD_JSON)
def test_damaged_io_json(problem: str, tmp_path: Path) -> None:
    path = copied(NAMES[0], tmp_path)
    (path / "context/io.json").write_bytes(BAD_JSON[problem])
    with pytest.raises(FormatError, match=r"io\.json: ") as caught:
        FORMAT.read(look_at(path))
    assert "\n" not in str(caught.value)


def test_io_json_of_something_else_is_no_crash(tmp_path: Path) -> None:
    path = copied(NAMES[0], tmp_path)
    (path / "context/model.yaml").unlink()
    (path / "context/io.json").write_text('{"root": {"type": "leaf", "value": 3}, "objects": {}}')
    checkpoint = opened(path)
    assert checkpoint.config == {} and len(checkpoint.tensors) == 9
    change = {"type": "leaf", "value": 3}
    data = io_objects(lambda d: d["objects"]["trainer_context_1"]["items"][0].__setitem__(1, change))
    (path / "context/io.json").write_bytes(data)
    assert opened(path).config == {}


def test_tokenizer_path_that_leads_outside_is_not_followed(tmp_path: Path) -> None:
    path = copied(NAMES[0], tmp_path)
    (path / "context/model.yaml").unlink()
    for outside in ("/etc/passwd", "../../model-secret", "../weights/common.pt"):
        items = lambda d, name=outside: d["objects"]["sentence_piece_tokenizer_1"]["items"][0][1].update(value=name)  # noqa: E731
        (path / "context/io.json").write_bytes(io_objects(items))
        tokenizer = opened(path).tokenizer
        assert tokenizer is not None and tokenizer.files == {}


def test_yaml_bomb(tmp_path: Path) -> None:
    path = copied(NAMES[0], tmp_path)
    (path / "context/model.yaml").write_text("a: !!python/object/apply:os.system [id]\n")
    with pytest.raises(UnsafeError):
        FORMAT.read(look_at(path))


@pytest.mark.parametrize("missing", [".metadata", "__0_0.distcp", "metadata.json", "all"])
def test_missing_weights(missing: str, tmp_path: Path) -> None:
    path = copied(NAMES[0], tmp_path)
    for file in (path / "weights").iterdir():
        if missing in (file.name, "all"):
            file.unlink()
    if missing == "metadata.json":
        assert any("metadata.json" in warning for warning in opened(path).warnings)
        return
    with pytest.raises(FormatError) as caught:
        FORMAT.read(look_at(path))
    assert str(path) in str(caught.value)


def test_flipped_bytes_in_io_json(tmp_path: Path) -> None:
    path = copied(NAMES[0], tmp_path)
    whole = (path / "context/io.json").read_bytes()
    for position in range(0, len(whole), 211):
        changed = bytearray(whole)
        changed[position] ^= 0x15
        (path / "context/io.json").write_bytes(changed)
        try:
            FORMAT.read(look_at(path))
        except AnyckptError as error:
            assert "\n" not in str(error)


# -- io.json ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_serialization_is_fiddles_own(name: str) -> None:
    data = (model(name) / "context/io.json").read_bytes()
    assert encode(decode(data, "io.json")) == data.decode()


def test_shared_objects_stay_shared() -> None:
    shared = Call(Reference("m", "Inner"), {"x": 1})
    tree = Call(Reference("m", "Outer2B"), {"a": shared, "b": [shared, (), (1, None)], "c": {"k": 2.5}})
    document = json.loads(encode(tree))
    assert document["refcounts"]["inner_1"] == 2
    assert document["objects"]["inner_1"]["paths"] == ["<root>.a", "<root>.b[0]"]
    assert document["objects"]["outer2_b_1"]["paths"] == ["<root>"]
    again = decode(encode(tree).encode(), "io.json")
    assert again.arguments["a"] is again.arguments["b"][0]
    assert again.arguments["b"][1:] == [(), (1, None)] and again.arguments["c"] == {"k": 2.5}


def test_plain_form() -> None:
    tree = Call(Reference("a.b", "C"), {"d": Reference("torch", "bfloat16"), "e": [Reference("x.y", "Enum.member")]})
    plain = to_plain(tree, "io.json")
    assert plain == {
        "_target_": "a.b.C",
        "d": {"_target_": "torch.bfloat16", "_call_": False},
        "e": [{"_target_": "x.y.Enum.member", "_call_": False}],
    }
    assert encode(from_plain(plain)) == encode(tree)
    assert reference("torch.nn.functional.silu") == Reference("torch.nn.functional", "silu")


def test_what_fiddle_cannot_serialize() -> None:
    with pytest.raises(UsageError):
        encode({"a": object()})


# -- writing ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("source", ["itself", "another format"])
def test_context_is_what_nemo_wrote(name: str, source: str, tmp_path: Path) -> None:
    checkpoint = opened(model(name))
    path = written(checkpoint if source == "itself" else as_if_translated(checkpoint), tmp_path / "m")
    for file in ("context/io.json", "context/model.yaml", "weights/metadata.json"):
        assert (path / file).read_text() == (model(name) / file).read_text(), file
    tree = {str(file.relative_to(path)) for file in path.rglob("*") if file.is_file()}
    original = {str(file.relative_to(model(name))) for file in model(name).rglob("*") if file.is_file()}
    assert tree == original - {"weights/__0_1.distcp"}
    io = json.loads((path / "context/io.json").read_text())
    facts = {
        key: {"n_items": len(o["items"]), "paths": o.get("paths", []), "type": o["type"]}
        for key, o in io["objects"].items()
    }
    assert facts == expected_of(f"nemo/{name}")["io_objects"]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("source", ["itself", "another format"])
def test_weights_and_common_state(name: str, source: str, tmp_path: Path) -> None:
    checkpoint = opened(model(name))
    path = written(checkpoint if source == "itself" else as_if_translated(checkpoint), tmp_path / "m")
    again, expected = opened(path), expected_of(f"nemo/{name}")
    assert_tensors_equal_expected(again.tensors, expected["tensors"])
    assert again.config == checkpoint.config and again.warnings == []
    assert again.tokenizer is not None and checkpoint.tokenizer is not None
    assert {n: s.read_all() for n, s in again.tokenizer.files.items()} == {
        n: s.read_all() for n, s in checkpoint.tokenizer.files.items()
    }
    assert set(again.ignored) >= set(checkpoint.ignored)
    ours = read_torch(LocalFile(path / "weights/common.pt")).root
    theirs = read_torch(LocalFile(model(name) / "weights/common.pt")).root
    assert list(ours) == list(theirs) and ours["loops"] == theirs["loops"]
    (mine,), (other,) = ours["callbacks"].values(), theirs["callbacks"].values()
    assert mine.pop("kth_value").numpy() == other.pop("kth_value").numpy()
    assert mine == other


def test_dtype_decides_precision(tmp_path: Path) -> None:
    checkpoint = as_if_translated(opened(model(NAMES[0])))
    for dtype, precision in (("float16", "16-mixed"), ("float32", "32"), ("bfloat16", "bf16-mixed")):
        checkpoint.config["config"]["params_dtype"] = {"_target_": f"torch.{dtype}", "_call_": False}
        context = opened(written(checkpoint, tmp_path / dtype)).details["context"]
        plugin = context["trainer"]["strategy"]["kwargs"]["plugins"]
        assert (plugin["precision"], plugin["params_dtype"]["_target_"]) == (precision, f"torch.{dtype}")


def test_arguments_that_are_defaults_are_not_passed(tmp_path: Path) -> None:
    checkpoint = opened(model(NAMES[0]))
    checkpoint.config["config"]["rotary_base"] = 500_000
    again = opened(written(checkpoint, tmp_path / "m"))
    explicit = again.details["context"]["model"]["config"]
    assert explicit["rotary_base"] == 500_000 and len(explicit) == 37
    assert again.config["config"]["rotary_base"] == 500_000


def test_tokenizer_that_is_only_a_name(tmp_path: Path) -> None:
    checkpoint = replace(
        as_if_translated(opened(model(NAMES[1]))), tokenizer=Tokenizer("huggingface", hub_name="org/m")
    )
    again = opened(written(checkpoint, tmp_path / "m"))
    assert again.tokenizer is not None and (again.tokenizer.hub_name, again.tokenizer.files) == ("org/m", {})
    call = again.details["context"]["model"]["tokenizer"]["pretrained_model_name"]
    assert call == {
        "_target_": "nemo.lightning.io.artifact.file.DirOrStringArtifact", "attr": "org/m", "skip": True
    }  # fmt: skip


def test_no_tokenizer(tmp_path: Path) -> None:
    assert FORMAT.plan is not None
    plan = FORMAT.plan(replace(as_if_translated(opened(model(NAMES[0]))), tokenizer=None), WriteOptions())
    assert any("no tokenizer" in note for note in plan.notes)
    assert opened(write_plan(plan, tmp_path / "m")).tokenizer is None


def test_trainer_that_only_nemo_can_serialize_is_left_out(tmp_path: Path) -> None:
    checkpoint = opened(model(NAMES[0]))
    checkpoint.details["context"]["extra"] = {"datamodule": {"_type_": "builtins.set", "items": [1]}}
    assert FORMAT.plan is not None
    plan = FORMAT.plan(checkpoint, WriteOptions())
    assert any("not kept" in note for note in plan.notes)
    assert (write_plan(plan, tmp_path / "m") / "context/io.json").read_text() == (
        model(NAMES[0]) / "context/io.json"
    ).read_text()


@pytest.mark.parametrize("config", [{}, {"num_layers": 2}, {"_target_": "a.B"}, {"_target_": "a.B", "config": {}}])
def test_configuration_that_is_not_nemo_2s(config: dict[str, object]) -> None:
    assert FORMAT.plan is not None
    with pytest.raises(UsageError, match="needs a model configuration"):
        FORMAT.plan(replace(opened(model(NAMES[0])), config=config, config_kind=None), WriteOptions())


def test_artifacts_of_other_formats_stay_behind() -> None:
    assert FORMAT.plan is not None
    checkpoint = replace(as_if_translated(opened(model(NAMES[0]))), artifacts={"README.md": MemorySource(b"x")})
    plan = FORMAT.plan(checkpoint, WriteOptions())
    assert "README.md" in plan.ignored and not any("README" in file.path for file in plan.files)


def test_through_the_engine(tmp_path: Path) -> None:
    assert FORMAT.plan is not None
    execute(FORMAT.plan(opened(model(NAMES[1])), WriteOptions()), str(tmp_path / "m"))
    assert_tensors_equal_expected(opened(tmp_path / "m").tensors, expected_of(f"nemo/{NAMES[1]}")["tensors"])


# -- what is and what is not -----------------------------------------------------------------------------------


def test_detection(tmp_path: Path) -> None:
    assert not FORMAT.detect(look_at(tmp_path))
    assert not FORMAT.detect(look_at(model(NAMES[0]) / "weights"))
    assert not FORMAT.detect(look_at(model(NAMES[0]) / "context"))
    assert not FORMAT.detect(look_at(model(NAMES[0]) / "context/io.json"))
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights/model.safetensors").touch()
    assert not FORMAT.detect(look_at(tmp_path))
