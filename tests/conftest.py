"""Fixtures of the training tests; the thread count is put back after every test."""

import dataclasses

import pytest
import torch

from resnet_fused.train import data as datasets


@pytest.fixture(scope="module")
def dataset():
    whole = datasets.load("synthetic", image_size=8)
    return dataclasses.replace(whole, test_images=whole.test_images[:64], test_labels=whole.test_labels[:64])


@pytest.fixture(autouse=True)
def restore_threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)
