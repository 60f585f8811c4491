"""Fixtures of the training tests, devices of the equivalence tests; every test has one seed and thread count."""

import dataclasses
import os

import pytest
import torch

from resnet_fused import plan
from resnet_fused.train import data as datasets

# Where there is a GPU the equivalence tests run on it too, once as planned and once with our kernels wherever they can.
GPU = {"cuda": None, "cuda own": plan.OWN} if torch.cuda.is_available() else {}


def pytest_configure(config):
    os.environ["RESNET_FUSED_TUNE"] = "0"  # what was measured on this machine is no part of a test
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    if workers > 1:  # the cores are shared out, to what a test starts as well
        threads = max(1, (os.cpu_count() or 1) // workers)
        os.environ.setdefault("OMP_NUM_THREADS", str(threads))
        torch.set_num_threads(threads)
    config.addinivalue_line("markers", "cuda: runs on a GPU; collected only where there is one")


def pytest_generate_tests(metafunc):
    if "device" in metafunc.fixturenames:
        on_gpu = [pytest.param(name, marks=pytest.mark.cuda) for name in GPU]
        metafunc.parametrize("device", ["cpu", *on_gpu], indirect=True)


@pytest.fixture
def device(request, monkeypatch):
    """``"cpu"``, and ``"cuda"`` with exact float32 where there is one."""
    if request.param != "cpu":
        monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    with plan.force(GPU.get(request.param)):
        yield request.param.split()[0]


@pytest.fixture(scope="module")
def dataset():
    whole = datasets.load("synthetic", image_size=8)
    return dataclasses.replace(whole, test_images=whole.test_images[:64], test_labels=whole.test_labels[:64])


@pytest.fixture(autouse=True)
def seeded():
    """What a test draws does not depend on the tests before it."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def restore_threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)
