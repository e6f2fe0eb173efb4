"""What pages and notebooks are made of: names, rows, boxes, tables and files."""

from __future__ import annotations

import math
import os
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from tests.support import fixture_path

import anyckpt
from anyckpt.errors import MissingLibraryError, OutputError, UsageError
from anyckpt.markup import Cell, table, text
from anyckpt.operations.explorer.names import Standing, expert_of, short, standings
from anyckpt.operations.explorer.page import Drawing, Section, page
from anyckpt.operations.explorer.rows import Tensors, folded, row_of, stacks_of, together
from anyckpt.operations.explorer.treemap import Node, squarified, tree, treemap
from anyckpt.operations.steps.statistics import scan
from anyckpt.operations.steps.text_file import check_text_file, write_text
from anyckpt.tensor import from_array

LLAMA = "families/llama/hf"


class Parsed(HTMLParser):
    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def tensors(*names: str, elements: int = 4) -> list[Tensors]:
    return [
        Tensors(n, 1, "float32", (elements,), elements, 4 * elements, 1, {"f": 4 * elements}, None, None) for n in names
    ]


def test_layers_are_told_from_other_numbers() -> None:
    names = [f"model.layers.{i}.mlp.experts.{e}.up.weight" for i in range(2) for e in range(3)]
    found = standings([*names, "conv.0.weight", "conv.1.bias", "3.weight", "norm.weight", "one.7.weight"])
    assert found["model.layers.1.mlp.experts.2.up.weight"] == Standing(
        "model.layers", 1, "model.layers.*.mlp.experts.*.up.weight"
    )
    assert [found[name].layer for name in ("conv.0.weight", "conv.1.bias", "3.weight", "norm.weight")] == [None] * 4
    assert found["one.7.weight"] == Standing("", None, "one.7.weight")
    assert expert_of(names[2]) == 2 and expert_of("norm.weight") is None
    assert short("model.layers.*.mlp.experts.*.up.weight") == "mlp.experts.up"
    grouped = "decoder.layers.0.mlp.experts.linear_fc1.weight11"
    assert expert_of(grouped) == 11 and expert_of("mlp.linear_fc1.weight1") is None
    assert standings([grouped, grouped.replace("0", "1")])[grouped] == Standing(
        "decoder.layers", 0, "decoder.layers.*.mlp.experts.linear_fc1.weight*"
    )
    outside = standings(["experts.0.up", "experts.1.up"])
    assert {one.kind for one in outside.values()} == {"experts.*.up"}


def test_rows_are_folded_no_more_than_they_must_be() -> None:
    names = [f"layers.{i}.experts.{e}.up" for i in range(4) for e in range(8)] + ["norm"]
    rows = tensors(*names)
    _, told = stacks_of(rows)
    assert folded(rows, told, 33) == rows
    by_layer = folded(rows, told, 10)
    assert [one.name for one in by_layer] == [*(f"layers.{i}.experts.{{0-7}}.up" for i in range(4)), "norm"]
    assert [one.count for one in by_layer] == [8, 8, 8, 8, 1]
    assert [one.name for one in folded(rows, told, 3)] == ["layers.{0-3}.experts.{0-7}.up", "norm"]


@given(
    st.lists(st.from_regex(r"[ab*]{1,2}(\.[0-3a*]{1,2}){0,3}", fullmatch=True), unique=True, min_size=1),
    st.integers(1, 9),
)
def test_folding_accounts_for_every_tensor(names: list[str], most: int) -> None:
    rows = tensors(*names)
    found = folded(rows, stacks_of(rows)[1], most)
    assert len(found) <= most
    assert sum(one.count for one in found) == len(names)
    assert sum(one.nbytes for one in found) == sum(one.nbytes for one in rows) == sum(one.files["f"] for one in found)


