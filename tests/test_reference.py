"""The specification against ``torch.nn`` and against autograd, in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from resnet_fused import reference

SHAPE = (3, 5, 6, 7)
EPS = 1e-5
torch.manual_seed(0)


def _data(seed: int = 0, shape: tuple[int, ...] = SHAPE) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _norm(channels: int = 5) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(9)
    values = torch.rand((4, channels), generator=generator, dtype=torch.float64) + 0.5
    return values[0] - 1, values[1] - 1, values[2] - 1, values[3]


def _finalize(y: Tensor, momentum: float | None = 0.1, conv_bias: Tensor | None = None, **buffers: Tensor) -> Tensor:
    gamma, beta, _, _ = _norm(y.shape[1])
    return reference.bn_finalize(
        reference.bn_stats(y),
        gamma,
        beta,
        conv_bias,
        buffers.get("running_mean"),
        buffers.get("running_var"),
        buffers.get("counter"),
        momentum,
        EPS,
    )


def _close(got: Tensor, want: Tensor) -> None:
    torch.testing.assert_close(got, want)


def test_stats_are_var_mean() -> None:
    y = _data()
    var, mean = torch.var_mean(y, (0, 2, 3), unbiased=False)
    ((count, m, m2),) = reference.bn_stats(y)
    _close(m, mean)
    _close(m2 / count, var)


@pytest.mark.parametrize("sizes", [(3,), (1, 2), (2, 0, 1), (0, 3), (0, 0)])
def test_merging_partials_equals_the_whole(sizes: tuple[int, ...]) -> None:
    y = _data(shape=(sum(sizes), *SHAPE[1:])) * 1e-3 + 1e3
    parts = torch.cat([reference.bn_stats(part) for part in y.split(sizes)])
    for got, want in zip(reference.merge_partials(parts), reference.bn_stats(y)[0], strict=True):
        _close(got, want)


@pytest.mark.parametrize("momentum", [0.1, None, 0.0, 1.0])
@pytest.mark.parametrize("rows", [3, 0])
def test_finalize_moves_buffers_as_batch_norm_does(momentum: float | None, rows: int) -> None:
    stock = torch.nn.BatchNorm2d(5, momentum=momentum, dtype=torch.float64)
    _, _, mean, var = _norm()
    ours = {"running_mean": mean.clone(), "running_var": var.clone(), "counter": torch.tensor(4)}
    stock.load_state_dict(
        {**stock.state_dict(), "running_mean": mean, "running_var": var, "num_batches_tracked": 4 + 0 * var[0].long()}
    )
    for seed in range(2):
        y = _data(seed, (rows, *SHAPE[1:]))
        stock(y)
        _finalize(y, momentum, **ours)
    _close(ours["running_mean"], stock.running_mean)
    _close(ours["running_var"], stock.running_var)
    assert ours["counter"].item() == stock.num_batches_tracked.item() == 6


def test_a_convolution_bias_only_shifts_the_running_mean() -> None:
    y, bias = _data(), _data(1, (5,))
    _, _, mean, var = _norm()
    plain = {"running_mean": mean.clone(), "running_var": var.clone()}
    biased = {"running_mean": mean.clone(), "running_var": var.clone()}
    a = _finalize(y, 0.1, bias, **plain)
    b = _finalize(y + bias[:, None, None], 0.1, None, **biased)
    _close(plain["running_mean"], biased["running_mean"])
    _close(plain["running_var"], biased["running_var"])
    _close(
        reference.bn_apply(y, a, None, None, 1, 0, True),
        reference.bn_apply(y + bias[:, None, None], b, None, None, 1, 0, True),
    )


def _running_moments(conv_bias: Tensor | None = None) -> Tensor:
    gamma, beta, mean, var = _norm()
    return reference.bn_eval_moments(mean, var, gamma, beta, conv_bias, EPS, torch.float64)


def _batch_norm(y: Tensor, training: bool) -> Tensor:
    gamma, beta, mean, var = _norm(y.shape[1])
    return F.batch_norm(y, mean.clone(), var.clone(), gamma, beta, training, 0.1, EPS)


def _moments(y: Tensor, training: bool) -> Tensor:
    return _finalize(y) if training else _running_moments()


@pytest.mark.parametrize("training", [True, False])
def test_apply_is_batch_norm(training: bool) -> None:
    y = _data()
    _close(reference.bn_apply(y, _moments(y, training), None, None, 1, 0, False), _batch_norm(y, training))


def test_eval_moments_take_a_convolution_bias() -> None:
    y, bias = _data(), _data(1, (5,))
    got = reference.bn_apply(y, _running_moments(bias), None, None, 1, 0, False)
    _close(got, _batch_norm(y + bias[:, None, None], False))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("relu", [True, False])
def test_site_backward_is_autograd(training: bool, relu: bool) -> None:
    y, dout = _data().requires_grad_(), _data(1)
    gamma, beta, mean, var = (t.clone() for t in _norm())
    gamma.requires_grad_()
    beta.requires_grad_()
    out = F.batch_norm(y, mean, var, gamma, beta, training, 0.1, EPS)
    (F.relu(out) if relu else out).backward(dout)
    with torch.no_grad():
        moments = _moments(y, training)
        sums = reference.bn_bwd_reduce(dout, y, moments, relu)
        coef = reference.bn_bwd_finalize(sums, moments, training)
        _close(sums, torch.stack([beta.grad, gamma.grad]))
        _close(reference.bn_bwd_apply(dout, y, moments, coef, relu), y.grad)
        again, act = reference.bn_bwd_reduce_rebuild(dout, y, moments, relu)
        _close(again, sums)
        _close(act, reference.bn_apply(y, moments, None, None, 1, 0, relu))


@pytest.mark.parametrize("shortcut", ["identity", "projection", "pad"])
@pytest.mark.parametrize("relu", [True, False])
@pytest.mark.parametrize("skip", [True, False])
def test_join_is_autograd(shortcut: str, relu: bool, skip: bool) -> None:
    y, dout, dskip = _data().requires_grad_(), _data(1), _data(2) if skip else None
    shape = (3, 3, 11, 13) if shortcut == "pad" else SHAPE
    residual = _data(3, shape).requires_grad_()
    gamma, beta, *_ = _norm()
    if shortcut == "projection":
        added = F.batch_norm(residual, None, None, gamma, beta, True, 0.1, EPS)
    elif shortcut == "pad":
        added = F.pad(residual[:, :, ::2, ::2], (0, 0, 0, 0, 1, 1))
    else:
        added = residual
    z = F.batch_norm(y, None, None, gamma, beta, True, 0.1, EPS)
    want = F.relu(z + added) if relu else z + added
    want.backward(dout if dskip is None else dout + dskip)
    with torch.no_grad():
        moments = _finalize(y)
        other = _finalize(residual) if shortcut == "projection" else None
        out = reference.bn_apply(y, moments, residual, other, 2, 1, relu)
        _close(out, want)
        g, sums, residual_sums = reference.join_bwd_reduce(
            dout, dskip, out if relu else None, y, moments, residual if other is not None else None, other
        )
        coef = reference.bn_bwd_finalize(sums, moments, True)
        _close(reference.bn_bwd_apply(g, y, moments, coef, False), y.grad)
        if other is not None:
            coef = reference.bn_bwd_finalize(residual_sums, other, True)
            _close(reference.bn_bwd_apply(g, residual, other, coef, False), residual.grad)
        elif shortcut == "identity":
            _close(g, residual.grad)


@pytest.mark.parametrize("window", [((3, 3), (2, 2), (1, 1)), ((2, 3), (1, 2), (0, 1))])
@pytest.mark.parametrize("relu", [True, False])
def test_pool_is_autograd(window: tuple[tuple[int, int], ...], relu: bool) -> None:
    y = _data().requires_grad_()
    z = _batch_norm(y, False)
    want = F.max_pool2d(F.relu(z) if relu else z, *window)
    dout = torch.randn_like(want)
    want.backward(dout)
    with torch.no_grad():
        moments = _running_moments()
        _close(reference.pool_apply(y, moments, *window, relu), want)
        g, sums = reference.pool_bwd(dout, y, moments, *window, relu)
        coef = reference.bn_bwd_finalize(sums, moments, False)
        _close(reference.bn_bwd_apply(g, y, moments, coef, False), y.grad)


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("geometry", [((1, 1), (0, 0), (1, 1)), ((2, 1), (1, 2), (1, 2))])
def test_convolution_gradients_are_autograd(geometry: tuple[tuple[int, int], ...], groups: int) -> None:
    x, w = _data(shape=(2, 4, 9, 8)).requires_grad_(), _data(1, (6, 4 // groups, 3, 3)).requires_grad_()
    y = reference.conv_fwd(x, w, *geometry, groups)
    _close(y, F.conv2d(x, w, None, *geometry, groups))
    dy = torch.randn_like(y)
    y.backward(dy)
    dx, dw = reference.conv_bwd(dy, x.detach(), w.detach(), *geometry, groups, (True, True))
    assert dx is not None and dw is not None
    _close(dx, x.grad)
    _close(dw, w.grad)
    assert reference.conv_bwd(dy, x.detach(), w.detach(), *geometry, groups, (False, False)) == (None, None)


def test_relu_lets_a_nan_through_both_ways() -> None:
    y = torch.tensor([float("nan"), -1.0, 0.0, 2.0, float("-inf"), float("inf")], dtype=torch.float64).view(1, 1, 1, 6)
    moments = torch.tensor([0.0, 1.0, 1.0, 0.0, 1.0], dtype=torch.float64)[:, None]
    out = reference.bn_apply(y, moments, None, None, 1, 0, True)
    torch.testing.assert_close(out, F.relu(y), equal_nan=True)
    g, _, _ = reference.join_bwd_reduce(torch.ones_like(y), None, out, y, moments, None, None)
    assert g.flatten().tolist() == [1, 0, 0, 1, 0, 1]


@pytest.mark.parametrize("memory", ["speed", "lean", "min"])
def test_gradcheck_of_a_whole_block(memory: str) -> None:
    from resnet_fused import Bottleneck

    block = Bottleneck(4, 2, out_channels=4, memory=memory, engine="reference").double()
    parameters = dict(block.named_parameters())

    def run(x: Tensor, *values: Tensor) -> Tensor:
        return torch.func.functional_call(block, dict(zip(parameters, values, strict=True)), (x,))

    x = _data(shape=(2, 4, 4, 3)).requires_grad_()
    assert torch.autograd.gradcheck(run, (x, *(p.detach().clone().requires_grad_() for p in parameters.values())))
