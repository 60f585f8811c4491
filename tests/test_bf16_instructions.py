"""Products of bfloat16 by AVX512-BF16 and AMX: as compiled, on a machine that has them or under an emulator of them.

The emulator is ``emulation/bf16_instructions.c``: it takes over where such an instruction is illegal.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from resnet_fused.engines import cpu

from . import test_packed

ROOT = Path(__file__).resolve().parents[1]
ISAS = ("avx512_bf16", "amx")
FEW = ("1x1", "1x1 deeper than a block of bfloat16", "3x3 stride 2", "5x5 stride 3")
TESTS = "tests/test_packed.py::test_the_law_in_bfloat16"


def has(isa: str) -> bool:
    """Whether this machine executes it."""
    before = cpu.isa()
    try:
        cpu.set_isa(isa)
    except RuntimeError:
        return False
    cpu.set_isa(before)
    return True


@pytest.fixture(scope="module")
def emulator(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if test_packed.REASON is not None:
        pytest.skip(test_packed.REASON)
    if "AVX512" not in torch.backends.cpu.get_cpu_capability() or platform.system() != "Linux":
        pytest.skip("the emulator needs AVX-512, which the instructions extend, and Linux")
    if (compiler := shutil.which("cc")) is None:
        pytest.skip("no C compiler for the emulator")
    source, made = ROOT / "tests/emulation/bf16_instructions.c", tmp_path_factory.mktemp("emulator") / "emulator.so"
    subprocess.run([compiler, "-O2", "-shared", "-fPIC", str(source), "-o", str(made), "-lm"], check=True)
    return made


def run(isa: str, names: list[str], emulator: Path) -> None:
    environment = dict(os.environ, RESNET_FUSED_CPU_ISA=isa)
    if not has(isa):
        environment |= {"LD_PRELOAD": str(emulator), "RESNET_FUSED_EMULATED_ISA": isa}
    options = ["-q", "-p", "no:cacheprovider", "-p", "no:faulthandler"]  # the last would take the emulator's signal
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *options, *(f"{TESTS}[{name}]" for name in names)],
        cwd=ROOT, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0 and f"{len(names)} passed" in done.stdout, done.stdout + done.stderr


@pytest.mark.parametrize("isa", ISAS)
def test_the_law(isa: str, emulator: Path) -> None:
    run(isa, [f"{name}-pending" for name in FEW], emulator)


@pytest.mark.full
@pytest.mark.parametrize("kind", ["pending", "projection"])
@pytest.mark.parametrize("isa", ISAS)
def test_the_law_of_everything(isa: str, kind: str, emulator: Path) -> None:
    run(isa, [f"{name}-{kind}" for name in test_packed.BF16_CASES], emulator)
