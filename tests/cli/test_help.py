"""What ``--help`` shows, what a shell completes, and what is suggested for a word that is not known."""

from __future__ import annotations

import ast
import os
import shlex
import subprocess
import sys
from pathlib import Path

import click
import pytest
from click.shell_completion import ShellComplete
from tests.cli.runner import Runner
from tests.support import fixture_path

from anyckpt import cli, convert
from anyckpt.cli.command import Command
from anyckpt.errors import UsageError, did_you_mean

LLAMA = fixture_path("families/llama/hf")


def command(name: str) -> click.Command:
    found = cli.group.get_command(click.Context(cli.group), name)
    assert found is not None
    return found


@pytest.mark.parametrize("name", cli._COMMANDS)
def test_every_help_ends_with_examples_that_the_command_takes(anyckpt: Runner, name: str) -> None:
    known = command(name)
    assert isinstance(known, Command) and known.examples
    text = anyckpt(name, "--help").out
    assert text.index("\nExamples:\n") > text.index("\nOptions:\n")
    for purpose, line in known.examples:
        assert f"  # {purpose}\n  {line}\n" in text
        program, first, *words = shlex.split(line)
        assert (program, first) == ("anyckpt", name)
        known.make_context(name, words).close()


def test_help_of_all_ends_with_examples(anyckpt: Runner) -> None:
    text = anyckpt("--help").out
    assert text.index("\nExamples:\n") > text.index("\nCommands:\n")
    assert text.endswith('  eval "$(_ANYCKPT_COMPLETE=bash_source anyckpt)"\n')


def test_options_of_convert_stand_under_titles_in_their_order(anyckpt: Runner) -> None:
    lines = anyckpt("convert", "--help").out.splitlines()
    titles = [line for line in lines if line.endswith(":") and not line.startswith(" ")]
    assert titles[0] == "What to write:" and titles[-2:] == ["Options:", "Examples:"]
    quantizing = lines[lines.index("Quantizing:") : lines.index("Parallel layout:")]
    assert any("--group-size" in line for line in quantizing)
    assert not any("--tp" in line for line in quantizing)
    listed = {word for line in lines for word in line.split() if word.startswith("--") and line.startswith("  -")}
    taken = {name for known in command("convert").params if isinstance(known, click.Option) for name in known.opts}
    assert {name for name in taken if name.startswith("--")} <= {name.rstrip(",") for name in listed} | {"--help"}


def completed(*words: str) -> dict[str, str | None]:
    *before, incomplete = words
    found = ShellComplete(cli.group, {}, "anyckpt", "_ANYCKPT_COMPLETE").get_completions(before, incomplete)
    return {item.value: item.help for item in found} if all(i.type == "plain" for i in found) else {"<file>": None}


def test_a_shell_completes_commands_formats_families_and_namings() -> None:
    assert set(completed("mer")) >= {"merge-lora"}
    assert completed("convert", "a", "b", "--to", "nemo") == {
        "nemo": "NeMo archive (.nemo)",
        "nemo2": completed("convert", "a", "b", "--to", "nemo2")["nemo2"],
    }
    assert "fsdp" not in completed("convert", "a", "b", "--to", "")
    assert set(completed("convert", "a", "b", "--family", "qwen2")) == {"qwen2", "qwen2-moe"}
    assert set(completed("convert", "a", "b", "--names", "nemo-")) == {"nemo-flat", "nemo-sharded"}
    assert set(completed("convert", "a", "b", "--quantize", "mx")) == {"mxfp4"}
    assert set(completed("convert", "a", "b", "--quantize-form", "mo")) == {"modelopt"}
    assert set(completed("convert", "a", "b", "--dtype", "b")) == {"bf16", "bfloat16"}
    assert "--overwrite" in completed("convert", "a", "b", "--over")


@pytest.mark.parametrize("name", cli._COMMANDS)
def test_a_shell_completes_paths(name: str) -> None:
    assert completed(name, "some") == {"<file>": None}


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_each_shell_gets_its_script(shell: str) -> None:
    environment = {**os.environ, "_ANYCKPT_COMPLETE": f"{shell}_source"}
    words = [sys.executable, "-m", "anyckpt"]
    done = subprocess.run(words, capture_output=True, text=True, check=False, env=environment)
    assert (done.returncode, done.stderr) == (0, "")
    assert f"_ANYCKPT_COMPLETE={shell}_complete" in done.stdout


