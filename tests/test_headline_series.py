"""The order of a headline run, its larger batches and its repetitions, on a machine made up."""

from __future__ import annotations

import contextlib
import dataclasses
import json

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from analysis.gpu import headline_runs, headline_series, paper_headline  # noqa: E402
from analysis.gpu.headline_runs import BatchRuns, ForcedGate, RunLimits  # noqa: E402
from analysis.gpu.headline_series import JUDGED_REPEATS, Series  # noqa: E402
from analysis.gpu.time_spent import TimeSpent  # noqa: E402
from analysis.live_evidence import best_of, gains, headline_rows  # noqa: E402
from moeprof.live.repetitions import Repetitions  # noqa: E402

LIMITS = RunLimits(seconds=0.0, least_repeats=2, point_seconds=3.0, pass_seconds=8.0)
HOURS = 1e6


class Machine:
    """A clock and a memory: a pass over a batch takes seconds and bytes in proportion to it."""

    def __init__(self, capacity=1000, seconds=0.01, num_bytes=10):
        self.capacity, self.seconds, self.num_bytes = capacity, seconds, num_bytes
        self.now = 0.0
        self.peak = 0
        self.passes = []

    def monotonic(self):
        return self.now

    perf_counter = monotonic

    def memory(self, _):
        peak, self.peak = self.peak, 0
        return 0, peak

    def repeat(self, function, *, device, repeats, warmup=0):
        times = []
        for _ in range(warmup + repeats):
            begun = self.now
            function()
            times.append((self.now - begun) * 1e3)
        return Repetitions(tuple(times[warmup:]))

    def prepare(self, batch):
        def run():
            self.passes.append(batch)
            if batch * self.num_bytes > self.capacity:
                raise torch.OutOfMemoryError("no more\nat all")
            self.peak = batch * self.num_bytes
            self.now += batch * self.seconds

        return batch, run


@pytest.fixture
def machine(monkeypatch):
    made = Machine()
    for module in (headline_runs, headline_series):
        monkeypatch.setattr(module, "time", made)
    monkeypatch.setattr(headline_runs, "memory", made.memory)
    monkeypatch.setattr(headline_runs, "repeat", made.repeat)
    monkeypatch.setattr(headline_runs, "free_bytes", lambda _: made.capacity)
    monkeypatch.setattr(headline_runs, "wait_for", lambda _: None)
    monkeypatch.setattr(headline_runs, "release", lambda _: None)
    return made


def climbed(machine, batches=(1, 2), limits=LIMITS, **given):
    before = headline_runs.run_gating("x", batches, machine.prepare, "cpu", limits=limits)
    found = headline_runs.climb("x", before, machine.prepare, "cpu", limits=limits, **given)
    every = BatchRuns(
        rows=before.rows + found.rows,
        skipped=before.skipped + found.skipped,
        once=before.once + found.once,
    )
    return found, headline_runs.ending("x", every)


def test_batches_are_doubled_until_memory_ends(machine):
    found, ending = climbed(machine)
    assert [row["batch"] for row in found.rows] == [4, 8, 16, 32, 64, 128]
    assert [row.get("out_of_memory") for row in found.rows[-2:]] == [None, "no more"]
    assert found.rows[-2]["extra_bytes"] == 640 and not found.once and not found.skipped
    assert ending == {
        "gating": "x",
        "largest_timed": 64,
        "largest_run": 64,
        "faster_once": [],
        "out_of_memory_batch": 128,
        "said": "out of memory at batch 128",
    }


def test_what_is_too_slow_runs_once_and_what_is_slower_still_is_named(machine):
    machine.seconds, machine.capacity = 0.1, 2000
    found, ending = climbed(machine)
    # Three passes of 8 take 2.4 s, of 16 more than 3 s; one of 64 takes 6.4 s, of 128 more than 8.
    assert [row["batch"] for row in found.rows if "times_ms" in row] == [4, 8]
    assert [(row["batch"], row["extra_bytes"]) for row in found.once] == [
        (16, 160), (32, 320), (64, 640)
    ]  # fmt: skip
    assert found.once[0]["pass_ms"] == pytest.approx(1600)
    assert [row["batch"] for row in found.skipped] == [128]
    assert "12.8 s, more than 8 s" in found.skipped[0]["reason"]
    assert machine.passes.count(128) == 0 and machine.passes.count(256) == 1
    assert ending["said"] == "out of memory at batch 256; not tried below it: 128"
    assert ending["largest_timed"] == 8 and ending["largest_run"] == 64


