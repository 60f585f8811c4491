"""Devices as a model of time sees them: bandwidth, FLOP rates, memory. Figures of the makers' data sheets.

Rates are dense, with float32 accumulation; bandwidth is the memory's peak, which no kernel quite reaches. So a time
made from them is a floor. The CPU's are measured here, in a fraction of a second.
"""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Callable

import torch

GIB = 2**30
TERA = 1e12
CPU = "cpu"
_COPY_BYTES, _SIDE, _ROUNDS = 2**26, 1024, 5


@dataclasses.dataclass(frozen=True)
class Device:
    """A device's rates.

    Args:
        name: as the commands take it.  bandwidth: of its memory, bytes per second.
        memory: bytes that a program can have.
        flops: per second, by precision: bf16, fp16, tf32, fp32; what is missing it cannot compute at speed.
        source: where the figures are from.
    """

    name: str
    bandwidth: float
    memory: int
    flops: dict[str, float]
    source: str = "data sheet"

    def seconds(self, moved: float, flops: float, precision: str) -> float:
        """No kernel that moves ``moved`` bytes and computes ``flops`` can take less.

        Raises:
            ValueError: the device has no such ``precision``.
        """
        if precision not in self.flops:
            raise ValueError(f"device {self.name}: expected a precision of {', '.join(self.flops)}, got {precision}")
        return max(moved / self.bandwidth, flops / self.flops[precision])


def _gpu(name: str, gib: float, terabytes: float, half: float, tf32: float, fp32: float, bf16: bool = True) -> Device:
    flops = {"fp16": half * TERA, **({"bf16": half * TERA, "tf32": tf32 * TERA} if bf16 else {}), "fp32": fp32 * TERA}
    return Device(name, terabytes * TERA, int(gib * GIB), flops)


# memory (GiB a program sees), TB/s, then TFLOP/s in 16 bits, TF32 and exact float32
_GPUS = (
    _gpu("t4", 14.6, 0.320, 65, 0, 8.1, bf16=False),
    _gpu("a10", 22, 0.600, 125, 62.5, 31.2),
    _gpu("a30", 23.5, 0.933, 165, 82, 10.3),
    _gpu("a100-40", 39.4, 1.555, 312, 156, 19.5),
    _gpu("a100", 79.1, 2.039, 312, 156, 19.5),
    _gpu("l4", 22, 0.300, 121, 60, 30.3),
    _gpu("l40s", 44.4, 0.864, 362, 183, 91.6),
    _gpu("rtx3090", 23.6, 0.936, 71, 35.6, 35.6),
    _gpu("rtx4090", 23.5, 1.008, 165, 82.6, 82.6),
    _gpu("rtx5090", 31.3, 1.792, 209, 104.8, 104.8),
    _gpu("h100-pcie", 79.1, 2.000, 756, 378, 51),
    _gpu("h100", 79.1, 3.350, 989, 495, 66.9),
    _gpu("h200", 139.8, 4.800, 989, 495, 66.9),
    _gpu("b200", 178, 8.000, 2250, 1125, 75),
    _gpu("mi300x", 191.9, 5.300, 1307, 654, 163.4),
)
DEVICES = {device.name: device for device in _GPUS}
NAMES = (*DEVICES, CPU)


def named(name: str) -> Device:
    """The device called ``name``; ``cpu`` is this machine's, measured.

    Raises:
        ValueError: unknown name.
    """
    if name == CPU:
        return measured_cpu()
    if name not in DEVICES:
        raise ValueError(f"device: expected one of {', '.join(NAMES)}, got {name!r}")
    return DEVICES[name]


def here() -> Device | None:
    """The GPU of this machine where it is one of `DEVICES`, by its name; None for no GPU or another one."""
    if not torch.cuda.is_available():
        return None
    words = torch.cuda.get_device_name().lower().replace("nvidia", "").replace("geforce", "").replace(" ", "")
    matching = [device for name, device in DEVICES.items() if words.startswith(name.partition("-")[0])]
    pcie = [device for device in matching if device.name.endswith("-pcie") == ("pcie" in words)]
    total = torch.cuda.get_device_properties(0).total_memory
    return min(pcie or matching, key=lambda device: abs(device.memory - total), default=None)


def _fastest(run: Callable[[], object]) -> float:
    times = []
    for _ in range(_ROUNDS):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return min(times)


def measured_cpu() -> Device:
    """This CPU with torch's number of threads: a copy's bandwidth and a float32 matrix product's rate."""
    block = torch.zeros(_COPY_BYTES // 4)
    into, side = torch.empty_like(block), torch.randn(_SIDE, _SIDE)
    with torch.no_grad():
        bandwidth = 2 * _COPY_BYTES / _fastest(lambda: into.copy_(block))
        rate = 2 * _SIDE**3 / _fastest(lambda: torch.mm(side, side))
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 0
    flops = dict.fromkeys(("fp32", "bf16", "fp16"), rate)
    return Device(CPU, bandwidth, memory, flops, f"measured here, {torch.get_num_threads()} threads")
