"""A stand-in for CuPy over NumPy, where there is no GPU: stricter than CuPy, so that what it lets pass runs there.

`StrictCupy()` is a namespace like `cupy`. Its arrays compute NumPy's bits, and:

- they never become a host's array, a Python number or a buffer by themselves: only `asnumpy` brings them over, only
  `asarray` takes a host's array. (CuPy converts to numbers by itself, and waits; its `__array__` raises, too.)
- they do not meet the host's arrays: operands, indices, `x[...] = host` and `host[...] = x` are TypeErrors. As in CuPy,
  Python's numbers are operands, and take the array's dtype; NumPy's scalars are, and keep theirs.
- only functions, methods and arguments exist that CuPy documents: FUNCTIONS, CONSTANTS, and what `Array` defines.
- streams and events are kept account of. Each allocation remembers who read and wrote which bytes, on which stream and
  when; an operation that is not ordered after those that it conflicts with is a `Race`, whatever bits it would see. So
  is a buffer handed to MPI, or read by the host, before the host has seen the end of what computes it.
- each thread begins on device 0, as in CUDA; what is launched or recorded while another device is current is an error.
- copies that are asynchronous happen late: when an event after them is first seen to be done, or something waits. Until
  then the target holds rubbish, and so does new memory. An event is not done the first times that it is asked.

Every name and argument of FUNCTIONS was looked up in CuPy's reference and in the signatures of CuPy 14.2.
"""

from __future__ import annotations

import ctypes
import random
import threading
import weakref
from collections.abc import Callable, Iterator
from functools import wraps
from types import SimpleNamespace
from typing import Any

import numpy as np
from numpy.lib.array_utils import byte_bounds

FUNCTIONS: dict[str, tuple[str, ...]] = {
    "add": ("x1", "x2", "*", "out"),
    "arange": ("start", "stop", "step", "dtype"),
    "ascontiguousarray": ("a", "dtype"),
    "clip": ("a", "a_min", "a_max", "out"),
    "concatenate": ("tup", "axis", "out"),
    "cos": ("x", "*", "out"),
    "divide": ("x1", "x2", "*", "out"),
    "einsum": ("subscripts", "*operands", "dtype"),
    "empty": ("shape", "dtype", "order"),
    "empty_like": ("prototype", "dtype", "order"),
    "exp": ("x", "*", "out"),
    "full": ("shape", "fill_value", "dtype", "order"),
    "log": ("x", "*", "out"),
    "matmul": ("x1", "x2", "*", "out"),
    "max": ("a", "axis", "out", "keepdims"),
    "maximum": ("x1", "x2", "*", "out"),
    "mean": ("a", "axis", "dtype", "out", "keepdims"),
    "multiply": ("x1", "x2", "*", "out"),
    "sin": ("x", "*", "out"),
    "sqrt": ("x", "*", "out"),
    "stack": ("tup", "axis", "out"),
    "subtract": ("x1", "x2", "*", "out"),
    "sum": ("a", "axis", "dtype", "out", "keepdims"),
    "tanh": ("x", "*", "out"),
    "triu": ("m", "k"),
    "vdot": ("a", "b"),
    "where": ("condition", "x", "y"),
    "zeros": ("shape", "dtype", "order"),
    "zeros_like": ("a", "dtype", "order"),
}
"""What the project uses, or may, with its arguments as CuPy has them; those after a star by name only."""

CONSTANTS = ("inf",)

RUBBISH = 0xA5
EMPTY = ("empty", "empty_like")
Clock = dict[int, int]
"""How far in each stream something is seen to have come."""


def alone(method: Callable[..., Any]) -> Callable[..., Any]:
    """One thread at a time: a second one may help messages on."""

    @wraps(method)
    def locked(self: Any, *arguments: Any) -> Any:
        with self.gpu.lock:
            return method(self, *arguments)

    return locked


class Race(AssertionError):
    """Two accesses of the same bytes that nothing orders, or the host's of what it has not waited for."""


