"""Tables at the widths that people have: names whole, nothing lost without a word."""

from __future__ import annotations

import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from anyckpt.cli import console, tables
from anyckpt.cli.tables import Column, fitted

COLUMNS = [
    Column("name"),
    Column("type"),
    Column("shape"),
    Column("size", right=True),
    Column("files", optional=1),
]
LONG = "model.layers.{0-31}.post_attention_layernorm.weight"
ROWS = [
    ["lm_head.weight", "bfloat16", "[128256, 4096]", "1.05 GB", "model-00004-of-00004.safetensors"],
    ["model.layers.{0-31}.mlp.up_proj.weight", "bfloat16", "[14336, 4096]", "3.76 GB", "4 files"],
    ["model.norm.weight", "bfloat16", "[4096]", "8.19 kB", "model-00004-of-00004.safetensors"],
    [LONG, "bfloat16", "[4096]", "262 kB", "4 files"],
]


def text(room: int | None) -> str:
    table = fitted(COLUMNS, ROWS, room)
    return "\n".join([*table.heading, *table.body, f"left out {table.left_out}"])


AT_60 = """\
name
    type      shape              size
lm_head.weight
    bfloat16  [128256, 4096]  1.05 GB
model.layers.{0-31}.mlp.up_proj.weight
    bfloat16  [14336, 4096]   3.76 GB
model.norm.weight
    bfloat16  [4096]          8.19 kB
model.layers.{0-31}.post_attention_layernorm.weight
    bfloat16  [4096]           262 kB
left out (4,)"""

AT_80 = """\
name                                    type      shape              size
lm_head.weight                          bfloat16  [128256, 4096]  1.05 GB
model.layers.{0-31}.mlp.up_proj.weight  bfloat16  [14336, 4096]   3.76 GB
model.norm.weight                       bfloat16  [4096]          8.19 kB
model.layers.{0-31}.post_attention_layernorm.weight
                                        bfloat16  [4096]           262 kB
left out (4,)"""

AT_100 = """\
name                                                 type      shape              size
lm_head.weight                                       bfloat16  [128256, 4096]  1.05 GB
model.layers.{0-31}.mlp.up_proj.weight               bfloat16  [14336, 4096]   3.76 GB
model.norm.weight                                    bfloat16  [4096]          8.19 kB
model.layers.{0-31}.post_attention_layernorm.weight  bfloat16  [4096]           262 kB
left out (4,)"""

AT_200 = """\
name                                                 type      shape              size  files
lm_head.weight                                       bfloat16  [128256, 4096]  1.05 GB  model-00004-of-00004.safetensors
model.layers.{0-31}.mlp.up_proj.weight               bfloat16  [14336, 4096]   3.76 GB  4 files
model.norm.weight                                    bfloat16  [4096]          8.19 kB  model-00004-of-00004.safetensors
model.layers.{0-31}.post_attention_layernorm.weight  bfloat16  [4096]           262 kB  4 files
left out ()"""


@pytest.mark.parametrize(("room", "expected"), [(60, AT_60), (80, AT_80), (100, AT_100), (200, AT_200), (None, AT_200)])
def test_a_table_at_the_widths_that_people_have(room: int | None, expected: str) -> None:
    assert text(room) == expected


CELL = st.text("ab[], .0", max_size=30).map(str.strip)


@given(st.lists(st.tuples(CELL.filter(bool), CELL, CELL, CELL, CELL).map(list), min_size=1), st.integers(40, 220))
def test_no_cell_is_cut_and_only_what_has_no_room_is_beyond_it(rows: list[list[str]], room: int) -> None:
    table = fitted(COLUMNS, rows, room)
    body = "\n".join(table.body)
    for row in rows:
        for number, cell in enumerate(row):
            assert number in table.left_out or cell in body
    longest = max(len(cell) for row in rows for cell in row) + 4
    assert all(len(line) <= max(room, longest) for line in table.body)


def test_a_long_value_goes_on_below_itself_and_no_word_is_cut(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(tables, "width", lambda: 40)
    path = "/a/path/that/is/far/longer/than/the/terminal/is/wide.safetensors"
    tables.print_facts([("path", path), ("model", "2 layers of width 64, MLP 80, 4 heads of 16 in 2 groups")])
    assert capsys.readouterr().out == (
        f"path   {path}\nmodel  2 layers of width 64, MLP 80, 4\n       heads of 16 in 2 groups\n"
    )


def test_notes_and_errors_are_wrapped_on_a_terminal_alone(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = "error: run: 12 tensors are missing; copy the missing files"
    console.print_note(text)
    monkeypatch.setattr(tables, "width", lambda stream: 40)
    console.print_note(text)
    wrapped = "error: run: 12 tensors are missing; copy\n  the missing files\n"
    assert capsys.readouterr().err == f"{text}\n{wrapped}"


def test_a_size_stays_with_its_unit() -> None:
    assert tables.wrap_words("5 float32 (284 B), 1 float16 (4 B)", 33) == ["5 float32 (284 B), 1 float16", "(4 B)"]


def test_what_is_left_out_is_said_once(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(tables, "width", lambda: 60)
    columns = [Column("name"), Column("shards", right=True, optional=1), Column("files", optional=2)]
    rows = [["a" * 53, "1", "one.safetensors"], ["b" * 53, "1", "two.safetensors"]]
    tables.print_table(columns, rows)
    out = capsys.readouterr().out
    assert out.splitlines()[-1] == "(no room for shards: 1 in all rows, files)"


def test_tab_separated_rows_have_no_other_tabs(capsys: pytest.CaptureFixture[str]) -> None:
    tables.print_tsv(("name", "bytes", "note"), [("a\tb\n", 12, None)])
    assert capsys.readouterr().out == "name\tbytes\tnote\na\\tb\\n\t12\t\n"


@pytest.mark.parametrize(
    ("environment", "sign"),
    [({"LC_ALL": "C"}, "x"), ({"LC_ALL": "", "LANG": "POSIX"}, "x"), ({"LC_ALL": "C.UTF-8", "LANG": "C"}, "\u00d7")],
)
def test_the_sign_for_how_many_is_one_that_the_locale_has(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], sign: str
) -> None:
    for name in ("LC_ALL", "LC_CTYPE", "LANG"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert sys.stdout.encoding.lower() == "utf-8"
    assert tables.times() == sign
