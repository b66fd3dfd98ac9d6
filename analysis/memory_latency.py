"""Memory of the experts on the device against p95 step latency: predicted, measured, and bounded.

    python -m analysis.memory_latency TRACE --predicted FILE --calibration FILE
        [--verified FILE ...] [--also PREDICTED CALIBRATION VERIFIED] [--budget-share 0.5] [-o OUT]

Predicts the 95th percentile for the settings of a file of predictions (``moeprof verify
--predict-only``) from the calibration that these were made from, and sees that the percentiles in
the file come out the same, so that it is the model that was judged. Beside it: what was measured
(``moeprof verify --predictions``), what a replay of one token after another or a hit rate alone
(of the judged steps, as everything here) would have said, and a frontier: as few copies as any
policy can do with so many slots (MIN, free to pass an expert through), deciding for nothing, no
copy waiting for a slot. Recommended is the least predicted within the budget, of policies that do
not know the future. Another machine has predictions of its own, and stands beside (``others``).
"""

from __future__ import annotations

import argparse
import json
import math
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from analysis import command
from analysis.prediction_quality import Judgement, read_judgements
from analysis.token_major import token_major
from moeprof.errors import MoeprofError
from moeprof.live.step_percentiles import repetitions_of
from moeprof.live.verification_files import read_predictions
from moeprof.live.verification_options import Predictions
from moeprof.replay.buffer_plans import plan_buffer
from moeprof.replay.cache.policies import POLICIES
from moeprof.replay.calibration_file import Calibration, DecisionTimes, read_calibration
from moeprof.replay.cost_model import PERCENTILES, Prediction, Question, predict, prediction_rows
from moeprof.replay.pipeline import NOTHING
from moeprof.replay.serving_settings import BufferingSetting, GatingSetting, parse_setting
from moeprof.reporting.writing import write_files
from moeprof.trace.reader import Trace, open_trace

RESULTS = Path(__file__).resolve().parent / "results"
RESULT = "memory_latency.json"
KIND = "moeprof memory against latency"
PERCENTILE = 95
BUDGET_SHARE = 0.5
FRONTIER_SHARES = tuple(sixteenth / 16 for sixteenth in range(1, 17))

_FRONTIER_POLICY = "min_bypass"
_FREE = DecisionTimes(dispatch_s=0.0, hit_s=0.0, miss_s=0.0, slot_s=0.0, error=0.0)
_CLOSE = 1e-6
_MS = 1e3


def memory_latency(
    trace: Trace,
    predictions: Predictions,
    machine: Calibration,
    judgements: Sequence[Judgement] = (),
    *,
    budget_share: float = BUDGET_SHARE,
) -> dict[str, Any]:
    """Returns every series of the figure, as plain data.

    Args:
        trace: Of the predictions.
        predictions: Made from the calibration.
        machine: The calibration.
        judgements: Measurements of these predictions.
        budget_share: Of all experts' bytes, within which a setting is recommended.

    Raises:
        MoeprofError: The predictions are of another trace, calibration or model of costs.
    """
    if predictions.facts["calibrated"] != machine.date:
        raise MoeprofError(
            f"the predictions come from a calibration of {predictions.facts['calibrated']}, this "
            f"one is of {machine.date}",
            hint="give the calibration that they were made from",
        )
    asked = predictions.options.question(trace)
    if predictions.facts["num_lookups"] != asked.routed.num_lookups:
        raise MoeprofError(f"the predictions are not of {trace.path}", hint="give their trace")
    question = replace(asked, percentiles=(PERCENTILE, *PERCENTILES))
    found = [predict(question, parse_setting(name), machine) for name in predictions.settings]
    _check_same(found, predictions, question)
    whole = sum(site.num_experts for site in question.routed.sites) * question.shape.expert_bytes
    budget = int(whole * budget_share)
    rows = [_row(one) for one in found]
    fitting = [
        row for row in rows if row["device_bytes"] <= budget and not _sees_future(row["policy"])
    ]
    return {
        "kind": KIND,
        "percentile": PERCENTILE,
        "routing": {"trace": Path(trace.path).name, "model": trace.model.name},
        "shape": asdict(question.shape),
        "layers": len(question.routed.sites),
        "experts_per_layer": [site.num_experts for site in question.routed.sites],
        "judged_steps": len(question.judged),
        "tokens_per_judged_step": _tokens_per_step(question),
        "all_expert_bytes": whole,
        "calibrated_on": machine.name,
        "calibrated": machine.date,
        "predicted_on": predictions.facts["date"],
        "budget_bytes": budget,
        "recommended": min(fitting, key=_predicted_ms)["setting"] if fitting else None,
        "predicted": rows,
        "token_major": list(_token_major_rows(question, found, machine)),
        "hit_rate_alone": list(_hit_rate_rows(question, found, machine)),
        "frontier": _frontier(question, machine),
        "measured": [row for one in judgements for row in _measured_rows(one)],
        "sources": [
            {
                "file": one.name,
                "machine": one.machine,
                "date": one.content["date"],
                "command": one.content["command"],
                "hardware": one.content["hardware"],
                "versions": one.content["versions"],
                "notes": one.content["notes"],
                **{key: one.content[key] for key in ("beside",) if key in one.content},
            }
            for one in judgements
        ],
    }


