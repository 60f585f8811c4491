"""The source architectures where their text fails: fused or not, with the error that was recorded.

A test's name begins with the row; `test_source_rows` has what works.
"""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from resnet_fused import fuse
from resnet_fused.modules import Fused
from resnet_fused.recognise import Refusal, recognise

from .models import literal, source_c
from .models.rows import MAP


def reason(module: nn.Module) -> str:
    found = recognise(module)
    assert isinstance(found, Refusal)
    return found.reason


def fails_as_written(module: nn.Module, shape: tuple[int, ...], error: type[Exception], text: str) -> None:
    """The block is left alone, and its own error is what it was."""
    x = torch.randn(shape)
    with pytest.raises(error, match=text) as stock:
        copy.deepcopy(module)(x)
    fused = fuse(module)
    assert not isinstance(fused, Fused)
    with pytest.raises(error) as ours:
        fused(x)
    assert str(ours.value) == str(stock.value)


def test_a4_literal_names_two_spellings() -> None:
    block = literal.TwoSpellings(8, 8, 1)
    assert reason(block).startswith("its forward cannot be traced: AttributeError")
    fails_as_written(block, MAP, AttributeError, "conv1")


def test_a5_literal_activation() -> None:
    with pytest.raises(AttributeError, match="ReLu"):
        literal.MissingActivation()


def test_a6_literal_bottleneck() -> None:
    block = literal.NarrowBottleneck(8, 4, 16, 1)
    assert reason(block) == "convolution 'conv3' takes 8 channels and gets 4"
    fails_as_written(block, MAP, RuntimeError, "channels")


def test_a7_literal_condition() -> None:
    with pytest.raises(TypeError, match="not iterable"):
        None in None  # noqa: B015 - the bug


def test_c1_literal_sizes_cannot_match() -> None:
    block = literal.Unpadded(8, 8)
    assert reason(block) == (
        "for a 33x33 input the shortcut is 33x33 and the main path 29x29, which cannot be added; "
        "the padding or the stride of a convolution does not fit"
    )
    fails_as_written(block, (2, 8, 32, 32), RuntimeError, r"size of tensor a \(28\) must match .* b \(32\)")


@pytest.mark.parametrize(("widths", "text"), [((4, 8), "channels"), ((8, 8), "must match the size")])
def test_c3_literal_projects_the_wrong_tensor(widths: tuple[int, int], text: str) -> None:
    block = literal.ProjectsTheMainPath(*widths, downsample=True)
    assert reason(block) == "the result of batch norm 'batch' is used 2 times"
    fails_as_written(block, (2, widths[0], 8, 8), RuntimeError, text)


def test_c5_literal_has_no_projection_at_stride_1() -> None:
    block = source_c.LiteralBottleneckBlock(8, 32, 4)
    assert reason(block) == "the shortcut adds 8 channels to 32"
    fails_as_written(block, MAP, RuntimeError, "must match the size")


def test_c6_literal_name() -> None:
    with pytest.raises(NameError, match="first_stride"):
        literal.ForgottenSelf(2)


def test_c7_literal_sequence() -> None:
    with pytest.raises(SyntaxError):
        compile("blocks = [0 // else 1]", "source C", "exec")
    with pytest.raises(RuntimeError, match="channels"):
        fuse(literal.sequence_that_forgets_its_width(8, 16))(torch.randn(MAP))


def test_c8_literal_net() -> None:
    stem, x, sides = literal.unpadded_stem(), torch.empty(1, 3, 224, 224), []
    for module in stem:
        x = module(x)
        sides.append(x.shape[2])
    assert sides == [109, 109, 109, 54]
    assert nn.AvgPool2d(3)(torch.zeros(1, 1, 7, 7)).shape[2:] == (2, 2)
    with pytest.raises(TypeError, match="required positional arguments"):
        nn.Linear()
    with pytest.raises(TypeError, match="super"):
        literal.WrongSuper()
