"""Kernels with one bug each, that the harness must catch; `length` is the number of elements of ``x`` and ``out``."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def off_by_one_mask_kernel(x_ptr, out_ptr, length, BLOCK: tl.constexpr):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = offs <= length
    tl.store(out_ptr + offs, tl.load(x_ptr + offs, mask=mask, other=0.0), mask=mask)


@triton.jit
def integer_mask_kernel(x_ptr, out_ptr, length, BLOCK: tl.constexpr):
    """Off by one, through a mask that the interpreter keeps as integers."""
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    for step in range(1):
        mask = (offs <= length) & ((tl.program_id(0) >= 0) & (step >= 0))
        tl.store(out_ptr + offs, tl.load(x_ptr + offs, mask=offs < length, other=0.0), mask=mask)


@triton.jit
def unmasked_load_kernel(x_ptr, out_ptr, length, BLOCK: tl.constexpr):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out_ptr + offs, tl.load(x_ptr + offs), mask=offs < length)


@triton.jit
def missing_other_kernel(x_ptr, out_ptr, length, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    tl.store(out_ptr, tl.sum(tl.load(x_ptr + offs, mask=offs < length).to(tl.float32), 0))


@triton.jit
def same_element_kernel(x_ptr, out_ptr, length, BLOCK: tl.constexpr):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < length
    tl.store(out_ptr + offs % 64, tl.load(x_ptr + offs, mask=mask, other=0.0), mask=mask)


@triton.jit
def lost_update_kernel(x_ptr, out_ptr, length, BLOCK: tl.constexpr):
    """Accumulate across programs without an atomic: right in the interpreter's order, wrong on a GPU."""
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    total = tl.sum(tl.load(x_ptr + offs, mask=offs < length, other=0.0), 0)
    tl.store(out_ptr, tl.load(out_ptr) + total)


@triton.jit
def program_order_kernel(x_ptr, out_ptr, BLOCK: tl.constexpr):
    """A running sum that needs the programs to run in order."""
    pid = tl.program_id(0)
    before = tl.load(out_ptr + pid - 1, mask=pid > 0, other=0.0)
    tl.store(out_ptr + pid, before + tl.load(x_ptr + pid))


@triton.jit
def block_copy_kernel(x_ptr, out_ptr, length, BLOCK: tl.constexpr):
    """Right for a dense tensor; reads between the rows of a view."""
    offs = tl.arange(0, BLOCK)
    mask = offs < length
    tl.store(out_ptr + offs, tl.load(x_ptr + offs, mask=mask, other=0.0), mask=mask)


@triton.jit
def register_hog_kernel(x_ptr, out_ptr, BLOCK: tl.constexpr):
    """Keep BLOCK x BLOCK float32 alive in one warp: spills."""
    rows = tl.arange(0, BLOCK)[:, None] * BLOCK
    columns = tl.arange(0, BLOCK)[None, :]
    a = tl.load(x_ptr + rows + columns)
    b = tl.load(x_ptr + BLOCK * BLOCK + rows + columns)
    tl.debug_barrier()
    tl.store(out_ptr + rows + columns, a * tl.sum(b, 1)[:, None] + b * tl.sum(a, 0)[None, :])
