"""The Triton interpreter, repaired and instrumented, on CPU tensors.

    interpreter.install()                      # once per process, started with TRITON_INTERPRET=1
    with interpreter.checked(order_seed=1) as launches:
        my_wrapper(cpu_tensors)
    launches[0].traffic["x_ptr"].read          # bytes

Inside the block an access outside the tensor that the pointer came from, a misaligned one, one between the rows of a
view, and any two programs that touch one element without both reading or both being atomic raise; lanes that a masked
load leaves undefined are poisoned (NaN, or a huge integer); programs run in the order that ``order_seed`` draws.
Triton decides when a kernel is decorated whether it is interpreted, so use `runner`, which starts a process.
Views of one storage are checked against each other where their element sizes agree.
"""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import os
from collections.abc import Iterator
from typing import Any

import numpy as np
import triton.language as tl
import triton.runtime.interpreter as stock
from triton.runtime.interpreter import GridExecutor, InterpreterBuilder, TensorHandle

from tests.emulation import interpreter_numerics
from tests.emulation.interpreter_memory import KernelMemoryError, Launch, TrackedTensor
from tests.emulation.rounding import BFLOAT16_NAN

_POINTER_OPERATIONS = (
    *("addptr", "broadcast", "expand_dims", "reshape"),
    *("trans", "bitcast", "splat", "unsplat", "select"),
)


@dataclasses.dataclass
class _Session:
    order_seed: int | None
    launches: list[Launch] = dataclasses.field(default_factory=list)


_session: _Session | None = None


@contextlib.contextmanager
def checked(order_seed: int | None = None) -> Iterator[list[Launch]]:
    """Check every launch in the block.

    Args:
        order_seed: draws the order in which programs run; None keeps the interpreter's.

    Yields:
        A list that gains one `Launch` per launch.

    Raises:
        RuntimeError: `install` was not called.
        KernelMemoryError: at a bad access, wrapped by Triton in its InterpreterError.
    """
    global _session
    if InterpreterBuilder.create_masked_load is not _masked_load:
        raise RuntimeError("checked: expected interpreter.install() to have been called")
    previous, _session = _session, _Session(order_seed)
    try:
        yield _session.launches
    finally:
        _session = previous


def _program() -> tuple[tuple[int, int, int], int]:
    """The running program's coordinates and its linear index."""
    x, y, z = stock.interpreter_builder.grid_idx
    _, ny, nz = stock.interpreter_builder.grid_dim
    return (x, y, z), (x * ny + y) * nz + z


def _record(pointers: TensorHandle, mask: np.ndarray, kind: str, values: np.ndarray | None = None) -> None:
    if _session is None or not mask.any():
        return
    program, index = _program()
    tracked: TrackedTensor | None = pointers.attr.get("tensor")
    if tracked is None:
        raise KernelMemoryError(f"{kind} through a pointer of unknown origin in program {program}")
    # A mask that a Python bool took part in comes as integers, which would index instead of choosing.
    addresses, active = np.broadcast_arrays(pointers.data, mask.astype(bool))
    if values is not None:
        values = np.broadcast_to(values, active.shape)[active]
    itemsize = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
    _session.launches[-1].access(tracked, addresses[active], itemsize, kind, program, index, values)