class Stream:
    """A queue of operations. Each has a number; the clock says what of all streams the next one comes after."""

    def __init__(self, gpu: Gpu, number: int) -> None:
        self.gpu, self.number = gpu, number
        self.clock: Clock = {}
        self.late: list[tuple[int, Callable[[], Any]]] = []

    @alone
    def launch(self, reads: list[np.ndarray], writes: list[np.ndarray], late: Callable[[], Any] | None = None) -> None:
        """Enter an operation in the accounts of the memory that it touches."""
        self.gpu.require_current()
        merge(self.clock, self.gpu.host)
        self.clock[self.number] = place = self.clock.get(self.number, 0) + 1
        for kind, arrays in (("read", reads), ("write", writes)):
            for array in arrays:
                self.gpu.memory_of(array).access(array, kind, self, place)
        if late is not None:
            self.late.append((place, late))

    @alone
    def wait_event(self, event: Event) -> None:
        """What is launched from now on comes after the event."""
        merge(self.clock, event.clock)

    @alone
    def synchronize(self) -> None:
        """The host waits for all that was launched."""
        self.catch_up(self.clock)
        merge(self.gpu.host, self.clock)

    def catch_up(self, clock: Clock) -> None:
        """Do what is late, of all streams, up to these places."""
        for stream in self.gpu.streams:
            while stream.late and stream.late[0][0] <= clock.get(stream.number, 0):
                stream.late.pop(0)[1]()


def merge(clock: Clock, other: Clock) -> None:
    """The later of both, for each stream."""
    for stream, place in other.items():
        clock[stream] = max(place, clock.get(stream, 0))


class Event:
    """A place in a stream."""

    def __init__(self, gpu: Gpu) -> None:
        self.gpu = gpu
        self.clock: Clock = {}
        self.stream: Stream | None = None
        self.patience = gpu.random.randrange(3)

    @alone
    def record(self, stream: Stream) -> None:
        """Here."""
        self.gpu.require_current()
        merge(stream.clock, self.gpu.host)
        self.stream, self.clock = stream, dict(stream.clock)

    @property
    @alone
    def done(self) -> bool:
        """Whether the stream has come here; if so, the host has seen it."""
        assert self.stream is not None, "an event that was never recorded"
        if any(self.gpu.host.get(stream, 0) < place for stream, place in self.clock.items()):
            if self.patience:
                self.patience -= 1
                return False
            self.stream.catch_up(self.clock)
            merge(self.gpu.host, self.clock)
        return True


class Allocation:
    """A piece of memory and who touched it last: (first byte, end, kind) -> place, for each stream."""

    def __init__(self, gpu: Gpu) -> None:
        self.gpu = gpu
        self.touched: dict[int, dict[tuple[int, int, str], int]] = {}
        self.with_mpi: list[tuple[int, int, str]] = []

    def access(self, array: np.ndarray, kind: str, stream: Stream, place: int) -> None:
        """Touch it, in order or with a `Race`."""
        first, end = byte_bounds(array)
        self.require(first, end, kind, stream.clock, stream.number, f"stream {stream.number} {kind}s")
        for start, stop, verb in self.with_mpi:
            if start < end and first < stop and (verb == "receive" or kind == "write"):
                raise Race(f"stream {stream.number} {kind}s what MPI has not yet given back, a {verb}")
        self.touched.setdefault(stream.number, {})[first, end, kind] = place

    def require(self, first: int, end: int, kind: str, clock: Clock, own: int | None, who: str) -> None:
        """A `Race` unless the clock is past every access that this one conflicts with."""
        for number, touched in self.touched.items():
            if number == own:
                continue
            for (start, stop, before), place in touched.items():
                if start < end and first < stop and "write" in (kind, before) and clock.get(number, 0) < place:
                    raise Race(f"{who} what stream {number} {before}s, in no order")

    @alone
    def seen(self, array: np.ndarray, kind: str, who: str) -> None:
        """A `Race` unless the host has seen the end of all that it must not meet."""
        self.require(*byte_bounds(array), kind, self.gpu.host, None, who)


class Flags:
    """What CuPy has of them."""

    def __init__(self, array: np.ndarray) -> None:
        self.c_contiguous, self.f_contiguous = array.flags.c_contiguous, array.flags.f_contiguous
        self.owndata = array.base is None


class Pointer:
    """Where an array begins."""

    def __init__(self, array: Array) -> None:
        self._array = array

    def copy_to_host_async(self, mem: int, size: int, stream: Stream) -> None:
        """To pinned memory, some time later."""
        source, target = self._array.raw, self._array.gpu.pinned_at(mem, size)
        stream.launch([source], [target], lambda: ctypes.memmove(target.ctypes.data, source.ctypes.data, size))
        target[...] = RUBBISH

    def copy_from_host_async(self, mem: int, size: int, stream: Stream) -> None:
        """From pinned memory, some time later."""
        target, source = self._array.raw, self._array.gpu.pinned_at(mem, size)
        stream.launch([source], [target], lambda: ctypes.memmove(target.ctypes.data, source.ctypes.data, size))
        target.reshape(-1).view(np.uint8)[...] = RUBBISH


