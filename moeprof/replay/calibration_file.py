"""What one machine was measured to do, as a file that predictions are made from.

Every number has a spread, so that a prediction can say how sure it is. Leaves out measuring, which
needs the machine (`moeprof.live.calibrate`), and predicting (`cost_model`).
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from moeprof.errors import CalibrationError, UsageError
from moeprof.replay import json_values as checked
from moeprof.replay.calibration_sizes import CalibrationSizes, Regime
from moeprof.replay.json_files import write_json

# 3 has the fields of 2: what changed is that compiled code asks for a buffer's small dispatches, so
# that older files would predict a machine that is no more.
SCHEMA_VERSION = 3
KIND = "moeprof calibration"

Floats = NDArray[np.float64]

_LOW, _HIGH = 0.05, 0.95
_INTERQUARTILE_SIGMAS = 1.349
_MEDIAN_PENALTY = 1.2533
_HINT = "measure this machine again: moeprof calibrate -o FILE"


@dataclass(frozen=True, kw_only=True)
class Measured:
    """One constant; its unit is the suffix of the field that holds it.

    Attributes:
        median: Median of the repetitions.
        low: 5th percentile of them.
        high: 95th percentile.
        error: Relative standard error of the median: 1.2533 sigma / sqrt(n) / median, sigma from
            the distance of the quartiles, so that single outliers do not count.
        num_repetitions: Repetitions.
    """

    median: float
    low: float
    high: float
    error: float
    num_repetitions: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Measured:
        """Returns what repetitions say; at least one."""
        every = np.asarray(values, np.float64)
        median = float(np.median(every))
        low, high = np.quantile(every, (_LOW, _HIGH)).tolist()
        first, third = np.quantile(every, (0.25, 0.75)).tolist()
        sigma = (third - first) / _INTERQUARTILE_SIGMAS
        error = _MEDIAN_PENALTY * sigma / math.sqrt(len(every)) / median if median > 0 else 0.0
        return cls(median=median, low=low, high=high, error=error, num_repetitions=len(every))


@dataclass(frozen=True, kw_only=True)
class Curve:
    """A time that depends on a size: straight between the points that were measured.

    Below the smallest size it stays what it is there; above the largest it goes on as between the
    last two, or in proportion where there is one point only.

    Attributes:
        sizes: Ascending.
        times_s: One per size.
    """

    sizes: tuple[float, ...]
    times_s: tuple[Measured, ...]

    def at(self, sizes: ArrayLike) -> Floats:
        """Returns the times [...] in seconds for sizes [...]."""
        given = np.asarray(sizes, np.float64)
        return _straight(given, np.array(self.sizes), [one.median for one in self.times_s])

    @property
    def error(self) -> float:
        """Largest relative standard error of its points."""
        return max(one.error for one in self.times_s)


def _straight(given: Floats, sizes: Floats, times: Sequence[float] | Floats) -> Floats:
    """Returns times by straight lines between points; see `Curve`."""
    known = np.asarray(times, np.float64)
    if len(sizes) == 1:
        in_proportion: Floats = known[0] * np.maximum(given / sizes[0], 1.0)
        return in_proportion
    slope = max(0.0, (known[-1] - known[-2]) / (sizes[-1] - sizes[-2]))
    beyond = known[-1] + slope * (given - sizes[-1])
    found: Floats = np.where(given > sizes[-1], beyond, np.interp(given, sizes, known))
    return found


@dataclass(frozen=True, kw_only=True)
class ExpertTimes:
    """Time of one expert, by its bytes and the rows it is given.

    Attributes:
        expert_bytes: Sizes measured, ascending.
        by_rows: For each of them the time by rows.
    """

    expert_bytes: tuple[int, ...]
    by_rows: tuple[Curve, ...]

    def at(self, expert_bytes: int, rows: ArrayLike) -> Floats:
        """Returns the times [...] in seconds of an expert for rows [...]."""
        given = np.asarray(rows, np.float64)
        of_size = np.stack([curve.at(given) for curve in self.by_rows])
        if len(self.expert_bytes) == 1:
            only: Floats = of_size[0] * max(expert_bytes / self.expert_bytes[0], 1.0)
            return only
        sizes = np.array(self.expert_bytes, np.float64)
        above = int(np.clip(np.searchsorted(sizes, expert_bytes), 1, len(sizes) - 1))
        share = max(0.0, (expert_bytes - sizes[above - 1]) / (sizes[above] - sizes[above - 1]))
        grown: Floats = of_size[above] - of_size[above - 1]
        found: Floats = of_size[above - 1] + share * (
            grown if share <= 1 else np.maximum(grown, 0.0)
        )
        return found

    @property
    def error(self) -> float:
        """Largest relative standard error of its points."""
        return max(curve.error for curve in self.by_rows)


@dataclass(frozen=True, kw_only=True)
class DecisionTimes:
    """Host time in which a policy's state machine decides about a dispatch.

    Attributes:
        dispatch_s: Per dispatch.
        hit_s: Per lookup that hits.
        miss_s: Per lookup that misses.
        slot_s: Per miss and slot of the cache: some policies look through all residents.
        error: Relative error of the fit.
    """

    dispatch_s: float
    hit_s: float
    miss_s: float
    slot_s: float
    error: float

    def at(self, hits: ArrayLike, misses: ArrayLike, capacity: ArrayLike) -> Floats:
        """Returns the times [dispatches] in seconds."""
        missed = np.asarray(misses, np.float64)
        return (
            self.dispatch_s
            + self.hit_s * np.asarray(hits, np.float64)
            + missed * (self.miss_s + self.slot_s * np.asarray(capacity, np.float64))
        )


@dataclass(frozen=True, kw_only=True)
class GatingTimes:
    """Time of a gating kernel, as a sum of what it does; no part is negative.

    Attributes:
        host_dispatch_s: Host time per dispatch.
        host_expert_s: Host time per active expert.
        device_dispatch_s: Device time per dispatch.
        device_expert_s: Device time per active expert.
        weight_factor: Device time over weight bytes / copy rate.
        flops_factor: Device time over FLOPs / matrix rate.
        moved_factor: Device time over bytes of rows and masks / copy rate.
        waits: The host waits for the device in it.
        error: Relative error of the fit.
    """

    host_dispatch_s: float
    host_expert_s: float
    device_dispatch_s: float
    device_expert_s: float
    weight_factor: float
    flops_factor: float
    moved_factor: float
    waits: bool
    error: float


@dataclass(frozen=True, kw_only=True)
class StreamedTimes:
    """Times of dispatches of a few tokens that run in pieces (`moeprof.replay.cache.pieces`).

    Attributes:
        most_tokens: Larger dispatches run expert by expert.
        rows_at_once: Rows of an expert that its weights are read once for.
        known_s: From the start of a dispatch on an idle device until the host knows the active
            experts.
        late_s: From the device having come so far until then, on a busy device.
        piece_host: Host time to launch a piece, by its experts.
        slot_host_s: Host time besides where they lie in slots.
        load_host_s: Host time to ask for one copy, of several asked for together.
        piece_device: Device time of a piece, by the bytes of an expert and the times that weights
            of one are read (in place of rows).
        combine_host_s: Host time of what follows the experts.
        combine_device: Device time of it, by (token, slot) rows.
        rest_host_s: Host time of a dispatch besides, once the host knows; None where dispatches
            are asked for from Python, and all their time lies in the others.
    """

    most_tokens: int
    rows_at_once: int
    known_s: Measured
    late_s: Measured
    piece_host: Curve
    slot_host_s: Measured
    load_host_s: Measured
    piece_device: ExpertTimes
    combine_host_s: Measured
    combine_device: Curve
    rest_host_s: Measured | None = None


@dataclass(frozen=True, kw_only=True)
class Leftovers:
    """What trials leave over once they were fitted.

    Attributes:
        residuals: One per trial: log of measured over predicted, by a fit to all others.
        freedom: Degrees of freedom: trials less what was fitted to them.
        jitter: Factors of single steps around their trial, of all trials; median about 1. Those
            of a step's median over the repetitions of its trial.
    """

    residuals: tuple[float, ...]
    freedom: float
    jitter: tuple[float, ...]

    @property
    def spread(self) -> float:
        """Root mean square of the residuals."""
        return math.sqrt(math.fsum(one * one for one in self.residuals) / len(self.residuals))


@dataclass(frozen=True, kw_only=True)
class KernelCorrection:
    """What the trials of a gating kernel say.

    Attributes:
        log_factor: Log of measured over modelled.
        error: Standard error of it.
    """

    log_factor: float
    error: float


@dataclass(frozen=True, kw_only=True)
class Corrections:
    """What trials say about the constants (`moeprof.replay.corrections`).

    Attributes:
        parts: Kinds of work, as `moeprof.replay.pipeline.PARTS`.
        log_factors: [parts] logs of the factors by which their times are multiplied.
        covariance: [parts][parts] of their errors.
        buffering: What is left over where the host computes no experts, with a buffer or without;
            None without such trials.
        host: Where it does, likewise.
        kernels: By gating kernel; nothing else has one factor for all it does.
        gating: What is left over; None without trials of kernels.
    """

    parts: tuple[str, ...]
    log_factors: tuple[float, ...]
    covariance: tuple[tuple[float, ...], ...]
    buffering: Leftovers | None
    host: Leftovers | None = None
    kernels: Mapping[str, KernelCorrection] = field(default_factory=dict)
    gating: Leftovers | None = None


@dataclass(frozen=True, kw_only=True)
class Trial:
    """A run on the machine beside what the constants alone say: what a model leaves over.

    Attributes:
        kind: ``buffering`` or ``gating``.
        setting: Its name.
        routing: Where the routing came from.
        modelled_ms: [steps] by the constants, without correction.
        measured_ms: [repetitions][steps]; None where a time is set aside, as the core was slow.
    """

    kind: str
    setting: str
    routing: str
    modelled_ms: tuple[float, ...]
    measured_ms: tuple[tuple[float | None, ...], ...]

    def step_ms(self) -> Floats:
        """Returns [steps] the medians of the repetitions, without what is set aside."""
        found: Floats = np.nanmedian(np.array(self.measured_ms, np.float64), axis=0)
        return found

    def ratios(self) -> Floats:
        """Returns [steps] medians of the repetitions over what was modelled."""
        found: Floats = self.step_ms() / np.array(self.modelled_ms)
        return found


@dataclass(frozen=True, kw_only=True)
class TrialSource:
    """Whose trials a calibration has, where they are another machine's.

    Attributes:
        machine: Its name.
        date: When it was calibrated, ISO 8601.
    """

    machine: str
    date: str


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """What a machine was measured to do.

    Attributes:
        device: Device, processor, driver and memory, as in a trace.
        versions: Of packages.
        date: When, ISO 8601.
        command: What measured it.
        dtype: Of weights and rows.
        is_serial: The device has no queue of its own: it is the host.
        device_copy_bytes_per_s: Bytes read plus written by a large copy on the device.
        matrix_flops_per_s: Of a large matrix product.
        launch_host_s: Host time to launch a small kernel.
        launch_device_s: Device time of a small kernel among others.
        to_device: Copy of so many bytes from page-locked host memory to the device.
        device_expert: One expert on the device, its weights not in a device cache.
        host_expert: One expert on the host, likewise.
        expert_host_s: Host time to launch one expert.
        slot_host_s: Host time besides where it lies in a slot.
        load_host_s: Host time to ask for one copy.
        fetch_s: From asking for rows on the host to having them.
        return_host_s: Host time to send rows back.
        known_s: From the start of a dispatch on an idle device until the host knows the active
            experts.
        sort_device: Device part of that, by (token, slot) rows.
        combine_host_s: Host time of what follows the experts.
        combine_device: Device time of it, by (token, slot) rows.
        sync_s: Wait for an idle device.
        handover_s: From the end of a computation to the start of a copy that waits for it, and
            from the end of a copy to the start of a computation.
        foresee_s: Host time in which a dispatch learns, and says which experts are copied ahead;
            None where it was not measured.
        host_probes_ms: Times of a fixed piece of work on the host, taken all through the
            calibration: how steady its speed is. Empty where they were not taken.
        num_disturbed: Parts, and steps of trials, for which no core stayed quiet in any try: what
            was measured stands all the same. None where nobody looked.
        streamed: Dispatches that run in pieces; None where the machine cannot.
        decisions: By policy.
        gating: By kernel.
        all_to_all: Time of an exchange between ranks, by the bytes that each sends to the others;
            None where none was measured.
        exchange_ranks: Ranks that exchanged; None where none did.
        trials: Runs that say what the model leaves over.
        corrections: What they say together; None without.
        by_size: What those of buffers, and of none, say at each size, by the bytes of an expert;
            what a size does not tell is as in ``corrections``.
        trials_of: Where trials and what they say come from; None where from this machine.
        sizes: How large the things were that were measured; None in files from before they were
            kept.
    """

    device: Mapping[str, Any]
    versions: Mapping[str, str]
    date: str
    command: str
    dtype: str
    is_serial: bool
    device_copy_bytes_per_s: Measured
    matrix_flops_per_s: Measured
    launch_host_s: Measured
    launch_device_s: Measured
    to_device: Curve
    device_expert: ExpertTimes
    host_expert: ExpertTimes
    expert_host_s: Measured
    slot_host_s: Measured
    load_host_s: Measured
    fetch_s: Measured
    return_host_s: Measured
    known_s: Measured
    sort_device: Curve
    combine_host_s: Measured
    combine_device: Curve
    sync_s: Measured
    handover_s: Measured
    foresee_s: Measured | None = None
    host_probes_ms: tuple[float, ...] = ()
    num_disturbed: int | None = None
    streamed: StreamedTimes | None = None
    decisions: Mapping[str, DecisionTimes] = field(default_factory=dict)
    gating: Mapping[str, GatingTimes] = field(default_factory=dict)
    all_to_all: Curve | None = None
    exchange_ranks: int | None = None
    trials: tuple[Trial, ...] = ()
    corrections: Corrections | None = None
    by_size: Mapping[int, Corrections] = field(default_factory=dict)
    trials_of: TrialSource | None = None
    sizes: CalibrationSizes | None = None

    @property
    def name(self) -> str:
        """The machine in a few words."""
        return str(self.device.get("device_name") or self.device.get("cpu_name") or "unknown")


_CONSTANTS = (
    "device_copy_bytes_per_s", "matrix_flops_per_s", "launch_host_s", "launch_device_s",
    "expert_host_s", "slot_host_s", "load_host_s", "fetch_s", "return_host_s", "known_s",
    "combine_host_s", "sync_s", "handover_s",
)  # fmt: skip
_CURVES = ("to_device", "sort_device", "combine_device")
_SURFACES = ("device_expert", "host_expert")
_TEXTS = ("date", "command", "dtype")
_TABLES = ("device", "versions")
# Symmetric but for what rounding leaves.
_ASYMMETRY = 1e-9


def write_calibration(
    calibration: Calibration, path: str | os.PathLike[str], *, force: bool = False
) -> Path:
    """Writes a calibration file.

    Raises:
        MoeprofError: The file exists.
    """
    content = {"kind": KIND, "schema_version": SCHEMA_VERSION, **asdict(calibration)}
    return write_json(content, path, force=force)


def read_calibration(path: str | os.PathLike[str]) -> Calibration:
    """Reads a calibration file.

    Raises:
        CalibrationError: It is missing, damaged, something else, or of another version.
    """
    source = Path(path)
    try:
        content = json.loads(source.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CalibrationError(f"there is no calibration file {source}", hint=_HINT) from None
    except (OSError, ValueError, RecursionError) as error:
        raise CalibrationError(
            f"{source} cannot be read as a calibration file: {error}", hint=_HINT
        ) from None
    if not isinstance(content, dict) or content.get("kind") != KIND:
        raise CalibrationError(f"{source} is no calibration file", hint=_HINT)
    version = content.get("schema_version")
    if version != SCHEMA_VERSION:
        raise CalibrationError(
            f"{source} has version {version}, this moeprof reads version {SCHEMA_VERSION}",
            hint=_HINT,
        )
    try:
        return _calibration(content)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        what = f"it lacks {error}" if isinstance(error, KeyError) else str(error)
        raise CalibrationError(f"{source} is damaged: {what}", hint=_HINT) from None


def _calibration(content: Mapping[str, Any]) -> Calibration:
    exchange, streamed, fitted = (
        content[name] for name in ("all_to_all", "streamed", "corrections")
    )
    parts: dict[str, Any] = {name: checked.text(content[name], name) for name in _TEXTS}
    parts |= {name: checked.table(content[name], name) for name in _TABLES}
    parts |= {name: _measured(content[name], name) for name in _CONSTANTS}
    parts |= {name: _curve(content[name], name) for name in _CURVES}
    parts |= {name: _surface(content[name], name) for name in _SURFACES}
    rates = [parts["device_copy_bytes_per_s"], parts["matrix_flops_per_s"]]
    if min(one.median for one in [*rates, *parts["to_device"].times_s]) <= 0:
        raise ValueError("a rate, or the time of a copy, is zero")
    # Files from before experts were copied ahead do not have it.
    # Nor have files from before one machine's trials served another.
    source = content.get("trials_of")
    return Calibration(
        **parts,
        is_serial=checked.flag(content["is_serial"], "is_serial"),
        foresee_s=_measured_or_none(content.get("foresee_s"), "foresee_s"),
        # Nor do files from before the host was probed have that.
        host_probes_ms=_numbers(
            content.get("host_probes_ms", []), "host_probes_ms", checked.positive
        ),
        # Nor those from before cores were watched.
        num_disturbed=_whole_or_none(content.get("num_disturbed"), "num_disturbed"),
        streamed=None if streamed is None else _streamed(streamed),
        decisions={
            name: _decision(one, f"decisions.{name}")
            for name, one in checked.table(content["decisions"], "decisions").items()
        },
        gating={
            name: _gating(one, f"gating.{name}")
            for name, one in checked.table(content["gating"], "gating").items()
        },
        all_to_all=None if exchange is None else _curve(exchange, "all_to_all"),
        # Files from before exchanges were measured do not have it.
        exchange_ranks=_whole_or_none(content.get("exchange_ranks"), "exchange_ranks", least=1),
        trials=tuple(
            _trial(one, f"trials[{index}]")
            for index, one in enumerate(checked.listed(content["trials"], "trials"))
        ),
        corrections=None if fitted is None else _corrections(fitted, "corrections"),
        by_size=_by_size(content["by_size"]),
        trials_of=None if source is None else _source(source),
        # Nor do files from before sizes were kept have them.
        sizes=None if content.get("sizes") is None else _sizes(content["sizes"]),
    )


def _only(content: Any, kind: type, what: str) -> Mapping[str, Any]:
    """Returns a table of the fields of a dataclass, and of no others."""
    known = {field.name for field in dataclasses.fields(kind)}
    unknown = sorted(set(checked.table(content, what)) - known)
    if unknown:
        raise ValueError(f"{what} has {unknown[0]}, which is not known")
    found: Mapping[str, Any] = content
    return found


def _numbers(
    values: Any, what: str, check: Callable[[Any, str], float] = checked.number
) -> tuple[float, ...]:
    return tuple(check(one, what) for one in checked.listed(values, what))


def _whole_or_none(value: Any, what: str, *, least: int = 0) -> int | None:
    return None if value is None else checked.whole(value, what, least=least)


def _measured(content: Any, what: str) -> Measured:
    given = _only(content, Measured, what)
    median, low, high, error = (
        checked.not_negative(given[name], f"{what}.{name}")
        for name in ("median", "low", "high", "error")
    )
    if low > high:
        raise ValueError(f"{what}.low is above {what}.high")
    count = checked.whole(given["num_repetitions"], f"{what}.num_repetitions")
    return Measured(median=median, low=low, high=high, error=error, num_repetitions=count)


def _measured_or_none(content: Any, what: str) -> Measured | None:
    return None if content is None else _measured(content, what)


def _decision(content: Any, what: str) -> DecisionTimes:
    given = _only(content, DecisionTimes, what)
    return DecisionTimes(
        **{
            field.name: checked.not_negative(given[field.name], f"{what}.{field.name}")
            for field in dataclasses.fields(DecisionTimes)
        }
    )


def _gating(content: Any, what: str) -> GatingTimes:
    given = _only(content, GatingTimes, what)
    times = {
        field.name: checked.not_negative(given[field.name], f"{what}.{field.name}")
        for field in dataclasses.fields(GatingTimes)
        if field.name != "waits"
    }
    return GatingTimes(**times, waits=checked.flag(given["waits"], f"{what}.waits"))


def _curve(content: Any, what: str) -> Curve:
    given = _only(content, Curve, what)
    sizes = _numbers(given["sizes"], f"{what}.sizes")
    times = tuple(
        _measured(one, f"{what}.times_s") for one in checked.listed(given["times_s"], what)
    )
    _check_ascending(sizes, len(times), what)
    return Curve(sizes=sizes, times_s=times)


def _surface(content: Any, what: str) -> ExpertTimes:
    given = _only(content, ExpertTimes, what)
    sizes = tuple(
        checked.whole(one, f"{what}.expert_bytes")
        for one in checked.listed(given["expert_bytes"], what)
    )
    curves = tuple(_curve(one, f"{what}.by_rows") for one in checked.listed(given["by_rows"], what))
    _check_ascending(sizes, len(curves), what)
    return ExpertTimes(expert_bytes=sizes, by_rows=curves)


def _check_ascending(sizes: Sequence[float], count: int, what: str) -> None:
    if not sizes or len(sizes) != count or any(np.diff(sizes) <= 0) or sizes[0] <= 0:
        raise ValueError(f"the sizes of {what} do not ascend, or do not match its times")


def _streamed(content: Any) -> StreamedTimes:
    given = _only(content, StreamedTimes, "streamed")
    constants = ("known_s", "late_s", "slot_host_s", "load_host_s", "combine_host_s")
    curves = ("piece_host", "combine_device")
    parts: dict[str, Any] = {name: _measured(given[name], f"streamed.{name}") for name in constants}
    parts |= {name: _curve(given[name], f"streamed.{name}") for name in curves}
    parts |= {
        name: checked.whole(given[name], f"streamed.{name}", least=1)
        for name in ("most_tokens", "rows_at_once")
    }
    return StreamedTimes(
        **parts,
        piece_device=_surface(given["piece_device"], "streamed.piece_device"),
        rest_host_s=_measured_or_none(given.get("rest_host_s"), "streamed.rest_host_s"),
    )


def _by_size(content: Any) -> dict[int, Corrections]:
    found = {}
    for size, one in checked.table(content, "by_size").items():
        if not size.isdecimal() or int(size) < 1:
            raise ValueError(f"a size of experts is not positive: {size!r}")
        found[int(size)] = _corrections(one, f"by_size.{size}")
    return found


def _corrections(content: Any, what: str) -> Corrections:
    given = _only(content, Corrections, what)
    parts = tuple(
        checked.text(one, f"{what}.parts")
        for one in checked.listed(given["parts"], f"{what}.parts")
    )
    factors = _numbers(given["log_factors"], f"{what}.log_factors")
    covariance = tuple(
        _numbers(own, f"{what}.covariance")
        for own in checked.listed(given["covariance"], f"{what}.covariance")
    )
    sizes = {len(covariance), *(len(own) for own in [factors, *covariance])}
    if sizes != {len(parts)} or not parts:
        raise ValueError(f"{what} do not match their parts")
    _check_covariance(np.array(covariance), f"{what}.covariance")
    left = {
        kind: None if given[kind] is None else _leftovers(given[kind], f"{what}.{kind}")
        for kind in ("buffering", "host", "gating")
    }
    kernels = checked.table(given["kernels"], f"{what}.kernels")
    return Corrections(
        parts=parts,
        log_factors=factors,
        covariance=covariance,
        kernels={name: _kernel(one, f"{what}.kernels.{name}") for name, one in kernels.items()},
        **left,
    )


def _check_covariance(covariance: Floats, what: str) -> None:
    """Raises ValueError where errors can have no such covariance."""
    if np.abs(covariance - covariance.T).max() > _ASYMMETRY * np.abs(covariance).max():
        raise ValueError(f"{what} is not symmetric")
    try:
        np.linalg.cholesky(covariance)
    except np.linalg.LinAlgError:
        raise ValueError(f"{what} is not positive definite") from None


def _kernel(content: Any, what: str) -> KernelCorrection:
    given = _only(content, KernelCorrection, what)
    return KernelCorrection(
        log_factor=checked.number(given["log_factor"], f"{what}.log_factor"),
        error=checked.not_negative(given["error"], f"{what}.error"),
    )


def _leftovers(content: Any, what: str) -> Leftovers:
    given = _only(content, Leftovers, what)
    residuals = _numbers(given["residuals"], f"{what}.residuals")
    jitter = _numbers(given["jitter"], f"{what}.jitter", checked.positive)
    freedom = checked.positive(given["freedom"], f"{what}.freedom")
    if not residuals or not jitter:
        raise ValueError(f"{what}: trials leave nothing over")
    return Leftovers(residuals=residuals, freedom=freedom, jitter=jitter)


def _trial(content: Any, what: str) -> Trial:
    given = _only(content, Trial, what)
    modelled = _numbers(given["modelled_ms"], f"{what}.modelled_ms", checked.positive)
    measured = tuple(
        tuple(
            None if x is None else checked.positive(x, f"{what}.measured_ms")
            for x in checked.listed(run, f"{what}.measured_ms")
        )
        for run in checked.listed(given["measured_ms"], f"{what}.measured_ms")
    )
    if not modelled or not measured or any(len(run) != len(modelled) for run in measured):
        raise ValueError(f"{what} has no steps, or not as many measured as modelled")
    if any(all(x is None for x in step) for step in zip(*measured, strict=True)):
        raise ValueError(f"{what} has a step whose times are all set aside")
    named = {
        name: checked.text(given[name], f"{what}.{name}") for name in ("kind", "setting", "routing")
    }
    return Trial(**named, modelled_ms=modelled, measured_ms=measured)


def _source(content: Any) -> TrialSource:
    given = _only(content, TrialSource, "trials_of")
    return TrialSource(
        machine=checked.text(given["machine"], "trials_of.machine"),
        date=checked.text(given["date"], "trials_of.date"),
    )


def _sizes(content: Any) -> CalibrationSizes:
    given = _only(content, CalibrationSizes, "sizes")
    lists = ("expert_bytes", "rows", "host_rows", "slots", "tokens", "pieces")
    counts = ("d_model", "num_experts", "top_k", "cold_bytes", "repeats", "trial_repetitions")
    every: dict[str, Any] = {name: _wholes(given[name], f"sizes.{name}") for name in lists}
    every |= {name: checked.whole(given[name], f"sizes.{name}", least=1) for name in counts}
    widths = []
    for pair in checked.listed(given["widths"], "sizes.widths"):
        size, width = _wholes(pair, "sizes.widths")
        widths.append((size, width))
    regimes = [
        Regime(
            **{
                field.name: checked.whole(one[field.name], f"sizes.regimes.{field.name}", least=1)
                for field in dataclasses.fields(Regime)
            }
        )
        for one in checked.listed(given["regimes"], "sizes.regimes")
    ]
    try:
        return CalibrationSizes(
            **every,
            widths=tuple(widths),
            regimes=tuple(regimes),
            gated=checked.flag(given["gated"], "sizes.gated"),
            dtype=checked.text(given["dtype"], "sizes.dtype"),
        )
    except UsageError as error:
        raise ValueError(f"sizes: {error.message}") from None


def _wholes(values: Any, what: str) -> tuple[int, ...]:
    return tuple(checked.whole(one, what, least=1) for one in checked.listed(values, what))
