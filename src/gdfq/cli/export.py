"""A file to deploy, from the folder of a run."""

from pathlib import Path

import click

from gdfq.api import load
from gdfq.deploy.export import Exported, find_target, named_target
from gdfq.deploy.safetensors import STUDENT_FILE
from gdfq.errors import UsageError
from gdfq.runs.metrics import finished, note_export, run_of


def export(
    folder: Path,
    *,
    target: str | None,
    out: Path | None,
    raw_input: bool,
    safe_x86: bool,
    memory: int | None,
    model: str | None,
) -> None:
    """Export, and print what was written."""
    if target is None and out is None:
        target = "onnx"
    chosen = None if target is None else named_target(target)
    folder = run_of(folder)
    quantized = load(folder)
    home = folder if folder.is_dir() else folder.parent
    path = out or home / (chosen.file_name if chosen else "")
    if folder != home and finished(home) and path.resolve().parent == home.resolve():
        raise UsageError(
            f"exported files in the folder of a run must be of its network, {home / STUDENT_FILE}; "
            f"{folder} is another file. Give --out in another folder, or export {home}."
        )
    if path.exists() and path.resolve() == (home / STUDENT_FILE).resolve():
        raise UsageError(f"{path} is the network itself. Give another file with --out.")
    kind = find_target(chosen, path)
    if model is not None and not kind.holds_weights_alone:
        raise UsageError(
            "--model is for targets whose files hold weights for its code, such as "
            f"compressed-tensors; the target is {kind.name!r}. Remove --model."
        )
    exported = quantized.export(
        path,
        target=kind,
        raw_input=raw_input,
        safe_x86=safe_x86,
        memory=memory,
        original=model,
    )
    note_export(home, exported.path, exported.as_values())
    print_export(exported)


def print_export(exported: Exported) -> None:
    """Say which file was written, how it compared with the network, and what to know of it."""
    click.echo(f"{'file':10}{exported.path}, {exported.bytes / 1024:.0f} KiB")
    for kind, parity in (("usual", exported.inside), ("extreme", exported.beyond)):
        same = "" if parity.agreement is None else f"{parity.agreement:.1f} % same predictions "
        click.echo(
            f"{'parity':10}{same}on {parity.images} {kind} inputs; outputs differ by "
            f"{parity.max_difference:.2g} at most ({100 * parity.relative_error:.2g} %)"
        )
    for name, share in exported.differs_first:
        click.echo(f"{'':10}{name}: {100 * share:.2g} % of the codes differ")
    for note in exported.notes:
        click.secho(f"{'note':10}{note}", fg="yellow" if exported.saturates_here else None)