def refuse(what: str) -> Callable[..., Any]:
    """A method that raises, as what it does would bring an array to the host unasked."""

    def method(self: Any, *_: Any, **__: Any) -> Any:
        raise TypeError(f"implicit conversion to the host: {what}")

    return method


class Array:
    """An array on the stand-in's GPU. `raw`, the NumPy array behind it, is for the stand-in and its tests alone."""

    __array_ufunc__ = None  # so that NumPy leaves operators to this class, and its functions refuse
    __hash__ = None  # type: ignore[assignment]

    def __init__(self, gpu: Gpu, raw: np.ndarray, base: Array | None = None) -> None:
        self.gpu, self.raw, self.base = gpu, raw, base

    __array__ = refuse("__array__")
    __array_function__ = refuse("a function of NumPy's")
    __float__, __int__, __bool__, __index__ = (refuse(name) for name in ("float", "int", "bool", "index"))
    item, tolist, tobytes, get = (refuse(name) for name in ("item", "tolist", "tobytes", "get"))

    shape = property(lambda self: self.raw.shape)
    dtype = property(lambda self: self.raw.dtype)
    ndim = property(lambda self: self.raw.ndim)
    size = property(lambda self: self.raw.size)
    nbytes = property(lambda self: self.raw.nbytes)
    itemsize = property(lambda self: self.raw.itemsize)
    strides = property(lambda self: self.raw.strides)
    flags = property(lambda self: Flags(self.raw))
    data = property(Pointer)
    T = property(lambda self: self._derived(self.raw.T))

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        """For mpi4py. Whoever asks is about to use the memory without regard to any stream."""
        self.gpu.memory_of(self.raw).seen(self.raw, "read", "MPI is handed")
        return {"shape": self.shape, "typestr": self.dtype.str, "data": (self.raw.ctypes.data, False), "version": 3,
                "strides": None}

    def __len__(self) -> int:
        return len(self.raw)

    def __iter__(self) -> Iterator[Array]:
        return (self[index] for index in range(len(self.raw)))

    def reshape(self, *shape: Any) -> Array:
        """A view where it can be one, else a copy."""
        return self._derived(self.raw.reshape(*shape))

    def transpose(self, *axes: Any) -> Array:
        """A view."""
        return self._derived(self.raw.transpose(*axes))

    def swapaxes(self, axis1: int, axis2: int) -> Array:
        """A view."""
        return self._derived(self.raw.swapaxes(axis1, axis2))

    def astype(self, dtype: Any, copy: bool = True) -> Array:
        """Converted."""
        return self if not copy and self.dtype == dtype else self.gpu.apply(lambda raw: raw.astype(dtype), (self,))

    def copy(self) -> Array:
        """New memory."""
        return self.gpu.apply(lambda raw: raw.copy(), (self,))

    def max(self, axis: Any = None, out: Array | None = None, keepdims: bool = False) -> Array:
        """The largest along an axis."""
        return self.gpu.apply(np.max, (self,), out, axis=axis, keepdims=keepdims)

    def fill(self, value: Any) -> None:
        """With one number."""
        self[...] = value

    def __getitem__(self, index: Any) -> Array:
        found = self.raw[self.gpu.plain(index)]
        if isinstance(found, np.ndarray) and np.may_share_memory(found, self.raw):
            return self._derived(found)
        return self.gpu.apply(lambda *_: found, (self, index))

    def __setitem__(self, index: Any, value: Any) -> None:
        place = self.gpu.plain(index)
        target = self.raw[place]
        if not isinstance(target, np.ndarray):  # a single number
            target = self.raw[place if isinstance(place, tuple) else (place,)][..., None]
        if not np.may_share_memory(target, self.raw):  # places in a list: where they lie is not said more closely
            target = self.raw
        plain = self.gpu.plain(value)
        self.gpu.current.launch(self.gpu.arrays((index, value)), [target])
        self.raw[place] = plain

    def _derived(self, raw: np.ndarray) -> Array:
        if np.may_share_memory(raw, self.raw):
            return Array(self.gpu, raw, self.base if self.base is not None else self)
        return self.gpu.apply(lambda _: raw, (self,))


def _operator(name: str) -> Callable[..., Any]:
    function = getattr(np.ndarray, name)
    in_place = name.startswith("__i") and name != "__invert__"

    def method(self: Array, *others: Any) -> Any:
        if in_place:
            self.gpu.apply(function, (self, *others), out=self)
            return self
        return self.gpu.apply(function, (self, *others))

    return method


