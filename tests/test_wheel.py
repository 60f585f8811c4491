"""One wheel for every torch from 2.11 on and every Python from 3.10 on: built here, used in other environments."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

from tests.emulation import nvcc
from tests.test_build import copy_sources, run

pytestmark = [pytest.mark.full, pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler")]

# What torch imports; its CUDA packages are those of this environment.
REQUIREMENTS = ("typing_extensions", "sympy", "mpmath", "networkx", "jinja2", "markupsafe", "fsspec", "filelock")
ENVIRONMENTS = [("3.11", "2.13.0+cpu"), ("3.11", "2.11.0"), ("3.10", "2.14.1"), ("3.12", "2.14.1"), ("3.13", "2.14.1")]
CODE = """
import json, time, torch
start = time.process_time()
import resnet_fused
from resnet_fused import projection
seconds = time.process_time() - start
from resnet_fused.engines import cpu
x, w = torch.randint(-9, 9, (2, 8, 5, 5)).float(), torch.randint(-9, 9, (4, 8, 1, 1)).float()
out, partials = projection.projection_fwd(x, w, None, (2, 2), True, None, None, None, False)
dx = projection.projection_dgrad(out, None, w, None, None, (5, 5), (2, 2), None)
exact = torch.equal(out, torch.conv2d(x, w, None, 2))  # small integers
from resnet_fused.checking import check
from resnet_fused.resnet import BUILDERS
report = check(BUILDERS["cifar-20"](fused=False), shape=(2, 3, 16, 16), dtype="fp32")
print(json.dumps({"file": resnet_fused.__file__, "torch": torch.__version__, "cpu": cpu.load(), "seconds": seconds,
                  "cuda": projection.load_cuda(), "cuda_build": torch.version.cuda is not None,
                  "exact": exact, "law": report.passed}))
"""


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built here, unpacked."""
    folder = tmp_path_factory.mktemp("wheel")
    checkout = copy_sources(folder)
    options = ("--no-build-isolation", "--no-deps", "--no-index", "--wheel-dir", str(folder))
    environment = {"RESNET_FUSED_BUILD_CPU": "1", "RESNET_FUSED_BUILD_CUDA": "auto", "TORCH_CUDA_ARCH_LIST": "8.0+PTX"}
    built = run(sys.executable, "-m", "pip", "wheel", *options, str(checkout), cwd=folder, **environment)
    assert built.returncode == 0, built.stdout + built.stderr
    (wheel,) = folder.glob("*.whl")
    assert "-cp310-abi3-" in wheel.name
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "site")
    return folder / "site"


def interpreter(version: str) -> Path:
    candidates = [shutil.which(f"python{version}"), *Path.home().glob(f".pyenv/versions/{version}.*/bin/python")]
    for candidate in filter(None, candidates):
        done = subprocess.run([candidate, "-c", ""], capture_output=True, check=False)
        if done.returncode == 0:
            return Path(candidate)
    pytest.skip(f"no Python {version}")


@pytest.mark.parametrize(("python", "version"), ENVIRONMENTS)
def test_the_wheel_works(site: Path, tmp_path: Path, python: str, version: str) -> None:
    packages = tmp_path / "packages"
    pip = (sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(packages))
    which = ("--python-version", python, "--only-binary", ":all:")
    done = run(*pip, *which, f"torch=={version}", *REQUIREMENTS, cwd=tmp_path)
    if done.returncode:
        pytest.skip(f"torch {version} for Python {python} cannot be installed here: {done.stderr.strip()[-300:]}")
    paths = [site, packages]
    libraries = Path(torch.__file__).parent.parent / "nvidia"  # what a CUDA torch loads; of no Python version
    if libraries.exists() and not (packages / "nvidia").exists():
        (packages / "nvidia").symlink_to(libraries)
    environment = {"PYTHONPATH": os.pathsep.join(map(str, paths))}
    used = run(str(interpreter(python)), "-c", CODE, cwd=tmp_path, **environment)
    assert used.returncode == 0, used.stderr
    said = json.loads(used.stdout.splitlines()[-1])
    assert said["file"].startswith(str(site)) and said["torch"].startswith(version)
    assert said["cpu"] is None and said["exact"] and said["law"]
    if not said["cuda_build"]:
        assert "is not a CUDA build" in said["cuda"]
    elif not nvcc.missing_nvcc():
        assert said["cuda"] is None
    assert said["seconds"] < 0.3  # of the processor, beyond torch's own import
