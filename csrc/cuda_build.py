"""What setup.py and the tests need to know of a CUDA toolkit: where it is, and how nvcc is called.

A system toolkit (CUDA_HOME, CUDA_PATH, nvcc on the path, /usr/local/cuda) serves, and so do pip's compiler packages
(nvidia-cuda-nvcc, nvidia-nvvm, nvidia-cuda-crt, nvidia-cuda-cccl, nvidia-cuda-runtime). Standard library only.
"""

from __future__ import annotations

import dataclasses
import os
import re
import shutil
import subprocess
import sysconfig
from pathlib import Path

# 8.6 and 8.9 run the code of 8.0: nothing in the kernels is special to them. 7.5 has code of its own, a quarter more to
# compile, for GPUs that TORCH_CUDA_ARCH_LIST must ask for.
DEFAULT_ARCHS = "8.0;9.0;10.0;12.0+PTX"
OLDEST_ARCH = (7, 5)  # ldmatrix, and mma.sync m16n8k8 of float16
MATHS = {"bf16": "MathBF16", "f16": "MathF16", "tf32": "MathTF32", "f32": "MathF32"}
# Compiled once for each of MATHS.
KERNELS = "projection.cu"


@dataclasses.dataclass(frozen=True)
class Toolkit:
    """A CUDA toolkit: ``nvcc``, its version, and the runtime library to link."""

    nvcc: Path
    version: str
    runtime: Path

    def archs(self) -> frozenset[str]:
        """The virtual architectures that this nvcc knows, such as ``compute_80``."""
        done = subprocess.run([self.nvcc, "--list-gpu-arch"], capture_output=True, text=True, check=False)
        return frozenset(done.stdout.split())


def _candidates() -> list[Path]:
    named = [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    if named:
        return [Path(home) / "bin" / "nvcc" for home in named]
    on_path = shutil.which("nvcc")
    found = [Path(on_path)] if on_path else []
    packages = Path(sysconfig.get_path("purelib")) / "nvidia"
    return [*found, Path("/usr/local/cuda/bin/nvcc"), *sorted(packages.glob("cu*/bin/nvcc"))]


def _runtime(nvcc: Path, major: str, torch_root: Path) -> Path | None:
    """``libcudart.so.MAJOR``: the toolkit's own, or the one that torch brought."""
    homes = [nvcc.resolve().parent.parent, Path("/usr/local/cuda"), torch_root.parent / "nvidia" / f"cu{major}"]
    homes.append(torch_root.parent / "nvidia" / "cuda_runtime")
    for home in homes:
        for folder in ("lib64", "lib", "targets/x86_64-linux/lib", "targets/sbsa-linux/lib"):
            library = home / folder / f"libcudart.so.{major}"
            if library.exists():
                return library
    return None


def find_toolkit(torch_cuda: str | None, torch_root: Path) -> Toolkit | str:
    """The toolkit to build with, or why there is none, in words.

    Args:
        torch_cuda: ``torch.version.cuda``.  torch_root: the folder of the package.
    """
    if torch_cuda is None:
        return "this torch is not a CUDA build"
    candidates = _candidates()
    nvcc = next((path for path in candidates if os.access(path, os.X_OK)), None)
    if nvcc is None:
        return f"no nvcc found (looked for {', '.join(map(str, candidates))})"
    done = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=False)
    match = re.search(r"release (\d+\.\d+)", done.stdout)
    if match is None:
        return f"{nvcc} --version says nothing usable: {(done.stdout + done.stderr).strip()[:200]}"
    version, major = match[1], match[1].split(".")[0]
    if major != torch_cuda.split(".")[0]:
        return f"nvcc is of CUDA {version}, torch of CUDA {torch_cuda}; their major versions must be equal"
    runtime = _runtime(nvcc, major, torch_root)
    return Toolkit(nvcc, version, runtime) if runtime else f"no libcudart.so.{major} beside {nvcc} or torch"


def arch_flags(requested: str, known: frozenset[str]) -> tuple[list[str], list[str]]:
    """``-gencode`` flags of a TORCH_CUDA_ARCH_LIST, and what of it is left out, with the reason.

    Raises:
        ValueError: an entry is not of the form 9.0, 9.0a or 9.0+PTX.
    """
    flags, left_out = [], []
    for entry in re.split(r"[;\s,]+", requested.strip()):
        match = re.fullmatch(r"(\d+)\.(\d)([a-z]?)(\+PTX)?", entry)
        if match is None:
            raise ValueError(f"TORCH_CUDA_ARCH_LIST: expected entries like 9.0, 9.0a or 9.0+PTX, got {entry!r}")
        major, minor, suffix, with_ptx = match.groups()
        number = f"{major}{minor}{suffix}"
        if (int(major), int(minor)) < OLDEST_ARCH:
            left_out.append(f"{entry} (the kernels need 7.5)")
        elif f"compute_{number}" not in known and f"compute_{major}{minor}" not in known:
            left_out.append(f"{entry} (this nvcc does not know it)")
        else:
            flags.append(f"-gencode=arch=compute_{number},code=sm_{number}")
            if with_ptx:
                flags.append(f"-gencode=arch=compute_{number},code=compute_{number}")
    return flags, left_out


@dataclasses.dataclass(frozen=True)
class Choice:
    """Whether the CUDA library is built, and how; ``refusal`` says why it is not, if so."""

    mode: str
    refusal: str | None = None
    toolkit: Toolkit | None = None
    flags: tuple[str, ...] = ()
    archs: str = "none"


def choose(mode: str, obstacle: str | None, torch_cuda: str | None, torch_root: Path) -> Choice:
    """What RESNET_FUSED_BUILD_CUDA=``mode`` comes to.

    Args:
        obstacle: why the CPU library, which holds the schemas, is not built, or None.

    Raises:
        ValueError: TORCH_CUDA_ARCH_LIST is malformed.
    """
    if mode == "0":
        return Choice(mode, "RESNET_FUSED_BUILD_CUDA=0")
    if obstacle:
        return Choice(mode, f"it needs the CPU library: {obstacle}")
    found = find_toolkit(torch_cuda, torch_root)
    if isinstance(found, str):
        return Choice(mode, found)
    requested = os.environ.get("TORCH_CUDA_ARCH_LIST") or DEFAULT_ARCHS
    flags, left_out = arch_flags(requested, found.archs())
    archs = f"{requested}; left out: {', '.join(left_out)}" if left_out else requested
    refusal = None if flags else f"no architecture is left of TORCH_CUDA_ARCH_LIST={archs}"
    return Choice(mode, refusal, found, tuple(flags), archs)


def math_flags(math: str) -> list[str]:
    """What makes `KERNELS` the kernels of one kind of arithmetic."""
    return [f"-DRESNET_FUSED_MATH={math}", f"-DRESNET_FUSED_MATH_TYPE=resnet_fused::cuda::{MATHS[math]}"]
