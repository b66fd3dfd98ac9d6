from __future__ import annotations

import builtins
import sys
import time
from types import SimpleNamespace
from unittest import mock

import pynvml
import pytest

from moeprof.recording import devices, hardware
from moeprof.recording.devices import DeviceSampler, NullMeter, open_meter
from moeprof.trace import schema

UUIDS = ["GPU-aaaa-1", "GPU-aabb-2", "GPU-cccc-3"]


def field_value(value: int, *, kind: int = pynvml.NVML_VALUE_TYPE_UNSIGNED_LONG_LONG, ret: int = 0):
    answer = pynvml.c_nvmlFieldValue_t()
    answer.nvmlReturn = ret
    answer.valueType = kind
    if kind == pynvml.NVML_VALUE_TYPE_UNSIGNED_INT:
        answer.value.uiVal = value
    else:
        answer.value.ullVal = value
    return answer


class FakeDriver:
    """What the mocked NVML answers; tests change it while a meter is open."""

    def __init__(self) -> None:
        self.energy_mj: object = 5_000
        self.tx: object = field_value(1_000)
        self.rx: object = field_value(2_000)
        self.utilization: object = 37

    def answer(self, value: object) -> object:
        if isinstance(value, Exception):
            raise value
        return value

    def fields(self, _handle: str, ids: list[int]) -> list[object]:
        values = {
            pynvml.NVML_FI_DEV_PCIE_COUNT_TX_BYTES: self.tx,
            pynvml.NVML_FI_DEV_PCIE_COUNT_RX_BYTES: self.rx,
        }
        return [self.answer(values[i]) for i in ids]


@pytest.fixture
def driver() -> FakeDriver:
    return FakeDriver()


@pytest.fixture
def nvml(driver, monkeypatch):
    """The module pynvml with every function replaced, constants and errors kept."""
    fake = mock.create_autospec(pynvml)
    for name, value in vars(pynvml).items():
        if name.startswith("NVML_") or name.startswith("NVMLError"):
            setattr(fake, name, value)
    fake.nvmlDeviceGetCount.return_value = len(UUIDS)
    fake.nvmlDeviceGetHandleByIndex.side_effect = lambda i: f"handle-{UUIDS[i]}"
    fake.nvmlDeviceGetHandleByUUID.side_effect = lambda uuid: f"handle-{uuid}"
    fake.nvmlDeviceGetUUID.side_effect = lambda handle: handle.removeprefix("handle-")
    fake.nvmlDeviceGetName.return_value = b"Test GPU"
    fake.nvmlSystemGetDriverVersion.return_value = "999.1"
    fake.nvmlDeviceGetMemoryInfo.return_value = SimpleNamespace(total=1 << 30, used=1 << 20)
    fake.nvmlDeviceGetUtilizationRates.side_effect = lambda _: SimpleNamespace(
        gpu=driver.answer(driver.utilization), memory=1
    )
    fake.nvmlDeviceGetPowerUsage.return_value = 250_500
    fake.nvmlDeviceGetTotalEnergyConsumption.side_effect = lambda _: driver.answer(driver.energy_mj)
    fake.nvmlDeviceGetFieldValues.side_effect = driver.fields
    fake.nvmlDeviceGetMaxPcieLinkGeneration.return_value = 5
    fake.nvmlDeviceGetMaxPcieLinkWidth.return_value = 16
    monkeypatch.setitem(sys.modules, "pynvml", fake)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return fake


def test_units_are_joules_watts_and_bytes(nvml, driver):
    meter = open_meter()
    assert [d.uuid for d in meter.devices] == UUIDS
    assert meter.devices[0].name == "Test GPU"
    assert meter.devices[0].memory_bytes == 1 << 30
    assert meter.driver == "999.1"
    sample = meter.sample()[0]
    assert sample.energy_j == pytest.approx(5.0)
    assert sample.power_w == pytest.approx(250.5)
    assert sample.utilization_pct == 37
    assert sample.memory_used_bytes == 1 << 20


class FakeTime:
    """A clock that tests move."""

    now_s = 0.0

    def perf_counter(self) -> float:
        return self.now_s


@pytest.fixture
def clock(monkeypatch) -> FakeTime:
    fake = FakeTime()
    monkeypatch.setattr(devices, "time", fake)
    return fake


def test_pcie_bytes_count_from_the_first_reading(nvml, driver):
    meter = open_meter()
    assert meter.sample()[0].pcie_tx_bytes == 0
    driver.tx = field_value(1_700)
    meter.poll()
    driver.tx = field_value(1_701)
    assert meter.sample()[0].pcie_tx_bytes == 701