def _poison(shape: tuple[int, ...], element: Any) -> np.ndarray:
    dtype = stock._get_np_dtype(element)
    if element.scalar == tl.bfloat16:
        return np.full(shape, BFLOAT16_NAN, dtype)
    if dtype.kind == "f":
        return np.full(shape, np.nan, dtype)
    return np.full(shape, np.iinfo(dtype).max // 3 if dtype.kind in "iu" else True, dtype)


def _masked_load(
    self: Any,
    pointers: TensorHandle,
    mask: TensorHandle,
    other: TensorHandle | None,
    cache_modifier: Any = None,
    eviction_policy: Any = None,
    is_volatile: bool = False,
) -> TensorHandle:
    element = pointers.get_element_ty()
    _record(pointers, mask.data, "load")
    fill = _poison(pointers.data.shape, element) if other is None else other.data
    return TensorHandle(stock._interpreter.load(pointers.data, mask.data, fill, stock._get_np_dtype(element)), element)


def _masked_store(
    self: Any,
    pointers: TensorHandle,
    value: TensorHandle,
    mask: TensorHandle,
    cache_modifier: Any = None,
    eviction_policy: Any = None,
) -> Any:
    _record(pointers, mask.data, "store", value.data)
    return stock._interpreter.store(pointers.data, value.data, mask.data)


def _track_atomic_updates() -> None:
    genuine = InterpreterBuilder.create_atomic_rmw

    def update(self: Any, operation: Any, pointers: Any, value: Any, mask: Any, semantics: Any, scope: Any) -> Any:
        if value.dtype.scalar == tl.bfloat16:
            raise NotImplementedError("atomic update: expected a dtype other than bfloat16")
        _record(pointers, mask.data, "atomic")
        return genuine(self, operation, pointers, value, mask, semantics, scope)

    InterpreterBuilder.create_atomic_rmw = update


def _track_pointer(name: str) -> None:
    """Let the result of a pointer operation remember the tensor that its operand came from."""
    genuine = getattr(InterpreterBuilder, name)

    def operate(self: Any, *arguments: Any, **options: Any) -> Any:
        result = genuine(self, *arguments, **options)
        sources = (a.attr["tensor"] for a in arguments if isinstance(a, TensorHandle) and "tensor" in a.attr)
        source = next(sources, None)
        if source is not None and isinstance(result.dtype.scalar, tl.pointer_type):
            result.attr["tensor"] = source
        return result

    setattr(InterpreterBuilder, name, operate)


def _track_arguments() -> None:
    genuine = stock._implicit_cvt

    def convert(argument: Any) -> Any:
        converted = genuine(argument)
        if _session is not None and hasattr(argument, "data_ptr"):
            converted.handle.attr["tensor"] = _session.launches[-1].track(stock._unwrap_tensor(argument))
        return converted

    stock._implicit_cvt = convert


def _tensor_names(name: str, argument: Any) -> list[str]:
    if isinstance(argument, tuple):
        return [inner for i, item in enumerate(argument) for inner in _tensor_names(f"{name}.{i}", item)]
    return [name] if hasattr(argument, "data_ptr") else []


def _track_launches() -> None:
    genuine = GridExecutor.__call__

    def launch(self: Any, *args: Any, **kwargs: Any) -> Any:
        if _session is None:
            return genuine(self, *args, **kwargs)
        known = {k: v for k, v in kwargs.items() if k in self.arg_names}
        arguments = inspect.getcallargs(self.fn, *args, **known)
        names = [name for key, value in arguments.items() for name in _tensor_names(key, value)]
        _session.launches.append(Launch(self.fn.__name__, names))
        builder = stock.interpreter_builder
        place, seed, orders = builder.set_grid_idx, _session.order_seed, []

        def shuffled(x: int, y: int, z: int) -> None:
            nx, ny, nz = builder.grid_dim
            if not orders:
                orders.append(np.random.default_rng(seed).permutation(nx * ny * nz))
            drawn = int(orders[0][(x * ny + y) * nz + z])
            place(drawn // (ny * nz), drawn // nz % ny, drawn % nz)

        if seed is not None:
            builder.set_grid_idx = shuffled
        try:
            return genuine(self, *args, **kwargs)
        finally:
            vars(builder).pop("set_grid_idx", None)

    GridExecutor.__call__ = launch


def install() -> None:
    """Repair and instrument the interpreter of this process; a second call does nothing.

    Raises:
        RuntimeError: the process was not started with TRITON_INTERPRET=1.
    """
    if os.environ.get("TRITON_INTERPRET") != "1":
        raise RuntimeError("interpreter.install: expected the process to be started with TRITON_INTERPRET=1")
    if InterpreterBuilder.create_masked_load is _masked_load:
        return
    interpreter_numerics.install()
    InterpreterBuilder.create_masked_load = _masked_load
    InterpreterBuilder.create_masked_store = _masked_store
    _track_atomic_updates()
    for name in _POINTER_OPERATIONS:
        _track_pointer(f"create_{name}")
    _track_arguments()
    _track_launches()
