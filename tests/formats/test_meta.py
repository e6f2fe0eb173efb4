"""Meta's and Mistral's release folders, and torchtitan's names: there and back, joined, divided, and refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.models.cases import facts, open_case
from tests.support import write_plan

import anyckpt
from anyckpt import models
from anyckpt.checkpoint import Checkpoint
from anyckpt.config import meta_names
from anyckpt.config.meta import parse, render
from anyckpt.containers.safetensors import safetensors_parts
from anyckpt.containers.torch_file.writer import zip_parts
from anyckpt.engine.plan import OutputFile, Plan
from anyckpt.errors import AnyckptError, FormatError, MappingError, UsageError
from anyckpt.models.dialects import spellings
from anyckpt.tensor import LazyTensor, from_array

FAMILIES = ("llama", "mistral_swa", "mixtral", "llama_tied_bf16")


def write_part(folder: Path, number: int, tensors: Mapping[str, LazyTensor]) -> None:
    folder.mkdir(exist_ok=True)
    name = f"consolidated.{number:02d}.pth"
    write_plan(Plan("torch", (OutputFile("", zip_parts(dict(tensors), archive_name=name[:-4])),)), folder / name)


def released(tmp_path: Path, count: int = 1, case: str = "llama_tied_bf16") -> Path:
    """A folder of that many parts, as we write it."""
    layout = anyckpt.LayoutRequest(tensor_parallel=count)
    anyckpt.convert(open_case(case).checkpoint.path, tmp_path / f"meta{count}", to="meta", layout=layout)
    return tmp_path / f"meta{count}"


@pytest.mark.parametrize("case", FAMILIES)
@pytest.mark.parametrize("count", [1, 2])
def test_there_and_back(tmp_path: Path, case: str, count: int) -> None:
    source = open_case(case).checkpoint
    if case in ("llama", "mixtral") and count == 2:  # 151 tokens; experts
        with pytest.raises(UsageError, match=r"(experts|tok_embed).*cannot be divided among 2 model-parallel parts"):
            released(tmp_path, count, case)
        return
    folder = released(tmp_path, count, case)
    found = anyckpt.open(folder)
    assert (found.format, found.dialect, found.layout.tensor_parallel) == ("meta", "meta", count)
    assert anyckpt.verify(folder).sound
    anyckpt.convert(folder, tmp_path / "hf", to="hf", config=source.config)
    assert facts(anyckpt.open(tmp_path / "hf").tensors) == facts(source.tensors)
    own = models.identify(found)
    assert own is not None
    assert own.family == open_case(case).model.family
    wanted = models.identify(source)
    assert wanted is not None
    for name in ("num_query_groups", "kv_channels", "ffn_hidden_size", "rotary_base", "rope_scaling", "window_size"):
        assert getattr(own.config, name) == getattr(wanted.config, name), name


@pytest.mark.parametrize("names", meta_names.SPELLINGS)
@pytest.mark.parametrize("case", ["llama", "qwen3", "llama_tied_bf16"])
def test_names_in_a_distributed_checkpoint(tmp_path: Path, names: str, case: str) -> None:
    source = open_case(case).checkpoint
    anyckpt.convert(source.path, tmp_path / "dcp", to="dcp", names=names)
    stored = anyckpt.open(tmp_path / "dcp").tensors
    assert spellings.detect(stored) == names
    head, middle = ("output", "") if names == "meta" else ("lm_head", "qkv_linear.")
    assert {f"{head}.weight", f"layers.0.attention.{middle}wq.weight"} <= stored.keys()
    assert "llama" in anyckpt.inspect(tmp_path / "dcp").likely_families or case == "qwen3"
    anyckpt.convert(tmp_path / "dcp", tmp_path / "hf", to="hf", config=source.config)
    assert facts(anyckpt.open(tmp_path / "hf").tensors) == facts(source.tensors)


def test_wrapped_names_are_those_of_the_model() -> None:
    case = open_case("llama")
    named = models.from_hub(case.hub(), "torchtitan").tensors
    wrapped = {
        "model." + name.replace("attention.", "_checkpoint_wrapped_module.attention."): tensor
        for name, tensor in named.items()
    }
    assert spellings.detect(wrapped) == "torchtitan"
    stored = Checkpoint("x", "x", {**wrapped, "rope.freqs": from_array(np.ones(2, "<f4"))})
    hub = models.to_hub(stored, case.model)
    assert facts(hub.tensors) == facts(case.hub().tensors)
    assert list(hub.ignored) == ["rope.freqs"]
    del wrapped["model.layers.1._checkpoint_wrapped_module.attention.qkv_linear.wk.weight"]
    with pytest.raises(MappingError, match=r"missing: model\.layers\.1\.attention\.qkv_linear\.wk\.weight"):
        models.to_hub(Checkpoint("x", "x", wrapped), case.model)


def test_rows_of_a_head_are_neighbours() -> None:
    """Meta's row 2i is transformers' row i, and 2i + 1 is i + half."""
    rows = from_array(np.arange(16, dtype="<f4").reshape(16, 1))
    config = open_case("llama").model.config
    pairs = meta_names.MetaNames((meta_names.Pair("q", "wq", "num_query_groups"),))
    own = meta_names.from_family({"q": rows}, pairs, config, "meta")
    assert config.num_query_groups == 2
    assert own["wq"].numpy()[:, 0].tolist() == [0, 4, 1, 5, 2, 6, 3, 7, 8, 12, 9, 13, 10, 14, 11, 15]
    assert meta_names.to_family(own, pairs, config).tensors["q"].numpy().tolist() == rows.numpy().tolist()


def test_embedding_divided_along_columns_as_llama_2_is(tmp_path: Path) -> None:
    whole = anyckpt.open(released(tmp_path))
    folder = released(tmp_path, 2)
    for number in range(2):
        part = dict(anyckpt.open(shutil.copy(folder / f"consolidated.{number:02d}.pth", tmp_path / "x.pth")).tensors)
        embedding = whole.tensors["tok_embeddings.weight"]
        half = embedding.shape[1] // 2
        part["tok_embeddings.weight"] = embedding.narrow(1, number * half, half)
        part["rope.freqs"] = from_array(np.ones(4, "<f4"))
        write_part(tmp_path / "columns", number, part)
    shutil.copy(folder / "params.json", tmp_path / "columns")
    found = anyckpt.open(tmp_path / "columns")
    assert facts({n: t for n, t in found.tensors.items() if n != "rope.freqs"}) == facts(whole.tensors)


def changed(folder: Path, number: int, change: Any) -> None:
    path = folder / f"consolidated.{number:02d}.pth"
    copy = Path(shutil.copy(path, folder.parent / "part.pth"))
    part = {name: from_array(tensor.numpy()) for name, tensor in anyckpt.open(copy).tensors.items()}
    change(part)
    path.unlink()
    write_part(folder, number, part)


def test_a_part_that_is_missing(tmp_path: Path) -> None:
    folder = released(tmp_path, 2)
    with pytest.raises(FormatError, match=r"is one of 2 model-parallel parts; open .*meta2"):
        anyckpt.open(folder / "consolidated.01.pth")
    (folder / "consolidated.01.pth").rename(tmp_path / "kept")
    with pytest.raises(FormatError, match=r"1 of 2 model-parallel parts are missing: consolidated\.01\.pth"):
        anyckpt.open(folder)
    (folder / "consolidated.00.pth").unlink()
    (tmp_path / "kept").rename(folder / "consolidated.01.pth")
    with pytest.raises(FormatError, match=r"missing: consolidated\.00\.pth"):
        anyckpt.open(folder)


def test_parts_that_do_not_fit(tmp_path: Path) -> None:
    folder = released(tmp_path, 2)
    norm = "layers.0.attention_norm.weight"
    changed(folder, 1, lambda part: part.update({norm: from_array(part[norm].numpy() + 1)}))
    with pytest.raises(FormatError, match=rf"{norm}.*consolidated\.00\.pth and consolidated\.01\.pth differ"):
        anyckpt.open(folder)
    changed(folder, 1, lambda part: part.pop(norm))
    with pytest.raises(FormatError, match=rf"1 tensors are not in every part: {norm}"):
        anyckpt.open(folder)
    changed(folder, 0, lambda part: part.pop(norm))
    changed(folder, 0, lambda part: part.update({"odd.weight": part["norm.weight"]}))
    changed(folder, 1, lambda part: part.update({"odd.weight": part["norm.weight"]}))
    with pytest.raises(FormatError, match=r"odd\.weight.*how model-parallel parts divide this tensor is not known"):
        anyckpt.open(folder)


def test_mistrals_safetensors(tmp_path: Path) -> None:
    source = open_case("mistral_swa").checkpoint
    anyckpt.convert(source.path, tmp_path / "meta", to="meta")
    tensors = anyckpt.open(tmp_path / "meta").tensors
    folder = tmp_path / "mistral"
    folder.mkdir()
    names = list(tensors)
    halves = ({name: tensors[name] for name in names[::2]}, {name: tensors[name] for name in names[1::2]})
    for number, half in enumerate(halves, 1):
        name = f"consolidated-{number:05d}-of-00002.safetensors"
        write_plan(Plan("x", (OutputFile("", safetensors_parts(half, {})),)), folder / name)
    shutil.copy(tmp_path / "meta" / "params.json", folder)
    found = anyckpt.open(folder)
    assert (found.format, facts(found.tensors)) == ("meta", facts(tensors))
    anyckpt.convert(folder, tmp_path / "hf", to="hf")
    assert anyckpt.open(tmp_path / "hf").config["model_type"] == "mistral"
    assert facts(anyckpt.open(tmp_path / "hf").tensors) == facts(source.tensors)
    (folder / "consolidated-00001-of-00002.safetensors").unlink()
    with pytest.raises(FormatError, match=r"1 of 2 weight files are missing: consolidated-00001-of-00002"):
        anyckpt.open(folder)


def test_a_hugging_face_folder_with_params_beside(tmp_path: Path) -> None:
    folder = shutil.copytree(open_case("llama").checkpoint.path, tmp_path / "both")
    shutil.copy(folder / "model.safetensors", folder / "consolidated.safetensors")
    (folder / "params.json").write_text("{}")
    assert anyckpt.open(folder).format == "hf"


@pytest.mark.parametrize(
    ("dim", "width"),
    [(4096, 11008), (5120, 13824), (8192, 28672), (4096, 14336), (2048, 8192), (16384, 53248), (64, 97)],
)
def test_widths_by_metas_formula(dim: int, width: int) -> None:
    case = open_case("llama")
    from dataclasses import replace

    config = replace(case.model.config, hidden_size=dim, kv_channels=dim // 4, ffn_hidden_size=width)
    rendered = render(case.model.definition, config, [])
    assert parse(case.model.definition, rendered, {}, []).ffn_hidden_size == width


def test_what_params_do_not_say() -> None:
    """Of Llama 3.2 1B, by what transformers' script concludes; -1 is the vocabulary of the tensors."""
    facts_of = {
        "dim": 2048, "ffn_dim_multiplier": 1.5, "multiple_of": 256, "n_heads": 32, "n_kv_heads": 8, "n_layers": 16,
        "norm_eps": 1e-5, "rope_theta": 500000.0, "use_scaled_rope": True, "vocab_size": 128256,
    }  # fmt: skip
    definition, notes = open_case("llama").model.definition, []
    config = parse(definition, facts_of, {}, notes)
    assert (config.ffn_hidden_size, config.max_position_embeddings, config.bos_token_id) == (8192, 131072, 128000)
    assert config.rope_scaling is not None
    assert config.rope_scaling["factor"] == 32.0
    assert len(notes) == 3
    said = {**facts_of, "max_seq_len": 4096, "rope_scaling_factor": 16.0}
    for key in ("max_seq_len", "rope_scaling_factor"):
        assert any(note.endswith(f"that says {key}") for note in notes)
    notes.clear()
    config = parse(definition, said, {}, notes)
    assert (config.max_position_embeddings, (config.rope_scaling or {})["factor"]) == (4096, 16.0)
    assert ["which tokens begin and end a text" in note for note in notes] == [True]
    rows = {"output.weight": from_array(np.zeros((7, 4), "<f4"))}
    assert parse(definition, {**facts_of, "vocab_size": -1}, rows, []).vocab_size == 7


