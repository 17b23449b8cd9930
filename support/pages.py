"""Reads the code out of README and docs, and runs it as a reader would: page by page, top down.

```python runs, ```bash runs, and a block with `title="net.py"` becomes that file. Other blocks (```text)
are no code. A comment before a block, which readers do not see, says what is special about it:

    <!-- test: check (why) -->              it runs under `make check` only
    <!-- test: check nncf (why) -->         the same, where the library is installed
    <!-- test: skip (why) -->               it is not run
"""

import importlib.util
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from support.places import ROOT

from gdfq.cli import main

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
_FENCE = re.compile(
    r"(?:^<!-- test: (?P<mark>\w+)(?: (?P<library>\w+))? \((?P<reason>[^)]+)\) -->\n+)?"
    r'^(?P<indent> *)```(?P<language>\w*)(?: title="(?P<title>[\w./-]+)")?[^\n]*\n'
    r"(?P<code>.*?)^(?P=indent)```$",
    re.DOTALL | re.MULTILINE,
)


@dataclass(frozen=True)
class Block:
    """A block of code and the marks of its comment."""

    language: str
    title: str | None
    code: str
    mark: str | None
    library: str | None
    line: int

    @property
    def absent(self) -> bool:
        """Whether it needs a library that is not here."""
        return self.library is not None and importlib.util.find_spec(self.library) is None


def blocks(page: Path) -> list[Block]:
    """All blocks of a page, in order."""
    text = page.read_text()
    return [
        Block(
            found["language"], found["title"],
            re.sub(f"^{found['indent']}", "", found["code"], flags=re.MULTILINE),
            found["mark"], found["library"], text[: found.start("code")].count("\n") + 1,
        )
        for found in _FENCE.finditer(text)
    ]  # fmt: skip


def run(
    page: Path, chosen: Sequence[Block], folder: Path, *, shell: bool = True
) -> dict[str, object]:
    """Run blocks in the folder, one after the other.

    Args:
        page: Where they are from, for messages.
        chosen: The blocks.
        folder: Where they work: the working directory, when `shell` is False.
        shell: Whether all commands go through bash. Without it, a block of `gdfq` commands alone
            runs in this process, which spares starting Python for each.

    Returns:
        What the Python of the page has defined.
    """
    space: dict[str, object] = {"__name__": "page"}
    for block in chosen:
        where = f"{page.name}, line {block.line}"
        if block.title is not None:
            (folder / block.title).write_text(block.code)
            sys.modules.pop(Path(block.title).stem, None)  # of another folder, of the same name
        elif block.language == "python":
            # Empty lines before it, so that an error names the line of the page.
            exec(compile("\n" * (block.line - 1) + block.code, str(page), "exec"), space)
        elif block.language == "bash":
            commands = None if shell else gdfq_commands(block.code)
            if commands is None:
                _bash(block.code, folder, where)
            else:
                assert Path.cwd() == folder.resolve()
                for command in commands:
                    assert main(command) == 0, f"{where}: gdfq {shlex.join(command)}"
    return space


def gdfq_commands(code: str) -> list[list[str]] | None:
    """The arguments of each command, or None where one is more than a plain `gdfq` command."""
    commands = []
    for line in code.replace("\\\n", "").splitlines():
        words = shlex.split(line, comments=True)
        bare = re.sub(r"'[^']*'|#.*", "", line)
        if words and (words[0] != "gdfq" or re.search(r"[|<>&;$*`]", bare)):
            return None
        if words:
            commands.append(words[1:])
    return commands


def _bash(code: str, folder: Path, where: str) -> None:
    """Run commands with the `gdfq` of this Python until the first one that fails."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", code],
        cwd=folder, env={**os.environ, "PATH": path}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, f"{where}: {code}\n{done.stdout}{done.stderr}"