def test_what_is_quicker_than_predicted_is_timed(machine):
    """A loop over experts takes as long for more tokens: its best batch is a large one."""
    every = machine.prepare

    def prepare(batch):
        machine.seconds = 0.8 / batch
        return every(batch)

    before = headline_runs.run_gating("x", (1,), prepare, "cpu", limits=LIMITS)
    found = headline_runs.climb("x", before, prepare, "cpu", limits=LIMITS)
    batches = [2, 4, 8, 16, 32, 64, 128]
    assert [row["batch"] for row in found.rows] == batches
    # The only pass that told so is kept until there is better.
    assert [row["batch"] for row in found.once] == batches[:-1]
    assert headline_runs.ending("x", found)["largest_timed"] == 64
    assert headline_runs.ending("x", found)["faster_once"] == []
    assert all(row["median_ms"] == pytest.approx(800) for row in found.rows[:-1])


def test_a_faster_only_pass_is_named():
    found = BatchRuns(rows=[row("x", 4, 100.0)])
    found.once.append({"gating": "x", "batch": 8, "num_tokens": 8, "pass_ms": 70.0})
    found.once.append({"gating": "x", "batch": 16, "num_tokens": 16, "pass_ms": 170.0})
    assert headline_runs.ending("x", found)["faster_once"] == [8]


def test_the_end_of_the_time_is_said(machine):
    found, ending = climbed(machine, limits=dataclasses.replace(LIMITS, deadline_s=0.44))
    assert found.rows[-1]["batch"] == 8
    assert ending["out_of_memory_batch"] is None
    assert ending["said"] == (
        "not tried: batches from 16 up: the time given to larger batches is up"
    )


def test_what_ran_once_is_kept_where_time_ends_before_it_is_timed(machine):
    every = machine.prepare

    def prepare(batch):
        # Quick enough to be timed, as its only pass shows, which takes the time that there is.
        machine.seconds = (0.8 if batch == 1 else 1.0) / batch
        return every(batch)

    before = headline_runs.run_gating("x", (1,), prepare, "cpu", limits=LIMITS)
    limits = dataclasses.replace(LIMITS, deadline_s=machine.now + 1.7)
    found = headline_runs.climb("x", before, prepare, "cpu", limits=limits)
    assert [row["batch"] for row in found.once] == [2]
    assert [row["batch"] for row in found.rows if "out_of_memory" not in row] == []
    rows = [*before.rows, *found.rows]
    ending = headline_runs.ending("x", BatchRuns(rows=rows, skipped=found.skipped, once=found.once))
    assert ending["largest_run"] == 2 and ending["largest_timed"] == 1
    assert "not tried below it: 4, 8" in ending["said"]


def test_every_row_is_kept_as_soon_as_there_is_one(machine):
    kept = []

    def lost(batch):
        if batch == 8:
            raise KeyboardInterrupt
        return machine.prepare(batch)

    with pytest.raises(KeyboardInterrupt):
        headline_runs.run_gating(
            "x", (1, 4, 8), lost, "cpu", limits=LIMITS,
            grown=lambda kind, row: kept.append((kind, row["batch"])),
        )  # fmt: skip
    assert kept == [("rows", 1), ("rows", 4)]
    with pytest.raises(KeyboardInterrupt):
        headline_runs.climb(
            "x", BatchRuns(), lost, "cpu", limits=LIMITS,
            grown=lambda kind, row: kept.append((kind, row["batch"])),
        )  # fmt: skip
    assert kept[2:] == [("rows", 1), ("rows", 2), ("rows", 4)]


