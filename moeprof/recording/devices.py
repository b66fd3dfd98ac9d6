"""Device meters: utilization, memory, power, energy and PCIe bytes of the visible GPUs.

A machine without a GPU gets a meter without devices, so that callers need no special case. Leaves
out temperatures, clocks and per-process figures, and everything that torch itself can tell.
"""

from __future__ import annotations

import functools
import logging
import os
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

logger = logging.getLogger(__name__)
logger.addHandler(logging.NullHandler())

POLL_INTERVAL_S = 0.02
"""Time between readings of counters that wrap."""

_MILLI = 1e-3
_PCIE_FIELDS = {
    "pcie_tx_bytes": "NVML_FI_DEV_PCIE_COUNT_TX_BYTES",
    "pcie_rx_bytes": "NVML_FI_DEV_PCIE_COUNT_RX_BYTES",
}
_LANE_BYTES_PER_S = {1: 0.25e9, 2: 0.5e9, 3: 0.985e9, 4: 1.97e9, 5: 3.94e9, 6: 7.57e9}
_FASTEST_LINK = 16 * 3.94e9
_UNSUPPORTED = (
    "NVML_ERROR_NOT_SUPPORTED",
    "NVML_ERROR_NO_PERMISSION",
    "NVML_ERROR_FUNCTION_NOT_FOUND",
    "NVML_ERROR_DEPRECATED",
)
_REASONS = {
    "NVML_ERROR_LIBRARY_NOT_FOUND": "the NVIDIA management library is not installed",
    "NVML_ERROR_DRIVER_NOT_LOADED": "the NVIDIA driver is not loaded",
    "NVML_ERROR_LIB_RM_VERSION_MISMATCH": "the NVIDIA driver and its library differ in version",
    "NVML_ERROR_NO_PERMISSION": "no permission to talk to the NVIDIA driver",
    "NVML_ERROR_GPU_IS_LOST": "the GPU has fallen off the bus",
    "NVML_ERROR_RESET_REQUIRED": "the GPU must be reset",
    "NVML_ERROR_NOT_FOUND": "no such GPU",
}


class MeterError(Exception):
    """A device that did not answer; the message says why.

    Args:
        message: Why, in words.
        unsupported: True where asking again can never help.
    """

    def __init__(self, message: str, *, unsupported: bool = False) -> None:
        super().__init__(message)
        self.unsupported = unsupported


@dataclass(frozen=True, kw_only=True)
class Device:
    """One visible device.

    Attributes:
        index: Ordinal among the visible devices, as CUDA counts them.
        name: Product name.
        uuid: Identifier that does not depend on the order of devices.
        memory_bytes: Total memory; None where the driver does not say.
    """

    index: int
    name: str
    uuid: str
    memory_bytes: int | None = None


@dataclass(frozen=True, kw_only=True)
class DeviceSample:
    """One reading of one device; None where the device does not say.

    Attributes:
        device: Ordinal among the visible devices.
        utilization_pct: Share of the driver's last window in which a kernel ran.
        memory_used_bytes: Memory in use, all processes.
        power_w: Board power.
        energy_j: Energy counter since the driver was loaded.
        pcie_tx_bytes: Bytes the device sent since the first reading, protocol overhead included.
        pcie_rx_bytes: Bytes the device received since the first reading, likewise.
    """

    device: int
    utilization_pct: float | None = None
    memory_used_bytes: int | None = None
    power_w: float | None = None
    energy_j: float | None = None
    pcie_tx_bytes: int | None = None
    pcie_rx_bytes: int | None = None

    @property
    def empty(self) -> bool:
        """True when the device answered nothing."""
        return all(value is None for name, value in asdict(self).items() if name != "device")


class DeviceMeter(Protocol):
    """Reads the visible devices; never raises once it is open."""

    @property
    def devices(self) -> tuple[Device, ...]:
        """The visible devices."""

    @property
    def reason(self) -> str:
        """Why there are no devices; empty when there are some."""

    @property
    def driver(self) -> str | None:
        """Version of the driver."""

    @property
    def num_errors(self) -> int:
        """Readings that failed although the device supports them."""

    @property
    def last_error(self) -> str:
        """Why the last of them failed."""

    def poll(self) -> None:
        """Reads the counters that wrap, so that no wrap is missed."""

    def sample(self) -> list[DeviceSample]:
        """Returns one reading per device that answered."""

    def close(self) -> None:
        """Lets go of the driver; later readings are empty."""