def test_a_counter_of_32_bits_survives_wraps_while_it_is_polled(nvml, driver, clock):
    # At 63 GB/s, the most this link can carry, it wraps every 68 ms.
    meter = open_meter(uuids=UUIDS[:1])
    sent = 0
    for _ in range(200):
        driver.rx = field_value(sent % 2**32, kind=pynvml.NVML_VALUE_TYPE_UNSIGNED_INT)
        meter.poll()
        clock.now_s += 0.06
        sent += int(0.06 * 63e9)
    driver.rx = field_value(sent % 2**32, kind=pynvml.NVML_VALUE_TYPE_UNSIGNED_INT)
    assert sent > 100 * 2**32
    assert meter.sample()[0].pcie_rx_bytes == sent


def test_bytes_are_null_once_a_wrap_may_have_been_missed(nvml, driver, clock):
    driver.rx = field_value(7, kind=pynvml.NVML_VALUE_TYPE_UNSIGNED_INT)
    meter = open_meter(uuids=UUIDS[:1])
    meter.poll()
    clock.now_s += 0.07
    assert meter.sample()[0].pcie_rx_bytes is None
    assert meter.sample()[0].pcie_rx_bytes is None
    # 64 bits do not wrap.
    assert meter.sample()[0].pcie_tx_bytes == 0


def test_a_slower_link_may_be_read_less_often(nvml, driver, clock):
    nvml.nvmlDeviceGetMaxPcieLinkGeneration.return_value = 3
    driver.rx = field_value(7, kind=pynvml.NVML_VALUE_TYPE_UNSIGNED_INT)
    meter = open_meter(uuids=UUIDS[:1])
    meter.poll()
    clock.now_s += 0.2
    assert meter.sample()[0].pcie_rx_bytes == 0


def test_a_missing_energy_counter_is_null_and_asked_for_once(nvml, driver):
    driver.energy_mj = pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)
    driver.tx = field_value(0, ret=pynvml.NVML_ERROR_NOT_SUPPORTED)
    meter = open_meter(uuids=UUIDS[:1])
    for _ in range(3):
        (sample,) = meter.sample()
        assert sample.energy_j is None
        assert sample.pcie_tx_bytes is None
        assert sample.pcie_rx_bytes == 0
        assert sample.power_w == pytest.approx(250.5)
    assert meter.num_errors == 0
    assert nvml.nvmlDeviceGetTotalEnergyConsumption.call_count == 1


def test_an_error_in_mid_run_is_counted_and_the_next_sample_is_whole(nvml, driver):
    meter = open_meter(uuids=UUIDS[:1])
    driver.utilization = pynvml.NVMLError(pynvml.NVML_ERROR_GPU_IS_LOST)
    (sample,) = meter.sample()
    assert sample.utilization_pct is None
    assert sample.energy_j == pytest.approx(5.0)
    assert meter.num_errors == 1
    assert "fallen off the bus" in meter.last_error
    driver.utilization = 50
    assert meter.sample()[0].utilization_pct == 50
    assert meter.num_errors == 1


def test_a_device_that_answers_nothing_gives_no_row(nvml, driver):
    meter = open_meter(uuids=UUIDS[:1])
    lost = pynvml.NVMLError(pynvml.NVML_ERROR_GPU_IS_LOST)
    for function in (
        nvml.nvmlDeviceGetMemoryInfo,
        nvml.nvmlDeviceGetUtilizationRates,
        nvml.nvmlDeviceGetPowerUsage,
        nvml.nvmlDeviceGetTotalEnergyConsumption,
        nvml.nvmlDeviceGetFieldValues,
    ):
        function.side_effect = lost
    assert meter.sample() == []
    assert meter.num_errors == 5


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (pynvml.NVML_ERROR_LIBRARY_NOT_FOUND, "not installed"),
        (pynvml.NVML_ERROR_DRIVER_NOT_LOADED, "not loaded"),
        (pynvml.NVML_ERROR_UNKNOWN, "driver says"),
    ],
)
def test_without_a_driver_there_is_a_meter_without_devices(nvml, error, reason):
    nvml.nvmlInit.side_effect = pynvml.NVMLError(error)
    meter = open_meter()
    assert isinstance(meter, NullMeter)
    assert reason in meter.reason
    assert meter.sample() == []
    meter.close()


