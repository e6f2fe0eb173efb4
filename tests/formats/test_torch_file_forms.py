"""Kinds of tensors and containers from one torch file to another, and what diff sees of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.support import write_plan

import anyckpt
from anyckpt.containers.torch_file.containers import rebuilt
from anyckpt.containers.torch_file.forms import Forms
from anyckpt.containers.torch_file.values import FormedTensor, TensorFacts
from anyckpt.containers.torch_file.writer import zip_parts
from anyckpt.engine.plan import OutputFile, Plan
from anyckpt.pickling import DictRecord, Global, Record, torch_objects
from anyckpt.tensor import from_array

FLAT = from_array(np.arange(12, dtype="<f4"))


def formed(shape: tuple[int, ...], offset: int, strides: tuple[int, ...], **facts: Any) -> FormedTensor:
    elements = np.lib.stride_tricks.as_strided(
        np.arange(12, dtype="<f4")[offset:], shape, tuple(4 * stride for stride in strides)
    )
    return FormedTensor(from_array(elements.copy()), FLAT, offset, strides, TensorFacts(**facts))


def saved(path: Path, root: Any) -> Path:
    write_plan(Plan("torch", (OutputFile("", zip_parts(root)),)), path)
    return path


ROOTS: dict[str, Any] = {
    "views": {"all": formed((12,), 0, (1,)), "odd": formed((6,), 1, (2,)), "turned": formed((3, 4), 0, (1, 3))},
    "parameter": {"w": formed((12,), 0, (1,), parameter=True, requires_grad=True)},
    "asked": {"w": formed((12,), 0, (1,), requires_grad=True)},
    "attributes": {"w": formed((12,), 0, (1,), attributes={"tp": 2})},
    "subclass": {"w": formed((12,), 0, (1,), kind=Global("a.b", "C.D"), subclass="a.b.C.D")},
    "tuple": {"t": (formed((12,), 0, (1,)), "word", {3})},
    "class": {"r": Record(Global("a", "B"), (1, formed((12,), 0, (1,))), state={"x": 1})},
}


@pytest.mark.parametrize("name", list(ROOTS))
def test_there_and_back(tmp_path: Path, name: str) -> None:
    source = saved(tmp_path / "a.pt", ROOTS[name])
    done = anyckpt.convert(source, tmp_path / "b.pt", to="torch")
    first, second = anyckpt.open(source), anyckpt.open(tmp_path / "b.pt")
    assert isinstance(first.forms, Forms)
    assert first.forms.described() == second.forms.described()
    assert first.forms.described() or name == "class"
    assert done.ignored == {}
    assert not anyckpt.diff(source, tmp_path / "b.pt", raw=True)
    assert done.bytes_written < 3000, "no view grows the file"


def test_diff_sees_forms(tmp_path: Path) -> None:
    plain = saved(tmp_path / "plain.pt", {"w": FLAT})
    for number, name in enumerate(("parameter", "asked", "attributes", "subclass")):
        other = saved(tmp_path / f"{number}.pt", ROOTS[name])
        found = anyckpt.diff(plain, other, raw=True)
        assert [setting.name for setting in found.state] == ["form of w"], name
        assert not anyckpt.diff(plain, other), "weights alone are the same"


TREES = st.recursive(
    st.integers(0, 9),
    lambda inner: st.one_of(st.lists(inner), st.tuples(inner, inner), st.dictionaries(st.text(), inner)),
)


@given(TREES)
def test_a_container_rebuilt_of_all_its_parts_is_the_same(tree: Any) -> None:
    if isinstance(tree, int):
        return
    parts = dict(tree) if isinstance(tree, dict) else dict(enumerate(tree))
    again = rebuilt(tree, parts)
    assert (type(again), again) == (type(tree), tree)
    ordered = DictRecord(Global("collections", "defaultdict"), (Global("builtins", "list"),))
    ordered.update({str(key): value for key, value in parts.items()})
    copy = rebuilt(ordered, ordered)
    assert (copy, copy.type, copy.args) == (ordered, ordered.type, ordered.args)


@pytest.mark.parametrize(
    "root",
    [{"state": {0: {"a": FLAT}}}, {"state": {0: {"a": FLAT}, 1: {"a": FLAT}}}, [{"a": FLAT}], {"t": [{"x": [FLAT]}]}],
)
def test_tables_by_number_keep_what_they_lie_in(tmp_path: Path, root: Any) -> None:
    table: Any = DictRecord(Global("collections", "defaultdict"), (Global("builtins", "dict"),))
    for number, tree in enumerate((root, {"state": table})):
        table.update({0: {"a": FLAT}})
        source = saved(tmp_path / f"{number}.pt", tree)
        done = anyckpt.convert(source, tmp_path / f"copy{number}.pt", to="torch")
        assert done.ignored == {} and not any("without" in note for note in done.notes)
        assert not anyckpt.diff(source, tmp_path / f"copy{number}.pt", raw=True)
        assert anyckpt.open(tmp_path / f"copy{number}.pt").tensors.keys() == anyckpt.open(source).tensors.keys()


@pytest.mark.parametrize("name", list(ROOTS))
@pytest.mark.parametrize("to", ["lightning", "sharded", "dcp", "safetensors"])
def test_what_an_output_does_not_keep_is_told(tmp_path: Path, name: str, to: str) -> None:
    """Everything that the source says of what is written is said by the output too, or in a note."""
    source = saved(tmp_path / "a.pt", {"model": ROOTS[name]})
    sharded = to == "sharded"
    done = anyckpt.convert(source, tmp_path / "b", to="lightning" if sharded else to, sharded=sharded)
    first, second = anyckpt.open(source), anyckpt.open(tmp_path / "b")
    assert first.forms is not None
    kept = [] if second.forms is None else list(second.forms.particulars().values())
    note = next((note for note in done.notes if "says of its objects" in note), "")
    for words in first.forms.particulars().values():
        assert [kind for kind, _ in words] in [[kind for kind, _ in own] for own in kept] or all(
            f"{kind} of " in note for kind, _ in words
        )
    assert (not note) == (to == "lightning" and name not in ("tuple", "class"))


def test_what_is_left_out_is_not_told_of(tmp_path: Path) -> None:
    root = {"model": {"w": FLAT, "v": FLAT}, "optimizer": {"state": {0: {"m": ROOTS["parameter"]["w"]}}}}
    root["optimizer"]["param_groups"] = [{"params": [0], "lr": 0.1}]
    source = saved(tmp_path / "a.pt", root)
    done = anyckpt.convert(source, tmp_path / "b", to="safetensors")
    assert [note for note in done.notes if "objects" in note] == [
        "the output has the same elements, and not all that the source says of its objects: shared storage of model.v"
    ]
    done = anyckpt.convert(source, tmp_path / "c", to="safetensors", exclude="v")
    assert not any("objects" in note for note in done.notes)


@pytest.mark.parametrize(
    ("version", "more", "told"), [(1, {}, False), (2, {}, True), (2, {"num_batches_tracked": FLAT}, False)]
)
def test_usual_versions_of_modules_need_no_word(tmp_path: Path, version: int, more: dict[str, Any], told: bool) -> None:
    tensors = {"w": FLAT, **{f"norm.{name}": tensor for name, tensor in more.items()}}
    state = torch_objects.ordered_dict(tensors, metadata={"": {"version": 1}, "norm": {"version": version}})
    source = saved(tmp_path / "a.pt", state)
    done = anyckpt.convert(source, tmp_path / "a.safetensors", to="safetensors", exclude="norm.*" if more else None)
    assert any("versions of modules of the file" in note for note in done.notes) == told
    assert not anyckpt.convert(source, tmp_path / "a.ckpt", to="lightning").notes


@pytest.mark.parametrize("files", [1, 2])
def test_state_dicts_in_a_folder_are_read_with_their_forms(tmp_path: Path, files: int) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "mystery"}')
    state: dict[str, Any] = {"w": FLAT, "v": FLAT, **ROOTS["views"]}
    both = [state, {"p": ROOTS["parameter"]["w"], "q": ROOTS["asked"]["w"]}]
    if files == 1:
        saved(folder / "pytorch_model.bin", torch_objects.ordered_dict(both[0] | both[1]))
    else:
        for number, part in enumerate(both, 1):
            saved(folder / f"pytorch_model-0000{number}-of-00002.bin", part)
    said = anyckpt.open(folder).forms
    assert said is not None
    for to, name in (("torch", "a.pt"), ("lightning", "a.ckpt")):
        done = anyckpt.convert(folder, tmp_path / name, to=to)
        assert not any("objects" in note for note in done.notes)
        copy = anyckpt.open(tmp_path / name).forms
        assert copy is not None
        for held in ("w", "v", "odd", "turned", "p", "q"):
            own = copy.particulars().get(held if to == "torch" else f"state_dict.{held}", ())
            assert [kind for kind, _ in own] == [kind for kind, _ in said.particulars().get(held, ())]
    notes = anyckpt.convert(folder, tmp_path / "safe", to="hf").notes
    assert any("Parameter of p; requires_grad of p, q" in note for note in notes)


def test_a_cast_ends_what_views_share_and_says_so(tmp_path: Path) -> None:
    tied = formed((12,), 0, (1,))
    source = saved(tmp_path / "a.pt", {"a": tied, "b": tied})
    assert not anyckpt.convert(source, tmp_path / "b.pt", to="torch", dtype="bf16").notes, "these stay one tensor"
    source = saved(tmp_path / "c.pt", ROOTS["views"])
    notes = anyckpt.convert(source, tmp_path / "d.pt", to="torch", dtype="bf16").notes
    assert "all, odd, turned: shares its storage no longer, for its elements are computed" in notes
    assert "odd: its strides change, for its elements are computed" in notes
    described = anyckpt.open(tmp_path / "d.pt").forms
    assert described is not None and not any("shared" in text for text in described.described().values())
