"""Say what is installed, which engine will run, and whether a fused block computes what stock does."""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import platform
import time

from ._console import print_table

HELP = "versions, engines, device, and a one-second self test"
_PACKAGES = ("torch", "triton", "torchvision", "numpy", "rich", "matplotlib", "sklearn")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """No flags."""


def _version(package: str) -> str:
    try:
        module = importlib.import_module(package)
        return str(getattr(module, "__version__", None) or importlib.metadata.version(package))
    except ImportError:
        return "not installed"
    except (OSError, RuntimeError, AttributeError, ValueError) as error:  # there, but broken: that is worth a line
        return f"broken: {type(error).__name__}: {error}"


def _machine() -> list[tuple[str, str]]:
    import torch

    gpus = (
        [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
    )
    capability = torch.backends.cpu.get_cpu_capability()
    return [
        ("python", f"{platform.python_version()} on {platform.system()} {platform.machine()}"),
        *((package, _version(package)) for package in _PACKAGES),
        ("threads", str(torch.get_num_threads())),
        ("CPU", f"torch uses {capability}"),
        ("GPU", ", ".join(gpus) or "none"),
        ("tuned", _tuned()),
    ]


def _projection() -> list[tuple[str, str, str]]:
    """Where the fused projection shortcut runs, and why not elsewhere."""
    import torch

    from .. import projection

    devices = {"cpu": "C++ kernels around the BLAS of torch", "cuda": "CUDA kernels, bf16, fp16, TF32 and fp32"}
    reasons = {name: projection.unavailable(torch.device(name), torch.float32) for name in devices}
    return [(name, "no" if reasons[name] else "runs", reasons[name] or words) for name, words in devices.items()]


def _tuned() -> str:
    """What a process on this device uses of `resnet-fused tune`."""
    import torch

    from .. import winners

    device = winners.device_name(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    winners.ready(device)
    count = len(winners.table())
    path = winners.store.path_of(device, winners.store.folder())
    return f"{count} measured choices, {path}" if count else "no measured choices; resnet-fused tune makes some"


def _self_test() -> tuple[bool, str]:
    """Forward and backward of a small fused net against stock, both memory formats and float64."""
    import torch

    from ..checking import check
    from ..resnet import cifar_resnet

    start = time.perf_counter()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        report = check(cifar_resnet(8, fused=False).to(device), shape=(4, 3, 16, 16))
    except (ImportError, OSError, RuntimeError, ValueError, NotImplementedError) as error:
        return False, f"{type(error).__name__}: {error}"
    failed = ", ".join(verdict.name for verdict in report.verdicts if not verdict.passed)
    words = f"fails in {failed}" if failed else f"{len(report.verdicts)} tensors agree with stock"
    return report.passed, f"{words}, on {device}, {time.perf_counter() - start:.1f} s"


def run(args: argparse.Namespace) -> int:
    """Print the report; 0 when the self test passes, 1 when not."""
    from .. import engines

    print_table(("", ""), _machine())
    print()
    rows = [(name, "runs" if available else "no", detail) for name, available, detail in engines.describe()]
    print_table(("engine", "here", "detail"), rows)
    print()
    print_table(("projection", "here", "detail"), _projection())
    passed, words = _self_test()
    print(f"\nself test: {'PASS' if passed else 'FAIL'}: {words}")
    return 0 if passed else 1