def test_a_pass_longer_than_the_time_left_is_not_begun(machine):
    limits = dataclasses.replace(LIMITS, point_seconds=None, pass_seconds=HOURS, deadline_s=5.0)
    machine.seconds = 1.0
    before = BatchRuns(rows=[{"gating": "x", "batch": 4, "median_ms": 4e3, "extra_bytes": 40}])
    found = headline_runs.climb("x", before, machine.prepare, "cpu", limits=limits)
    assert not found.once and machine.passes == [128]
    assert [row["batch"] for row in found.skipped] == [8, 16, 32, 64]
    assert "more than the 5.0 s left" in found.skipped[0]["reason"]


def test_a_largest_batch_ends_the_series(machine):
    _, ending = climbed(machine, limits=dataclasses.replace(LIMITS, most_batch=8))
    assert ending["largest_timed"] == 8 and "batches from 16 up: larger than 8" in ending["said"]


def test_memory_of_a_mask_grows_with_the_square(machine):
    machine.seconds = 1.0
    row = {"gating": "x", "batch": 4, "median_ms": 4e3, "extra_bytes": 400, "times_ms": [4e3]}
    given = (BatchRuns(rows=[row]), machine.prepare, "cpu")
    headline_runs.climb("x", *given, limits=LIMITS, growth=2)
    # 400 bytes times four are beyond: tried at once, though a pass would take too long.
    assert machine.passes[0] == 8


def test_without_a_memory_that_counts_a_slow_series_ends(machine, monkeypatch):
    monkeypatch.setattr(headline_runs, "free_bytes", lambda _: None)
    machine.seconds = 10.0
    found, ending = climbed(machine, batches=(1,))
    assert len(found.skipped) == 1 and ending["said"].startswith("not tried: batches from 2 up")


def test_libraries_that_find_no_memory_and_other_failures(machine):
    def failing(said):
        def prepare(batch):
            tokens, run = machine.prepare(batch)

            def broken():
                if batch > 4:
                    raise RuntimeError(said)
                run()

            return tokens, broken

        before = headline_runs.run_gating("x", (1, 2), prepare, "cpu", limits=LIMITS)
        found = headline_runs.climb("x", before, prepare, "cpu", limits=LIMITS)
        before.rows.extend(found.rows)
        before.skipped.extend(found.skipped)
        return headline_runs.ending("x", before)["said"]

    assert failing("CUBLAS_STATUS_ALLOC_FAILED") == "out of memory at batch 8"
    assert failing("Triton Error [CUDA]: out of memory") == "out of memory at batch 8"
    wrong = failing("invalid configuration argument\nmore")
    assert wrong == "not tried: batches from 8 up: failed: invalid configuration argument"


def test_a_listed_batch_that_fails_ends_the_run(machine):
    def prepare(batch):
        raise RuntimeError("a defect")

    with pytest.raises(RuntimeError, match="a defect"):
        headline_runs.run_gating("x", (1,), prepare, "cpu", limits=LIMITS)


def test_endings_are_never_silent():
    found = BatchRuns()
    assert headline_runs.ending("x", found)["said"] == "not tried: its turn did not come"
    found.rows.append({"gating": "x", "batch": 4, "times_ms": [1.0]})
    assert "above 4 come after what is judged" in headline_runs.ending("x", found)["said"]


def row(gating, batch, tokens_per_s, *, repeats=2, extra_bytes=0, p95_ms=1.0):
    return {
        "gating": gating, "batch": batch, "num_tokens": batch, "tokens_per_s": tokens_per_s,
        "median_ms": batch / tokens_per_s * 1e3, "p95_ms": p95_ms, "extra_bytes": extra_bytes,
        "times_ms": [batch / tokens_per_s * 1e3] * repeats,
    }  # fmt: skip


def series_of(rows, order=("dynamic", "other"), **given):
    made = Series(order=order, device="cpu", limits=LIMITS, climbing=LIMITS, **given)
    made.found.rows.extend(rows)
    return made


