"""The build: pure Python without a compiler, an abi3 wheel with one, and a printed configuration."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import resnet_fused
from resnet_fused import projection
from tests.emulation import nvcc

ROOT = Path(__file__).resolve().parent.parent
SOURCES = ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE", "csrc", "resnet_fused")
Run = Callable[..., subprocess.CompletedProcess[str]]

if not (ROOT / "setup.py").exists():
    pytest.skip("needs a source checkout", allow_module_level=True)


def copy_sources(folder: Path) -> Path:
    """A copy of the sources without anything built."""
    copy = folder / "checkout"
    copy.mkdir()
    for name in SOURCES:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(
                source, copy / name, ignore=shutil.ignore_patterns("*.so", "_cuda_refusal.txt", "__pycache__")
            )
        elif source.exists():
            shutil.copy(source, copy / name)
    return copy


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    return copy_sources(tmp_path)


def run(*command: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("RESNET_FUSED", "CXX", "PYTHONPATH"))}
    quick = {"RESNET_FUSED_BUILD_CUDA": "0"}
    return subprocess.run(command, cwd=cwd, env={**clean, **quick, **environment}, capture_output=True, text=True)


def pip_install(checkout: Path, target: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    options = ("--no-build-isolation", "--no-deps", "--no-index", "--target", str(target), "-v")
    return run(sys.executable, "-m", "pip", "install", *options, str(checkout), cwd=checkout, **environment)


def test_without_a_compiler_the_package_installs_as_pure_python(checkout: Path, tmp_path: Path) -> None:
    target = tmp_path / "site"
    done = pip_install(checkout, target, CXX="/nonexistent/c++")
    assert done.returncode == 0, done.stdout + done.stderr
    assert (
        "CPU library: not built: no C++ compiler found (CXX=/nonexistent/c++ not on the path)"
        in done.stdout + done.stderr
    )
    assert not list(target.rglob("*.so"))
    code = (
        "import resnet_fused, torch\n"
        "from resnet_fused.engines import cpu\n"
        "print(resnet_fused.__file__)\n"
        "print(cpu.load())\n"
        "try: cpu.bn_stats(torch.ones(1, 1, 1, 1))\n"
        "except RuntimeError as error: print(error)\n"
    )
    used = run(sys.executable, "-c", code, cwd=tmp_path, PYTHONPATH=str(target))
    where, reason, error = used.stdout.splitlines()
    assert where.startswith(str(target))
    assert reason.startswith("the CPU library is not built")
    assert error == f"resnet_fused.engines.cpu: {reason}"


def test_a_compiler_that_fails_does_not_break_the_install(checkout: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken-c++"
    broken.write_text("#!/bin/sh\necho this compiler is broken >&2\nexit 1\n")
    broken.chmod(0o755)
    arguments = (sys.executable, "setup.py", "build_ext", "--inplace")
    done = run(*arguments, cwd=checkout, CXX=str(broken))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "this compiler is broken" in done.stdout + done.stderr
    assert not list((checkout / "resnet_fused").glob("*.so"))
    required = run(*arguments, cwd=checkout, CXX=str(broken), RESNET_FUSED_BUILD_CPU="1")
    assert required.returncode != 0
    assert "this compiler is broken" in required.stdout + required.stderr


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"CXX": "/nonexistent/c++", "RESNET_FUSED_BUILD_CPU": "1"}, "cannot be built: no C++ compiler found"),
        ({"RESNET_FUSED_BUILD_CPU": "yes"}, "RESNET_FUSED_BUILD_CPU: expected auto, 0 or 1, got yes"),
        ({"RESNET_FUSED_BUILD_CUDA": "on"}, "RESNET_FUSED_BUILD_CUDA: expected auto, 0 or 1, got on"),
        ({"RESNET_FUSED_BUILD_CUDA": "1", "RESNET_FUSED_BUILD_CPU": "0"}, "it needs the CPU library: RESNET_FUSED_BUI"),
    ],
)
def test_what_cannot_be_done_is_refused(checkout: Path, environment: dict[str, str], message: str) -> None:
    done = run(sys.executable, "setup.py", "--version", cwd=checkout, **environment)
    assert done.returncode != 0
    assert message in done.stderr


def test_prints_its_whole_configuration(checkout: Path) -> None:
    done = run(
        sys.executable, "setup.py", "--version", cwd=checkout, MAX_JOBS="3", DEBUG="1", RESNET_FUSED_BUILD_CPU="0"
    )
    assert "CPU library: not built: RESNET_FUSED_BUILD_CPU=0" in done.stdout
    assert "MAX_JOBS: 3" in done.stdout
    assert "DEBUG: 1" in done.stdout
    assert "CUDA library: not built: RESNET_FUSED_BUILD_CUDA=0" in done.stdout
    for item in ("compiler: ", "torch: ", "Python: ", "machine: ", "instruction sets: "):
        assert re.search(f"^  {item}.+", done.stdout, re.MULTILINE)
    assert done.stdout.splitlines()[-1] == resnet_fused.__version__


@pytest.fixture
def fake_tools(tmp_path: Path) -> dict[str, str]:
    """A C++ compiler that only makes its output file, and a CUDA toolkit of torch's version whose nvcc fails."""
    compiler = tmp_path / "fake-c++"
    compiler.write_text('#!/bin/sh\nwhile [ "$1" != -o ]; do shift; done; : > "$2"\n')
    home = tmp_path / "toolkit"
    nvcc = home / "bin" / "nvcc"
    nvcc.parent.mkdir(parents=True)
    (home / "lib64").mkdir()
    version = torch.version.cuda or "13.0"
    (home / "lib64" / f"libcudart.so.{version.split('.')[0]}").touch()
    nvcc.write_text(
        f'#!/bin/sh\ncase "$1" in --version) echo "release {version}, V{version}.0";;\n'
        "--list-gpu-arch) echo compute_80;; *) echo this nvcc is broken >&2; exit 1;; esac\n"
    )
    for tool in (compiler, nvcc):
        tool.chmod(0o755)
    return {"CXX": str(compiler), "CUDA_HOME": str(home), "RESNET_FUSED_BUILD_CUDA": "auto"}


