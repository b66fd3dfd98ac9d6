"""Times of steps, each with whether the core that asked for it was quiet.

Where something else runs beside the core that dispatches, on the same arithmetic, a step of small
experts may take twice as long. That is found by looking at the core just before and after, and
never by how long the step took: what is set aside is not chosen by its result, and most of it took
little longer than usual. Steps of less than `_LOOK_EVERY_MS` together share their looks.
"""

from __future__ import annotations

from dataclasses import dataclass

from moeprof.live.core_binding import Watch

# A look takes some 0.3 ms. Slow stretches of the hosts seen last longer than these steps together.
_LOOK_EVERY_MS = 5.0


@dataclass(frozen=True, kw_only=True)
class StepTimes:
    """One repetition of all steps.

    Attributes:
        times_ms: [steps].
        is_quiet: [steps] False where the core of the dispatching thread was found slow just before
            or after, whatever the time came out as.
    """

    times_ms: tuple[float, ...]
    is_quiet: tuple[bool, ...]


class WatchedTimes:
    """Times of steps as they are taken, with looks at the core between them.

    Args:
        watch: Looks; goes elsewhere where the core is not quiet any more.
    """

    def __init__(self, watch: Watch) -> None:
        self._watch = watch
        self._times: list[float] = []
        self._is_quiet: list[bool] = []
        self._since_ms = 0.0
        watch.settle()
        self._was_quiet = watch.is_quiet()

    def add(self, step_ms: float) -> None:
        """Takes the time of the next step."""
        self._times.append(step_ms)
        self._since_ms += step_ms
        if self._since_ms >= _LOOK_EVERY_MS:
            self._look()

    def whole(self) -> StepTimes:
        """Returns the times of all steps."""
        if len(self._is_quiet) < len(self._times):
            self._look()
        return StepTimes(times_ms=tuple(self._times), is_quiet=tuple(self._is_quiet))

    def _look(self) -> None:
        is_quiet = self._watch.is_quiet()
        since = len(self._times) - len(self._is_quiet)
        self._is_quiet += [self._was_quiet and is_quiet] * since
        if not is_quiet:
            # The next steps had better run elsewhere.
            self._watch.settle()
            is_quiet = self._watch.is_quiet()
        self._was_quiet, self._since_ms = is_quiet, 0.0