for _name in ("add", "sub", "mul", "truediv", "pow", "matmul", "and", "or"):
    for _form in ("__{}__", "__r{}__", "__i{}__"):
        setattr(Array, _form.format(_name), _operator(_form.format(_name)))
for _name in ("__neg__", "__invert__", "__abs__", "__eq__", "__ne__", "__lt__", "__le__", "__gt__", "__ge__"):
    setattr(Array, _name, _operator(_name))


class Gpu:
    """One device, as one process sees it."""

    def __init__(self, seed: int = 0) -> None:
        self.lock = threading.RLock()
        self.random = random.Random(seed)
        self.number = 0
        self.chosen = threading.local()
        self.host: Clock = {}
        self.streams: list[Stream] = []
        self.current = self.stream()
        self.faults: list[str] = []
        self.total_bytes = 0
        # By the address where it begins; memory that is freed takes its entry along.
        self._memory: dict[int, Allocation] = {}
        self._pinned: dict[int, np.ndarray] = {}

    def require_current(self) -> None:
        """That this thread has chosen the device."""
        current = getattr(self.chosen, "number", 0)
        assert current == self.number, f"device {current} is current in this thread, not {self.number}"

    def stream(self) -> Stream:
        """A new one."""
        self.require_current()
        self.streams.append(Stream(self, len(self.streams)))
        return self.streams[-1]

    def make(self, raw: np.ndarray) -> Array:
        """An array in new memory, that the current stream writes."""
        raw = np.asarray(raw)
        if raw.base is not None:
            raw = raw.copy(order="K")
        self._memory[raw.ctypes.data] = Allocation(self)
        weakref.finalize(raw, self._memory.pop, raw.ctypes.data, None)
        self.total_bytes += raw.nbytes
        self.current.launch([], [raw])
        return Array(self, raw)


    def memory_of(self, raw: np.ndarray) -> Allocation:
        """The accounts of the memory that an array lies in."""
        owner = raw
        while isinstance(owner.base, np.ndarray):
            owner = owner.base
        return self._memory[owner.ctypes.data]

    def plain(self, value: Any) -> Any:
        """An operand or index with NumPy's arrays for this GPU's; a TypeError for anything of another memory."""
        if isinstance(value, tuple | list):
            return type(value)(self.plain(part) for part in value)
        if isinstance(value, Array):
            if value.gpu is not self:
                raise TypeError("an array of another GPU")
            return value.raw
        if isinstance(value, np.ndarray):
            raise TypeError("Unsupported type <class 'numpy.ndarray'>: an array of the host's")
        return value

    def arrays(self, values: Any) -> list[np.ndarray]:
        """All arrays among operands."""
        if isinstance(values, Array):
            return [values.raw]
        if isinstance(values, tuple | list):
            return [array for value in values for array in self.arrays(value)]
        return []

    def apply(self, function: Callable[..., Any], operands: tuple[Any, ...], out: Array | None = None,
              **named: Any) -> Array:
        """An operation on the current stream."""
        plain = self.plain(operands)
        if out is not None and not isinstance(out, Array):
            raise TypeError(f"out must be one of this library's arrays, not {type(out)}")
        target = [out.raw] if out is not None else []
        self.current.launch(self.arrays(operands), target)
        if out is None:
            result = function(*plain, **named)
            same = next((each for each in operands if isinstance(each, Array) and each.raw is result), None)
            return self.make(result) if same is None else same
        if function.__name__.startswith("__i"):
            function(*plain)
        else:
            function(*plain, out=out.raw, **named)
        return out

    def pinned_at(self, address: int, size: int) -> np.ndarray:
        """So many bytes of pinned memory."""
        memory = self._pinned.get(address)
        if memory is None or memory.nbytes < size:
            raise TypeError("an asynchronous copy needs pinned memory of the host's")
        return memory[:size]

    def alloc_pinned(self, size: int) -> Any:
        """Pinned memory, which must not be let go before the host has seen the end of all copies."""
        store = np.full(size, RUBBISH, dtype=np.uint8)  # copies that are late keep it, as CuPy's would not
        memory, address = (ctypes.c_uint8 * size).from_buffer(store), store.ctypes.data
        self._pinned[address] = store
        allocation = self._memory[address] = Allocation(self)

        def let_go() -> None:
            try:
                allocation.seen(self._pinned.pop(address), "write", "the host gives away pinned memory that")
            except Race as race:
                self.faults.append(str(race))
            self._memory.pop(address, None)

        weakref.finalize(memory, let_go)
        return memory

    def handed(self, array: Array, verb: str) -> np.ndarray:
        """The memory of an array that MPI is handed, to send it or to receive into it; until `given_back`."""
        memory = self.memory_of(array.raw)
        memory.seen(array.raw, "read" if verb == "send" else "write", f"MPI is handed to {verb}")
        memory.with_mpi.append((*byte_bounds(array.raw), verb))
        return array.raw

    def given_back(self, array: Array, verb: str) -> None:
        """MPI is through with it."""
        self.memory_of(array.raw).with_mpi.remove((*byte_bounds(array.raw), verb))


