"""Commands start on systems without the modules and functions that only Unix has."""

import json
import subprocess
import sys
from pathlib import Path

UNIX_ONLY = ("resource", "fcntl", "grp", "pwd", "pty", "termios", "tty", "syslog")
PROGRAM = f"""
import os, signal, sys
for name in {UNIX_ONLY!r}:
    sys.modules[name] = None  # its import fails
for name in ("sched_getaffinity", "getuid", "geteuid", "killpg", "getloadavg", "nice"):
    if hasattr(os, name):
        delattr(os, name)
from gdfq.cli import main
from gdfq.runs.sweep import read_sweep
from gdfq.runs.sweep_runner import usable_cores
assert usable_cores() >= 1
assert len(read_sweep(__import__("pathlib").Path(sys.argv[1])).cells()) == 2
sys.exit(main(sys.argv[2:]))
"""


def test_doctor_and_sweep_run_without_unix_only_modules(tmp_path: Path) -> None:
    (tmp_path / "net.py").write_text(
        "from torch import nn\n"
        "def net():\n"
        "    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(),\n"
        "        nn.Flatten(), nn.Linear(144, 3)).eval()\n"
    )
    (tmp_path / "sweep.yaml").write_text("networks: [net.py:net]\nseeds: [0, 1]\n")
    words = ["doctor", f"{tmp_path}/net.py:net", "--input=1x8x8", "--steps=8", "--json"]
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(tmp_path / "sweep.yaml"), *words],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["peak_bytes"] is None  # nothing tells it
    assert found["seconds"].keys() == {"images", "calibration", "tuning"}