def test_rows_that_the_headline_takes():
    rows = [
        row("dynamic", 1, 10.0),
        row("dynamic", 2, 40.0, extra_bytes=9, p95_ms=5.0),
        row("dynamic", 4, 50.0, extra_bytes=99),
        row("other", 1, 5.0),
        row("other", 2, 6.0, extra_bytes=9, p95_ms=5.0),
        {"gating": "other", "batch": 4, "out_of_memory": "no more"},
    ]
    found = headline_series.judged_rows(rows, ["dynamic", "other"])
    assert [(each["gating"], each["batch"]) for each in found] == [
        ("dynamic", 4), ("other", 2), ("dynamic", 2)
    ]  # fmt: skip
    (compared,) = headline_runs.headline(rows, ["dynamic", "other"])
    assert (compared["best_batch"], compared["equal_terms_batch"]) == (4, 2)
    assert compared["best_repetitions"] == compared["baseline_repetitions"] == 2
    assert compared["equal_terms_repetitions"] == 2
    assert compared["baseline_p95_ms"] == compared["equal_terms_p95_ms"] == 5.0


def test_judged_rows_are_measured_again_until_the_headline_rests_on_them(machine):
    """A row that was lucky loses its place, and the one that takes it is measured again, too."""
    machine.seconds = 0.01  # 100 tokens/s, whatever the batch
    rows = [row("dynamic", 2, 99.0), row("dynamic", 4, 150.0), row("other", 2, 120.0)]
    kept = []
    made = series_of(rows, keep=lambda: kept.append(len(kept)))
    applied = []

    @contextlib.contextmanager
    def given(name):
        applied.append(name)
        yield machine.prepare

    made.revisit(["dynamic", "other"], given, until_s=HOURS)
    assert applied[0] == "dynamic" and kept == list(range(len(applied)))
    result = made.result()
    (compared,) = result["headline"]
    assert compared["best_repetitions"] == compared["baseline_repetitions"] == JUDGED_REPEATS == 20
    assert compared["gain_at_own_best"] == pytest.approx(1.0)
    again = {(each["gating"], each["batch"]): each for each in result["rows"]}
    lucky = again["dynamic", 4]
    assert len(lucky["times_ms"]) == 20 and len(lucky["sweep_times_ms"]) == 2
    assert lucky["tokens_per_s"] == pytest.approx(100.0) and lucky["revisited"]
    assert lucky["p95_ms"] == pytest.approx(np.percentile(lucky["times_ms"], 95))


def test_what_there_is_no_time_for_keeps_its_repetitions(machine, capsys):
    machine.seconds = 0.01
    rows = [row("dynamic", 2, 100.0), row("other", 64, 100.0)]

    @contextlib.contextmanager
    def given(_):
        yield machine.prepare

    made = series_of(rows)
    made.revisit(["dynamic", "other"], given, until_s=1.0)
    (compared,) = made.result()["headline"]
    assert (compared["best_repetitions"], compared["baseline_repetitions"]) == (20, 2)
    assert "not measured again" in capsys.readouterr().out
    made.revisit(["dynamic"], given, until_s=HOURS)
    assert set(machine.passes) == {2}


def test_a_row_that_finds_no_memory_again_stays_as_it_was(machine):
    machine.capacity = 1

    @contextlib.contextmanager
    def given(_):
        yield machine.prepare

    made = series_of([row("dynamic", 2, 100.0)])
    made.revisit(["dynamic"], given, until_s=HOURS)
    assert made.found.rows == [row("dynamic", 2, 100.0)]


def test_results_are_in_order_and_say_nothing_of_batches_that_ran_later():
    made = series_of([row("other", 4, 1.0), row("dynamic", 8, 1.0), row("dynamic", 2, 1.0)])
    made.found.skipped.extend(
        {"gating": "other", "batch": batch, "reason": "time"} for batch in (8, 4)
    )
    result = made.result()
    assert [(each["gating"], each["batch"]) for each in result["rows"]] == [
        ("dynamic", 2), ("dynamic", 8), ("other", 4)
    ]  # fmt: skip
    assert [each["batch"] for each in result["skipped"]] == [8]
    assert [each["gating"] for each in result["endings"]] == ["dynamic", "other"]


def test_choices_come_again_in_batches_larger_than_they_are():
    ids = torch.tensor([[0, 1], [2, 3], [4, -1]])
    gate = ForcedGate(torch.nn.Identity(), [(ids, ids.float())])
    for rows, wanted in ((2, [0, 1]), (3, [0, 1, 2]), (8, [0, 1, 2, 0, 1, 2, 0, 1])):
        found, weights = gate(torch.zeros(rows, 4))
        assert torch.equal(found, ids[wanted]) and torch.equal(weights, ids[wanted].float())


