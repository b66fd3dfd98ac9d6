"""Measures what this machine does, once, for the cost model.

Constants first, each by itself; then trials: whole steps under several settings, driven by made-up
routing in two regimes, next to what the constants alone say of them. From them come corrections of
the constants and how sure predictions are (`moeprof.replay.corrections`). Leaves out the file
(`moeprof.replay.calibration_file`).
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import tempfile
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path

import torch

from moeprof.errors import CalibrationError, MoeprofError, UsageError
from moeprof.live.calibration_sizes import (
    CPU_SIZES,
    GPU_SIZES,
    CalibrationSizes,
    asked_in,
    asked_sizes,
)
from moeprof.live.calibration_trials import (
    MadeUp,
    TrialBench,
    TriedSetting,
    made_up,
    trial_question,
    trial_settings,
    tried_setting,
)
from moeprof.live.ceilings import measure_ceilings
from moeprof.live.constant_bench import ConstantBench, streamed_times
from moeprof.live.core_binding import QuietCore, Unwatched, Watch, allowed_cores
from moeprof.live.decision_times import decision_times, foresee_time
from moeprof.live.exchange_times import exchange_curve
from moeprof.live.host_probe import probe_ms
from moeprof.live.kernel_bench import KernelBench
from moeprof.live.kernels import KERNELS
from moeprof.live.measured_curves import ascending, middle, surface
from moeprof.live.transfers import made_current
from moeprof.recording.hardware import hardware, versions
from moeprof.replay.cache import policies
from moeprof.replay.calibration_file import Calibration, Measured
from moeprof.replay.corrections import (
    TriedBuffer,
    check_trials,
    fit_by_size,
    fit_corrections,
    with_trials_of,
)
from moeprof.replay.expert_shapes import ExpertShape
from moeprof.replay.pooled_constants import in_time_order, pooled_constants
from moeprof.replay.serving_settings import BufferingSetting
from moeprof.trace.schema import Hardware

Progress = Callable[[str, int, int], None]

DEFAULT_POLICIES = tuple(policies.POLICIES)


def calibrate(
    device: torch.device | str | None = None,
    *,
    sizes: CalibrationSizes | None = None,
    expert_bytes: Sequence[int] | None = None,
    widths: Mapping[int, int] | None = None,
    policies: Sequence[str] = DEFAULT_POLICIES,
    kernels: Sequence[str] = tuple(KERNELS),
    num_ranks: int | None = None,
    trials_from: Calibration | None = None,
    quiet_core: bool = False,
    command: str = "moeprof.live.calibrate",
    progress: Progress | None = None,
) -> Calibration:
    """Measures this machine for the cost model (`moeprof.replay.cost`).

    Args:
        device: Which; a GPU if there is one when None.
        sizes: How large things are; `GPU_SIZES` or `CPU_SIZES` when None.
        expert_bytes: Sizes of experts, instead of those in ``sizes``: those of the models that
            predictions are wanted for.
        widths: Width of the rows of some of these sizes.
        policies: Cache policies whose decisions are timed.
        kernels: Gating kernels that are timed.
        num_ranks: Processes that exchange rows, each on a GPU of its own (on a CPU all on it); no
            exchange is measured when None. A script that gives it starts under
            ``if __name__ == "__main__":``.
        trials_from: Another machine's calibration: what its trials say is taken over, and only
            constants are measured here.
        quiet_core: Keep the calling thread on a core that is quiet (`moeprof.live.core_binding`),
            and measure again what the core did not stay quiet for, as a verification does that is
            told to.
        command: What to write into the file as the command.
        progress: Called with (what is measured, parts done, parts in all).

    Raises:
        UsageError: An argument makes no sense.
        MoeprofError: The device is not there.
        CalibrationError: The other machine's trials say nothing about this one.
    """
    target = device_named(device)
    chosen = sizes or sizes_for(target)
    if expert_bytes is not None:
        chosen = dataclasses.replace(chosen, expert_bytes=tuple(sorted(set(expert_bytes))))
    if widths is not None:
        chosen = dataclasses.replace(chosen, widths=tuple(sorted(widths.items())))
    ran = [shape.expert_bytes for shape in _shapes(chosen)]
    if ran != sorted(set(ran)):
        raise UsageError(
            "two of these sizes are measured by experts of the same bytes, or in another order",
            hint="widths are rounded to multiples of 8: name sizes that are further apart",
        )
    unknown = [name for name in kernels if name not in KERNELS]
    if unknown:
        raise UsageError(
            f"there is no gating kernel {unknown[0]!r}", hint=f"one of {', '.join(KERNELS)}"
        )
    for policy in policies:
        # Refuses unknown ones before anything takes time.
        BufferingSetting(capacity=None, policy=policy)
    if trials_from is not None:
        # Before anything takes time, likewise.
        check_trials(trials_from, dtype=chosen.dtype)
    show = progress or (lambda *_: None)
    if quiet_core:
        # Before anything takes time: not every system can.
        allowed_cores()
    # First: ranks that do not find each other should not cost all the rest.
    exchange = None if num_ranks is None else exchange_curve(num_ranks, device=target)
    with tempfile.TemporaryDirectory() as folder, torch.no_grad(), made_current(target):
        regimes = [made_up(Path(folder), chosen, regime) for regime in chosen.regimes]
        measure = functools.partial(
            _measured, target, chosen, regimes, policies, kernels, command, show,
            known=hardware(target), trials=trials_from is None,
        )  # fmt: skip
        if quiet_core:
            with QuietCore() as quiet:
                machine, tried = measure(quiet)
            machine = dataclasses.replace(machine, num_disturbed=quiet.num_given_up)
        else:
            machine, tried = measure(Unwatched())
    found = (
        _corrected(machine, [tried])
        if trials_from is None
        else with_trials_of(machine, trials_from)
    )
    return dataclasses.replace(found, all_to_all=exchange, exchange_ranks=num_ranks)


def sizes_for(device: torch.device) -> CalibrationSizes:
    """Returns the sizes that suit a device."""
    return GPU_SIZES if device.type == "cuda" else CPU_SIZES


def device_named(device: torch.device | str | None) -> torch.device:
    """Returns the device to measure; a GPU if there is one when None.

    Raises:
        UsageError: It is no device that can be measured.
        MoeprofError: It is not there.
    """
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        found = torch.device(device)
    except RuntimeError:
        raise UsageError(f"there is no device {device!r}", hint="say cpu or cuda") from None
    if found.type == "cuda" and not torch.cuda.is_available():
        raise MoeprofError("there is no GPU that torch can use", hint="say --device cpu")
    if found.type not in ("cpu", "cuda"):
        raise UsageError(f"{found.type} devices cannot be calibrated", hint="say cpu or cuda")
    return found


def _measured(
    device: torch.device,
    sizes: CalibrationSizes,
    regimes: Sequence[MadeUp],
    policy_names: Sequence[str],
    kernels: Sequence[str],
    command: str,
    show: Progress,
    watch: Watch,
    *,
    known: Hardware,
    trials: bool,
) -> tuple[Calibration, list[TriedSetting]]:
    """Returns constants, and trials where these are wanted."""
    bench = ConstantBench(device, sizes, watch=watch)
    kernel_bench = KernelBench(device, sizes, watch=watch)
    trial_bench = TrialBench(device, sizes, watch=watch)
    tried_sizes = sizes.expert_bytes if trials else ()
    parts = 4 + len(policy_names) + len(kernels) + len(tried_sizes)
    count = itertools.count()
    probes: list[float] = []

    def probe() -> None:
        watch.settle()
        probes.append(probe_ms())

    show("rates of the device", next(count), parts)
    probe()
    ceilings = measure_ceilings(
        bench.device, dtype=getattr(torch, sizes.dtype), repeats=sizes.repeats
    )
    copy_ms, matrix_ms = ceilings.copy.times_ms, ceilings.matrix.times_ms
    moved = ceilings.copy_bytes_per_s * ceilings.copy.median_ms
    computed = ceilings.matrix_flops_per_s * ceilings.matrix.median_ms
    show("experts and copies", next(count), parts)
    by_size = []
    for size in sizes.expert_bytes:
        probe()
        by_size.append(bench.of_expert(size))
    probe()
    show("dispatches", next(count), parts)
    constants = bench.of_dispatch()
    streamed = streamed_times(by_size)
    machine = Calibration(
        device=asdict(known),
        versions=versions(),
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        command=command,
        dtype=sizes.dtype,
        sizes=sizes,
        is_serial=bench.times.is_serial,
        device_copy_bytes_per_s=Measured.of([moved / each for each in copy_ms]),
        matrix_flops_per_s=Measured.of([computed / each for each in matrix_ms]),
        to_device=ascending([(one.block_bytes, one.copy) for one in by_size]),
        device_expert=surface([(one.expert_bytes, one.on_device) for one in by_size]),
        host_expert=surface([(one.expert_bytes, one.on_host) for one in by_size]),
        # The host asks for large experts as it does for small ones.
        expert_host_s=middle([one.launch for one in by_size]),
        slot_host_s=middle([one.slot for one in by_size]),
        load_host_s=middle([one.load for one in by_size]),
        handover_s=by_size[0].handover,
        foresee_s=foresee_time(regimes, streamed=streamed is not None, watch=watch),
        streamed=streamed,
        **constants,
    )
    decisions = {}
    for name in policy_names:
        show(f"decisions of {name}", next(count), parts)
        probe()
        decisions[name] = decision_times(
            regimes, name, streamed=machine.streamed is not None, watch=watch
        )
    gating = {}
    for name in kernels:
        show(f"gating {name}", next(count), parts)
        probe()
        gating[name] = kernel_bench.of_kernel(name, machine)
    machine = dataclasses.replace(machine, decisions=decisions, gating=gating)
    tried: list[TriedSetting] = []
    for size in tried_sizes:
        show(f"trials at {size / (1 << 20):.2f} MiB an expert", next(count), parts)
        tried += trial_bench.trials(regimes, size, machine, between=probe)
    show("done", parts, parts)
    return dataclasses.replace(machine, host_probes_ms=tuple(probes)), tried


def _corrected(machine: Calibration, runs: Sequence[Sequence[TriedSetting]]) -> Calibration:
    """Returns a calibration with its trials, and what they say.

    Args:
        machine: Its constants.
        runs: The trials of each calibration whose trials these are.
    """
    tried = [one for run in runs for one in run]
    places = [place for run in runs for place in _places(run)]
    buffers = [
        TriedBuffer(trial=one.trial, work=one.work, expert_bytes=one.expert_bytes, place=place)
        for one, place in zip(tried, places, strict=True)
        if one.whole is None
    ]
    of_kernels = {
        name: [
            (one.trial, place)
            for one, place in zip(tried, places, strict=True)
            if one.whole == name
        ]
        for name in machine.gating
    }
    return dataclasses.replace(
        machine,
        trials=tuple(one.trial for one in tried),
        corrections=fit_corrections(
            buffers,
            {name: [trial for trial, _ in own] for name, own in of_kernels.items()},
            {name: [place for _, place in own] for name, own in of_kernels.items()},
        ),
        by_size=fit_by_size(buffers),
    )


def _places(run: Sequence[TriedSetting]) -> list[tuple[str, str, int, int]]:
    """Returns setting, routing, bytes of an expert and number of the regime of each trial."""
    counts: Counter[tuple[str, str, int]] = Counter()
    found = []
    for one in run:
        tried = one.trial.setting, one.trial.routing, one.expert_bytes
        # In every regime once, in their order.
        found.append((*tried, counts[tried]))
        counts[tried] += 1
    return found


def refitted(machine: Calibration, sizes: CalibrationSizes | None = None) -> Calibration:
    """Returns a calibration with its trials modelled and fitted again; nothing is measured.

    Args:
        machine: A calibration.
        sizes: Those that it was measured with; as it says itself when None.

    Raises:
        UsageError: These are not its trials.
    """
    chosen = _sizes_of(machine, sizes)
    known = dataclasses.replace(machine, sizes=chosen)
    return _corrected(known, [_tried_again(machine, known, chosen)])


def pooled(
    calibrations: Sequence[Calibration], sizes: CalibrationSizes | None = None
) -> Calibration:
    """Returns what calibrations of one kind of machine say together; nothing is measured.

    Constants as `pooled_constants` has them; the trials of all, modelled by these, correct them.
    So predictions know how far such machines, and the same one at other times, are apart.

    Args:
        calibrations: Each measured at a time of its own; they are put in order of time.
        sizes: Those that they were measured with; as each says itself when None.

    Raises:
        CalibrationError: They are of different machines or sizes, or two of them are one.
        UsageError: There is none, or one has other trials than these sizes ask for.
    """
    if not calibrations:
        raise UsageError("there are no calibrations to pool", hint="give two or more")
    ordered = in_time_order(calibrations)
    machine = pooled_constants(ordered)
    chosen = [_sizes_of(each, sizes) for each in ordered]
    if any(_shapes(each) != _shapes(chosen[-1]) for each in chosen):
        raise CalibrationError(
            "the calibrations were measured at other widths of the experts",
            hint="pool calibrations measured with the same sizes",
        )
    machine = dataclasses.replace(machine, sizes=chosen[-1])
    runs = [_tried_again(each, machine, own) for each, own in zip(ordered, chosen, strict=True)]
    return _corrected(machine, runs)


def _shapes(sizes: CalibrationSizes) -> list[ExpertShape]:
    return [sizes.shape(size) for size in sizes.expert_bytes]


def _sizes_of(source: Calibration, given: CalibrationSizes | None) -> CalibrationSizes:
    """Returns the sizes that a calibration was measured with.

    Those that are given, else those that it keeps. Files from before it kept them say what was
    asked for in their command; all else was as it is for a device of that kind.

    Raises:
        UsageError: It was measured with others.
    """
    known = source.sizes if given is None else given
    sizes = known or dataclasses.replace(
        CPU_SIZES if source.is_serial else GPU_SIZES, dtype=source.dtype
    )
    measured = source.device_expert.expert_bytes
    candidates = [sizes, dataclasses.replace(sizes, expert_bytes=measured)]
    if known is None:
        candidates = [*_asked_of(source, sizes), candidates[1]]
    for each in candidates:
        ran = tuple(shape.expert_bytes for shape in _shapes(each))
        if each.dtype == source.dtype and ran == measured:
            return each
    raise _other_trials()


def _asked_of(source: Calibration, sizes: CalibrationSizes) -> list[CalibrationSizes]:
    """Returns the sizes that the command of a calibration asked for, where it is one."""
    texts = asked_in(source.command)
    try:
        if not texts:
            return []
        expert_bytes, widths = asked_sizes(texts, dtype=source.dtype)
        return [dataclasses.replace(sizes, expert_bytes=expert_bytes, widths=widths)]
    except UsageError:
        # What wrote the file took other words for sizes.
        return []


def _other_trials() -> UsageError:
    return UsageError(
        "the calibration has other trials than these sizes ask for",
        hint="give the sizes that it was measured with",
    )


def _tried_again(
    source: Calibration, machine: Calibration, sizes: CalibrationSizes
) -> list[TriedSetting]:
    """Returns the trials of ``source``, modelled by the constants of ``machine``."""
    if source.trials_of is not None:
        raise UsageError(
            f"the trials are those of {source.trials_of.machine}, by other constants",
            hint="fit the calibration of that machine again",
        )
    trials = iter(source.trials)
    tried: list[TriedSetting] = []
    with tempfile.TemporaryDirectory() as folder:
        regimes = [made_up(Path(folder), sizes, regime) for regime in sizes.regimes]
        for shape, made in itertools.product(_shapes(sizes), regimes):
            question = trial_question(made, shape)
            for setting in trial_settings(source):
                trial = next(trials, None)
                if trial is None or trial.setting != setting.name:
                    raise _other_trials()
                if len(trial.modelled_ms) != len(question.routed.steps):
                    raise _other_trials()
                tried.append(tried_setting(trial.measured_ms, question, setting, machine))
    if next(trials, None) is not None:
        raise _other_trials()
    return tried
