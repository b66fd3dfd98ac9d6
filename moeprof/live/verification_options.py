"""What a verification runs and how well it measures, and predictions as they are made before.

Leaves out how they are made and measured (`verification`), their files (`verification_files`) and
what is said of them (`verdicts`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from moeprof.errors import UsageError
from moeprof.replay.cost_model import Question, question_of
from moeprof.replay.expert_shapes import ExpertShape, shape_of_trace

if TYPE_CHECKING:
    from moeprof.trace.reader import Trace

NAME = "verification"
TOLERANCE = 0.02
QUIET_CORE_NOTE = (
    "steps are set aside before or after which the core of the dispatching thread was found slow"
)


@dataclass(frozen=True, kw_only=True)
class VerifyOptions:
    """What is run; the same for predictions and measurements.

    Attributes:
        stack: Stack of the trace; the last one (a decoder) when None.
        shape: Of random experts; as the model or the trace has it when None.
        dtype: Of the model's or trace's experts as they are run; as recorded when None.
        phase: Steps that are judged; see `moeprof.replay.cost_model.question_of`.
        max_steps: At most so many steps.
        repetitions: Times that every setting runs them at least; more where a repetition is cheap
            against building the setting.
        most_repetitions: At most, where percentiles are not yet known to `TOLERANCE`.
        rounds: Over which the least repetitions are spread; one repetition in each where there are
            fewer repetitions than rounds.
        seed: Of the draws.
    """

    stack: str | None = None
    shape: ExpertShape | None = None
    dtype: str | None = None
    phase: str | None = None
    max_steps: int | None = None
    repetitions: int = 5
    most_repetitions: int = 20
    rounds: int = 3
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuses numbers that measure nothing."""
        if not 1 <= self.repetitions <= self.most_repetitions:
            raise UsageError(
                f"{self.repetitions} to {self.most_repetitions} repetitions make no sense"
            )
        if self.rounds < 1:
            raise UsageError(f"{self.rounds} rounds make no sense")

    def question(self, trace: Trace) -> Question:
        """Returns what is predicted."""
        stack = trace.stacks[-1] if self.stack is None else self.stack
        return question_of(
            trace,
            stack=stack,
            shape=self.shape or shape_of_trace(trace, stack, dtype=self.dtype),
            phase=self.phase,
            max_steps=self.max_steps,
            seed=self.seed,
        )


@dataclass(frozen=True, kw_only=True)
class Predictions:
    """Predictions as they are written before a measurement.

    Attributes:
        options: What is run.
        settings: Names of the settings.
        rows: As `moeprof.replay.cost` has them.
        facts: Trace, model and calibration that they come from.
    """

    options: VerifyOptions
    settings: tuple[str, ...]
    rows: tuple[Mapping[str, Any], ...]
    facts: Mapping[str, Any]

    @property
    def shape(self) -> ExpertShape:
        """Of the experts that were predicted."""
        return ExpertShape(**self.facts["shape"])
