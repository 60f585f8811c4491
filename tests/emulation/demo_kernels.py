"""Three small correct kernels that the harness is shown on; activations are channels_last, flattened to (NPQ, C).

pointwise_conv: y = x w; bn_relu: y = relu(x * scale + shift); channel_sum: the sum over NPQ, accumulated in float32.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _pointwise_conv_fwd_kernel(
    x_ptr,  # (NPQ, C)
    w_ptr,  # (C, K)
    y_ptr,  # (NPQ, K), contiguous
    NPQ,
    C,
    K,
    stride_x_npq,
    stride_x_c,
    stride_w_c,
    stride_w_k,
    BLOCK_NPQ: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    offs_npq = tl.program_id(0).to(tl.int64) * BLOCK_NPQ + tl.arange(0, BLOCK_NPQ)
    offs_k = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    acc = tl.zeros((BLOCK_NPQ, BLOCK_K), tl.float32)
    for c in range(0, C, BLOCK_C):
        offs_c = c + tl.arange(0, BLOCK_C)
        mask_x = (offs_npq[:, None] < NPQ) & (offs_c[None, :] < C)
        mask_w = (offs_c[:, None] < C) & (offs_k[None, :] < K)
        x = tl.load(x_ptr + offs_npq[:, None] * stride_x_npq + offs_c[None, :] * stride_x_c, mask=mask_x, other=0.0)
        w = tl.load(w_ptr + offs_c[:, None] * stride_w_c + offs_k[None, :] * stride_w_k, mask=mask_w, other=0.0)
        acc = tl.dot(x, w, acc)
    mask_y = (offs_npq[:, None] < NPQ) & (offs_k[None, :] < K)
    tl.store(y_ptr + offs_npq[:, None] * K + offs_k[None, :], acc.to(y_ptr.dtype.element_ty), mask=mask_y)


@triton.jit
def _bn_relu_fwd_kernel(
    x_ptr,  # (NPQ, C)
    scale_ptr,  # (C,), float32
    shift_ptr,  # (C,), float32
    y_ptr,  # (NPQ, C)
    numel,
    C,
    BLOCK: tl.constexpr,
):
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < numel
    x = tl.load(x_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    scale = tl.load(scale_ptr + offs % C, mask=mask, other=0.0)
    shift = tl.load(shift_ptr + offs % C, mask=mask, other=0.0)
    y = tl.maximum(x * scale + shift, 0.0, propagate_nan=tl.PropagateNan.ALL)
    tl.store(y_ptr + offs, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _channel_sum_kernel(
    x_ptr,  # (NPQ, C)
    sum_ptr,  # (C,), float32
    NPQ,
    C,
    BLOCK_NPQ: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    offs_c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    acc = tl.zeros((BLOCK_NPQ, BLOCK_C), tl.float32)
    for start in range(0, NPQ, BLOCK_NPQ):
        offs_npq = start + tl.arange(0, BLOCK_NPQ).to(tl.int64)
        mask = (offs_npq[:, None] < NPQ) & (offs_c[None, :] < C)
        acc += tl.load(x_ptr + offs_npq[:, None] * C + offs_c[None, :], mask=mask, other=0.0).to(tl.float32)
    tl.store(sum_ptr + offs_c, tl.sum(acc, 0), mask=offs_c < C)


def pointwise_conv(
    x: Tensor, w: Tensor, block: tuple[int, int, int] = (64, 64, 32), num_stages: int = 3, swap_strides: bool = False
) -> Tensor:
    """1x1 convolution of ``x`` (NPQ, C) with ``w`` (C, K); ``swap_strides`` plants a bug.

    Equivalent to: ``x @ w``
    """
    (npq, c), k = x.shape, w.shape[1]
    y = torch.full((npq, k), float("nan"), dtype=x.dtype, device=x.device)
    strides_x = x.stride()[::-1] if swap_strides else x.stride()
    grid = (triton.cdiv(npq, block[0]), triton.cdiv(k, block[1]))
    _pointwise_conv_fwd_kernel[grid](
        x,
        w,
        y,
        npq,
        c,
        k,
        *strides_x,
        *w.stride(),
        BLOCK_NPQ=block[0],
        BLOCK_K=block[1],
        BLOCK_C=block[2],
        num_warps=4,
        num_stages=num_stages,
    )
    return y


def bn_relu(x: Tensor, scale: Tensor, shift: Tensor, block: int = 1024) -> Tensor:
    """Folded BN and ReLU of ``x`` (NPQ, C) with float32 ``scale`` and ``shift`` (C,).

    Equivalent to: ``torch.relu(x.float() * scale + shift).to(x.dtype)``
    """
    y = torch.full_like(x, float("nan"))
    grid = (triton.cdiv(x.numel(), block),)
    _bn_relu_fwd_kernel[grid](x, scale, shift, y, x.numel(), x.shape[1], BLOCK=block)
    return y


def channel_sum(x: Tensor, block: tuple[int, int] = (64, 32)) -> Tensor:
    """Per-channel sum of ``x`` (NPQ, C) in float32.

    Equivalent to: ``x.float().sum(0)``
    """
    npq, c = x.shape
    out = torch.full((c,), float("nan"), device=x.device)
    _channel_sum_kernel[(triton.cdiv(c, block[1]),)](x, out, npq, c, BLOCK_NPQ=block[0], BLOCK_C=block[1])
    return out
