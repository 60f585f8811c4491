"""Memory that the CPU engine keeps from one step to the next: used again, bounded, given back when asked."""

from __future__ import annotations

import os
import subprocess
import sys
import threading

import pytest
import torch
from torch.profiler import ProfilerActivity, kineto_available, profile

import resnet_fused
from resnet_fused.engines import cpu, cpu_site

REASON = cpu.load() or (None if cpu_site._site_fwd else "the CPU library is older than its site ops: build it again")
pytestmark = pytest.mark.skipif(REASON is not None, reason=str(REASON))

MOMENTS = torch.tensor([[0.0], [1.0], [1.0], [0.0], [0.1]]).expand(5, 16).contiguous()
MEGABYTES = 1 << 20


def activation(images: int, value: float = 1.0) -> torch.Tensor:
    """One of ``images`` times 1 MiB, made by an op of the engine."""
    y = torch.full((images, 16, 128, 128), value).to(memory_format=torch.channels_last)
    return cpu.bn_apply(y, MOMENTS, None, None, 1, 0, False)


@pytest.fixture(autouse=True)
def empty() -> None:
    resnet_fused.release_memory()


def test_the_next_step_gets_the_same_memory() -> None:
    first = activation(2)
    address = first.data_ptr()
    del first
    assert activation(2).data_ptr() == address


def test_what_is_in_use_is_not_given_out() -> None:
    held = activation(2, 3.0)
    other = activation(2, 5.0)
    resnet_fused.release_memory()
    assert bool((held == 3).all()) and bool((other == 5).all())


def test_a_view_holds_its_memory() -> None:
    view = activation(2, 3.0)[1:]
    activation(2, 5.0)
    assert bool((view == 3).all())


def test_no_more_is_kept_than_was_in_use_at_once() -> None:
    for images in (1, 2, 3, 4, 6):
        activation(images)
    assert resnet_fused.release_memory() <= 6 * MEGABYTES
    held = [activation(1) for _ in range(5)]
    del held
    assert resnet_fused.release_memory() == 5 * MEGABYTES
    assert resnet_fused.release_memory() == 0


def test_what_nobody_asks_for_is_given_back() -> None:
    activation(5)
    for _ in range(4200):
        activation(1)
    assert resnet_fused.release_memory() == MEGABYTES


def test_small_activations_are_not_kept() -> None:
    cpu.bn_apply(torch.ones(1, 16, 8, 8).to(memory_format=torch.channels_last), MOMENTS, None, None, 1, 0, False)
    assert resnet_fused.release_memory() == 0


def test_threads_do_not_share_memory() -> None:
    wrong: list[float] = []

    def work(value: float) -> None:
        for _ in range(100):
            made = activation(1, value)
            if not bool((made == value).all()):
                wrong.append(value)

    threads = [threading.Thread(target=work, args=(float(i),)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_what_was_in_use_is_not_kept_once_it_is_off() -> None:
    held = activation(2)
    with cpu.unkept_memory():
        del held
        assert resnet_fused.release_memory() == 0


@pytest.mark.skipif(not kineto_available(), reason="torch was built without its profiler")
def test_the_profiler_sees_what_is_not_kept() -> None:
    def allocated() -> int:
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as profiler:
            held = cpu.bn_apply(y, MOMENTS, None, None, 1, 0, False)
        del held
        return sum(event.self_cpu_memory_usage for event in profiler.key_averages())

    y = torch.ones(2, 16, 128, 128).to(memory_format=torch.channels_last)
    with cpu.unkept_memory():
        assert allocated() == 2 * MEGABYTES
        assert resnet_fused.release_memory() == 0
    assert allocated() == 0
    assert resnet_fused.release_memory() == 2 * MEGABYTES


def test_it_can_be_turned_off() -> None:
    program = """
import torch, resnet_fused
from resnet_fused.engines import cpu
cpu.load()
y = torch.ones(2, 16, 128, 128).to(memory_format=torch.channels_last)
cpu.bn_apply(y, torch.ones(5, 16), None, None, 1, 0, False)
print(resnet_fused.release_memory())
"""
    environment = {**os.environ, "RESNET_FUSED_KEEP_MEMORY": "0"}
    ran = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    assert ran.stdout.split() == ["0"]
