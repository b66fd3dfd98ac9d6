"""Predictions and measurements made up, as `moeprof verify` writes them: known errors and dates."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

QUIET_CORE_NOTE = (
    "steps are set aside before or after which the core of the dispatching thread was found slow"
)
CALIBRATED = "2026-01-01T00:00:00+00:00"
PREDICTED = "2026-01-02T00:00:00+00:00"
MEASURED = "2026-01-03T00:00:00+00:00"
GIB = 1 << 30
PERCENTILES = (50, 99)
CAPACITY_GIB = {"25%": 2, "50%": 4, None: 8}
NUM_STEPS, NUM_REPETITIONS = 40, 4


def settings_of(policies: Sequence[str] = ("lru", "min")) -> dict[str, int]:
    """Returns GiB on the device by name of the setting."""
    buffered = {
        f"{policy}:{capacity}": size
        for capacity, size in CAPACITY_GIB.items()
        if capacity
        for policy in policies
    }
    return {"unbuffered": CAPACITY_GIB[None], **buffered, "gating:dynamic": CAPACITY_GIB[None]}


def step_times(middle_ms: float, seed: int) -> list[list[float]]:
    """Returns [repetitions][steps]; the same steps every time, but for a hair."""
    generator = np.random.default_rng(seed)
    steps = middle_ms * np.exp(generator.normal(0, 0.1, NUM_STEPS))
    hair = np.exp(generator.normal(0, 0.001, (NUM_REPETITIONS, NUM_STEPS)))
    times: list[list[float]] = (steps * hair).tolist()
    return times


def predicted_file(
    folder: Path,
    trace: str,
    predicted_ms: Mapping[tuple[str, int], float],
    *,
    half_width: float = 0.1,
    date: str = PREDICTED,
    machine: str | None = None,
) -> Path:
    """Writes predictions: intervals of ``half_width`` each way, naive ones 2 and 3 times as high.

    Args:
        folder: Where.
        trace: Name.
        predicted_ms: By setting and percentile.
        half_width: As a share.
        date: Of the predictions.
        machine: That was calibrated, and ends the name of the file; an H100 that does not when
            None.
    """
    sizes = settings_of()
    rows = [
        {
            "setting": setting, "percentile": percentile, "predicted_ms": value,
            "low_ms": value * (1 - half_width), "high_ms": value * (1 + half_width),
            "naive_bandwidth_ms": 2 * value, "naive_mean_ms": 3 * value,
            "judged_hit_rate": 0.5 if ":" in setting else None, "copied_bytes_per_step": 1e6,
            "device_bytes": sizes[setting] * GIB, "figure_class": "estimate",
        }
        for (setting, percentile), value in predicted_ms.items()
    ]  # fmt: skip
    shape = {"d_model": 16, "d_ff": 8, "gated": True, "bias": False, "dtype": "float32"}
    content = {
        "kind": "moeprof predictions",
        "schema_version": 1,
        "options": {
            "stack": None, "shape": shape, "dtype": None, "phase": None, "max_steps": None,
            "repetitions": 5, "most_repetitions": 20, "seed": 0,
        },
        "settings": list(dict.fromkeys(row["setting"] for row in rows)),
        "rows": rows,
        "facts": {
            "trace": f"{trace}.moeprof", "model": f"model {trace}", "num_lookups": 10,
            "calibrated_on": machine or "H100", "calibrated": CALIBRATED, "shape": shape,
            "date": date,
        },
    }  # fmt: skip
    path = folder / f"predicted-{trace}{'' if machine is None else '-' + machine.lower()}.json"
    path.write_text(json.dumps(content))
    return path


def carried_file(
    predictions: Path,
    times: float,
    *,
    trials_on: str = "H100",
    is_unchanged: bool = False,
    date: str = PREDICTED,
) -> Path:
    """Writes predictions that were carried over: so many times as long as the machine's own.

    Args:
        predictions: The machine's own, from `predicted_file`; the file lies beside.
        times: Times as long.
        trials_on: Name of the other machine.
        is_unchanged: All of its calibration is the other's.
        date: Of the predictions.
    """
    made = json.loads(predictions.read_text())
    facts = made["facts"]
    facts |= {
        "carried_for": predictions.name, "judged_on": facts["calibrated_on"],
        "trials_on": trials_on, "trials_date": CALIBRATED, "date": date,
    }  # fmt: skip
    if is_unchanged:
        facts["calibrated_on"] = trials_on
    for row in made["rows"]:
        for name in ("predicted_ms", "low_ms", "high_ms"):
            row[name] *= times
    ends = "unchanged" if is_unchanged else "constants"
    name = predictions.stem.replace("predicted", "carried")
    path = predictions.with_name(f"{name}-{ends}.json")
    path.write_text(json.dumps(made))
    return path


def verified_file(
    predictions: Path,
    machine: str,
    times_ms: Mapping[str, Sequence[Sequence[float]] | None],
    *,
    date: str = MEASURED,
    part: str = "",
    probes_ms: Sequence[float] = (),
    set_aside: Mapping[str, Sequence[Sequence[int]]] | None = None,
) -> Path:
    """Writes measurements of predictions; None for a setting that did not fit.

    Args:
        predictions: From `predicted_file`; the file lies beside.
        machine: Name of the device.
        times_ms: By setting.
        date: Of the measurement.
        part: Ends the name of the file.
        probes_ms: Of the host before each repetition, which is then a visit.
        set_aside: Places of the steps that were set aside in each repetition, by setting, where the
            core was watched; of each step one is left.
    """
    aside = set_aside or {}
    made = json.loads(predictions.read_text())
    rows: list[dict[str, Any]] = []
    for row in made["rows"]:
        if row["setting"] not in times_ms:
            continue
        times = times_ms[row["setting"]]
        value = None
        if times is not None:
            kept = np.array(times, float)
            for own, places in zip(kept, aside.get(row["setting"], ()), strict=False):
                own[list(places)] = np.nan
            value = float(np.percentile(np.nanmedian(kept, axis=0), row["percentile"]))
        rows.append(
            {
                **row, "measured_ms": value, "measured_spread": None if times is None else 0.01,
                "repetitions": 0 if times is None else len(times),
                "error": None, "inside": None, "naive_bandwidth_error": None,
                "naive_mean_error": None,
            }
        )  # fmt: skip
    content = {
        "kind": "moeprof verification",
        "command": f"moeprof verify --predictions {predictions.name}",
        "date": date,
        "hardware": {
            "device": "cuda", "device_name": machine, "device_memory_bytes": 80 * GIB,
            "num_devices": 1, "driver": "1", "cpu_name": "made up", "num_cpus": 1,
            "host_memory_bytes": GIB,
        },
        "versions": {"torch": "2", "moeprof": "0"},
        "notes": [
            f"routing of {made['facts']['trace']}, random weights",
            *((QUIET_CORE_NOTE,) if set_aside is not None else ()),
        ],
        "findings": [], "metrics": [], "rows": rows,
        "step_times": {
            name: {
                "steps": list(range(NUM_STEPS)), "measured_ms": times,
                **({"set_aside": aside.get(name, [[]] * len(times))} if aside else {}),
                **({"visits": [
                    {"round": 1 + index, "begun_s": 1.0 * index, "probe_ms": probe,
                     "repetitions": 1}
                    for index, probe in enumerate(probes_ms)
                ]} if probes_ms else {}),
            }
            for name, times in times_ms.items()
            if times is not None
        },
    }  # fmt: skip
    name = predictions.stem.replace("predicted", "verified")
    path = predictions.with_name(f"{name}-{machine.lower()}{part}.json")
    path.write_text(json.dumps(content))
    return path


def made_up(
    folder: Path,
    *,
    traces: Sequence[str] = ("a", "b", "c"),
    machines: Sequence[str] = ("H100", "H200"),
    off: float = 1.0,
) -> tuple[list[Path], list[Path]]:
    """Writes predictions and measurements of several traces.

    Args:
        folder: Where.
        traces: Names.
        machines: Names.
        off: Predicted over measured on the first machine, give or take a percent.

    Returns:
        Files of measurements, and of predictions.
    """
    verified, predicted = [], []
    for number, trace in enumerate(traces):
        names = list(settings_of())
        middle = {name: 10.0 + 3 * index for index, name in enumerate(names)}
        times = {name: step_times(middle[name], index) for index, name in enumerate(names)}
        hair = np.random.default_rng(number)
        said = {
            (name, each): float(np.percentile(times[name], each)) * off * (1 + hair.normal(0, 0.01))
            for name in names
            for each in PERCENTILES
        }
        made = predicted_file(folder, trace, said)
        predicted.append(made)
        verified += [verified_file(made, machine, times) for machine in machines]
    return verified, predicted
