"""A command whose ``--help`` has its options under titles and ends with examples."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import click

if TYPE_CHECKING:
    from anyckpt.cli.slurm import Steps

SLURM = "anyckpt.slurm"
"""Of a context: the option that asked for a script, in place of running the command."""

_WORDS = "anyckpt.words"

Decorated = TypeVar("Decorated", bound=Callable[..., Any])


class Option(click.Option):
    """An option that stands under a title.

    Args:
        title: the title; ``Options`` if empty.
        others: as ``click.Option`` takes them.
    """

    def __init__(self, *arguments: Any, title: str = "", **others: Any) -> None:
        super().__init__(*arguments, **others)
        self.title = title


def option(*names: str, title: str = "", **others: Any) -> Callable[[Decorated], Decorated]:
    """As ``click.option``, under a title."""
    return click.option(*names, cls=Option, title=title, **others)


class Command(click.Command):
    """As ``click.Command``, with titles and examples.

    Args:
        examples: what each is for, and its command line.
        in_script: what a script for Slurm does, from what was given and its words; the same in each task if None.
        others: as ``click.Command`` takes them.
    """

    def __init__(
        self,
        *arguments: Any,
        examples: Sequence[tuple[str, str]] = (),
        in_script: Callable[[Mapping[str, Any], Sequence[str]], Steps] | None = None,
        **others: Any,
    ) -> None:
        super().__init__(*arguments, **others)
        self.examples = tuple(examples)
        self._in_script = in_script

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        ctx.meta[_WORDS] = tuple(args)
        return super().parse_args(ctx, args)

    def invoke(self, ctx: click.Context) -> Any:
        """Run it, or print the script that does so in several processes, if that is asked for."""
        if SLURM not in ctx.meta:
            return super().invoke(ctx)
        from anyckpt.cli.slurm import Steps, print_script

        words = ctx.meta[_WORDS]
        steps = Steps(words) if self._in_script is None else self._in_script(ctx.params, words)
        return print_script(ctx.info_name or "", steps, ctx.meta[SLURM], ctx.params)

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Options under their titles, in the order in which titles first come; those without one at the end."""
        titled: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx) if isinstance(parameter, click.Option) else None
            if record is not None:
                titled.setdefault(getattr(parameter, "title", ""), []).append(record)
        others = titled.pop("", [])
        for title, records in [*titled.items(), ("Options", others)]:
            if records:
                with formatter.section(title):
                    formatter.write_dl(records)

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        write_examples(formatter, self.examples)
        super().format_epilog(ctx, formatter)


def write_examples(formatter: click.HelpFormatter, examples: Sequence[tuple[str, str]]) -> None:
    """What each is for and its command line, which can be copied; nothing if there are none."""
    if not examples:
        return
    with formatter.section("Examples"):
        for number, (purpose, line) in enumerate(examples):
            if number:
                formatter.write_paragraph()
            formatter.write_text(f"# {purpose}")
            formatter.write(f"{'':{formatter.current_indent}}{line}\n")
