"""Repairs of the Triton interpreter's arithmetic: bfloat16, tf32 and generic reductions.

The interpreter of Triton 3.8 keeps bfloat16 as bit patterns in uint16 and then computes with the patterns: tl.dot,
+, * and comparisons are wrong without a word, and float32 to bfloat16 truncates. Here every operation decodes to
float32, computes, and rounds to nearest even, as the compiled code does. float8 is refused.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import triton.language as tl
import triton.runtime.interpreter as stock
from triton.runtime.interpreter import InterpreterBuilder, ReduceOps, ScanOps, TensorHandle

from tests.emulation.rounding import bfloat16_values, round_to_bfloat16, round_to_tf32


def _is_bfloat16(handle: Any) -> bool:
    return isinstance(handle, TensorHandle) and handle.dtype.scalar == tl.bfloat16


def decode(handle: TensorHandle) -> np.ndarray:
    """The values of a handle as an array that numpy computes with.

    Raises:
        NotImplementedError: the handle is float8.
    """
    if handle.dtype.scalar.is_fp8():
        raise NotImplementedError(f"interpreter: expected a dtype other than float8, got {handle.dtype}")
    if handle.dtype.scalar == tl.bfloat16:
        return bfloat16_values(handle.data)
    return handle.data


def encode(values: np.ndarray, dtype: Any) -> TensorHandle:
    """A handle of ``dtype`` holding ``values``; comparisons stay boolean."""
    if dtype.scalar == tl.bfloat16 and values.dtype != bool:
        values = round_to_bfloat16(values)
    return TensorHandle(values, dtype.scalar)


def _repaired(name: str) -> Callable[..., TensorHandle]:
    genuine = getattr(InterpreterBuilder, name)

    def operate(self: Any, *arguments: Any) -> TensorHandle:
        *handles, operation = arguments
        with np.errstate(all="ignore"):
            if not any(_is_bfloat16(handle) for handle in handles):
                return genuine(self, *arguments)
            # The last operand has the result's dtype: tl.where's first one is the condition.
            return encode(operation(*map(decode, handles)), handles[-1].dtype)

    return operate


def _fma(self: Any, x: TensorHandle, y: TensorHandle, z: TensorHandle) -> TensorHandle:
    exact = decode(x).astype(np.float64) * decode(y) + decode(z)
    return encode(exact.astype(decode(z).dtype), z.dtype)


def _absolute(self: Any, x: TensorHandle) -> TensorHandle:
    return encode(np.abs(decode(x)), x.dtype)


def _cast(self: Any, source: TensorHandle, target: Any) -> TensorHandle:
    values = decode(source)
    with np.errstate(all="ignore"):
        if target.scalar == tl.bfloat16:
            return encode(values.astype(np.float32), target)
        dtype = stock._get_np_dtype(target)
        if dtype.kind in "iu" and values.dtype.kind == "f":
            # Saturates and maps NaN to zero, as cvt does.
            values = np.nan_to_num(np.trunc(values))
            if dtype.itemsize < 8:
                values = np.clip(values, float(np.iinfo(dtype).min), float(np.iinfo(dtype).max))
        return TensorHandle(values.astype(dtype), target.scalar)


def _float_to_float(self: Any, source: TensorHandle, target: Any, rounding: Any) -> TensorHandle:
    truncates = rounding is not None and rounding != stock._ir.ROUNDING_MODE.RTNE
    if truncates and target.scalar == tl.bfloat16:
        return TensorHandle(round_to_bfloat16(decode(source), toward_zero=True), tl.bfloat16)
    return _cast(self, source, target)


def _dot(self: Any, a: TensorHandle, b: TensorHandle, acc: TensorHandle, precision: Any, _: Any) -> TensorHandle:
    x, y, accumulator = decode(a), decode(b), decode(acc)
    if a.dtype.scalar == tl.float32 and precision == stock._ir.INPUT_PRECISION.TF32:
        x, y = round_to_tf32(x), round_to_tf32(y)
    compute = np.float32 if accumulator.dtype in (np.float16, np.float32) else accumulator.dtype
    product = np.matmul(x.astype(compute), y.astype(compute))
    return encode((product + accumulator).astype(accumulator.dtype), acc.dtype)


def _combine(operation: Any, left: list[np.ndarray], right: list[np.ndarray], inputs: Any) -> list[np.ndarray]:
    tensors = [operation.to_tensor(data, like.dtype) for side in (left, right) for data, like in zip(side, inputs)]
    result = operation.combine_fn.fn(*tensors)
    return [tensor.handle.data for tensor in (result if isinstance(result, tuple) else (result,))]


def _tree_reduce(self: Any, inputs: Any) -> list[Any]:
    """Combine whole halves: fast, and in tree order as on a GPU, so that a non-associative function shows."""
    all_axes = self.axis is None
    inputs, axis = self.unravel(inputs, self.axis)
    rank = inputs[0].handle.data.ndim
    arrays = [np.moveaxis(tensor.handle.data, axis, 0) for tensor in inputs]
    while (length := arrays[0].shape[0]) > 1:
        half = length // 2
        lower, upper = [a[:half] for a in arrays], [a[half : 2 * half] for a in arrays]
        combined = _combine(self, lower, upper, inputs)
        arrays = [np.concatenate([c, a[2 * half :]]) for c, a in zip(combined, arrays)]
    out = []
    for array, tensor in zip(arrays, inputs):
        data: Any = array[0]
        if self.keep_dims:
            data = np.asarray(data).reshape([1] * rank) if all_axes else np.expand_dims(data, axis)
        elif all_axes:
            data = np.asarray(data).item()
        out.append(self.to_tensor(data, tensor.dtype))
    return out


def _doubling_scan(self: Any, inputs: Any) -> list[Any]:
    """Inclusive scan by doubling strides, as on a GPU."""
    arrays = [np.moveaxis(tensor.handle.data, self.axis, 0) for tensor in inputs]
    if self.reverse:
        arrays = [a[::-1] for a in arrays]
    stride = 1
    while stride < arrays[0].shape[0]:
        combined = _combine(self, [np.roll(a, stride, 0) for a in arrays], arrays, inputs)
        arrays = [np.concatenate([a[:stride], c[stride:]]) for a, c in zip(arrays, combined)]
        stride *= 2
    if self.reverse:
        arrays = [a[::-1] for a in arrays]
    back = [np.ascontiguousarray(np.moveaxis(a, 0, self.axis)) for a in arrays]
    return [self.to_tensor(data, tensor.dtype) for data, tensor in zip(back, inputs)]


def install() -> None:
    """Replace the interpreter's arithmetic in this process."""
    for name in ("binary_op", "unary_op", "ternary_op"):
        setattr(InterpreterBuilder, name, _repaired(name))
    InterpreterBuilder.create_fma = _fma
    InterpreterBuilder.create_fabs = _absolute
    InterpreterBuilder.cast_impl = _cast
    InterpreterBuilder.create_fp_to_fp = _float_to_float
    InterpreterBuilder.create_dot = _dot
    InterpreterBuilder.get_bf16 = lambda self, value: encode(np.array([value], np.float32), tl.bfloat16)
    ReduceOps.generic_reduce = _tree_reduce
    ScanOps.generic_scan = _doubling_scan
