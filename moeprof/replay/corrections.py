"""What trial runs say about the constants of a machine.

Constants are measured one by one; a run may still take longer than they say, by what they do to
each other. Trials of expert buffers, and of none, in several regimes, correct the kinds of work:
the log of a factor for each of `pipeline.PARTS` is fitted so that the modelled steps come out as
measured. Damped Gauss-Newton steps minimise

    sum over trials of mean over steps of (log measured - log modelled)^2 / sigma^2
    + (log factors - start)^T known^-1 (log factors - start)

where measured is a step's median over the repetitions and sigma what is left over in the trials,
found along with the factors, apart for trials in which the host computes. The first step of a trial
is left out: it begins with a device at rest and with the host's caches cold, takes up to half as
long again, and is no measure of the steps that follow each other. The second term keeps parts where
they are that no trial sees, or that several explain alike. Of all trials together, start is 0 and
known diagonal: a constant is thought to be right within `PRIOR`, and within `WAIT_PRIOR` where it
is a wait of the host for the device, measured by itself with latencies that hide in each other
where dispatch follows dispatch. Of those of one size of experts, start is the fit to all, and known
its covariance + `BETWEEN_SIZES`^2 I.

Without a buffer nothing is copied: those trials tell what the host and the device take where
copies hide it in others. Trials of a gating kernel give one factor for that kernel.

What remains is judged by leaving out one trial at a time: how far off is a setting that was not
fitted to. At one size of experts it is left out there, not in the fit to all that it starts from.
Several calibrations try the same at several times: such trials are left out together, and are one
in the degrees of freedom, as a setting that is predicted was tried at no time.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from moeprof.errors import CalibrationError
from moeprof.replay.calibration_file import (
    Calibration,
    Corrections,
    KernelCorrection,
    Leftovers,
    Trial,
    TrialSource,
)
from moeprof.replay.pipeline import PARTS, Work, step_times

Floats = NDArray[np.float64]
Groups = Sequence[Sequence[int]]

PRIOR = 0.3
"""Standard deviation of the log of a factor before any trial."""

WAIT_PRIOR = 0.8
"""The same of `WAITS`."""

WAITS = ("known", "sort")
"""Parts in which the host waits to learn what the device has found."""

BETWEEN_SIZES = 0.15
"""Standard deviation of the log of a factor from one size of experts to another."""

NUM_FIRST = 1
"""Steps at the beginning of a trial that say nothing about the others."""

_LEAST_SIGMA = 0.01
_FIRST_SIGMA = 0.1
_NUM_SIGMAS = 4
_NUM_STEPS = 60
_DIFFERENCE = 1e-4
_DAMPING = 1e-3
_MOST_DAMPING = 1e9
_DAMPING_RATE = 4.0
_CONVERGED = 1e-9
_MS = 1e3
_MEDIAN_PENALTY = 1.2533


@dataclass(frozen=True, kw_only=True, eq=False)
class TriedBuffer:
    """A trial of an expert buffer, or of none, with what its steps did.

    Attributes:
        trial: What was measured.
        work: What is modelled.
        expert_bytes: Of an expert.
        place: What was tried, the same in every calibration that tried it; None where no other
            trial is of the same.
    """

    trial: Trial
    work: Work
    expert_bytes: int = 0
    place: Hashable = None

    @property
    def uses_host(self) -> bool:
        """True where the host computes experts."""
        return bool(self.work.on_host.any())


def fit_corrections(
    buffers: Sequence[TriedBuffer],
    kernels: Mapping[str, Sequence[Trial]],
    places: Mapping[str, Sequence[Hashable]] | None = None,
) -> Corrections | None:
    """Returns what trials say; None without any.

    Args:
        buffers: Trials of expert buffers, and of none.
        kernels: Trials by gating kernel.
        places: What each of them tried, as `TriedBuffer` has it; each something else when None.
    """
    known = {name: own for name, own in kernels.items() if own}
    if not buffers and not known:
        return None
    groups = {
        name: _groups((places or {}).get(name, [None] * len(own))) for name, own in known.items()
    }
    return _corrections(_fit_all(buffers), known, groups)


def fit_by_size(buffers: Sequence[TriedBuffer]) -> dict[int, Corrections]:
    """Returns what trials say at each size of experts, by the bytes of one.

    What parts do to each other depends on whether copies, the host or the device are waited for,
    and that on the size: large experts are bound by copies, small ones by the host. But a host is
    as fast for large experts as for small ones, and a link as fast in every setting: the factors of
    a size are thought to lie within `BETWEEN_SIZES` of those of all trials. So what a size does not
    tell, the others do.

    Args:
        buffers: Trials of expert buffers, and of none.
    """
    found: dict[int, Corrections] = {}
    if not buffers:
        return found
    every = _fit_all(buffers)
    near = every.covariance + BETWEEN_SIZES**2 * np.eye(len(PARTS))
    for size in sorted({each.expert_bytes for each in buffers}):
        own = [each for each in buffers if each.expert_bytes == size]
        found[size] = _corrections(_fit_parts(own, every.log_factors, near), {}, {})
    return found


def check_trials(other: Calibration, *, dtype: str) -> None:
    """Refuses trials that say nothing about experts of a type, whatever the machine.

    Args:
        other: Calibration whose trials are to be taken.
        dtype: Of the experts that they are taken for.

    Raises:
        CalibrationError: It has no trials, those of other parts, or of experts of another type.
    """
    hint = f"measure {other.name} again: moeprof calibrate -o FILE"
    if other.corrections is None:
        raise CalibrationError(f"the calibration of {other.name} has no trials", hint=hint)
    if any(each.parts != PARTS for each in (other.corrections, *other.by_size.values())):
        raise CalibrationError(
            f"the calibration of {other.name} corrects other parts than this moeprof models",
            hint=hint,
        )
    if other.dtype != dtype:
        raise CalibrationError(
            f"trials on {other.name} say nothing: experts of {other.dtype} there, {dtype} here",
            hint="take the trials of a machine that runs the same",
        )


def with_trials_of(constants: Calibration, other: Calibration) -> Calibration:
    """Returns a machine's constants, corrected by what another machine's trials say.

    What parts of the work do to each other is mostly the runtime's doing, not the machine's: trials
    may carry over where constants do not.

    Args:
        constants: Calibration whose constants are kept; its own trials are not looked at.
        other: Calibration whose trials and corrections are taken.

    Raises:
        CalibrationError: The other has no trials, or its machine did not run the same work.
    """
    check_trials(other, dtype=constants.dtype)
    for what, own, its in (
        ("is the host itself:", constants.is_serial, other.is_serial),
        ("runs in pieces:", constants.streamed is not None, other.streamed is not None),
    ):
        if own != its:
            raise CalibrationError(
                f"trials on {other.name} say nothing about {constants.name}: {what} {its} there, "
                f"{own} here",
                hint="take the trials of a machine that runs the same",
            )
    return replace(
        constants,
        trials=other.trials,
        corrections=other.corrections,
        by_size=other.by_size,
        trials_of=other.trials_of or TrialSource(machine=other.name, date=other.date),
    )


@dataclass(frozen=True, kw_only=True, eq=False)
class _PartFit:
    log_factors: Floats
    covariance: Floats
    leftovers: Leftovers | None
    host_leftovers: Leftovers | None


def _groups(places: Sequence[Hashable]) -> Groups:
    """Returns the indices of trials of the same place together; those of None are alone."""
    found: dict[Hashable, list[int]] = {}
    for index, place in enumerate(places):
        found.setdefault(index if place is None else (place,), []).append(index)
    return list(found.values())


def _corrections(
    fit: _PartFit, known: Mapping[str, Sequence[Trial]], groups: Mapping[str, Groups]
) -> Corrections:
    of_kernels = {name: [_middle(trial) for trial in own] for name, own in known.items()}
    return Corrections(
        parts=PARTS,
        log_factors=tuple(fit.log_factors.tolist()),
        covariance=tuple(tuple(row) for row in fit.covariance.tolist()),
        buffering=fit.leftovers,
        host=fit.host_leftovers,
        kernels={name: _correction(logs, len(groups[name])) for name, logs in of_kernels.items()},
        gating=_kernel_leftovers(of_kernels, known, groups) if known else None,
    )


def _fit_all(buffers: Sequence[TriedBuffer]) -> _PartFit:
    """Returns what trials say where nothing else is known but the constants."""
    known = np.where(np.isin(PARTS, WAITS), WAIT_PRIOR, PRIOR)
    return _fit_parts(buffers, np.zeros(len(PARTS)), np.diag(known**2))


def _fit_parts(buffers: Sequence[TriedBuffer], start: Floats, known: Floats) -> _PartFit:
    """Returns what trials say.

    Args:
        buffers: The trials.
        start: [parts] logs of the factors as they are thought to be before.
        known: [parts, parts] covariance of their errors.
    """
    factors = start
    prior = np.asarray(np.linalg.inv(known), np.float64)
    if not buffers:
        return _PartFit(log_factors=factors, covariance=known, leftovers=None, host_leftovers=None)
    measured = [np.log(_settled(each.trial.step_ms()) / _MS) for each in buffers]
    uses_host = np.array([each.uses_host for each in buffers])
    sigmas = np.full(len(buffers), _FIRST_SIGMA)
    for _ in range(_NUM_SIGMAS):
        factors = _descended(buffers, measured, factors, sigmas, start, prior)
        squares = np.array([np.mean(r**2) for r in _residuals(buffers, measured, factors)])
        # The host's own computing is less steady than anything else: it must not blur the rest.
        for kind in np.unique(uses_host):
            own = uses_host == kind
            sigmas[own] = max(_LEAST_SIGMA, float(np.sqrt(np.mean(squares[own]))))
    slopes = _slopes(buffers, factors)
    residuals = _residuals(buffers, measured, factors)
    weighed = [j.T @ j / len(j) / s**2 for j, s in zip(slopes, sigmas, strict=True)]
    curvature = prior + sum(weighed)
    covariance = np.asarray(np.linalg.inv(curvature), np.float64)
    pulls = [
        slope.T @ residual / len(residual) / sigma**2
        for slope, residual, sigma in zip(slopes, residuals, sigmas, strict=True)
    ]
    groups = _groups([each.place for each in buffers])
    left_out = np.zeros(len(buffers))
    for group in groups:
        part = np.sum([weighed[each] for each in group], axis=0)
        pull = np.sum([pulls[each] for each in group], axis=0)
        moved = np.linalg.solve(curvature - part, -pull)
        for each in group:
            left_out[each] = np.median(residuals[each] - slopes[each] @ moved)
    jitter = [np.exp(residual - np.median(residual)) for residual in residuals]

    def leftovers(chosen: NDArray[np.bool_]) -> Leftovers | None:
        picked = np.flatnonzero(chosen)
        if not len(picked):
            return None
        num_fitted = float(np.trace(covariance @ sum(weighed[each] for each in picked)))
        num_places = sum(bool(chosen[list(group)].any()) for group in groups)
        return Leftovers(
            residuals=tuple(left_out[picked].tolist()),
            freedom=max(1.0, num_places - num_fitted),
            jitter=tuple(np.concatenate([jitter[each] for each in picked]).tolist()),
        )

    return _PartFit(
        log_factors=factors,
        covariance=covariance,
        leftovers=leftovers(~uses_host),
        host_leftovers=leftovers(uses_host),
    )


def _descended(
    buffers: Sequence[TriedBuffer],
    measured: Sequence[Floats],
    factors: Floats,
    sigmas: Floats,
    start: Floats,
    prior: Floats,
) -> Floats:
    """Returns the factors that minimise the sum in the module's description, for some sigmas.

    ``prior`` [parts, parts] is the inverse of what is called known there.
    """

    def total(given: Floats, residuals: Sequence[Floats]) -> float:
        misfit = sum(
            float(np.mean(r**2)) / sigma**2 for r, sigma in zip(residuals, sigmas, strict=True)
        )
        return float(misfit + (given - start) @ prior @ (given - start))

    residuals = _residuals(buffers, measured, factors)
    least = total(factors, residuals)
    damping = _DAMPING
    for _ in range(_NUM_STEPS):
        slopes = _slopes(buffers, factors)
        curvature = prior.copy()
        pull = -prior @ (factors - start)
        for slope, residual, sigma in zip(slopes, residuals, sigmas, strict=True):
            curvature += slope.T @ slope / len(slope) / sigma**2
            pull += slope.T @ residual / len(residual) / sigma**2
        gain = 0.0
        while damping < _MOST_DAMPING:
            damped = curvature + damping * np.diag(np.diag(curvature))
            tried = factors + np.linalg.solve(damped, pull)
            found = _residuals(buffers, measured, tried)
            reached = total(tried, found)
            if reached < least:
                gain, least, factors, residuals = least - reached, reached, tried, found
                damping = max(damping / _DAMPING_RATE, _DAMPING)
                break
            damping *= _DAMPING_RATE
        if gain <= _CONVERGED * least:
            break
    return factors


def _residuals(
    buffers: Sequence[TriedBuffer], measured: Sequence[Floats], factors: Floats
) -> list[Floats]:
    """Returns [settled steps] logs of measured over modelled, for each trial."""
    scale = np.exp(factors)[None]
    return [
        own - np.log(_settled(step_times(each.work, scale)[0]))
        for each, own in zip(buffers, measured, strict=True)
    ]


def _slopes(buffers: Sequence[TriedBuffer], factors: Floats) -> list[Floats]:
    """Returns [settled steps, parts] how the logs of modelled steps follow those of factors."""
    moved = np.exp(np.concatenate([factors[None], factors + _DIFFERENCE * np.eye(len(factors))]))
    found = []
    for each in buffers:
        logs = np.log(step_times(each.work, moved))
        found.append(_settled(((logs[1:] - logs[0]) / _DIFFERENCE).T))
    return found


def _settled(steps: Floats) -> Floats:
    """Returns what belongs to the steps [steps, ...] behind the first; to all where it is alone."""
    return steps[NUM_FIRST:] if len(steps) > NUM_FIRST else steps


def _middle(trial: Trial) -> float:
    return float(np.log(np.median(_settled(trial.ratios()))))


def _correction(logs: Sequence[float], num_places: int) -> KernelCorrection:
    spread = float(np.std(logs, ddof=1)) if len(logs) > 1 else PRIOR
    return KernelCorrection(
        log_factor=float(np.median(logs)), error=_MEDIAN_PENALTY * spread / num_places**0.5
    )


def _kernel_leftovers(
    logs: Mapping[str, Sequence[float]],
    trials: Mapping[str, Sequence[Trial]],
    groups: Mapping[str, Groups],
) -> Leftovers:
    """Returns what each trial is off by from the others of its kernel; all of it where alone."""
    residuals = []
    for name, own in logs.items():
        group_of = {each: group for group in groups[name] for each in group}
        for index, one in enumerate(own):
            others = [other for place, other in enumerate(own) if place not in group_of[index]]
            residuals.append(one - float(np.median(others)) if others else one)
    ratios = [_settled(trial.ratios()) for own in trials.values() for trial in own]
    return Leftovers(
        residuals=tuple(residuals),
        freedom=max(1.0, float(sum(map(len, groups.values())) - len(logs))),
        jitter=tuple(np.concatenate([each / np.median(each) for each in ratios]).tolist()),
    )