class StrictCupy:
    """A namespace like `cupy`, with one GPU of its own or several by that name."""

    ndarray = Array
    __version__ = "0 (a stand-in)"

    def __init__(self, seed: int = 0, gpus: int = 1) -> None:
        self.gpu = gpu = Gpu(seed)
        self.used: set[str] = set()
        runtime = SimpleNamespace(
            is_hip=False, getDeviceCount=lambda: gpus, CUDARuntimeError=RuntimeError,
            getDeviceProperties=lambda number: {"name": b"a stand-in for a GPU"})
        self.cuda = SimpleNamespace(
            Device=lambda number: Device(gpu, number), Event=self._event, Stream=self._stream, runtime=runtime,
            get_current_stream=lambda: gpu.current, alloc_pinned_memory=gpu.alloc_pinned)

    def _event(self, *, disable_timing: bool = False) -> Event:
        self.gpu.require_current()
        return Event(self.gpu)

    def _stream(self, *, non_blocking: bool = False) -> Stream:
        assert non_blocking, "a stream that waits for the null stream by itself hides what is not ordered"
        return self.gpu.stream()

    def get_default_memory_pool(self) -> Any:
        """With what was ever taken: the stand-in reuses nothing."""
        return SimpleNamespace(total_bytes=lambda: self.gpu.total_bytes)

    def asnumpy(self, array: Array) -> np.ndarray:
        """A copy for the host, which waits for it."""
        if not isinstance(array, Array):
            raise TypeError(f"asnumpy is given what is no array of this library: {type(array)}")
        self.gpu.current.launch([array.raw], [])
        self.gpu.current.synchronize()
        return array.raw.copy()

    def asarray(self, array: np.ndarray, *, blocking: bool = False) -> Array:
        """A copy for the GPU."""
        if not isinstance(array, np.ndarray) or not blocking:
            raise TypeError("asarray takes a host's array here, and blocks")
        return self.gpu.make(array.copy())

    def __getattr__(self, name: str) -> Any:
        if name in CONSTANTS:
            return getattr(np, name)
        if name not in FUNCTIONS:
            raise AttributeError(f"{name} is not in the list of CuPy's functions that are known to exist")

        def call(*given: Any, **named: Any) -> Array:
            self.used.add(name)
            check_call(name, given, named)
            values = self.gpu.plain(tuple(named.values()))
            out = named.pop("out", None)
            plain = dict(zip(named, values)) if out is None else {key: self.gpu.plain(named[key]) for key in named}
            result = self.gpu.apply(getattr(np, name), given, out=out, **plain)
            if name in EMPTY:
                result.raw.reshape(-1).view(np.uint8)[...] = RUBBISH
            return result

        return call


def check_call(name: str, given: tuple[Any, ...], named: dict[str, Any]) -> None:
    """A TypeError unless CuPy's function takes such arguments."""
    places = FUNCTIONS[name]
    stars = [place for place in places if place.startswith("*")]
    by_place = places.index(stars[0]) if stars else len(places)
    unknown = set(named) - set(places)
    if (len(given) > by_place and stars in ([], ["*"])) or unknown:
        raise TypeError(f"{name} takes {places}: not {len(given)} arguments by place, nor {sorted(unknown)}")


class Device:
    """A device that can be made current in a thread. The one that is used first is the stand-in's."""

    def __init__(self, gpu: Gpu, number: int) -> None:
        self.gpu, self.number = gpu, number
        self.before: list[int] = []

    def use(self) -> None:
        """From now on."""
        if not hasattr(self.gpu.chosen, "number"):
            self.gpu.number = self.number
        self.gpu.chosen.number = self.number

    def __enter__(self) -> Device:
        self.before.append(getattr(self.gpu.chosen, "number", 0))
        self.gpu.chosen.number = self.number
        return self

    def __exit__(self, *_: object) -> None:
        self.gpu.chosen.number = self.before.pop()