def test_shares_of_the_time(monkeypatch):
    machine = Machine()
    monkeypatch.setattr(headline_series, "time", machine)
    ends = []
    for left in (3, 2, 1):
        ends.append(headline_series.even_share(12.0, left))
        machine.now = ends[-1]
    # Each takes all that it may; the last one has some time left.
    assert ends == pytest.approx([6.0, 10.0, 12.0])
    for shares in (paper_headline.SHARES, headline_series.DENSE_SHARES):
        assert list(shares.values()) == sorted(shares.values()) and shares["again"] == 1.0
    assert headline_series.ends_of({"a": 0.25, "b": 1.0}, 10.0, 18.0) == {"a": 12.0, "b": 18.0}


def test_seconds_add_up(monkeypatch):
    machine = Machine()
    monkeypatch.setattr("analysis.gpu.time_spent.time", machine)
    spent = TimeSpent()
    for _ in range(2):
        with spent.part("a"):
            machine.now += 2
    with pytest.raises(ValueError, match="x"), spent.part("b"):
        machine.now += 1
        raise ValueError("x")
    assert spent.seconds == {"a": 4.0, "b": 1.0}


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """The language model's script, and what it had written after every step."""
    folder = tmp_path_factory.mktemp("out")
    kept = []
    write = paper_headline.write_json

    def watched(path, result):
        write(path, result)
        kept.append(json.loads(path.read_text()))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(paper_headline, "write_json", watched)
        given = ["--tiny", "--routing", "uniform", "--out", str(folder), "--seconds", "100"]
        assert paper_headline.main(given) == 0
    return kept


def test_the_language_models_result(written):
    result = written[-1]
    assert len(result["source_sha256"]) == 64
    assert result["command"].endswith("--seconds 100")
    gatings = {each["gating"] for each in result["endings"]}
    assert gatings == set(paper_headline.BATCHES) == {each["gating"] for each in result["rows"]}
    assert all("batches from 8 up: larger than 4" in each["said"] for each in result["endings"])
    assert len(result["headline"]) == len(gatings) - 1
    for each in result["headline"]:
        assert each["best_repetitions"] == each["baseline_repetitions"] == 20
        assert each["equal_terms_repetitions"] in (20, None)
    assert result["wall_s"] >= sum(result["seconds_by_part"].values()) * 0.9
    # What readers work out from the rows is what the run wrote.
    rows = headline_rows(result)
    for name, gain in gains(result).items():
        rate = best_of(rows, "dynamic")["tokens_per_s"] / best_of(rows, name)["tokens_per_s"]
        assert gain.own_best == pytest.approx(rate)


def test_what_is_judged_is_written_before_larger_batches(written):
    listed = {name: max(each[:2]) for name, each in paper_headline.BATCHES.items()}

    def larger(result):
        rows = result["rows"]
        return [r for r in rows if r["gating"] != "dense" and r["batch"] > listed[r["gating"]]]

    def repetitions(result):
        return {each["best_repetitions"] for each in result["headline"]}

    first = next(place for place, result in enumerate(written) if larger(result))
    assert len(written[first - 1]["headline"]) == len(listed) - 1
    assert repetitions(written[first - 1]) == {20}
    seen = [{row["gating"] for row in result["rows"]} for result in written]
    wanted = ["dense", *headline_series.TURNS]
    for number in range(1, len(wanted) + 1):
        assert set(wanted[:number]) in seen
    assert seen[0] == {"dense"}


def test_without_time_every_gating_says_so(tmp_path, capsys):
    given = ["--tiny", "--routing", "uniform", "--out", str(tmp_path), "--seconds", "0"]
    assert paper_headline.main(given) == 0
    result = json.loads((tmp_path / paper_headline.RESULT).read_text())
    assert not result["rows"] and not result["headline"]
    assert len(result["endings"]) == len(paper_headline.BATCHES)
    assert all("time given" in each["said"] for each in result["endings"])
    assert "seconds," in capsys.readouterr().out
