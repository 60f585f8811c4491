"""`make gpu`: prove the package on this machine's GPU, then time it; the results go to a file.

The tests marked ``cuda``, `resnet-fused check` in bf16 (fp32 where the GPU has none), and training steps of whole nets
against eager PyTorch and `torch.compile`. Exit code 0 when all passed, 1 when not, 2 without a GPU.
"""

from __future__ import annotations

import dataclasses
import datetime
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

import resnet_fused
from benchmarks.race import Race, Row, Step, contestants
from resnet_fused.resnet import BUILDERS

ROUNDS, WARM_UP, BATCH, IMAGE = 21, 5, 64, 224
NETWORKS = ("resnet18", "resnet50")
RESULTS = Path(__file__).parent / "results"


def commands(dtype: str) -> dict[str, list[str]]:
    """What must pass before anything is timed, by name."""
    check = ["resnet_fused", "check", "--device", "cuda", "--dtype", dtype]
    return {"tests": ["pytest", "tests", "-m", "cuda", "-q"], "check": check, "check frozen": [*check, "--eval"]}


def waiting(step: Step) -> Step:
    """``step``, and then the GPU's own end of it."""

    def timed() -> None:
        step()
        torch.cuda.synchronize()

    return timed


def race(network: str, dtype: torch.dtype) -> list[Row]:
    """Training steps of ``network``, forward and backward, in turns."""
    torch.manual_seed(0)
    stock = BUILDERS[network](fused=False).to("cuda", dtype)
    x = torch.randn(BATCH, 3, IMAGE, IMAGE).to("cuda", dtype)
    steps = Race({name: waiting(step) for name, step in contestants(stock, x).items()})
    steps.warm_up(WARM_UP)
    for _ in range(ROUNDS):
        steps.round()
    return steps.rows()


def describe(dtype: str) -> dict[str, Any]:
    """The machine, the versions, the date."""
    import triton

    properties = torch.cuda.get_device_properties(0)
    return {
        "gpu": properties.name,
        "memory_bytes": properties.total_memory,
        "processors": properties.multi_processor_count,
        "torch": torch.__version__,
        "cuda": torch.version.cuda or f"hip {torch.version.hip}",
        "cudnn": torch.backends.cudnn.version(),
        "triton": triton.__version__,
        "resnet_fused": resnet_fused.__version__,
        "dtype": dtype,
        "batch": BATCH,
        "image": IMAGE,
        "rounds": ROUNDS,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "command": "make gpu",
    }


def main() -> int:
    """Run everything and write ``results/gpu-<name>.json``; what failed is in the file and is not timed."""
    if not torch.cuda.is_available():
        print("gpu: no GPU here: torch.cuda.is_available() is False")
        return 2
    dtype = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    machine = describe(dtype)
    passed = {}
    for name, command in commands(dtype).items():
        print(f"gpu: {name}", flush=True)
        passed[name] = subprocess.run([sys.executable, "-m", *command], check=False).returncode == 0
    rows = {}
    for network in NETWORKS if all(passed.values()) else ():
        rows[network] = race(network, {"bf16": torch.bfloat16, "fp32": torch.float32}[dtype])
        print(f"gpu: training step, {network}", *rows[network], sep="\n  ", flush=True)
    timed = {network: [dataclasses.asdict(row) for row in found] for network, found in rows.items()}
    path = RESULTS / f"gpu-{re.sub(r'[^a-z0-9]+', '-', machine['gpu'].lower()).strip('-')}.json"
    path.write_text(json.dumps({"machine": machine, "passed": passed, "training_step": timed}, indent=2) + "\n")
    print(f"gpu: {'passed' if all(passed.values()) else 'FAILED'}; results in {path}")
    return 0 if all(passed.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
