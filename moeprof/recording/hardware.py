"""Facts about this machine and the installed packages, for `trace.json`.

Leaves out anything that changes while a program runs; that is what `devices` samples.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import sys
from pathlib import Path
from typing import Any

from moeprof.recording.devices import open_meter
from moeprof.trace.schema import Hardware

_PACKAGES = ("torch", "transformers", "numpy", "pyarrow")
_RECORDING_PACKAGES = ("torch", "transformers", "accelerate", "safetensors", "tokenizers")


def hardware(device: Any = "cpu") -> Hardware:
    """Returns what this machine is.

    Args:
        device: A torch device or its name; where the model runs.
    """
    kind, _, ordinal = str(device).partition(":")
    common: dict[str, Any] = {
        "device": kind,
        "cpu_name": cpu_name(),
        "num_cpus": num_cpus(),
        "host_memory_bytes": host_memory_bytes(),
    }
    if kind != "cuda":
        return Hardware(**common)
    import torch

    properties = torch.cuda.get_device_properties(int(ordinal or torch.cuda.current_device()))
    meter = open_meter()
    driver = meter.driver
    meter.close()
    return Hardware(
        **common,
        device_name=properties.name,
        device_memory_bytes=properties.total_memory,
        num_devices=torch.cuda.device_count(),
        driver=driver,
    )


def versions() -> dict[str, str]:
    """Returns the versions that explain a trace; a package that is not installed is left out."""
    from moeprof import __version__

    found = {"moeprof": __version__, "python": platform.python_version()}
    for name in _PACKAGES:
        version = package_version(name)
        if version is not None:
            found[name] = version
    torch: Any = sys.modules.get("torch")
    if torch is not None and torch.version.cuda is not None:
        found["cuda"] = torch.version.cuda
    return found


def capabilities() -> dict[str, Any]:
    """Returns what can be recorded on this machine."""
    missing = [name for name in _RECORDING_PACKAGES if package_version(name) is None]
    cuda_devices: list[str] = []
    if "torch" not in missing:
        import torch

        cuda_devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    meter = open_meter()
    samples = meter.sample()
    meter.close()

    def metered(name: str) -> bool:
        return any(getattr(sample, name) is not None for sample in samples)

    return {
        **versions(),
        "cpu": cpu_name(),
        "cpus": num_cpus(),
        "memory_bytes": host_memory_bytes(),
        "can_record": not missing,
        "missing": [f"{', '.join(missing)}: pip install 'moeprof[record]'"] if missing else [],
        "cuda_devices": cuda_devices,
        "gpu_meter": meter.reason or f"NVIDIA driver {meter.driver}",
        "utilization": metered("utilization_pct"),
        "device_memory": metered("memory_used_bytes"),
        "power": metered("power_w"),
        "energy_counter": metered("energy_j"),
        "pcie_counters": metered("pcie_rx_bytes"),
        "process_memory": package_version("psutil") is not None,
    }


def package_version(name: str) -> str | None:
    """Returns the version of an installed distribution, or None."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def cpu_name() -> str | None:
    """Returns the processor's product name, or None where the system does not say."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text(encoding="utf-8", errors="replace").splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name" and value.strip():
                return value.strip()
    return platform.processor() or platform.machine() or None


def num_cpus() -> int | None:
    """Returns the processors this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count()


def host_memory_bytes() -> int | None:
    """Returns the machine's main memory, or None where the system does not say."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):
        return None
