"""Runs whose visits were put together: which is which, and how far they lie apart, by hand."""

from __future__ import annotations

import json

import pytest
import verified_files as made

pytest.importorskip("torch")

from analysis import prediction_quality as quality
from analysis.live_prediction_words import run_notes
from analysis.run_differences import run_of_rounds, runs_apart


def visits(*told):
    return {
        "visits": [
            {"round": number, "begun_s": begun_s, "probe_ms": 1.0, "repetitions": 1}
            for number, begun_s in told
        ]
    }


def test_time_begins_anew_with_a_run():
    # The second setting was visited first in round 3 and alone in round 4.
    runs = run_of_rounds({
        "one": visits((1, 0.0), (2, 9.0), (3, 1.5)),
        "two": visits((1, 4.0), (2, 6.0), (3, 0.0), (4, 8.0), (5, 0.0)),
    })  # fmt: skip
    assert runs == {1: 0, 2: 0, 3: 1, 4: 1, 5: 2}
    # What was visited late in one run and later in the next is of two runs all the same.
    late = {"one": visits((1, 0.0), (2, 2.0)), "two": visits((1, 1.0), (2, 0.0), (3, 3.0))}
    assert run_of_rounds(late) == {1: 0, 2: 1, 3: 1}
    assert run_of_rounds({"old": {}}) == {}


def judged(folder, times, told):
    said = {(name, each): 10.0 for name in times for each in made.PERCENTILES}
    predictions = made.predicted_file(folder, "a", said, machine="H200")
    path = made.verified_file(
        predictions, "H200",
        {name: [[each] * made.NUM_STEPS for each in own] for name, own in times.items()},
    )  # fmt: skip
    content = json.loads(path.read_text())
    for name, own in told.items():
        content["step_times"][name] |= visits(*own)
    path.write_text(json.dumps(content))
    return quality.read_judgements([path], [predictions])


def test_runs_apart_by_hand(tmp_path):
    steady, slower = [10.0, 10.1, 9.9, 10.0, 10.1], [12.0, 12.1, 11.9, 12.0, 12.1]
    first = [(number, float(number)) for number in range(1, 6)]
    second = [(number, float(number - 6)) for number in range(6, 11)]
    found = runs_apart(
        judged(
            tmp_path,
            {"lru:25%": steady + slower, "min:25%": [5.0] * 5 + [5.0, 9.0]},
            {"lru:25%": first + second, "min:25%": [*first, (6, 0.5), (7, 1.5)]},
        )
    )
    (own,) = found
    assert (own["machine"], own["runs"], own["settings"]) == ("H200", 2, 1)
    # Two visits say too little of a run: the other setting is not compared.
    assert own["setting"] == "lru:25%" and (own["low_ms"], own["high_ms"]) == (10.0, 12.0)
    assert own["ratio"] == own["median_ratio"] == pytest.approx(1.2)
    # Each run knows lru:25% alone, and the first knows min:25%.
    assert (own["known_in_a_run"], own["percentiles"]) == (4, 4)
    (note,) = run_notes({"runs_apart": found})
    assert "1.20 times (lru:25%: 10 to 12 ms in 2 runs; median of 1 settings 1.20)" in note
    assert note.endswith("4 of 4 percentiles are known to the same share from some run alone.")


def test_one_run_is_not_compared(tmp_path):
    (own,) = runs_apart(
        judged(tmp_path, {"lru:25%": [8.0, 12.0]}, {"lru:25%": [(1, 0.0), (2, 1.0)]})
    )
    assert (own["runs"], own["settings"], own["ratio"]) == (1, 0, None)
    assert own["known_in_a_run"] == 0
    assert run_notes({"runs_apart": [own]}) == [] == run_notes({})
