"""Random blocks, shapes, dtypes, norm states, layouts and memory modes against plain torch.nn.

A failure shrinks, and prints the command that runs it again.
"""

from __future__ import annotations

import pytest

hypothesis = pytest.importorskip("hypothesis", reason="the fuzzer needs hypothesis")

from hypothesis import HealthCheck, example, given, note, settings  # noqa: E402

from tests.fuzzing import Case, cases, verify  # noqa: E402

COMMON = {"deadline": None, "derandomize": True, "database": None, "suppress_health_check": list(HealthCheck)}


def _check(case: Case) -> None:
    note(f'to run it again: python -m tests.fuzzing "{case!r}"')
    verify(case)


@settings(max_examples=200, **COMMON)
@given(cases())
@example(Case(k=16, n=3, h=5, w=9, values="one inf", layout="nchw", dtype="bf16"))  # an Inf in one of two tiles
@example(Case(shortcut="pad symmetric", c=8, k=17, stride=2, values="positive"))  # an odd number of channels before
def test_two_hundred_random_blocks(case: Case) -> None:
    _check(case)


@pytest.mark.full
@settings(max_examples=2000, **COMMON)
@given(cases())
def test_two_thousand_random_blocks(case: Case) -> None:
    _check(case)
