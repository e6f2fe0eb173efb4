"""The command line: one module per command, no logic.

Exit codes: 0 done (``diff``: equal, ``verify``: sound), 1 different or damaged, 2 an error that the user can do
something about, in one line on standard error; 130 interrupted; 70 a defect of anyckpt itself, with a traceback.
"""

from __future__ import annotations

import gc
import io
import os
import sys
from collections.abc import Sequence
from importlib import import_module

import click

from anyckpt.cli.command import write_examples
from anyckpt.cli.late_packages import later

_COMMANDS = {
    "inspect": "Say what is in a checkpoint.",
    "convert": "Convert a checkpoint to another format.",
    "quantize": "Quantize a model, with calibration where it helps.",
    "reshard": "Change the parallel layout of a checkpoint and keep its format.",
    "average": "Average checkpoints of one model.",
    "merge": "Merge models: task arithmetic, SLERP, TIES, DARE, or a recipe of mergekit.",
    "merge-lora": "Add a LoRA adapter to its base model.",
    "diff": "Compare two checkpoints by value.",
    "report": "Write a page about a checkpoint for a browser.",
    "verify": "Check a checkpoint for damage.",
    "clean": "Remove what interrupted runs left.",
    "unpack": "Unpack a .nemo archive into a directory.",
    "pack": "Pack a directory into a .nemo archive.",
    "edit": "Change configuration or artifacts of a .nemo archive.",
    "migrate-config": "Translate a NeMo 1 training file to NeMo 2 or Megatron-Bridge.",
}
"""Name -> one line of help, so that ``anyckpt --help`` imports no command."""

_EXAMPLES = (
    ("what is in it", "anyckpt inspect model.nemo"),
    ("to another format; COMMAND --help has more", "anyckpt convert model.nemo llama-hf --to hf"),
    (
        "let bash complete words (zsh: zsh_source, fish: fish_source)",
        'eval "$(_ANYCKPT_COMPLETE=bash_source anyckpt)"',
    ),
)

_RARELY = (200_000, 20, 100)
"""When to look for cycles: among a hundred thousand tensors, all alive, it took a fifth of the time of planning.

Only the command's own process is tuned; in a program that imports anyckpt the collector is the program's.
"""

_BLAS_THREADS = "OPENBLAS_NUM_THREADS"
"""numpy starts OpenBLAS's threads when it is imported, one for each processor, which then wait busily for work.

There is none for them: what multiplies matrices here is divided among threads already.  With one, ``import numpy``
takes half of the processor's time, and sums do not depend on how many processors there are.
"""


class _LazyGroup(click.Group):
    """Imports a command's module when it is run."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in _COMMANDS:
            return None
        command: click.Command = import_module(f"anyckpt.cli.{cmd_name.replace('-', '_')}").command
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        name = args[0]
        if name not in _COMMANDS and not ctx.resilient_parsing:
            from anyckpt.errors import did_you_mean

            question = did_you_mean(name, _COMMANDS)
            ctx.fail(f"No such command {name!r}" + ("" if question is None else f"; {question}"))
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(_COMMANDS.items()))

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        write_examples(formatter, _EXAMPLES)


def _print_version(ctx: click.Context, _: click.Parameter, asked: bool) -> None:
    if asked and not ctx.resilient_parsing:
        from anyckpt import __version__

        click.echo(f"anyckpt {__version__}")
        ctx.exit()


@click.command(cls=_LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "--version",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=_print_version,
    help="Show the version and exit.",
)
def group() -> None:
    """Open, inspect and convert any large-model checkpoint, exactly, in bounded memory, without its framework."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a command and leave the process with its exit code."""
    gc.set_threshold(*_RARELY)
    os.environ.setdefault(_BLAS_THREADS, "1")
    later("numpy")  # which takes as long as all else that is imported to inspect or plan, and computes nothing there
    sys.exit(run(arguments))


def run(arguments: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        arguments: those of the command line if None.

    Returns:
        the exit code.
    """
    from anyckpt.cli.console import StoppedError
    from anyckpt.errors import AnyckptError

    try:
        _prepare_streams()
        result = group.main(args=arguments, prog_name="anyckpt", standalone_mode=False)
        sys.stdout.flush()
        return result if isinstance(result, int) else 0
    except click.exceptions.Exit as request:
        return request.exit_code
    except click.exceptions.NoArgsIsHelpError as help_text:
        print(help_text.format_message(), file=sys.stderr)
        return 2
    except click.ClickException as error:
        return _fail(error.format_message().removesuffix("."), _usage_hint(error))
    except AnyckptError as error:
        return _fail(str(error))
    except StoppedError as request:
        return _fail(str(request), code=130)
    except (click.Abort, KeyboardInterrupt):
        return _fail("interrupted", code=130)
    except BrokenPipeError:
        _silence_stdout()
        return 141
    except OSError as error:
        return _fail(": ".join(str(part) for part in (error.filename, error.strerror or error) if part))
    except MemoryError:
        return _fail("not enough memory; lower --memory or --workers")
    except Exception:
        import traceback

        traceback.print_exc()
        return _fail("this is a defect of anyckpt; please report it with the lines above", code=70)


def _prepare_streams() -> None:
    """Let every name be printed, whatever the terminal's encoding, and nothing fail where a stream is closed."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w"))
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _usage_hint(error: click.ClickException) -> str:
    context = getattr(error, "ctx", None)
    return "" if context is None else f"; see {context.command_path} --help"


def _fail(message: str, hint: str = "", code: int = 2) -> int:
    from anyckpt.cli.console import print_note

    try:
        print_note("error: " + " ".join(message.splitlines()) + hint)
    except BrokenPipeError:
        return code
    return code


def _silence_stdout() -> None:
    """Let the interpreter flush standard output at exit without another complaint about the closed pipe."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