def _check_same(found: Sequence[Prediction], predictions: Predictions, question: Question) -> None:
    said = {(row["setting"], row["percentile"]): row["predicted_ms"] for row in predictions.rows}
    for one in found:
        for row in prediction_rows(one, question):
            key = (row["setting"], row["percentile"])
            if key in said and not math.isclose(row["predicted_ms"], said[key], rel_tol=_CLOSE):
                raise MoeprofError(
                    f"{key[0]} p{key[1]} is {row['predicted_ms']:.4f} ms by this cost model, the "
                    f"predictions say {said[key]:.4f} ms",
                    hint="use the version of moeprof that made them",
                )


def _sees_future(policy: str | None) -> bool:
    """Returns whether no device can run the policy, so that nobody should be told to."""
    return policy is not None and POLICIES[policy].sees_future


def _predicted_ms(row: Mapping[str, Any]) -> float:
    return float(row["p95_ms"])


def _row(one: Prediction) -> dict[str, Any]:
    value, low, high = one.percentiles_ms[PERCENTILE]
    setting = one.setting
    buffered = isinstance(setting, BufferingSetting) and setting.capacity is not None
    return {
        "setting": setting.name,
        "policy": setting.policy if buffered else None,
        "kind": "gating"
        if isinstance(setting, GatingSetting)
        else setting.miss
        if buffered
        else "unbuffered",
        "ahead": setting.prefetch if buffered else 0,
        "device_bytes": one.device_bytes,
        "judged_hit_rate": one.judged_hit_rate,
        "p95_ms": value,
        "low_ms": low,
        "high_ms": high,
    }


def _tokens_per_step(question: Question) -> float:
    """Returns the mean number of tokens of a judged step at its first layer."""
    first = question.routed.step_starts[question.judged]
    return float(question.routed.num_tokens[first].mean())


def _loading(found: Sequence[Prediction]) -> Iterator[tuple[BufferingSetting, Prediction]]:
    """Yields buffers that copy each miss as it comes; a hit rate says nothing about others."""
    for one in found:
        setting = one.setting
        if (
            isinstance(setting, BufferingSetting)
            and setting.capacity is not None
            and (setting.miss, setting.scope, setting.prefetch) == ("load", "layer", 0)
        ):
            yield setting, one


def _token_major_rows(
    question: Question, found: Sequence[Prediction], machine: Calibration
) -> Iterator[dict[str, Any]]:
    for setting, one in _loading(found):
        plan = plan_buffer(question.trace, question.routed, setting, rows=question.rows)
        flat = token_major(question.rows, question.routed, setting, plan.capacity)
        other = predict(question, setting, machine, plan=flat.plan(plan))
        misses, lookups = (
            int(question.routed.per_step(each)[question.judged].sum())
            for each in (flat.misses, question.routed.rows)
        )
        yield {
            "setting": setting.name,
            "device_bytes": one.device_bytes,
            "judged_token_hit_rate": 1 - misses / lookups,
            "p95_ms": other.percentiles_ms[PERCENTILE][0],
        }