def test_without_nvcc_the_cpu_library_is_built_alone(checkout: Path, fake_tools: dict[str, str]) -> None:
    environment = {**fake_tools, "CUDA_HOME": str(checkout / "nowhere")}
    done = run(sys.executable, "setup.py", "build_ext", "--inplace", cwd=checkout, **environment)
    assert done.returncode == 0, done.stdout + done.stderr
    package = checkout / "resnet_fused"
    assert [path.name for path in package.glob("*.so")] == ["_cpu.abi3.so"]
    said = (package / "_cuda_refusal.txt").read_text()
    assert said.startswith("no nvcc found" if torch.version.cuda else "this torch is not a CUDA build")
    assert f"CUDA library: not built: {said.strip()}" in done.stdout


@pytest.mark.skipif(torch.version.cuda is None, reason="torch is not a CUDA build")
def test_an_nvcc_that_fails_does_not_break_the_install(checkout: Path, fake_tools: dict[str, str]) -> None:
    arguments = (sys.executable, "setup.py", "build_ext", "--inplace")
    done = run(*arguments, cwd=checkout, **fake_tools)
    assert done.returncode == 0, done.stdout + done.stderr
    package = checkout / "resnet_fused"
    assert [path.name for path in package.glob("*.so")] == ["_cpu.abi3.so"]
    assert "this nvcc is broken" in (package / "_cuda_refusal.txt").read_text()
    required = run(*arguments, cwd=checkout, **{**fake_tools, "RESNET_FUSED_BUILD_CUDA": "1"})
    assert required.returncode != 0
    assert "this nvcc is broken" in required.stdout + required.stderr


@pytest.mark.parametrize(
    ("archs", "refusal", "said"),
    [
        ("8.0;9.0", None, "8.0;9.0; left out: 9.0 (this nvcc does not know it)"),
        ("7.0 8.0+PTX", None, "7.0 8.0+PTX; left out: 7.0 (the kernels need 7.5)"),
        ("7.0", "no architecture is left of TORCH_CUDA_ARCH_LIST=7.0; left out: 7.0 (the kernels need 7.5)", "7.0;"),
    ],
)
def test_architectures(
    fake_tools: dict[str, str], monkeypatch: pytest.MonkeyPatch, archs: str, refusal: str | None, said: str
) -> None:
    monkeypatch.setenv("CUDA_HOME", fake_tools["CUDA_HOME"])
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", archs)
    choice = nvcc.cuda_build.choose("auto", None, torch.version.cuda or "13.0", ROOT)
    assert choice.refusal == refusal
    assert choice.archs.startswith(said)
    assert ("-gencode=arch=compute_80,code=compute_80" in choice.flags) == ("PTX" in archs)


