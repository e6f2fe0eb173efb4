"""What the package offers: signatures that say what they take, and what it knows of formats and families."""

from __future__ import annotations

import inspect
import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

import anyckpt
from anyckpt import extend
from anyckpt.formats import registry

ROOT = Path(__file__).resolve().parent.parent.parent
FUNCTIONS = [name for name in anyckpt.__all__ if name.islower() and not name.startswith("_")]


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_signature_says_what_it_takes_and_the_docstring_what_it_is(name: str) -> None:
    function = getattr(anyckpt, name)
    signature = inspect.signature(function)
    for parameter in signature.parameters.values():
        assert parameter.kind not in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL), parameter
        assert parameter.annotation is not parameter.empty
    if name == "formats":
        function = registry.facts
    text = inspect.getdoc(function) or ""
    assert all(f"{parameter}: " in text for parameter in signature.parameters), name
    assert "Raises:" in text


@pytest.mark.parametrize("name", ["convert", "reshard", "average", "merge", "merge_lora"])
def test_the_command_offers_nothing_that_the_function_does_not_take(name: str) -> None:
    command = import_module(f"anyckpt.cli.{name}").command
    layout = set(anyckpt.LayoutRequest.__dataclass_fields__) | {
        "tp", "pp", "vpp", "ep", "etp", "partition_rules", "vocab_padding",
    }  # fmt: skip
    taken = set(inspect.signature(getattr(anyckpt, name)).parameters)
    values = [parameter for parameter in command.params if parameter.expose_value]
    offered = {str(parameter.name) for parameter in values} - layout - {"as_json", "help"}
    assert offered <= taken


def test_a_word_that_is_no_option_is_an_error_at_once() -> None:
    for function in (anyckpt.reshard, anyckpt.average, anyckpt.merge, anyckpt.merge_lora, anyckpt.save):
        with pytest.raises(TypeError, match="unexpected keyword argument 'overwritee'"):
            function("a", "b", overwritee=True)  # type: ignore[call-arg]


def test_formats_say_what_they_read_and_write() -> None:
    found = anyckpt.formats()
    assert list(found) == list(registry.formats())
    hf = found["hf"]
    assert isinstance(hf, anyckpt.FormatFacts)
    assert (hf.reads, hf.writes, hf.names, hf.config, hf.own) == (True, True, "hf", "hf", True)
    assert not found["deepspeed"].writes
    assert found["nemo"].sharded
    assert repr(found["torch"]) == "<torch: torch.save file (reads, writes, own)>"


def test_families_say_how_frameworks_know_them() -> None:
    found = anyckpt.families()
    assert list(found) == sorted(found)
    llama = found["llama"]
    assert isinstance(llama, anyckpt.FamilyFacts)
    assert llama.model_types == ("llama",)
    assert "LlamaForCausalLM" in repr(llama)
    assert llama.own


@pytest.mark.parametrize(
    "first", ["anyckpt.formats()", "anyckpt.open(sys.argv[0] + '.none')", "import anyckpt.formats.hf"]
)
def test_formats_is_a_function_whatever_was_imported_before(first: str) -> None:
    code = f"""import sys, contextlib, anyckpt
with contextlib.suppress(anyckpt.AnyckptError):
    {first}
assert "hf" in anyckpt.formats() and anyckpt.formats()
from anyckpt.formats import registry
import anyckpt.formats.safetensors
assert anyckpt.formats.registry is registry and len(anyckpt.families()) > 30
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def listed_as_stable(module: str) -> list[str]:
    page = (ROOT / "docs" / "stability.md").read_text(encoding="utf-8")
    listed = re.search(rf"(?ms)^`{re.escape(module)}`[^`]*:\n(.*?)\.\n\n", page)
    assert listed is not None
    return re.findall(r"`(\w+)`", listed[1])


@pytest.mark.peer
@pytest.mark.parametrize("module", ["", ".dcp", ".lightning", ".megatron"])
def test_the_page_on_what_is_stable_lists_what_training_jobs_use(module: str) -> None:
    home = import_module(f"anyckpt.torch{module}")
    assert listed_as_stable(home.__name__) == list(home.__all__)
    assert set(home.__all__) <= set(dir(home))


@pytest.mark.parametrize("module", ["anyckpt", "anyckpt.extend", "anyckpt.testing"])
def test_the_page_on_what_is_stable_lists_what_is_there(module: str) -> None:
    names = listed_as_stable(module)
    home = import_module(module)
    assert names == list(home.__all__)
    assert len(set(names)) == len(names)
    for name in names:
        assert getattr(home, name) is not None
        assert name in dir(home)


def test_what_extensions_are_built_of_is_one_list_for_people_and_for_type_checkers() -> None:
    text = inspect.getsource(extend)
    checked = text.partition("if TYPE_CHECKING:")[2].partition("__all__")[0]
    told = {
        (name.split(" as ")[-1].strip(), home, name.split(" as ")[0].strip())
        for home, several, one in re.findall(r"from (anyckpt[.\w]*) import (?:\(([^)]*)\)|(.*))", checked)
        for name in (several or one).split(",")
        if name.strip()
    }
    assert {name for name, _, _ in told} == set(extend.__all__)
    for name, home, own in told:
        assert getattr(extend, name) is getattr(import_module(home), own), name


def test_importing_the_parts_for_extensions_imports_nothing_else() -> None:
    code = "import sys, anyckpt.extend; print([m for m in ('numpy', 'anyckpt.tensor', 'yaml') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