@given(st.lists(st.lists(st.floats(-1e3, 1e3), min_size=1, max_size=9), min_size=1, max_size=4))
def test_statistics_of_several_are_those_of_all_elements(parts: list[list[float]]) -> None:
    arrays = [np.array(part, np.float64) for part in parts]
    rows = []
    for i, array in enumerate([*arrays, np.concatenate(arrays)]):
        found = scan(from_array(array), statistics=True, digest=False, magnitudes=True)
        one = Tensors(str(i), 1, "float64", None, array.size, 8 * array.size, 1, {}, found.statistics, found.magnitudes)
        rows.append(one)
    several, whole = together("all", rows[:-1]), rows[-1]
    assert several.statistics is not None and whole.statistics is not None
    for name in ("min", "max", "zeros", "nan", "inf", "denormals"):
        assert getattr(several.statistics, name) == getattr(whole.statistics, name)
    assert several.statistics.mean == pytest.approx(whole.statistics.mean, abs=1e-9)
    assert several.statistics.std == pytest.approx(whole.statistics.std, abs=1e-6)
    assert several.magnitudes == whole.magnitudes


def test_magnitudes_are_counted_by_powers_of_two() -> None:
    array = np.array([0, 1, -1.5, 2, 3.9, 4, 0.25, np.nan, np.inf], np.float32)
    found = scan(from_array(array), statistics=True, digest=False, magnitudes=True).magnitudes
    assert found is not None
    assert (found.lowest, found.counts) == (-2, (1, 0, 2, 2, 1))
    assert scan(from_array(np.zeros(3)), statistics=True, digest=False, magnitudes=True).magnitudes is None
    assert scan(from_array(array), statistics=True, digest=False).magnitudes is None


@given(st.lists(st.integers(1, 10**12), min_size=1, max_size=14), st.floats(0.1, 10))
@example([1, 41_377_501_072], 1.0)
@example([1, 1, 10**12], 0.1)
def test_boxes_fill_the_square_and_do_not_overlap(sizes: list[int], aspect: float) -> None:
    sizes.sort(reverse=True)
    boxes = squarified(sizes, aspect)
    total = sum(sizes)
    for size, (x, y, width, height) in zip(sizes, boxes, strict=True):
        assert math.isclose(width * height, size / total, rel_tol=1e-6, abs_tol=1e-6)
        assert x >= -1e-6 and x + width <= 1 + 1e-6 and y >= -1e-6 and y + height <= 1 + 1e-6
    for i, (x, y, width, height) in enumerate(boxes):
        for left, top, wide, high in boxes[:i]:
            across = min(x + width, left + wide) - max(x, left)
            down = min(y + height, top + high) - max(y, top)
            assert across <= 1e-6 or down <= 1e-6


def test_the_tree_sums_up_and_names_of_any_length_fit() -> None:
    kinds = [("m.layers.*.a.w", 4, 40, 80), ("m.layers.*.a.b", 4, 4, 8), ("m.norm", 1, 2, 4), ("." * 5000, 1, 1, 1)]
    root = tree(kinds)
    assert (root.count, root.elements, root.nbytes) == (10, 47, 93)
    paths = {node.path: node.nbytes for node in _all(root)}
    assert paths["m.layers.*.a"] == 88 and paths["m.layers.*.a.w"] == 80
    found = Parsed(treemap(root, lambda node: node.nbytes, lambda node: f"{node.nbytes} B"))
    assert {attrs.get("data-find") for _, attrs in found.tags} >= {"m.layers.*.a.w", "m.norm"}


def _all(node: Node) -> list[Node]:
    return [one for inner in node.inside.values() for one in (inner, *_all(inner))]


@given(st.text(), st.text())
def test_every_text_is_escaped(one: str, other: str) -> None:
    found = Parsed(table(one, (other,), [(one, Cell(other, 1.5, 0.5))], explore=one))
    assert {tag for tag, _ in found.tags} <= {"table", "caption", "thead", "tbody", "tr", "th", "td"}
    assert "".join(found.texts).isprintable()
    text(other).encode("utf-8")


def test_a_page_lets_its_own_scripts_run_alone() -> None:
    evil = "</script><script>alert(1)</script>&<!--"
    made = page(evil, "", [Section("a", evil, "")], [Drawing("d", {"x": evil})], "var library = 1;")
    found = Parsed(made)
    scripts = [attrs for tag, attrs in found.tags if tag == "script"]
    assert len(scripts) == 3
    policy = next(attrs["content"] or "" for tag, attrs in found.tags if attrs.get("http-equiv"))
    assert policy.startswith("default-src 'none'; script-src 'sha256-") and policy.count("sha256-") == 2
    assert "alert(1)</script>" not in made
    assert not [attrs for _, attrs in found.tags if attrs.get("src") or (attrs.get("href") or "#")[0] not in "#d"]