def test_toolkits_that_do_not_serve(fake_tools: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    find = nvcc.cuda_build.find_toolkit
    monkeypatch.setenv("CUDA_HOME", fake_tools["CUDA_HOME"])
    assert find(None, ROOT) == "this torch is not a CUDA build"
    assert "their major versions must be equal" in find("11.8", ROOT)
    monkeypatch.setenv("CUDA_HOME", "/nonexistent")
    assert find("13.0", ROOT).startswith("no nvcc found (looked for /nonexistent/bin/nvcc")
    with pytest.raises(ValueError, match=r"TORCH_CUDA_ARCH_LIST: expected entries like 9\.0.*got 'Ampere'"):
        nvcc.cuda_build.arch_flags("Ampere", frozenset())


@pytest.mark.skipif(bool(nvcc.missing_nvcc()), reason=nvcc.missing_nvcc())
def test_where_there_is_nvcc_the_cuda_library_is_built_and_loads() -> None:
    reason = projection.load_cuda()
    if reason is not None and "RESNET_FUSED_BUILD_CUDA=0" in reason:
        pytest.skip(reason)
    assert reason is None
    for name in ("projection_fwd", "projection_dgrad", "projection_wgrad"):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"resnet_fused::{name}", "CUDA")


@pytest.mark.parametrize(
    ("capability", "built_for", "reason"),
    [
        ((8, 0), (8, 0), None),
        ((7, 5), (7, 5), None),
        ((7, 5), (8, 0), r"built for 8\.0 and newer, and this GPU has 7\.5: build it with TORCH_CUDA_ARCH_LIST="),
        ((7, 0), (7, 5), r"need compute capability 7\.5, and this GPU has 7\.0"),
        ((8, 0), None, "older than this package"),
    ],
)
def test_a_gpu_without_code_is_refused_in_words(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], built_for: tuple[int, int] | None, reason: str | None
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability)
    monkeypatch.setattr(projection, "_built_for", lambda: built_for)
    said = projection._capability_reason.__wrapped__(None)
    assert said is None if reason is None else re.search(reason, said)


@pytest.mark.full
@pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler")
def test_wheel_is_abi3_and_works(checkout: Path, tmp_path: Path) -> None:
    options = ("--no-build-isolation", "--no-deps", "--no-index", "--wheel-dir", str(tmp_path))
    built = run(sys.executable, "-m", "pip", "wheel", *options, str(checkout), cwd=checkout, RESNET_FUSED_BUILD_CPU="1")
    assert built.returncode == 0, built.stdout + built.stderr
    (wheel,) = tmp_path.glob("*.whl")
    assert "-cp310-abi3-" in wheel.name
    site = tmp_path / "site"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
        names = archive.namelist()
    assert "resnet_fused/_cpu.abi3.so" in names
    assert "resnet_fused/py.typed" in names
    code = "from resnet_fused.engines import cpu; print(cpu.__file__, cpu.load(), cpu.isa())"
    used = run(sys.executable, "-c", code, cwd=tmp_path, PYTHONPATH=str(site))
    assert used.stdout.startswith(f"{site}/resnet_fused/engines/cpu.py None "), used.stderr


@pytest.mark.full
def test_source_distribution_holds_the_sources(checkout: Path) -> None:
    done = run(sys.executable, "setup.py", "sdist", "--formats=zip", cwd=checkout, RESNET_FUSED_BUILD_CPU="0")
    assert done.returncode == 0, done.stderr
    (archive,) = (checkout / "dist").glob("*.zip")
    with zipfile.ZipFile(archive) as opened:
        held = {name.partition("/")[2] for name in opened.namelist()}
    sources = [path for path in (checkout / "csrc").rglob("*.*") if path.parent.name != "__pycache__"]
    assert {str(path.relative_to(checkout)) for path in sources} <= held
