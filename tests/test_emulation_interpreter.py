"""Layer 1 of tests/emulation: the repaired and instrumented Triton interpreter, in a process of its own."""

from __future__ import annotations

import os
import re

import pytest

pytest.importorskip("triton", reason="Triton is not installed")

import triton

from tests.emulation import runner

VERSION = tuple(int(part) for part in re.findall(r"\d+", triton.__version__)[:2])
pytestmark = pytest.mark.skipif(VERSION < (3, 8), reason="the repairs are written for the interpreter of Triton 3.8")

CASES = "tests.emulation.interpreter_cases"


@pytest.fixture(scope="module")
def results():
    return runner.run_cases(CASES)


@pytest.mark.parametrize("name", runner.case_names(CASES))
def test_interpreter(results, name):
    assert not results[name], results[name]


def test_the_runner_reports_a_case_that_fails():
    failing = runner.run_cases("tests.emulation.failing_case")
    assert "AssertionError: planted" in failing["case_fails"]


def test_the_runner_reports_a_module_that_is_missing():
    with pytest.raises(RuntimeError, match=r"No module named 'tests\.emulation\.absent'"):
        runner.run_cases("tests.emulation.absent")


def test_install_refuses_a_process_that_is_not_interpreting():
    from tests.emulation import interpreter

    assert os.environ.get("TRITON_INTERPRET") != "1"
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET=1"):
        interpreter.install()
    with pytest.raises(RuntimeError, match="install"), interpreter.checked():
        pass
