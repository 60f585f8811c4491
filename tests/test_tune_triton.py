"""Tuning the Triton engine, emulated: our kernels beside the library's convolution, and their tiles."""

from __future__ import annotations

import dataclasses
import warnings
from unittest import mock

import pytest
import torch
from triton.runtime.errors import OutOfResources

from resnet_fused import plan, tune, winners
from resnet_fused.engines import triton_site
from resnet_fused.tuning import candidates, session, sites, steps
from tests.engine_harness import basic, convolutions, fresh_engine, fused, images, needs_compiler, running
from tests.test_tune_race import Clock
from tests.tune_harness import no_winners

__all__ = ["fresh_engine", "no_winners"]
pytestmark = needs_compiler
STAGES = 2  # the tiles that the clock makes faster


@pytest.fixture
def seconds(monkeypatch):
    """Seconds of the variants, by name. Candidates run where they are judged; their times are the clock's."""
    clock, seconds = Clock(), {"own": 0.005, "library": 0.010}

    def timed(candidate, prepared, part=None):
        tile = 0.010 if f"stages {STAGES}" in candidate.name else 0.020
        return clock.tick(candidate.name, seconds.get(candidate.name, tile))

    monkeypatch.setattr(candidates, "timed", timed)
    monkeypatch.setattr(session, "race_steps", lambda *_: None)
    seconds["timer"] = clock.timer()
    return seconds


def tuned(seconds):
    with running(None), warnings.catch_warnings():
        warnings.simplefilter("error")
        return tune(basic().bfloat16(), images().bfloat16(), engine="triton", timer=seconds["timer"])


def launched():
    with running(None) as launches:
        fused(basic().bfloat16())(images().bfloat16()).sum().backward()
    return launches


def test_our_kernels_and_their_tiles_are_measured_and_run(seconds):
    report = tuned(seconds)
    assert not [note for measured in report.measured for note in measured.notes]
    assert len(report.measured) == 4
    winner = {m.problem.rpartition(": ")[2]: m.winner for m in report.measured}
    assert winner.pop("2x8x5x4 to 8, 3x3, bfloat16") == "own"
    assert set(winner) == {"tile of fwd", "tile of dgrad", "tile of wgrad"}
    assert all(f"stages {STAGES}" in name for name in winner.values())
    stages = {launch.config["num_stages"] for launch in launched() if launch.kernel.startswith("_conv_")}
    assert stages == {STAGES}
    with winners.using({}):
        assert STAGES not in {launch.config["num_stages"] for launch in launched() if "_conv_" in launch.kernel}


def test_a_library_that_is_faster_runs_instead(seconds, monkeypatch):
    monkeypatch.setattr(candidates, "TILED", ())
    seconds["library"] = 0.001
    (measured,) = tuned(seconds).changed
    assert (measured.default, measured.winner, measured.count) == ("own", "library", 2)
    assert not convolutions(launched())


def test_kernels_that_are_wrong_are_dropped(seconds, monkeypatch):
    monkeypatch.setattr(candidates, "TILED", ())
    genuine = triton_site.conv_wgrad
    with mock.patch.object(triton_site, "conv_wgrad", lambda *a: genuine(*a) * 1.5):
        (measured,) = tuned(seconds).measured
    assert measured.winner == "library" and "own dropped: FAIL grad of weight" in measured.notes[0]


def test_kernels_that_do_not_compile_are_dropped_without_a_word_or_a_trace(seconds, monkeypatch):
    monkeypatch.setattr(candidates, "TILED", ())
    failure = OutOfResources(300_000, 232_448, "shared memory")
    with mock.patch.object(triton_site, "conv_fwd", side_effect=failure):
        (measured,) = tuned(seconds).measured
    assert measured.winner == "library" and "own dropped: OutOfResources: out of resource" in measured.notes[0]
    assert not plan._refused


def test_tf32_products_are_held_to_its_mantissa(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    with running(None):
        problem = sites.collect(steps.Step(steps.private_copy(basic(), None, "triton"), (images(),)))[0]
        prepared = [sites.make_inputs(use, problem.key, torch.device("cpu")) for use in problem.uses]
        tried = [candidates.variant(problem, name, {}) for name in ("own", "library")]
        assert problem.shape.tf32 and candidates.faults(tried, problem, prepared) == {}
        exact = dataclasses.replace(problem, shape=dataclasses.replace(problem.shape, tf32=False))
        assert set(candidates.faults(tried, exact, prepared)) == {"own"}
