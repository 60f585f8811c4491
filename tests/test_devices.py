"""The table of devices, and the floor of a time."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from resnet_fused import devices


def test_a_floor_is_the_larger_of_two_times():
    device = devices.Device("toy", bandwidth=10.0, memory=1, flops={"fp32": 5.0})
    assert device.seconds(100, 1, "fp32") == 10 and device.seconds(1, 100, "fp32") == 20


def test_a_precision_that_is_missing_is_an_error():
    with pytest.raises(ValueError, match="device t4: expected a precision of fp16, fp32, got bf16"):
        devices.named("t4").seconds(1, 1, "bf16")


def test_an_unknown_device_is_an_error():
    with pytest.raises(ValueError, match=r"device: expected one of t4, .*cpu, got 'h300'"):
        devices.named("h300")


def test_the_table_is_sane():
    for name, device in devices.DEVICES.items():
        assert device.name == name and device.bandwidth > 1e11 and device.memory > 10 * devices.GIB
        assert device.flops["fp16"] >= device.flops["fp32"] > 1e12
    assert devices.named("h200").bandwidth > devices.named("h100").bandwidth > devices.named("a100").bandwidth


def test_the_cpu_is_measured():
    cpu = devices.named("cpu")
    assert cpu.bandwidth > 1e8 and cpu.flops["fp32"] > 1e8 and cpu.memory > devices.GIB and "measured" in cpu.source


@pytest.mark.parametrize(
    ("name", "gib", "expected"),
    [
        ("NVIDIA H100 80GB HBM3", 79.2, "h100"),
        ("NVIDIA A100-SXM4-40GB", 39.4, "a100-40"),
        ("NVIDIA A100-SXM4-80GB", 79.2, "a100"),
        ("NVIDIA GeForce RTX 4090", 23.6, "rtx4090"),
        ("NVIDIA H200", 139.8, "h200"),
        ("NVIDIA Thing-1", 8, None),
    ],
)
def test_this_machines_gpu_is_found_by_its_name(name, gib, expected, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: name)
    properties = SimpleNamespace(total_memory=int(gib * devices.GIB))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    found = devices.here()
    assert (None if found is None else found.name) == expected