class NullMeter:
    """The meter of a machine without a device.

    Args:
        reason: Why there is none.
    """

    def __init__(self, reason: str) -> None:
        self.reason = reason
        self.devices: tuple[Device, ...] = ()
        self.driver: str | None = None
        self.num_errors = 0
        self.last_error = ""

    def poll(self) -> None:
        """Does nothing: there is no counter."""

    def sample(self) -> list[DeviceSample]:
        """Returns nothing: there is no device."""
        return []

    def close(self) -> None:
        """Does nothing: there is no driver to let go of."""


class NvmlMeter:
    """Reads NVIDIA GPUs through NVML.

    Args:
        nvml: The module `pynvml` of nvidia-ml-py.
        uuids: Devices to read, in the order of their ordinals; None reads those that
            CUDA_VISIBLE_DEVICES leaves visible.

    Raises:
        MeterError: The driver is absent or does not answer.
    """

    reason = ""

    def __init__(self, nvml: Any, *, uuids: Sequence[str] | None = None) -> None:
        self._nvml = nvml
        self.num_errors = 0
        self.last_error = ""
        self.driver: str | None = None
        self._open = False
        self._unsupported: set[tuple[int, str]] = set()
        self._counters: dict[tuple[int, str], _Counter] = {}
        self._ask(nvml.nvmlInit)
        self._open = True
        try:
            self.driver = _text(self._ask(nvml.nvmlSystemGetDriverVersion))
            self._handles = self._find(uuids)
            self.devices = tuple(self._identify(i, h) for i, h in enumerate(self._handles))
        except MeterError:
            self.close()
            raise

    def poll(self) -> None:
        """Reads the counters that wrap, so that no wrap is missed.

        The PCIe counters of current GPUs have 32 bits: at full speed they wrap every 70 ms. Bytes
        are null from the moment that two readings were further apart than a wrap can be.
        """
        if self._open:
            for index, handle in enumerate(self._handles):
                self._pcie(index, handle)

    def sample(self) -> list[DeviceSample]:
        """Returns one reading per device that answered."""
        if not self._open:
            return []
        samples = (self._sample(index, handle) for index, handle in enumerate(self._handles))
        return [sample for sample in samples if not sample.empty]

    def close(self) -> None:
        """Lets go of the driver; later readings are empty. Idempotent."""
        if not self._open:
            return
        self._open = False
        try:
            self._ask(self._nvml.nvmlShutdown)
        except MeterError as error:
            logger.debug("closing the device meter: %s", error)

    def _ask(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Returns what NVML answers, with its errors mapped to `MeterError`."""
        try:
            return function(*arguments)
        except self._nvml.NVMLError as error:
            code = getattr(error, "value", None)
            raise self._error(code, str(error)) from error

    def _error(self, code: int | None, text: str) -> MeterError:
        unsupported = code in {getattr(self._nvml, name, None) for name in _UNSUPPORTED}
        for name, reason in _REASONS.items():
            if code is not None and code == getattr(self._nvml, name, None):
                return MeterError(reason, unsupported=unsupported)
        return MeterError(f"the NVIDIA driver says: {text}", unsupported=unsupported)

    def _find(self, uuids: Sequence[str] | None) -> list[Any]:
        nvml = self._nvml
        by_index = [
            self._ask(nvml.nvmlDeviceGetHandleByIndex, i)
            for i in range(self._ask(nvml.nvmlDeviceGetCount))
        ]
        if uuids is not None:
            return [self._ask(nvml.nvmlDeviceGetHandleByUUID, uuid) for uuid in uuids]
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        if visible is None:
            return by_index
        known = [_text(self._ask(nvml.nvmlDeviceGetUUID, handle)) for handle in by_index]
        handles = []
        for entry in visible_devices(visible, known):
            handle = by_index[known.index(entry)] if entry in known else None
            handles.append(handle or self._ask(nvml.nvmlDeviceGetHandleByUUID, entry))
        return handles

    def _identify(self, index: int, handle: Any) -> Device:
        memory = self._read(index, "memory", lambda: self._memory(handle).total)
        return Device(
            index=index,
            name=_text(self._ask(self._nvml.nvmlDeviceGetName, handle)),
            uuid=_text(self._ask(self._nvml.nvmlDeviceGetUUID, handle)),
            memory_bytes=None if memory is None else int(memory),
        )

    def _memory(self, handle: Any) -> Any:
        return self._ask(self._nvml.nvmlDeviceGetMemoryInfo, handle)

    def _read(self, index: int, field: str, read: Callable[[], Any]) -> Any:
        """Returns one reading, or None; what is not supported is asked for once only."""
        if (index, field) in self._unsupported:
            return None
        try:
            return read()
        except MeterError as error:
            if error.unsupported:
                self._unsupported.add((index, field))
            else:
                self.num_errors += 1
                self.last_error = str(error)
            return None

    def _sample(self, index: int, handle: Any) -> DeviceSample:
        nvml, ask = self._nvml, self._ask
        used = self._read(index, "memory", lambda: self._memory(handle).used)
        utilization = self._read(
            index, "utilization", lambda: ask(nvml.nvmlDeviceGetUtilizationRates, handle).gpu
        )
        power_mw = self._read(index, "power", lambda: ask(nvml.nvmlDeviceGetPowerUsage, handle))
        energy_mj = self._read(
            index, "energy", lambda: ask(nvml.nvmlDeviceGetTotalEnergyConsumption, handle)
        )
        return DeviceSample(
            device=index,
            utilization_pct=None if utilization is None else float(utilization),
            memory_used_bytes=None if used is None else int(used),
            power_w=None if power_mw is None else power_mw * _MILLI,
            energy_j=None if energy_mj is None else energy_mj * _MILLI,
            **self._pcie(index, handle),
        )

    def _pcie(self, index: int, handle: Any) -> dict[str, int | None]:
        """Returns the bytes counted since the first reading, by direction."""
        answers = self._read(index, "pcie", lambda: self._pcie_answers(handle))
        if answers is None:
            return {}
        now_s = time.perf_counter()
        totals: dict[str, int | None] = {}
        for name, answer in zip(_PCIE_FIELDS, answers, strict=True):
            reading = self._read(index, name, functools.partial(self._counter_value, answer))
            if reading is not None:
                value, bits = reading
                key = (index, name)
                if key not in self._counters:
                    rate = self._read(index, "link", lambda: self._link_bytes_per_s(handle))
                    self._counters[key] = _Counter(value, bits, now_s, rate or _FASTEST_LINK)
                totals[name] = self._counters[key].advance(value, now_s)
        return totals

    def _pcie_answers(self, handle: Any) -> list[Any]:
        ids = [getattr(self._nvml, field, None) for field in _PCIE_FIELDS.values()]
        if None in ids:
            raise MeterError("this nvidia-ml-py has no PCIe counters", unsupported=True)
        return list(self._ask(self._nvml.nvmlDeviceGetFieldValues, handle, ids))

    def _counter_value(self, answer: Any) -> tuple[int, int]:
        """Returns a counter's value and its number of bits."""
        nvml = self._nvml
        if answer.nvmlReturn != nvml.NVML_SUCCESS:
            raise self._error(answer.nvmlReturn, f"error {answer.nvmlReturn} for a PCIe counter")
        members = {
            nvml.NVML_VALUE_TYPE_UNSIGNED_INT: ("uiVal", 32),
            nvml.NVML_VALUE_TYPE_UNSIGNED_LONG: ("ulVal", 64),
            nvml.NVML_VALUE_TYPE_UNSIGNED_LONG_LONG: ("ullVal", 64),
        }
        if answer.valueType not in members:
            raise MeterError("a PCIe counter has an unknown type", unsupported=True)
        member, bits = members[answer.valueType]
        return int(getattr(answer.value, member)), bits

    def _link_bytes_per_s(self, handle: Any) -> float:
        """Returns the most bytes the PCIe link can carry per second in one direction."""
        generation = self._ask(self._nvml.nvmlDeviceGetMaxPcieLinkGeneration, handle)
        lanes = self._ask(self._nvml.nvmlDeviceGetMaxPcieLinkWidth, handle)
        rate = _LANE_BYTES_PER_S.get(generation)
        if rate is None or not lanes:
            raise MeterError("unknown PCIe generation", unsupported=True)
        return rate * int(lanes)


class _Counter:
    """A hardware counter of few bits turned into a count since its first reading."""

    def __init__(self, value: int, bits: int, now_s: float, rate_per_s: float) -> None:
        self._last = value
        self._last_s = now_s
        self._modulus = 1 << bits
        self._max_gap_s = self._modulus / rate_per_s
        self._total: int | None = 0

    def advance(self, value: int, now_s: float) -> int | None:
        """Returns the count up to ``value``; None once a wrap may have been missed."""
        if now_s - self._last_s >= self._max_gap_s:
            self._total = None
        if self._total is not None:
            self._total += (value - self._last) % self._modulus
        self._last, self._last_s = value, now_s
        return self._total


def visible_devices(setting: str, uuids: Sequence[str]) -> list[str]:
    """Returns the UUIDs that CUDA_VISIBLE_DEVICES leaves visible, in CUDA's order.

    As in CUDA, the first entry that names no device ends the list, and a UUID may be shortened as
    long as it stays unique.

    Args:
        setting: The variable's value: ordinals or UUIDs, separated by commas.
        uuids: All devices in PCI bus order.
    """
    visible: list[str] = []
    for entry in (part.strip() for part in setting.split(",")):
        if entry.isdecimal():
            found = [uuids[int(entry)]] if int(entry) < len(uuids) else []
        elif entry.startswith("MIG-"):
            found = [entry]
        else:
            found = [uuid for uuid in uuids if entry.startswith("GPU-") and uuid.startswith(entry)]
        if len(found) != 1 or found[0] in visible:
            break
        visible.extend(found)
    return visible


def open_meter(*, uuids: Sequence[str] | None = None) -> DeviceMeter:
    """Returns a meter for the visible GPUs, or one without devices that says why.

    Args:
        uuids: Devices to read, in the order of their ordinals; None follows
            CUDA_VISIBLE_DEVICES.
    """
    try:
        import pynvml
    except ImportError:
        return NullMeter("the package nvidia-ml-py is not installed")
    if not hasattr(pynvml, "_nvmlGetFunctionPointer"):
        return NullMeter("another package named pynvml hides nvidia-ml-py")
    try:
        meter = NvmlMeter(pynvml, uuids=uuids)
    except MeterError as error:
        return NullMeter(str(error))
    if not meter.devices:
        meter.close()
        return NullMeter("no GPU is visible")
    return meter


class DeviceSampler:
    """Samples a meter from a thread of its own into rows of the table `devices`.

    Between samples it polls the counters that wrap. The host program never sees an error from it:
    readings that failed are counted by the meter.

    Args:
        meter: What to read.
        interval_s: Time between samples.
        t0: Reading of `time.perf_counter` that stands for 0 seconds.
        rank: Process rank.
    """

    def __init__(
        self, meter: DeviceMeter, *, interval_s: float = 0.1, t0: float, rank: int = 0
    ) -> None:
        self._meter = meter
        self._interval_s = interval_s
        self._t0 = t0
        self._rank = rank
        self._rows: list[dict[str, Any]] = []
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    @property
    def meter(self) -> DeviceMeter:
        """The meter that is read."""
        return self._meter

    @property
    def rows(self) -> list[dict[str, Any]]:
        """A copy of the rows sampled and not yet drained."""
        with self._lock:
            return list(self._rows)

    def start(self) -> None:
        """Takes a first sample and goes on in the background."""
        assert self._thread is None, "a sampler starts once"
        self.sample()
        if not self._meter.devices:
            return
        self._thread = threading.Thread(target=self._run, name="moeprof-devices", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Ends the background thread and takes a last sample. Idempotent."""
        if self._stop.is_set():
            return
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
        self.sample()

    def drain(self) -> list[dict[str, Any]]:
        """Returns the rows sampled since the last call and forgets them."""
        with self._lock:
            rows, self._rows = self._rows, []
        return rows

    def sample(self) -> None:
        """Takes one sample now."""
        time_s = time.perf_counter() - self._t0
        rows = [
            {"rank": self._rank, "time_s": time_s, **asdict(sample)}
            for sample in self._meter.sample()
        ]
        with self._lock:
            self._rows.extend(rows)

    def _run(self) -> None:
        due_s = time.perf_counter() + self._interval_s
        while not self._stop.wait(min(POLL_INTERVAL_S, self._interval_s)):
            if time.perf_counter() < due_s:
                self._meter.poll()
                continue
            self.sample()
            due_s = time.perf_counter() + self._interval_s


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)
