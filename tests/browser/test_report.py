"""Pages about checkpoints, opened in Chromium: they are drawn, searched and sorted, and ask nobody for anything."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
from tests.browser.chromium import Chromium
from tests.browser.conftest import hollow, model
from tests.support import fixture_path

import anyckpt
from anyckpt.cli import run
from anyckpt.errors import OutputError, UsageError
from anyckpt.operations.report import Report

pytestmark = [pytest.mark.browser, pytest.mark.peer]

ROWS = "[...document.querySelectorAll('#tensors tbody tr')]"
NAMES = f"{ROWS}.map(row => row.cells[0].textContent)"
EVIL = [
    "</script><script>document.title='hit'</script>",
    "<img src=x onerror=\"document.title='hit'\">",
    "model.layers.0.'\"><svg onload=document.title='hit'>",
    "javascript:document.title='hit'",
    "$$\\frac{a}{b}$$ \\(x\\) \\[y\\]",
    "<!--<script>",
    "@t{safe} @{t} $x",
    "naïve\u202eдля 漢字 \U0001f600 \x1b[31m\x00\x7f",
    "&lt;b&gt; &amp;",
    "__proto__.constructor",
]


def search(browser: Chromium, words: str) -> list[str]:
    browser.run("document.querySelector('#tensors input').focus()")
    browser.run("document.querySelector('#tensors input').select()")
    browser.type(words)
    found: list[str] = browser.run(NAMES)
    return found


def quiet(browser: Chromium, page: Path) -> None:
    """Nothing went wrong and nobody was asked."""
    assert browser.said == []
    assert browser.asked == [page.as_uri()]


def test_everything_is_drawn_without_an_error(browser: Chromium, pages: tuple[Path, Report]) -> None:
    page, done = pages
    browser.open(page)
    drawn = int(browser.run("document.documentElement.dataset.drawn"))
    assert drawn == browser.run("document.querySelectorAll('.drawing').length") == 5
    assert browser.run("[...document.querySelectorAll('.drawing')].every(one => one.firstElementChild.shadowRoot)")
    assert browser.run("[...document.querySelectorAll('main > section')].map(one => one.id)") == list(done.sections)
    assert done.sections == (
        "overview", "modules", "layers", "places", "types", "statistics", "changes", "tensors", "configuration",
    )  # fmt: skip
    quiet(browser, page)


def test_the_table_is_searched_and_sorted(browser: Chromium, pages: tuple[Path, Report]) -> None:
    browser.open(pages[0])
    assert len(browser.run(NAMES)) == 57
    assert search(browser, "layers.*.q_proj") == [f"model.layers.{i}.self_attn.q_proj.weight" for i in range(6)]
    assert search(browser, "DOWN layers.3") == ["model.layers.3.mlp.down_proj.weight"]
    status = "document.querySelector('#tensors [role=status]').textContent"
    assert browser.run(status) == "1 of 57 tensors"
    assert search(browser, "no such tensor") == []
    browser.press("Escape")
    assert len(browser.run(NAMES)) == 57
    header = "[...document.querySelectorAll('#tensors thead button')].find(one => one.textContent === '{}')"
    browser.run(header.format("max |x| / std") + ".click()")
    assert browser.run(NAMES)[0] == "model.layers.3.mlp.down_proj.weight"
    assert browser.run(header.format("max |x| / std") + ".closest('th').ariaSort") == "descending"
    browser.run(header.format("bytes") + ".click()")
    sizes = browser.run(f"{ROWS}.map(row => Number(row.cells[4].dataset.key))")
    assert sizes == sorted(sizes, reverse=True)
    browser.run(header.format("bytes") + ".click()")
    assert browser.run(f"{ROWS}.map(row => Number(row.cells[4].dataset.key))") == sorted(sizes)
    browser.run(header.format("tensor") + ".click()")
    assert browser.run(NAMES)[0] == "lm_head.weight"


def test_choices_and_boxes(browser: Chromium, pages: tuple[Path, Report]) -> None:
    browser.open(pages[0])
    seen = (
        "Bokeh.documents.flatMap(one => one.roots()).flatMap(root => [...root.references()])"
        ".filter(model => model.type === 'GlyphRenderer' && model.visible && model.tags[2] !== undefined)"
        ".map(model => model.tags[2])"
    )
    assert set(browser.run(seen)) == {"standard deviation"}
    before = len(browser.run(seen))
    browser.run("document.querySelector('#statistics .legend button').click()")
    assert len(browser.run(seen)) == before - 2  # a line and its points
    choose = (
        "const one = [...document.querySelectorAll('#statistics select')].find(s => s.value === 'standard deviation')"
    )
    browser.run(f"(() => {{ {choose}; one.value = 'mean'; one.dispatchEvent(new Event('change')) }})()")
    assert set(browser.run(seen)) == {"mean"}
    browser.run("document.querySelector('#modules input[value=map-elements]').click()")
    assert browser.run("document.getElementById('map-bytes').hidden")
    browser.run(
        "[...document.querySelectorAll('#map-elements button')].find(b => b.title.startsWith('up_proj')).click()"
    )
    assert browser.run(NAMES) == [f"model.layers.{i}.mlp.up_proj.weight" for i in range(6)]


def test_light_and_dark(browser: Chromium, pages: tuple[Path, Report]) -> None:
    back = "getComputedStyle(document.body).backgroundColor"
    text = (
        "Bokeh.documents.flatMap(one => one.roots()).flatMap(root => [...root.references()])"
        ".filter(model => 'major_label_text_color' in model.attributes).map(model => model.major_label_text_color.value"
        " ?? model.major_label_text_color)"
    )
    browser.open(pages[0], dark=True)
    dark, labels = browser.run(back), set(browser.run(text))
    browser.prefer(dark=False)
    browser.until(f"{back} !== {json.dumps(dark)}")
    assert set(browser.run(text)).isdisjoint(labels)
    browser.run("document.querySelector('nav button').click()")
    assert browser.run(back) == dark
    assert set(browser.run(text)) == labels
    browser.open(pages[0])
    assert browser.run(back) == dark  # what was chosen stays
    browser.run("document.querySelector('nav button').click()")
    assert browser.run(back) != dark


@pytest.mark.parametrize("width", [360, 768, 1920])
def test_nothing_is_wider_than_the_screen(browser: Chromium, pages: tuple[Path, Report], width: int) -> None:
    browser.open(pages[0], width=width, height=740)
    assert browser.run("document.documentElement.scrollWidth") <= width
    assert browser.run("document.querySelector('.drawing').clientWidth") > width * 0.6 or width > 1300
    assert browser.picture()[:4] == b"\x89PNG"
    quiet(browser, pages[0])


def test_the_keyboard_and_screen_readers(browser: Chromium, pages: tuple[Path, Report]) -> None:
    browser.open(pages[0])
    browser.press("Tab")
    assert browser.run("document.activeElement.className") == "skip"
    browser.press("Enter", "\r")
    assert browser.run("location.hash") == "#main"
    browser.press("/", "/")
    assert browser.run("document.activeElement.matches('#tensors input')")
    assert browser.run("document.activeElement.value") == ""
    browser.type("norm")
    browser.run("document.querySelector('#tensors thead button').focus()")
    browser.press("Enter", "\r")
    assert browser.run("document.querySelector('#tensors thead th').ariaSort") == "ascending"
    told = [(node["role"]["value"], node.get("name", {}).get("value", "")) for node in browser.tree() if "role" in node]
    assert ("heading", "Tensors") in told
    assert ("searchbox", "Search tensors") in told
    for role in ("button", "textbox", "searchbox", "combobox", "radio", "img", "image", "link"):
        assert all(name for kind, name in told if kind == role), role
    assert sum(role in ("img", "image") and "Colour:" in name for role, name in told) >= 3


def test_names_run_nothing(browser: Chromium, tmp_path: Path) -> None:
    arrays = {name: np.full(4, i, np.float32) for i, name in enumerate(EVIL)}
    layers = {f"model.layers.{i}.{name}": np.full(4, i, np.float32) for i in range(4) for name in EVIL}
    evil = model(tmp_path / "<b>folder", extra={**arrays, **layers})
    config = json.loads((evil / "config.json").read_text())
    (evil / "config.json").write_text(json.dumps({**config, "x": {EVIL[0]: EVIL[1]}}))
    other = model(
        tmp_path / "other", moved=0.1, extra={name: array + 1 for name, array in {**arrays, **layers}.items()}
    )
    page = tmp_path / "page.html"
    anyckpt.report(evil, page, stats=True, against=other)
    browser.open(page)
    quiet(browser, page)
    assert browser.run("document.title") == "<b>folder"
    assert browser.run("document.querySelectorAll('main script, main img, main svg, main b b').length") == 0
    shown = browser.run(NAMES)
    assert set(EVIL[:7]) <= set(shown)
    assert search(browser, EVIL[0].split()[0])[0] == EVIL[0]
    for figure in range(int(browser.run("document.documentElement.dataset.drawn"))):
        place = browser.run(
            f"(() => {{ const one = document.getElementById('drawing-{figure + 1}');"
            "one.scrollIntoView({block: 'center', behavior: 'instant'});"
            "const box = one.getBoundingClientRect(); return [box.x + box.width * .6, box.y + box.height * .3] })()"
        )
        browser.call("Input.dispatchMouseEvent", type="mouseMoved", x=place[0], y=place[1])
    assert browser.run("document.title") == "<b>folder"
    quiet(browser, page)


def llama_405b() -> dict[str, tuple[str, list[int]]]:
    wide, inner, keys = 16384, 53248, 1024
    shapes = {
        "input_layernorm": [wide], "mlp.down_proj": [wide, inner], "mlp.gate_proj": [inner, wide],
        "mlp.up_proj": [inner, wide], "post_attention_layernorm": [wide], "self_attn.k_proj": [keys, wide],
        "self_attn.o_proj": [wide, wide], "self_attn.q_proj": [wide, wide], "self_attn.v_proj": [keys, wide],
    }  # fmt: skip
    named = {f"model.layers.{i}.{name}.weight": shape for i in range(126) for name, shape in shapes.items()}
    ends = {"model.embed_tokens.weight": [128256, wide], "model.norm.weight": [wide], "lm_head.weight": [128256, wide]}
    return {name: ("BF16", shape) for name, shape in {**named, **ends}.items()}


def test_a_model_of_405_billion_parameters(browser: Chromium, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    done = anyckpt.report(hollow(tmp_path / "llama", llama_405b(), 191), page)
    assert done.tensors == 1137
    assert done.bytes == page.stat().st_size < 5_000_000
    browser.open(page)
    assert "405.9B" in browser.run("document.querySelector('.cards').textContent")
    assert "191 of 191 files" in browser.run("document.getElementById('places').textContent")
    assert search(browser, "layers.125.mlp.up") == ["model.layers.125.mlp.up_proj.weight"]
    quiet(browser, page)


def test_experts_are_told_by_layer(browser: Chromium, tmp_path: Path) -> None:
    experts = {
        f"model.layers.{layer}.mlp.experts.{expert}.{name}_proj.weight{scale}": ("F8_E4M3", [8, 4])
        for layer in range(12)
        for expert in range(256)
        for name in ("gate", "up", "down")
        for scale in ("", "_scale_inv")
    }
    page = tmp_path / "page.html"
    done = anyckpt.report(hollow(tmp_path / "moe", experts, 4), page)
    assert done.tensors == 18432 and done.bytes < 5_000_000
    browser.open(page)
    found = search(browser, "layers.7. up_proj.weight_scale_inv")
    assert found == ["model.layers.7.mlp.experts.{0-255}.up_proj.weight_scale_inv"]
    assert browser.run(f"{ROWS}[0].cells[1].textContent") == "256"
    quiet(browser, page)


def test_ranks_and_stages(browser: Chromium, tmp_path: Path) -> None:
    first = model(tmp_path / "hf")
    anyckpt.convert(first, tmp_path / "ranks", to="megatron-lm", layout=anyckpt.LayoutRequest(2, 3))
    page = tmp_path / "page.html"
    anyckpt.report(tmp_path / "ranks", page)
    browser.open(page)
    rows = browser.run(
        "[...document.querySelectorAll('#places tbody tr')].map(r => [...r.cells].map(c => c.textContent))"
    )
    assert [row[1:3] for row in rows] == [
        [f"tensor {rank}, stage {stage}", f"{2 * stage}-{2 * stage + 1}{'' if stage == 1 else '; outside layers'}"]
        for stage in range(3)
        for rank in range(2)
    ]
    quiet(browser, page)


def test_experts_of_ranks(browser: Chromium, tmp_path: Path) -> None:
    layout = anyckpt.LayoutRequest(1, 2, expert_parallel=2)
    anyckpt.convert(fixture_path("families/mixtral/hf"), tmp_path / "ranks", to="megatron-lm", layout=layout)
    page = tmp_path / "page.html"
    anyckpt.report(tmp_path / "ranks", page)
    browser.open(page)
    rows = browser.run(
        "[...document.querySelectorAll('#places tbody tr')].map(r => [...r.cells].map(c => c.textContent))"
    )
    assert [(row[1], row[3]) for row in rows] == [
        (f"stage {stage}, expert {rank}", ["0-1", "2-3"][rank]) for stage in range(2) for rank in range(2)
    ]
    quiet(browser, page)


def test_a_notebook_shows_the_page(browser: Chromium, pages: tuple[Path, Report], tmp_path: Path) -> None:
    page = tmp_path / "notebook.html"
    shown = pages[1]._repr_html_() + anyckpt.inspect(pages[0].parent / "first", stats=True)._repr_html_()
    page.write_text(f"<!DOCTYPE html><html data-drawn='0'><body>{shown}</body></html>")
    browser.open(page)
    assert browser.run("document.querySelector('iframe').srcdoc.length") > 1_000_000
    assert "1 NaN" not in browser.run("document.body.textContent")
    assert browser.run("document.querySelectorAll('.anyckpt table tr').length") > 57
    assert [line for line in browser.said if "Blocked script" not in line] == []


def test_quantization_has_a_page_of_the_same_make(browser: Chromium, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    source = fixture_path("quant/src_llama_a/hf")
    anyckpt.convert(source, tmp_path / "q", to="hf", quantize="fp8", dry_run=True, report=page)
    browser.open(page)
    heads = browser.run("[...document.querySelectorAll('#weights thead th')].map(one => one.textContent)")
    assert heads == ["", "SQNR", "largest error", "saturated", "before", "after"]
    quiet(browser, page)


def test_hub_names_and_chosen_tensors(tmp_path: Path) -> None:
    source = fixture_path("families/llama/hf")
    done = anyckpt.report(source, tmp_path / "a.html", names="hub", tensors="*mlp*")
    text = (tmp_path / "a.html").read_text()
    assert done.tensors == len(re.findall(r'<tr><th scope="row">decoder\.layers\.\d\.mlp\.[^<]*</th><td>float32', text))
    assert "q_proj" not in text.partition('id="tensors"')[2].partition("</section>")[0]


def test_it_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    source = fixture_path("families/llama/hf")
    page = tmp_path / "a.html"
    page.write_text("mine")
    with pytest.raises(OutputError, match="already exists"):
        anyckpt.report(source, page)
    assert page.read_text() == "mine"
    anyckpt.report(source, page, overwrite=True)
    whole = page.read_bytes()
    assert whole.endswith(b"</html>\n")
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    (damaged / "model.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0{")
    with pytest.raises(anyckpt.FormatError):
        anyckpt.report(damaged, page, overwrite=True)
    assert page.read_bytes() == whole
    with pytest.raises(UsageError, match="ends in .html"):
        anyckpt.report(source, tmp_path / "a.txt")
    with pytest.raises(OutputError, match="does not exist"):
        anyckpt.report(source, tmp_path / "no" / "a.html")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.html", "damaged"]
    same = anyckpt.report(source, tmp_path / "b.html")
    assert same.bytes == len(whole)


def test_the_command(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    source, page = str(fixture_path("families/llama/hf")), str(tmp_path / "a.html")
    assert run(["report", source, "-o", page]) == 0
    assert capfd.readouterr().out.startswith(f"{page}: 21 tensors, 1.")
    assert run(["report", source, "-o", page, "--stats", "--json"]) == 2
    refused = capfd.readouterr()
    assert refused.out == "" and refused.err.count("\n") == 1
    assert "already exists" in refused.err and "--overwrite" in refused.err
    assert run(["report", source, "-o", page, "--stats", "--against", source, "--overwrite", "--json"]) == 0
    found = json.loads(capfd.readouterr().out)
    assert found["bytes"] == (tmp_path / "a.html").stat().st_size
    assert "statistics" in found["sections"] and "changes" in found["sections"]
    assert run(["report", str(tmp_path / "nothing"), "-o", str(tmp_path / "b.html")]) == 2
    assert run(["report", source, "-o", page, "--overwrite", "--tensors", "no*"]) == 2
    assert "no tensor matches" in capfd.readouterr().err
