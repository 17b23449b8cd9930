"""Writes the reference of commands from the commands: a hook of mkdocs (see `mkdocs.yml`)."""

import inspect
from collections.abc import Iterator
from typing import Any

import click

from gdfq.cli.app import cli

PAGE, MARK = "reference/commands.md", "<!-- the commands -->"
_CELL = str.maketrans({"|": r"\|", "<": "&lt;", "*": r"\*", "_": r"\_"})


def reference() -> str:
    """All commands as Markdown: what they do, how they are called, every option."""
    context = click.Context(cli, info_name="gdfq")
    parts = [described(cli)]
    for name, command in sorted(cli.commands.items()):
        inner = click.Context(command, info_name=f"gdfq {name}")
        usage = f"```text\n{' '.join([f'gdfq {name}', *command.collect_usage_pieces(inner)])}\n```"
        parts.append(
            f"## gdfq {name}\n\n{usage}\n\n{described(command)}\n\n{options(command, inner)}"
        )
    parts.append(f"## Options of all commands\n\n{options(cli, context)}")
    return "\n\n".join(parts)


def described(command: click.Command) -> str:
    """The help text; paragraphs that are not to be wrapped stay as they are."""
    paragraphs = inspect.cleandoc(command.help or "").split("\n\n")
    return "\n\n".join(
        f"```text\n{kept.strip()}\n```" if kept != paragraph else paragraph
        for paragraph, kept in ((p, p.removeprefix("\b")) for p in paragraphs)
    )


def options(command: click.Command, context: click.Context) -> str:
    """A table of the options in the words of `--help`."""
    rows = [
        f"| `{name.replace('|', '/')}` | {text.translate(_CELL)} |"
        for name, text in records(command, context)
    ]
    return "\n".join(["| option | meaning |", "| --- | --- |", *rows])


def records(command: click.Command, context: click.Context) -> Iterator[tuple[str, str]]:
    """Arguments stand in the usage, and --help is every command's."""
    for parameter in command.get_params(context):
        record = parameter.get_help_record(context)
        if record and isinstance(parameter, click.Option) and parameter.name != "help":
            yield record


def on_page_markdown(markdown: str, *, page: Any, **_: Any) -> str:
    """Called by mkdocs for each page."""
    return markdown.replace(MARK, reference()) if page.file.src_uri == PAGE else markdown
