"""Rows of a fixed capacity on one device: every buffer an OrtValue, allocated once, bound once, never moved."""

from __future__ import annotations

import contextlib
import itertools
import logging
import threading
from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvx.runtime.arrays import IntArray
from kvx.runtime.backends.device import Device
from kvx.runtime.backends.ort import ort
from kvx.runtime.backends.sessions import Graph, is_out_of_memory
from kvx.runtime.bundle.signature import Signature, TensorSpec
from kvx.runtime.decoding.cache import Capacity
from kvx.runtime.decoding.device_loop import LoopState
from kvx.runtime.errors import CapacityError, KvxError

ONNX_TYPES = {"float32": 1, "int64": 7, "bool": 9, "float16": 10, "bfloat16": 16}  # onnx.TensorProto.DataType
NO_CAPTURE = -1
WARM_UP_RUNS = 2
MOST_IDLE = 2  # each of the size of a cache

MakeRows = Callable[[Capacity], "DeviceRows"]

_log = logging.getLogger("kvx")
_graph_ids = itertools.count(1)


class DeviceRows:
    """See LoopRows. The `encoder` and the looped step, `loop`, run on the same device.

    With `capture` the step is captured as a CUDA graph, once, while all rows are idle; where ONNX Runtime refuses, it
    runs uncaptured, which the log says. A session that captures may not be run by two threads at a time: all rows of
    one session share its `lock`.
    """

    def __init__(self, encoder: Graph, loop: Graph, capacity: Capacity, *, capture: bool, lock: threading.Lock) -> None:
        self.capacity = capacity
        self.spoilt = False
        self._lock = lock
        self._encoder = encoder
        self._loop = loop
        self._session = loop.session()
        self._device = loop.settings.device
        self._values = {spec.name: zeros(spec, capacity, self._device) for spec in loop.signature.inputs}
        self._specs = {spec.name: spec for spec in loop.signature.inputs}
        self._state = [field.name for field in fields(LoopState) if field.name in self._values]
        self._binding = self._bind(loop.signature)
        self._graph_id = NO_CAPTURE
        self._options = _run_options(NO_CAPTURE)
        self.write(self._idle())
        if capture:
            self._capture()

    def encode(self, row: int, input_ids: IntArray, source_lengths: IntArray) -> None:
        """input_ids [n, S], source_lengths [n] → the cross keys and values of the rows from `row` on, in place."""
        session = self._encoder.session()
        with self._encoder.running:
            binding = session.io_binding()
            for name, array in (("input_ids", input_ids), ("source_lengths", source_lengths)):
                value = ort.OrtValue.ortvalue_from_numpy(array, self._device.kind, self._device.index)
                binding.bind_ortvalue_input(name, value)
            for name, past in self._encoder.signature.presents.items():
                spec, value = self._specs[past], self._values[past]
                shape = spec.shape({**self.capacity.sizes, "B": len(input_ids)})
                first = value.data_ptr() + row * (value.tensor_size_in_bytes() // self.capacity.rows)
                kind, index = self._device.kind, self._device.index
                binding.bind_output(name, kind, index, ONNX_TYPES[spec.dtype], shape, first)
            session.run_with_iobinding(binding)
            binding.synchronize_outputs()

    def write(self, state: LoopState) -> None:
        """Sets all of the state."""
        for name in self._state:
            self._values[name].update_inplace(getattr(state, name))

    def run(self, steps: int) -> None:
        """This number of steps, each feeding the next; the host waits for the last."""
        with self._lock, self._loop.running:
            for _ in range(steps):
                self._session.run_with_iobinding(self._binding, self._options)
            self._binding.synchronize_outputs()

    def read(self) -> LoopState:
        """The state as it is now, copied."""
        held = {name: self._values[name].numpy().copy() for name in self._state}
        return replace(self._idle(), **held)

    def spoil(self) -> None:
        """Notes that what a row left behind is not finite: nobody else may have these rows after this decode."""
        self.spoilt = True

    def release(self) -> None:
        """Gives up the captured graph, if there is one."""
        if self._graph_id != NO_CAPTURE:
            with self._lock:
                self._session.release_captured_graph(self._graph_id)

    def _idle(self) -> LoopState:
        spec = self._specs.get("forced_ids")
        forced = 0 if spec is None else spec.shape(self.capacity.sizes)[1]
        return LoopState.idle(self.capacity, forced)

    def _bind(self, signature: Signature) -> ort.IOBinding:
        binding, presents = self._session.io_binding(), signature.presents
        for spec in signature.inputs:
            binding.bind_ortvalue_input(spec.name, self._values[spec.name])
        for spec in signature.outputs:
            binding.bind_ortvalue_output(spec.name, self._values[presents[spec.name]])
        return binding

    def _capture(self) -> None:
        """Runs that change nothing, because every row is finished, then one that ONNX Runtime captures."""
        self.run(WARM_UP_RUNS)
        graph_id = next(_graph_ids)
        try:
            with self._lock, self._loop.running:
                self._session.run_with_iobinding(self._binding, _run_options(graph_id))
                self._binding.synchronize_outputs()
        except CapacityError:
            raise
        except KvxError as error:
            _log.warning("steps run uncaptured: %s", error.got)
        else:
            self._graph_id, self._options = graph_id, _run_options(graph_id)
        self.write(self._idle())


class IdleRows:
    """A few rows that no decode has at the moment, so that what is allocated and captured serves again."""

    def __init__(self, make: MakeRows, device: Device) -> None:
        self._make = make
        self._device = device
        self._idle: list[DeviceRows] = []
        self._lock = threading.Lock()

    @contextlib.contextmanager
    def taken(self, capacity: Capacity, size: int) -> Iterator[DeviceRows]:
        """Rows of a capacity of `size` bytes, for one decode. Raises CapacityError."""
        rows = self._take(capacity) or self._allocate(capacity, size)
        try:
            yield rows
        except GeneratorExit:  # nobody wants more of them
            self._give_back(rows)
            raise
        except BaseException as error:  # their state is unknown
            rows.release()
            if isinstance(error, Exception) and is_out_of_memory(error):
                raise _no_memory(capacity, size, capacity.rows // 2, self._device) from None
            raise
        else:
            self._give_back(rows)

    def _take(self, capacity: Capacity) -> DeviceRows | None:
        with self._lock:
            found = next((rows for rows in self._idle if rows.capacity == capacity), None)
            if found is not None:
                self._idle.remove(found)
            return found

    def _give_back(self, rows: DeviceRows) -> None:
        if rows.spoilt:
            rows.release()
            return
        with self._lock:
            self._idle.append(rows)
            if len(self._idle) > MOST_IDLE:
                self._idle.pop(0).release()

    def _allocate(self, capacity: Capacity, size: int) -> DeviceRows:
        """New rows, in the place of idle ones if there is no other room. What was tried in vain is given back."""
        try:
            return self._make(capacity)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
        self._drop_idle()
        fitting = capacity.rows
        while fitting and not self._fits(replace(capacity, rows=fitting)):
            fitting //= 2
        if fitting == capacity.rows:
            return self._make(capacity)
        raise _no_memory(capacity, size, fitting, self._device)

    def _drop_idle(self) -> None:
        with self._lock:
            for rows in self._idle:
                rows.release()
            self._idle.clear()

    def _fits(self, capacity: Capacity) -> bool:
        try:
            self._make(capacity).release()
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            return False
        return True


def _no_memory(capacity: Capacity, size: int, fitting: int, device: Device) -> CapacityError:
    return CapacityError(
        f"There is no memory on {device} for {capacity.rows} rows of {capacity.target} target and {capacity.source} "
        f"source positions, {size:,} bytes",
        expected=f"at most {fitting} rows",
        remedy="Plan fewer `rows` or fewer `max_new_tokens`, or free memory of the device.",
        option="rows",
    )


def zeros(spec: TensorSpec, capacity: Capacity, device: Device) -> ort.OrtValue:
    """A buffer of zeros on the device. What nobody has written must be finite."""
    shape = spec.shape(capacity.sizes)
    value = ort.OrtValue.ortvalue_from_shape_and_type(shape, ONNX_TYPES[spec.dtype], device.kind, device.index)
    value.update_inplace(_host_zeros(spec, shape))
    return value


def _host_zeros(spec: TensorSpec, shape: tuple[int, ...]) -> NDArray[Any] | ort.OrtValue:
    if spec.dtype != "bfloat16":
        return np.zeros(shape, spec.dtype)
    bits = np.zeros(shape, np.uint16)  # numpy has no bfloat16
    return ort.OrtValue.ortvalue_from_numpy_with_onnx_type(bits, ONNX_TYPES["bfloat16"])


def _run_options(graph_id: int) -> ort.RunOptions:
    """The options of a run whose end the host does not wait for."""
    options = ort.RunOptions()
    options.add_run_config_entry("gpu_graph_id", str(graph_id))
    options.add_run_config_entry("disable_synchronize_execution_providers", "1")
    return options
