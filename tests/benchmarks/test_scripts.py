"""Every benchmark script imports and starts."""

import importlib
import pkgutil
import sys

import pytest
from support.places import ROOT

MODULES = [found.name for found in pkgutil.iter_modules([str(ROOT / "benchmarks")])]


@pytest.mark.parametrize("name", MODULES)
def test_script_imports_and_answers_help(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    module = importlib.import_module(f"benchmarks.{name}")
    if 'if __name__ == "__main__"' not in (ROOT / "benchmarks" / f"{name}.py").read_text():
        return  # a part of scripts, no script
    monkeypatch.setattr(sys, "argv", [f"benchmarks.{name}", "--help"])
    with pytest.raises(SystemExit) as stop:
        module.main()
    assert stop.value.code == 0
    assert f"python -m benchmarks.{name}" in capsys.readouterr().out