VALUES = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=3), st.just([]), st.just({}))


@given(st.sampled_from(["llama", "mistral_swa", "mixtral"]), st.data())
def test_a_hostile_params_is_an_error_of_ours_or_nothing(name: str, data: st.DataObject) -> None:
    case = open_case(name)
    config = json.loads(json.dumps(models.render_config(case.model, "meta")))
    config[data.draw(st.sampled_from([*sorted(config), "moe", "multiple_of", "max_seq_len"]))] = data.draw(VALUES)
    try:
        model = models.identify(Checkpoint("x", "x", {}, config=config, config_kind="meta"))
        if model is not None:
            for kind in (*models.KINDS, "meta"):
                models.render_config(model, kind)
    except AnyckptError as error:
        assert "\n" not in str(error)


def test_families_that_meta_has_not(tmp_path: Path) -> None:
    for target in ({"to": "meta"}, {"to": "dcp", "names": "torchtitan"}):
        with pytest.raises(MappingError, match="have no models of family gemma"):
            anyckpt.convert(open_case("gemma").checkpoint.path, tmp_path / "x", **target)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="no parallel layout but a tensor-parallel one"):
        layout = anyckpt.LayoutRequest(pipeline_parallel=2)
        anyckpt.convert(open_case("llama").checkpoint.path, tmp_path / "x", to="meta", layout=layout)