def test_notebooks_show_results(tmp_path: Path) -> None:
    source = fixture_path(LLAMA)
    inspected = anyckpt.inspect(source, stats=True)._repr_html_()
    assert "model.embed_tokens.weight" in inspected and "max |x| / std" in inspected and "74,944" in inspected
    done = anyckpt.convert(source, tmp_path / "out", to="torch", dtype="bf16")
    assert "float32 -&gt; bfloat16: 21" in done._repr_html_()
    assert "would be written" in anyckpt.convert(source, tmp_path / "no", to="nemo2", dry_run=True)._repr_html_()
    found = anyckpt.diff(source, tmp_path / "out", statistics=True)
    assert "relative change" in found._repr_html_() and "Different" in found._repr_html_()
    assert "Equal" in anyckpt.diff(source, source)._repr_html_()
    sound = anyckpt.verify(source)._repr_html_()
    assert "sound" in sound and '<th scope="row">tensors</th><td>21</td>' in sound
    broken = tmp_path / "broken.safetensors"
    anyckpt.convert(source, broken, to="safetensors")
    os.truncate(broken, broken.stat().st_size - 8)
    for html in (inspected, done._repr_html_(), found._repr_html_(), sound):
        assert html.startswith("<style>.anyckpt{") and "<script" not in html


def test_results_escape_names_in_notebooks() -> None:
    evil = "<script>alert(1)</script>"
    one = anyckpt.Checkpoint("a", "hf", {evil: from_array(np.zeros(2)), "w": from_array(np.zeros(2))})
    other = anyckpt.Checkpoint("b", "hf", {"w": from_array(np.ones(2))})
    shown: list[Any] = [
        anyckpt.inspect(one, stats=True),
        anyckpt.diff(one, other, statistics=True),
        anyckpt.verify(one),
    ]
    for result in shown:
        assert "<script" not in result._repr_html_()


def test_rows_are_of_one_tensor() -> None:
    found = anyckpt.inspect(fixture_path(LLAMA), tensors="*").tensors
    assert found is not None
    for facts in found:
        row = row_of(facts)
        assert sum(row.files.values()) == row.nbytes == facts.nbytes
        assert row.peak is None


def test_bytes_that_two_tensors_share_count_once() -> None:
    one = anyckpt.open(fixture_path(LLAMA)).tensors["lm_head.weight"]
    found = anyckpt.inspect(anyckpt.Checkpoint("tied", "torch", {"embed": one, "head": one}), tensors="*")
    rows = [row_of(facts) for facts in found.tensors or ()]
    assert [row.nbytes for row in rows] == [one.nbytes, 0]
    assert together("both", rows).nbytes == sum(together("both", rows).files.values()) == found.bytes
    assert "shared" in found._repr_html_()


def test_without_the_extra_an_error_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "bokeh.resources", None)
    with pytest.raises(MissingLibraryError, match=r"pip install 'anyckpt\[report\]'"):
        anyckpt.report(fixture_path(LLAMA), tmp_path / "a.html")
    assert not list(tmp_path.iterdir())


def test_files_that_must_not_be_written_over(tmp_path: Path) -> None:
    source = tmp_path / "model.html"
    source.write_text("x")
    (tmp_path / "link.html").symlink_to(source)
    for path in (source, tmp_path / "link.html"):
        with pytest.raises(UsageError, match="are the same"):
            check_text_file(str(path), [str(source)], overwrite=True)
    with pytest.raises(OutputError, match="is a directory"):
        check_text_file(str(tmp_path), [], overwrite=True)
    with pytest.raises(UsageError, match="only a disk"):
        check_text_file("s3://bucket/a.html", [], overwrite=False)
    with pytest.raises(OutputError, match="already exists"):
        write_text(str(source), "y", overwrite=False)
    assert source.read_text() == "x"
    write_text(str(source), "y", overwrite=True)
    assert source.read_text() == "y"
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    write_text(str(pipe), "z", overwrite=True)
    assert os.read(reader, 9) == b"z"
    os.close(reader)
    assert sorted(one.name for one in tmp_path.iterdir()) == ["link.html", "model.html", "pipe"]