def test_without_the_package_there_is_a_meter_without_devices(monkeypatch):
    monkeypatch.delitem(sys.modules, "pynvml")
    real_import = builtins.__import__

    def no_pynvml(name, *args, **kwargs):
        if name == "pynvml":
            raise ImportError(name)
        return real_import(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", no_pynvml)
    assert "not installed" in open_meter().reason


def test_another_package_called_pynvml_is_refused(monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", SimpleNamespace(nvmlInit=lambda: None))
    assert "hides" in open_meter().reason


def test_a_driver_without_devices_gives_a_meter_without_devices(nvml, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    meter = open_meter()
    assert meter.reason == "no GPU is visible"
    assert nvml.nvmlShutdown.call_count == 1


@pytest.mark.parametrize(
    ("setting", "expected"),
    [
        ("0,2", [0, 2]),
        ("2,0", [2, 0]),
        (" 1 , 0", [1, 0]),
        ("1,7,0", [1]),
        ("-1", []),
        ("", []),
        ("0,-1,1", [0]),
        ("GPU-cccc", [2]),
        ("GPU-aa,GPU-cccc", []),
        ("GPU-aabb,0", [1, 0]),
        ("0,0", [0]),
        ("banana", []),
    ],
)
def test_visible_devices_follow_cuda(setting, expected):
    assert devices.visible_devices(setting, UUIDS) == [UUIDS[i] for i in expected]


def test_ordinals_follow_cuda_visible_devices(nvml, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,GPU-aaaa")
    meter = open_meter()
    assert [(d.index, d.uuid) for d in meter.devices] == [(0, UUIDS[2]), (1, UUIDS[0])]


def test_a_slice_of_a_device_is_found_by_its_own_identifier(nvml, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "MIG-1234")
    assert [d.uuid for d in open_meter().devices] == ["MIG-1234"]


def test_rows_are_those_of_the_devices_table(nvml):
    sampler = DeviceSampler(open_meter(), interval_s=60, t0=time.perf_counter(), rank=3)
    sampler.start()
    sampler.stop()
    rows = sampler.drain()
    assert len(rows) == 2 * len(UUIDS)
    assert {tuple(row) for row in rows} == {tuple(c.name for c in schema.DEVICES.columns)}
    assert {row["rank"] for row in rows} == {3}
    assert 0 <= rows[0]["time_s"] <= rows[-1]["time_s"] < 60
    assert sampler.drain() == []


def test_sampling_goes_on_through_errors_and_stops_when_told(nvml, driver):
    sampler = DeviceSampler(open_meter(uuids=UUIDS[:1]), interval_s=0.002, t0=0.0)
    sampler.start()
    driver.energy_mj = pynvml.NVMLError(pynvml.NVML_ERROR_UNKNOWN)
    deadline = time.perf_counter() + 20
    while sampler.meter.num_errors < 3 and time.perf_counter() < deadline:
        time.sleep(0.002)
    driver.energy_mj = 9_000
    sampler.stop()
    sampler.stop()
    rows = sampler.rows
    assert sampler.meter.num_errors >= 3
    assert rows[-1]["energy_j"] == pytest.approx(9.0)
    assert any(row["energy_j"] is None and row["power_w"] is not None for row in rows)


def test_a_sampler_without_devices_starts_no_thread():
    sampler = DeviceSampler(NullMeter("none"), t0=0.0)
    sampler.start()
    sampler.stop()
    assert sampler.rows == []


def test_closing_is_idempotent_and_ends_readings(nvml):
    meter = open_meter()
    meter.close()
    meter.close()
    assert meter.sample() == []
    assert nvml.nvmlShutdown.call_count == 1


def test_hardware_of_the_cpu_names_the_machine():
    info = hardware.hardware("cpu")
    assert info.device == "cpu"
    assert info.num_cpus >= 1
    assert info.host_memory_bytes > 2**20
    assert info.device_name is None


def test_versions_name_what_explains_a_trace():
    found = hardware.versions()
    assert {"moeprof", "python", "numpy", "pyarrow"} <= set(found)
    assert hardware.package_version("no-such-distribution") is None


@pytest.mark.gpu
def test_the_pcie_counter_of_a_real_gpu_counts_what_was_copied():
    import torch

    source = torch.empty(256 << 20, dtype=torch.uint8, pin_memory=True)
    target = source.cuda()
    torch.cuda.synchronize()
    sampler = DeviceSampler(open_meter(), t0=time.perf_counter())
    sampler.start()
    for _ in range(64):
        target.copy_(source)
    torch.cuda.synchronize()
    time.sleep(0.1)
    sampler.stop()
    received = sampler.rows[-1]["pcie_rx_bytes"]
    if received is None:
        pytest.skip("this GPU has no PCIe counters, or the machine is too busy to follow them")
    assert 1.0 < received / (64 * (256 << 20)) < 1.25


@pytest.mark.gpu
def test_hardware_of_a_real_gpu_has_a_driver():
    info = hardware.hardware("cuda:0")
    assert info.driver
    assert info.device_memory_bytes > 2**30
