"""Hand-written PTX: instructions against Python's integers, and programs that the emulator must refuse."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from tests.emulation import ptx

_FRAME = """
.version 8.0
.target sm_80
.address_size 64
.visible .entry snippet(.param .u64 p_a, .param .u64 p_b, .param .u64 p_out)
{{
  .reg .pred %p<4>;
  .reg .b16 %h<4>;
  .reg .b32 %r<16>;
  .reg .b64 %rd<16>;
  .shared .align 16 .b8 buffer[1024];
  mov.u32 %r9, %tid.x;
  and.b32 %r8, %r9, 31;
  mul.wide.u32 %rd8, %r8, 4;
  ld.param.u64 %rd1, [p_a];
  ld.param.u64 %rd2, [p_b];
  ld.param.u64 %rd3, [p_out];
  add.s64 %rd4, %rd1, %rd8;
  add.s64 %rd5, %rd2, %rd8;
  add.s64 %rd6, %rd3, %rd8;
  ld.global.b32 %r1, [%rd4];
  ld.global.b32 %r2, [%rd5];
  mov.u32 %r10, buffer;
  shl.b32 %r11, %r9, 2;
  add.s32 %r11, %r10, %r11;
  {code}
  st.global.b32 [%rd6], %r3;
  ret;
}}
"""


def run(code: str, a: Tensor, b: Tensor, threads: int = 32) -> Tensor:
    """Run ``code``, which computes %r3 from %r1 (of ``a``) and %r2 (of ``b``), both (32,) int32."""
    out = torch.zeros_like(a)
    ptx.launch(_FRAME.format(code=code), [a, b, out], (1,), threads)
    return out


def wrap(value: int) -> int:
    """``value`` modulo 2**32 as a signed integer."""
    return (value + 2**31) % 2**32 - 2**31


def _unsigned(value: int) -> int:
    return value % 2**32


def _halves_added(x: int, y: int) -> int:
    low = (x + y) & 0xFFFF
    return ((x >> 16) + (y >> 16)) % 2**16 << 16 | low


def _truncated(x: int, y: int) -> int:
    return abs(x) // abs(y) * (1 if (x < 0) == (y < 0) else -1)


INTEGER: dict[str, tuple[str, Callable[[int, int], int]]] = {
    "add": ("add.s32 %r3, %r1, %r2;", lambda x, y: x + y),
    "add of packed halves": ("add.s16x2 %r3, %r1, %r2;", lambda x, y: _halves_added(x, y)),
    "mul.lo": ("mul.lo.s32 %r3, %r1, %r2;", lambda x, y: x * y),
    "mul.hi signed": ("mul.hi.s32 %r3, %r1, %r2;", lambda x, y: (x * y) >> 32),
    "mul.hi unsigned": ("mul.hi.u32 %r3, %r1, %r2;", lambda x, y: (_unsigned(x) * _unsigned(y)) >> 32),
    "mad.lo": ("mad.lo.s32 %r3, %r1, %r2, 3;", lambda x, y: x * y + 3),
    "div": ("div.s32 %r3, %r1, 7;", lambda x, _: _truncated(x, 7)),
    "div by a negative": ("div.s32 %r3, %r1, -3;", lambda x, _: _truncated(x, -3)),
    "rem": ("rem.s32 %r3, %r1, 7;", lambda x, _: x - 7 * _truncated(x, 7)),
    "div unsigned": ("div.u32 %r3, %r1, 7;", lambda x, _: _unsigned(x) // 7),
    "shl past the end": ("shl.b32 %r3, %r1, 40;", lambda x, _: 0),
    "shr signed": ("shr.s32 %r3, %r1, 3;", lambda x, _: x >> 3),
    "shr signed past the end": ("shr.s32 %r3, %r1, 50;", lambda x, _: x >> 31),
    "shr unsigned": ("shr.u32 %r3, %r1, 3;", lambda x, _: _unsigned(x) >> 3),
    "shf.l": ("shf.l.wrap.b32 %r3, %r1, %r2, 4;", lambda x, y: (_unsigned(y) << 4) | (_unsigned(x) >> 28)),
    "shf.r": ("shf.r.wrap.b32 %r3, %r1, %r2, 4;", lambda x, y: (_unsigned(x) >> 4) | (_unsigned(y) << 28)),
    "bfe unsigned": ("bfe.u32 %r3, %r1, 3, 5;", lambda x, _: (_unsigned(x) >> 3) & 31),
    "bfe signed": ("bfe.s32 %r3, %r1, 3, 1;", lambda x, _: -((x >> 3) & 1)),
    "prmt": ("prmt.b32 %r3, %r1, %r2, 0x5410;", lambda x, y: (x & 0xFFFF) | (y & 0xFFFF) << 16),
    "prmt sign": ("prmt.b32 %r3, %r1, 0, 0xBBBB;", lambda x, _: -1 if x < 0 else 0),
    "lop3": ("lop3.b32 %r3, %r1, %r2, 255, 0xEA;", lambda x, y: (x & y) | 255),
    "selp": ("setp.lt.s32 %p1, %r1, %r2; selp.b32 %r3, %r1, %r2, %p1;", min),
    "setp unsigned": ("setp.lo.u32 %p1, %r1, %r2; selp.b32 %r3, 1, 0, %p1;", lambda x, y: _unsigned(x) < _unsigned(y)),
    "max": ("max.s32 %r3, %r1, %r2;", max),
    "cvt narrows and extends": (
        "cvt.u16.u32 %h1, %r1; cvt.s32.s16 %r3, %h1;",
        lambda x, _: (x + 2**15) % 2**16 - 2**15,
    ),
    "cvt from float": ("cvt.rn.f32.s32 %r4, %r1; cvt.rzi.s32.f32 %r3, %r4;", lambda x, _: min(_as_float(x), 2**31 - 1)),
    "guarded": ("mov.u32 %r3, 5; setp.gt.s32 %p1, %r1, 0; @!%p1 mov.u32 %r3, 6;", lambda x, _: 5 if x > 0 else 6),
}


def _as_float(value: int) -> int:
    return int(torch.tensor(value).float().item())


BROKEN: dict[str, tuple[str, str]] = {
    "unknown instruction": ("cp.reduce.async.bulk %r3, %r1;", "unsupported instruction"),
    "unknown modifier": ("add.sat.s32 %r3, %r1, %r2;", r"unsupported modifier \.sat"),
    "misaligned global": ("ld.global.b32 %r3, [%rd1+2];", "misaligned global access"),
    "global out of bounds": ("ld.global.b32 %r3, [%rd1+128];", "global out-of-bounds"),
    "misaligned shared": ("ld.shared.b32 %r3, [%r10+2];", "misaligned shared access"),
    "shared out of bounds": ("st.shared.b32 [%r10+1024], %r1;", "shared out-of-bounds"),
    "uninitialised shared": ("ld.shared.b32 %r3, [%r11];", "before it is written"),
    "lanes write one element": ("st.shared.b32 [%r10], %r9;", "different values written to one element"),
    "two warps write one element": (
        "setp.lt.u32 %p1, %r9, 32; @%p1 st.shared.b32 [%r10], %r1; @!%p1 st.shared.b32 [%r10], %r1;",
        "write after write by another warp",
    ),
    "write after read": (
        "st.shared.b32 [%r11], %r1; bar.sync 0; ld.shared.b32 %r3, [%r10]; bar.sync 0; "
        "ld.shared.b32 %r3, [%r10]; setp.eq.u32 %p1, %r9, 33; @%p1 st.shared.b32 [%r10], %r1;",
        "write after read by another warp",
    ),
    "divergent barrier": (
        "setp.lt.u32 %p1, %r9, 40; @%p1 bra $skip; bar.sync 0; $skip: bar.sync 0;",
        "divergent bar.sync",
    ),
    "division by zero": ("div.s32 %r3, %r1, %r2;", "division by zero"),
    "partial warp": (
        "setp.lt.u32 %p1, %r9, 5; @%p1 shfl.sync.bfly.b32 %r3, %r1, 1, 31, -1;",
        "executed by part of a warp",
    ),
}

LOOP = """
  mov.u32 %r3, 0;
  mov.u32 %r4, 0;
$again:
  setp.ge.s32 %p1, %r4, %r1;
  @%p1 bra $out;
  add.s32 %r4, %r4, 1;
  add.s32 %r3, %r3, %r4;
  bra $again;
$out:
"""
