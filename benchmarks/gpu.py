"""`make gpu`: prove the package on this machine's GPU, then time it; the results go to a file.

The tests marked ``cuda``, `resnet-fused check` in bf16 (fp32 where the GPU has none), then as `resnet-fused bench` does
training steps and inference of whole nets against eager PyTorch and `torch.compile`. Exit code 0 when all passed, 1
when not, 2 without a GPU.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import torch

from resnet_fused.benching.files import write_json
from resnet_fused.benching.report import comparisons, failures
from resnet_fused.benching.session import Session, Settings

RESULTS = Path(__file__).parent / "results"


def commands(dtype: str) -> dict[str, list[str]]:
    """What must pass before anything is timed, by name."""
    check = ["resnet_fused", "check", "--device", "cuda", "--dtype", dtype]
    return {"tests": ["pytest", "tests", "-m", "cuda", "-q"], "check": check, "check frozen": [*check, "--eval"]}


def settings(dtype: str) -> Settings:
    """What is timed."""
    return Settings(
        baselines=("eager", "nhwc", "compile", "max-autotune", "compile-graphs"),
        batch=64,
        dtype=dtype,
        memory=("speed", "min"),
        mode=("train", "infer"),
        rounds=21,
        warm_up=5,
        device="cuda",
    )


def main() -> int:
    """Run everything and write ``results/gpu-<name>.json``; what failed is in the file and is not timed."""
    if not torch.cuda.is_available():
        print("gpu: no GPU here: torch.cuda.is_available() is False")
        return 2
    dtype = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    passed = {}
    for name, command in commands(dtype).items():
        print(f"gpu: {name}", flush=True)
        passed[name] = subprocess.run([sys.executable, "-m", *command], check=False).returncode == 0
    session = Session(settings(dtype), say=lambda line: print(f"gpu: {line}", flush=True))
    if all(passed.values()):
        session.run()
    document = {**session.document("make gpu"), "passed": passed}
    print(*failures(document), *map("  ".join, comparisons(document)), sep="\n")
    path = RESULTS / f"gpu-{re.sub(r'[^a-z0-9]+', '-', document['machine']['gpu'].lower()).strip('-')}.json"
    write_json(path, document)
    right = all(passed.values()) and session.exit_code() == 0 and not session.interrupted
    print(f"gpu: {'passed' if right else 'FAILED'}; results in {path.name}")
    return 0 if right else 1


if __name__ == "__main__":
    sys.exit(main())
