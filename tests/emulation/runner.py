"""Run the ``case_*`` functions of a module in a process of their own, with TRITON_INTERPRET=1.

    failures = run_cases("tests.emulation.interpreter_cases")      # {case: traceback, or "" where it passed}

In the child this module is the main program: it installs `interpreter`, runs every case and prints one line of JSON.
"""

from __future__ import annotations

import importlib
import json
import os
import pathlib
import subprocess
import sys
import traceback

_MARK = "interpreter cases: "


def run_cases(module: str, names: list[str] | None = None, timeout: float = 300.0) -> dict[str, str]:
    """Run the cases ``names`` of ``module`` (all by default), for at most ``timeout`` seconds.

    Raises:
        RuntimeError: the process ended without a result; the message holds its output.
    """
    command = [sys.executable, "-m", "tests.emulation.runner", module, *(names or [])]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    root = pathlib.Path(__file__).resolve().parents[2]
    done = subprocess.run(command, env=environment, cwd=root, capture_output=True, text=True, timeout=timeout)
    for line in done.stdout.splitlines():
        if line.startswith(_MARK):
            return json.loads(line[len(_MARK) :])
    raise RuntimeError(f"run_cases({module}): expected a result, got exit status {done.returncode}\n{done.stderr}")


def case_names(module: str) -> list[str]:
    """The names of the ``case_*`` functions of ``module``."""
    return [name for name in vars(importlib.import_module(module)) if name.startswith("case_")]


def _main(module: str, names: list[str]) -> None:
    from tests.emulation import interpreter

    interpreter.install()
    cases = vars(importlib.import_module(module))
    results = {}
    for name in names or case_names(module):
        try:
            cases[name]()
        except Exception:
            results[name] = traceback.format_exc()
        else:
            results[name] = ""
    print(_MARK + json.dumps(results))


if __name__ == "__main__":
    _main(sys.argv[1], sys.argv[2:])
