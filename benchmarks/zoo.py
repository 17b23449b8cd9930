"""The whole line on many architectures with random weights: does it work on *my* network?

    python -m benchmarks.zoo                    # every architecture that is not measured yet
    python -m benchmarks.zoo --only timm:vit    # those whose name contains this, again

For each one and both placements: capture, two steps of its source, two tuning steps at w4a4,
inference on random images, export to ONNX and parity in ONNX Runtime. Random weights say nothing
of accuracy; they say whether a network of this shape passes. Each result is written to
benchmarks/results/zoo.json as soon as it is there, and the table in docs/networks.md at the end.
Needs the extra `hubs`; architectures of a library that is absent are skipped with a line, and one
that computes for more than five minutes is left with that reason.
"""

import argparse
import json
import signal
import warnings
from typing import Any

from support.architectures import ENTRIES, passed
from support.places import RESULTS, ROOT
from support.torchvision_shim import define_missing_operators

from gdfq.errors import GdfqError

FILE = RESULTS / "zoo.json"
PAGE, MARK = ROOT / "docs" / "networks.md", "<!-- benchmarks/zoo.py -->"
LONGEST = 300
"""Seconds of processor time that one architecture may take."""


class TooLongError(BaseException):
    """No Exception, which capture would take for a failure of the network."""


def limit_time() -> None:
    """Raise TooLongError when this process has computed for `LONGEST` seconds from now on."""

    def stop(*_: object) -> None:
        raise TooLongError

    signal.signal(signal.SIGVTALRM, stop)
    signal.setitimer(signal.ITIMER_VIRTUAL, LONGEST)


def table(rows: dict[str, Any]) -> str:
    """The results as Markdown."""
    lines = [
        "| network | input | parameters | layers | batch norms | outputs | relu | full |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in sorted(rows.values(), key=lambda row: str(row["network"])):
        if trouble := row.get("error") or row.get("bug"):
            lines.append(f"| {row['network']} | {row.get('input', '')} | | | | | {trouble} | |")
            continue
        ends = [
            part.get("error") or f"{part['kib']} KiB, {part['typical_error']:.0e}"
            for part in (row["relu"], row["full"])
        ]
        facts = (row["parameters"], row["layers"], row["batch_norms"], row["outputs"])
        cells = [row["network"], row["input"], *(f"{fact:,}" for fact in facts), *ends]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def write_table(rows: dict[str, Any]) -> None:
    """Put the table behind its mark in docs/networks.md."""
    before, mark, _ = PAGE.read_text().partition(MARK)
    assert mark, f"{PAGE} must have the line {MARK}"
    PAGE.write_text(f"{before}{mark}\n\n{table(rows)}\n")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", help="architectures whose name contains this, measured again")
    options = parser.parse_args()
    warnings.simplefilter("ignore")  # the libraries' own
    kept = define_missing_operators()  # they are there while it lives
    rows = json.loads(FILE.read_text()) if FILE.exists() else {}
    for entry in ENTRIES:
        if options.only not in entry.spec if options.only else entry.spec in rows:
            continue
        limit_time()
        try:
            row = passed(entry)
        except GdfqError as error:
            print(f"{entry.spec}: skipped, {error}", flush=True)
            continue
        except TooLongError:
            row = {
                "network": entry.spec, "input": "x".join(map(str, entry.shape)),
                "error": f"took longer than {LONGEST // 60} minutes here; not measured",
            }  # fmt: skip
        except Exception as error:  # a bug: record it and continue with the other networks
            row = {"network": entry.spec, "bug": f"{type(error).__name__}: {error}"[:400]}
        rows[entry.spec] = row
        FILE.write_text(json.dumps(rows, indent=1) + "\n")
        print(json.dumps(row), flush=True)
    write_table(rows)
    del kept


if __name__ == "__main__":
    main()