def _hit_rate_rows(
    question: Question, found: Sequence[Prediction], machine: Calibration
) -> Iterator[dict[str, Any]]:
    """Yields the time without a buffer, plus misses by the hit rate times the time of a copy.

    Hit rate and lookups are those of the same steps, the judged ones.
    """
    plain = predict(question, BufferingSetting(capacity=None), machine)
    lookups = question.routed.per_step(np.ones(question.routed.num_lookups, np.int64))
    each_ms = float(machine.to_device.at(question.shape.block_bytes)) * _MS
    for setting, one in _loading(found):
        assert one.judged_hit_rate is not None
        misses = (1 - one.judged_hit_rate) * float(lookups[question.judged].mean())
        yield {
            "setting": setting.name,
            "device_bytes": one.device_bytes,
            "judged_hit_rate": one.judged_hit_rate,
            "misses_per_judged_step": misses,
            "p95_ms": plain.percentiles_ms[PERCENTILE][0] + misses * each_ms,
        }


def _frontier(question: Question, machine: Calibration) -> list[dict[str, Any]]:
    """Returns memory and the least time with it, longer for no additional slot."""
    free = replace(machine, decisions={**machine.decisions, _FRONTIER_POLICY: _FREE})
    least = math.inf
    found = []
    for share in FRONTIER_SHARES:
        setting = BufferingSetting(capacity=share, policy=_FRONTIER_POLICY)
        plan = plan_buffer(question.trace, question.routed, setting, rows=question.rows)
        plan = replace(plan, after=np.full_like(plan.after, NOTHING), num_staging=0)
        one = predict(question, setting, free, plan=plan)
        least = min(least, one.percentiles_ms[PERCENTILE][0])
        found.append({"share": share, "device_bytes": one.device_bytes, "p95_ms": least})
    return found


def _measured_rows(one: Judgement) -> Iterator[dict[str, Any]]:
    """Yields each setting: the percentile of the steps' medians, and of all repetitions."""
    sizes = {row["setting"]: row["device_bytes"] for row in one.content["rows"]}
    for name, times in one.content["step_times"].items():
        repeated = repetitions_of(times)
        (spread,) = repeated.spreads((PERCENTILE,))
        yield {
            "machine": one.machine,
            "setting": name,
            "device_bytes": sizes[name],
            "p95_ms": repeated.percentile_ms(PERCENTILE),
            "spread": spread if math.isfinite(spread) else None,
            "raw_p95_ms": repeated.raw_ms(PERCENTILE),
            "repetitions": len(repeated.times_ms),
        }


def main(arguments: Sequence[str] | None = None) -> int:
    """Writes the series and returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m analysis.memory_latency",
        description=(__doc__ or "").split("\n\n", maxsplit=1)[0],
    )
    parser.add_argument("trace")
    parser.add_argument("--predicted", type=Path, required=True, metavar="FILE")
    parser.add_argument("--calibration", type=Path, required=True, metavar="FILE")
    parser.add_argument("--verified", nargs="+", type=Path, default=[], metavar="FILE")
    parser.add_argument(
        "--also",
        nargs=3,
        type=Path,
        action="append",
        default=[],
        metavar=("PREDICTED", "CALIBRATION", "VERIFIED"),
        help="the same on another machine",
    )
    parser.add_argument("--budget-share", type=float, default=BUDGET_SHARE)
    parser.add_argument("-o", "--output", type=Path, default=RESULTS / RESULT, metavar="OUT")
    options = parser.parse_args(arguments)
    given = sys.argv[1:] if arguments is None else list(arguments)

    def write() -> tuple[Path, ...]:
        trace = open_trace(options.trace)

        def found_by(
            predicted: Path, calibration: Path, verified: Sequence[Path]
        ) -> dict[str, Any]:
            return memory_latency(
                trace,
                read_predictions(predicted),
                read_calibration(calibration),
                read_judgements(verified, [predicted]) if verified else (),
                budget_share=options.budget_share,
            )

        found = found_by(options.predicted, options.calibration, options.verified)
        others = [
            found_by(predicted, calibration, [verified])
            for predicted, calibration, verified in options.also
        ]
        if others:
            found["others"] = others
        said = {"command": shlex.join(["python", "-m", "analysis.memory_latency", *given])}
        return write_files({options.output: json.dumps({**said, **found}, indent=1) + "\n"})

    return command.run(write)


if __name__ == "__main__":
    sys.exit(main())
