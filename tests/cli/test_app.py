"""Help and version."""

import subprocess
import sys

import pytest

import gdfq
from gdfq.cli import main


def test_help_and_version_do_not_import_torch(capsys: pytest.CaptureFixture[str]) -> None:
    probe = "import sys, gdfq.cli; sys.exit('torch' in sys.modules or gdfq.cli.main(['-h']))"
    assert subprocess.run([sys.executable, "-c", probe], check=False).returncode == 0
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.strip() == f"gdfq, version {gdfq.__version__}"
    for command in ("quantize", "evaluate", "report", "compare", "generate", "demo", "recipes"):
        assert main([command, "--help"]) == 0
    assert main(["recipes"]) == 0
    assert "GDFQ as published for CIFAR" in capsys.readouterr().out
