"""Builds the CPU and CUDA libraries of resnet_fused; `pyproject.toml` holds everything else.

The libraries are C++ on the libtorch stable ABI: one build serves every CPython from 3.10 on and every
torch from 2.11 on (the CUDA library: every one for the same major version of CUDA). Without a compiler or
without torch the package installs as pure Python, without nvcc or with a CPU-only torch as CPU library
alone, and the reason is printed; a CUDA library that fails to build never breaks the install. Environment:

    RESNET_FUSED_BUILD_CPU   auto (default): build if possible; 0: do not; 1: fail if it cannot be built
    RESNET_FUSED_BUILD_CUDA  the same for the CUDA library, which needs the CPU library
    TORCH_CUDA_ARCH_LIST     what nvcc compiles for (default: see csrc/cuda_build.py)
    CXX, CUDA_HOME           the compiler; the toolkit
    MAX_JOBS                 how many compilers run at once (default: one per core)
    DEBUG                    1: no optimisation, with debug information

Quick rebuild in place: ``python setup.py build_ext --inplace``.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
import platform
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

sys.path.insert(0, str(Path(__file__).resolve().parent / "csrc"))
import cuda_build

CSRC = Path("csrc")
KERNELS, CONVOLUTIONS, DISPATCH = (CSRC / "cpu" / f"{name}.cpp" for name in ("kernels", "convolutions", "dispatch"))
OLDEST_TORCH = (2, 11)
# The kernels are compiled once for each instruction set; the host code picks one at run time.
_AVX2 = ["-mavx2", "-mfma", "-mf16c"]
_AVX512 = [*_AVX2, "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq"]
X86_FLAGS = {"baseline": [], "avx2": _AVX2, "avx512": _AVX512}
# Those that have instructions for products of bfloat16: their convolutions only, the rest is that of AVX-512.
X86_BF16_FLAGS = {
    "avx512_bf16": [*_AVX512, "-mavx512bf16"],
    "amx": [*_AVX512, "-mavx512bf16", "-mamx-tile", "-mamx-bf16"],
}
# GCC would load all rows of a tile before it multiplies them, and spill its sums.
ARM_FLAGS = {"baseline": ["-fno-schedule-insns"]}
# GCC 12 takes the undefined operands of its own AVX-512 intrinsics for a mistake of ours.
WARNINGS = ["-Wall", "-Wextra", "-Wno-uninitialized", "-Wno-maybe-uninitialized"]

UNDECIDED = cuda_build.Choice("auto", "not configured")


@dataclasses.dataclass
class Config:
    """What is built, and with what; ``refusal`` says why the CPU library is not built, if so."""

    mode: str
    compiler: list[str]
    ninja: str = ""
    torch_version: str = "none"
    torch_root: Path = Path()
    refusal: str | None = None
    cuda: cuda_build.Choice = UNDECIDED

    def isa_flags(self, source: Path) -> dict[str, list[str]]:
        """Instruction set -> compiler flags of a source, for this machine's architecture."""
        machine = platform.machine().lower()
        if machine not in ("x86_64", "amd64"):
            return ARM_FLAGS if machine == "aarch64" else {"baseline": []}
        return X86_FLAGS | X86_BF16_FLAGS if source == CONVOLUTIONS and self.knows_bf16 else X86_FLAGS

    @functools.cached_property
    def knows_bf16(self) -> bool:
        """Whether the compiler knows the instructions for products of bfloat16, as GCC 11 and Clang 11 do."""
        command = [*self.compiler, *X86_BF16_FLAGS["amx"], "-E", "-x", "c++", os.devnull, "-o", os.devnull]
        return bool(self.compiler) and subprocess.run(command, capture_output=True).returncode == 0

    @property
    def debug(self) -> bool:
        """Whether DEBUG=1."""
        return os.environ.get("DEBUG") == "1"

    @property
    def jobs(self) -> int:
        """Compilers at once."""
        return int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)

    def compile_flags(self) -> list[str]:
        """Flags of every source. Contraction is off: an FMA is only where it is written."""
        major, minor = OLDEST_TORCH
        optimise = ["-Og", "-g"] if self.debug else ["-O3"]
        common = ["-std=c++17", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off", *optimise, *WARNINGS]
        target = f"-DTORCH_TARGET_VERSION=0x{major:02x}{minor:02x}{0:012x}"
        return [*common, target, "-isystem", str(self.torch_root / "include")]

    def link_flags(self) -> list[str]:
        """Flags of the link step; torch is loaded before the library, so no run path is needed."""
        shared = ["-dynamiclib", "-undefined", "dynamic_lookup"] if sys.platform == "darwin" else ["-shared"]
        return [*shared, "-L", str(self.torch_root / "lib"), "-ltorch_cpu"]

    def nvcc_flags(self) -> list[str]:
        """Flags of every CUDA source; the host compiler is the one that compiles everything else."""
        optimise = ["-O1", "-g"] if self.debug else ["-O3"]
        host = ["-ccbin", self.compiler[0], "-Xcompiler", "-fPIC,-fvisibility=hidden"]
        return ["-std=c++17", *optimise, *host, *self.cuda.flags]

    def describe(self) -> str:
        """The whole configuration, one item a line."""
        library = f"not built: {self.refusal}" if self.refusal else "built"
        cuda_library = f"not built: {self.cuda.refusal}" if self.cuda.refusal else "built"
        toolkit = self.cuda.toolkit
        rows = {
            "CPU library": library,
            "CUDA library": cuda_library,
            "RESNET_FUSED_BUILD_CPU": self.mode,
            "RESNET_FUSED_BUILD_CUDA": self.cuda.mode,
            "compiler": shlex.join(self.compiler) or "none",
            "nvcc": f"{toolkit.nvcc} (CUDA {toolkit.version}, {toolkit.runtime})" if toolkit else "none",
            "CUDA architectures": self.cuda.archs,
            "ninja": self.ninja or "none",
            "torch": f"{self.torch_version} (stable ABI of {'.'.join(map(str, OLDEST_TORCH))})",
            "Python": f"{platform.python_version()} (abi3 of 3.10)",
            "machine": f"{platform.system()} {platform.machine()}",
            "instruction sets": ", ".join(self.isa_flags(CONVOLUTIONS)),
            "DEBUG": "1" if self.debug else "0",
            "MAX_JOBS": str(self.jobs),
        }
        if not self.refusal:
            rows |= {"compile flags": shlex.join(self.compile_flags()), "link flags": shlex.join(self.link_flags())}
        if not self.cuda.refusal:
            rows["nvcc flags"] = shlex.join(self.nvcc_flags())
        return "\n".join(["resnet_fused build configuration", *(f"  {key}: {value}" for key, value in rows.items())])


def find_compiler() -> tuple[list[str], str | None]:
    """The C++ compiler as an argument vector, and None or why it cannot be used."""
    named = os.environ.get("CXX")
    candidates = [named] if named else ["c++", "g++", "clang++"]
    for candidate in candidates:
        command = shlex.split(candidate)
        if shutil.which(command[0]):
            return command, None
    source = f"CXX={named}" if named else " and ".join(candidates)
    return [], f"no C++ compiler found ({source} not on the path)"


def read_mode(variable: str) -> str:
    """The variable's auto, 0 or 1; raises SystemExit if it is something else."""
    mode = os.environ.get(variable, "auto")
    if mode not in ("auto", "0", "1"):
        raise SystemExit(f"setup.py: {variable}: expected auto, 0 or 1, got {mode}")
    return mode


def configure() -> Config:
    """Read the environment and see what can be built; raises SystemExit when a mode is 1 and it cannot be."""
    mode = read_mode("RESNET_FUSED_BUILD_CPU")
    compiler, refusal = find_compiler()
    ninja = find_ninja()
    if ninja is None:
        refusal = refusal or "no ninja found (not on the path, and the Python package is not installed)"
    config = Config(mode, compiler, ninja or "", refusal=refusal)
    torch_cuda = None
    try:
        import torch
    except ImportError as error:
        config.refusal = refusal or f"torch cannot be imported ({error}); install with --no-build-isolation"
    else:
        config.torch_version, config.torch_root = torch.__version__, Path(torch.__file__).parent
        torch_cuda = torch.version.cuda
        if tuple(map(int, torch.__version__.split(".")[:2])) < OLDEST_TORCH:
            config.refusal = refusal or f"torch {torch.__version__} is older than {'.'.join(map(str, OLDEST_TORCH))}"
    if sys.platform == "win32":
        config.refusal = "Windows is not supported"
    if mode == "0":
        config.refusal = "RESNET_FUSED_BUILD_CPU=0"
    if mode == "1" and config.refusal:
        raise SystemExit(f"setup.py: RESNET_FUSED_BUILD_CPU=1, but the CPU library cannot be built: {config.refusal}")
    try:
        config.cuda = cuda_build.choose(
            read_mode("RESNET_FUSED_BUILD_CUDA"), config.refusal, torch_cuda, config.torch_root
        )
    except ValueError as error:
        raise SystemExit(f"setup.py: {error}") from None
    if config.cuda.mode == "1" and config.cuda.refusal:
        reason = config.cuda.refusal
        raise SystemExit(f"setup.py: RESNET_FUSED_BUILD_CUDA=1, but the CUDA library cannot be built: {reason}")
    return config


def find_ninja() -> str | None:
    """The ninja on the path, or the one of the ``ninja`` package."""
    found = shutil.which("ninja")
    if found is None:
        with contextlib.suppress(ImportError):
            from ninja import BIN_DIR

            found = shutil.which("ninja", path=BIN_DIR)
    return found


class BuildNative(build_ext):
    """Writes a build.ninja, in which each source has its own flags, and runs it."""

    config: Config

    def run(self) -> None:
        """Build the libraries, and leave a note of why there is no CUDA library, for ``resnet-fused doctor``."""
        super().run()
        note = Path(self.get_ext_fullpath("resnet_fused._cuda")).parent / "_cuda_refusal.txt"
        if self.config.cuda.refusal:
            note.parent.mkdir(parents=True, exist_ok=True)
            note.write_text(self.config.cuda.refusal + "\n", encoding="utf-8")
        else:
            note.unlink(missing_ok=True)

    def build_extension(self, ext: Extension) -> None:
        """Build one library; raises CompileError, which only prints where the extension is optional."""
        folder = Path(self.build_temp).resolve() / ext.name
        folder.mkdir(parents=True, exist_ok=True)
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        target.parent.mkdir(parents=True, exist_ok=True)
        rules = folder / "build.ninja"
        rules.write_text(self._ninja_file(ext, folder, target), encoding="utf-8")
        command = [self.config.ninja, "-f", str(rules), "-j", str(self.config.jobs)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            if ext.name.endswith("_cuda"):
                target.unlink(missing_ok=True)  # one of an older build would be loaded in its place
                reason = f"its build failed: {(done.stdout + done.stderr).strip()[-500:]}"
                self.config.cuda = dataclasses.replace(self.config.cuda, refusal=reason)
            raise CompileError(f"{shlex.join(command)}\n{done.stdout}{done.stderr}")

    def _jobs(self, ext: Extension) -> list[tuple[Path, str, list[str]]]:
        """Source, suffix of its object and flags: kernels once for each instruction set or kind of arithmetic."""
        jobs: list[tuple[Path, str, list[str]]] = []
        for source in map(Path, ext.sources):
            if source in (KERNELS, CONVOLUTIONS):
                isas = self.config.isa_flags(source).items()
                jobs += [(source, isa, [f"-DRESNET_FUSED_ISA={isa}", *flags]) for isa, flags in isas]
            elif source.name == cuda_build.KERNELS:
                jobs += [(source, math, cuda_build.math_flags(math)) for math in cuda_build.MATHS]
            else:
                jobs.append((source, "", self._defines(source)))
        return jobs

    def _defines(self, source: Path) -> list[str]:
        """What a source is told about the others."""
        if source == DISPATCH and set(X86_BF16_FLAGS) <= set(self.config.isa_flags(CONVOLUTIONS)):
            return ["-DRESNET_FUSED_BF16_ISAS"]
        return ["-DUSE_CUDA"] if "cuda" in source.parts and source.suffix == ".cpp" else []

    def _ninja_file(self, ext: Extension, folder: Path, target: Path) -> str:
        """The rules: one object for each job, one link."""
        config, compiler = self.config, shlex.join(self.config.compiler)
        nvcc, link_flags = "", config.link_flags()
        if ext.name.endswith("_cuda") and config.cuda.toolkit is not None:
            nvcc = shlex.join([str(config.cuda.toolkit.nvcc), *config.nvcc_flags()])
            link_flags += ["-ltorch_cuda", str(config.cuda.toolkit.runtime)]
        lines = [
            f"builddir = {_escape(str(folder))}",
            f"flags = {shlex.join(config.compile_flags())}",
            "rule compile",
            f"  command = {compiler} -MMD -MF $out.d $flags $own -c $in -o $out",
            "  depfile = $out.d",
            "  deps = gcc",
            "rule nvcc",
            f"  command = {nvcc} -MMD -MF $out.d $own -c $in -o $out",
            "  depfile = $out.d",
            "  deps = gcc",
            "rule link",
            f"  command = {compiler} $in -o $out {shlex.join(link_flags)}",
        ]
        objects = []
        for source, suffix, flags in self._jobs(ext):
            stem = "_".join([*source.with_suffix("").parts, *filter(None, [suffix])])
            objects.append(f"{folder / stem}{source.suffix}.o")
            rule = "nvcc" if source.suffix == ".cu" else "compile"
            lines += [f"build {_escape(objects[-1])}: {rule} {_escape(str(source.resolve()))}"]
            lines += [f"  own = {shlex.join(flags)}"]
        return "\n".join([*lines, f"build {_escape(str(target))}: link {' '.join(map(_escape, objects))}", ""])


def _escape(path: str) -> str:
    """A path as ninja reads it."""
    return path.replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


def main() -> None:
    """Configure, say how, and hand over to setuptools."""
    os.chdir(Path(__file__).resolve().parent)
    config = configure()
    print(config.describe(), flush=True)
    BuildNative.config = config
    extensions = []
    if not config.refusal:
        sources = sorted(str(path) for path in [*CSRC.glob("*.cpp"), *(CSRC / "cpu").glob("*.cpp")])
        optional = config.mode != "1"
        extensions.append(Extension("resnet_fused._cpu", sources, py_limited_api=True, optional=optional))
    if not config.cuda.refusal:
        sources = sorted(str(path) for path in [*(CSRC / "cuda").glob("*.cpp"), *(CSRC / "cuda").glob("*.cu")])
        optional = config.cuda.mode != "1"
        extensions.append(Extension("resnet_fused._cuda", sources, py_limited_api=True, optional=optional))
    setup(
        ext_modules=extensions,
        cmdclass={"build_ext": BuildNative},
        options={"bdist_wheel": {"py_limited_api": "cp310"}} if extensions else {},
    )


main()