@pytest.mark.parametrize(
    ("words", "meant"),
    [
        (("inspct", "a"), "inspect"),
        (("merge_lora", "a"), "merge-lora"),
        (("convert", "a", "b", "--to", "safetensor"), "safetensors"),
        (("convert", "a", "b", "--to", "huggingface"), "hf"),
        (("convert", "a", "b", "--to", "megatron"), "megatron-core"),
        (("convert", LLAMA, "b", "--to", "hf", "--family", "lama"), "llama"),
        (("convert", LLAMA, "b", "--to", "torch", "--names", "nemoflat"), "nemo-flat"),
        (("convert", LLAMA, "b", "--to", "hf", "--quantize", "fp-8"), "fp8"),
        (
            ("convert", LLAMA, "b", "--to", "hf", "--quantize", "fp8", "--quantize-form", "compressed"),
            "compressed-tensors",
        ),
        (("convert", "a", "b", "--overwrit"), "--overwrite"),
    ],
)
def test_what_may_have_been_meant_is_said(anyckpt: Runner, words: tuple[str, ...], meant: str) -> None:
    error = anyckpt(*words).error
    assert meant in error.lower().partition("did you mean")[2], error


def test_nothing_is_suggested_for_what_resembles_nothing(anyckpt: Runner) -> None:
    assert did_you_mean("xyzzy", {"hf": "Hugging Face folder", "nemo": "NeMo archive"}) is None
    assert "did you mean" not in anyckpt("xyzzy").error


@pytest.mark.parametrize(
    ("name", "format"),
    [
        ("m.nemo", "nemo"),
        ("m.safetensors", "safetensors"),
        ("m.pt", "torch"),
        ("m.ckpt", "lightning"),
        ("M.PTH", "torch"),
    ],
)
def test_the_name_of_the_output_tells_the_format(anyckpt: Runner, tmp_path: Path, name: str, format: str) -> None:
    assert anyckpt("convert", LLAMA, tmp_path / name, "--json").json["format"] == format
    assert anyckpt("inspect", tmp_path / name, "--json").json["format"] == format
    assert convert(LLAMA, tmp_path / f"other-{name}", dry_run=True).format == format


def test_the_name_of_an_archive_tells_that_it_is_one(anyckpt: Runner, tmp_path: Path) -> None:
    path = tmp_path / "m.qnemo"
    assert anyckpt("convert", LLAMA, path, "--dtype", "bfloat16", "--json").json["format"] == "trtllm"
    assert path.is_file()


def test_a_format_that_is_said_goes_before_the_name(anyckpt: Runner, tmp_path: Path) -> None:
    assert anyckpt("convert", LLAMA, tmp_path / "m.pt", "--to", "safetensors", "--json").json["format"] == "safetensors"


def test_what_has_a_format_itself_is_written_in_that_of_the_outputs_name(anyckpt: Runner, tmp_path: Path) -> None:
    """A folder called ``mean.nemo`` is nothing that anybody opens."""
    made = anyckpt("average", LLAMA, LLAMA, "-o", tmp_path / "mean.nemo", "--json").json
    assert made["format"] == "nemo" and (tmp_path / "mean.nemo").is_file()
    assert anyckpt("average", LLAMA, LLAMA, "-o", tmp_path / "mean", "--json").json["format"] == "hf"
    adapter = fixture_path("families/lora_llama/hf_adapter")
    assert anyckpt("merge-lora", LLAMA, adapter, tmp_path / "m.safetensors", "--json").json["format"] == "safetensors"
    assert anyckpt("merge-lora", LLAMA, adapter, tmp_path / "m.pt", "--to", "hf", "--json").json["format"] == "hf"


def test_a_name_like_the_sources_means_the_sources_format(anyckpt: Runner, tmp_path: Path) -> None:
    """Files of torch are called ``.ckpt``, too."""
    assert anyckpt("convert", LLAMA, tmp_path / "a.ckpt", "--to", "torch").code == 0
    words = ("average", tmp_path / "a.ckpt", tmp_path / "a.ckpt", "-o", tmp_path / "mean.ckpt", "--json")
    assert anyckpt(*words).json["format"] == "torch"


def test_a_name_that_tells_nothing_is_an_error_with_the_formats(anyckpt: Runner, tmp_path: Path) -> None:
    error = anyckpt("convert", LLAMA, tmp_path / "out").error
    assert "add --to with a format: nemo, nemo2, lightning" in error and ".safetensors" in error
    assert "fsdp" not in error
    with pytest.raises(UsageError, match="--to"):
        convert(LLAMA, tmp_path / "out.bin")


@pytest.mark.parametrize(("word", "name"), [("bfloat16", "bfloat16"), ("float16", "float16"), ("bf16", "bfloat16")])
def test_types_may_be_said_in_full(anyckpt: Runner, tmp_path: Path, word: str, name: str) -> None:
    done = anyckpt("convert", LLAMA, tmp_path / "out.pt", "--dtype", word, "--json").json
    assert done["casts"] == {f"float32 -> {name}": 21}


def test_no_message_points_at_a_file_that_is_not_installed() -> None:
    """What is in the repository only, such as its documentation, nobody has who installed a wheel."""
    for path in Path(cli.__file__).parents[1].rglob("*.py"):
        nodes = list(ast.walk(ast.parse(path.read_text("utf-8"))))
        documentation = {id(node.value) for node in nodes if isinstance(node, ast.Expr)}
        for node in nodes:
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in documentation:
                assert "docs/" not in node.value, f"{path}: {node.value}"
