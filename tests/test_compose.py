"""Composing: what goes in comes out, in the batches asked for, as a fresh recording has it."""

from __future__ import annotations

import gc
import math
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from moeprof.errors import MoeprofError, TraceError, UsageError
from moeprof.replay import (
    activation,
    agreement,
    batching,
    compose,
    gating,
    latency,
    locality,
    memory,
)
from moeprof.trace.handmade import HandToken, hand_trace
from moeprof.trace.reader import Trace, open_trace
from moeprof.trace.synthetic import synthetic_trace
from moeprof.trace.validator import check
from moeprof.trace.writer import TraceWriter
from tests.test_trace_writer import make_info, make_unit

KEYS = ["request", "sequence", "position", "site", "slot"]


def tokens_of(trace: Trace):
    columns = [*KEYS, "phase", "expert", "status", "weight"]
    frame = trace.routing(columns=columns)
    return frame.sort_values(["phase", *KEYS], ignore_index=True)


def lm(path, **options) -> Trace:
    settings = {"num_requests": 12, "num_sites": 2, "batch": 1, "top_k": 3, **options}
    return synthetic_trace(path, **settings)


def mt(path, **options) -> Trace:
    return lm(path, stacks=("encoder", "decoder"), **options)


CASES = {
    "static": {"schedule": "static", "max_batch": 5},
    "continuous": {"max_batch": 4},
    "chunked": {"max_batch": 4, "chunk": 7},
    "tiny chunks": {"max_batch": 100, "chunk": 1},
    "one by one": {"max_batch": 1},
}


@pytest.mark.parametrize("kind", [lm, mt])
@pytest.mark.parametrize("name", CASES)
def test_tokens_in_are_tokens_out(tmp_path, kind, name):
    trace = kind(tmp_path / "t.moeprof")
    composed = compose(trace, **CASES[name])
    before, after = tokens_of(trace), tokens_of(composed)
    assert before.equals(after)
    result = check(composed)
    assert result.ok, result.problems
    assert composed.complete
    dispatches = Counter((d.step, d.site) for d in composed.dispatches())
    assert set(dispatches.values()) == {1}
    steps = composed.steps
    assert steps["step"].tolist() == list(range(len(steps)))
    assert (np.diff(steps["start_s"]) > 0).all()
    assert steps["wall_ms"].isna().all()


def test_beams_stay_together(tmp_path):
    trace = lm(tmp_path / "t.moeprof", num_sequences=3)
    for case in CASES.values():
        composed = compose(trace, **case)
        assert tokens_of(trace).equals(tokens_of(composed))
        assert check(composed).ok
        decode = composed.steps.query("phase == 'decode'")
        assert (decode["num_decode_tokens"] % 3 == 0).all()


def test_last_layers_keep_what_they_saw(tmp_path):
    trace = lm(tmp_path / "t.moeprof", prune_last_layer=True)
    for case in CASES.values():
        composed = compose(trace, **case)
        assert tokens_of(trace).equals(tokens_of(composed))
        assert check(composed).ok
    composed = compose(trace, "static", max_batch=4)
    prefill = composed.steps.query("phase == 'prefill'")["step"]
    layers = composed.layers[composed.layers["step"].isin(prefill)]
    assert set(layers[layers["site"] == 1]["num_rows"]) == {4}


def three_requests(path) -> Trace:
    """Prompts of 3, 1 and 2 tokens; 1, 3 and 0 decode turns."""
    steps = []
    for request, (prompt, turns) in enumerate([(3, 1), (1, 3), (2, 0)]):
        steps.append(
            [
                HandToken(request=request, position=p, experts=[(request,)], phase="prefill")
                for p in range(prompt)
            ]
        )
        steps += [
            [HandToken(request=request, position=prompt + t, experts=[(request,)])]
            for t in range(turns)
        ]
    return hand_trace(path, steps)


def shown(trace: Trace) -> list[list[tuple[int, int]]]:
    return [
        list(zip(d.requests.tolist(), d.positions.tolist(), strict=True))
        for d in trace.dispatches()
    ]


def test_static_batches_by_hand(tmp_path):
    composed = compose(three_requests(tmp_path / "t.moeprof"), "static", max_batch=2)
    assert shown(composed) == [
        [(0, 0), (0, 1), (0, 2), (1, 0)],
        [(0, 3), (1, 1)],
        [(1, 2)],
        [(1, 3)],
        [(2, 0), (2, 1)],
    ]
    steps = composed.steps
    assert steps["batch"].tolist() == [2, 2, 2, 2, 1]
    assert steps["num_padded_tokens"].tolist() == [2, 0, 1, 1, 0]
    assert steps["phase"].tolist() == ["prefill", "decode", "decode", "decode", "prefill"]
    rows = composed.routing(columns=["step", "row"]).groupby("step")["row"].agg(list)
    # Left padding: the one token of the second prompt is the last of its row of three.
    assert rows.tolist() == [[0, 1, 2, 5], [0, 1], [1], [1], [0, 1]]


def test_continuous_batches_by_hand(tmp_path):
    composed = compose(three_requests(tmp_path / "t.moeprof"), max_batch=2, chunk=2)
    # Request 2 waits for a place; prompt tokens fill what two per step leave.
    assert [sorted(step) for step in shown(composed)] == [
        [(0, 0), (0, 1)],
        [(0, 2), (1, 0)],
        [(0, 3), (1, 1)],
        [(1, 2), (2, 0), (2, 1)],
        [(1, 3)],
    ]
    assert composed.steps["phase"].tolist() == ["prefill", "prefill", "decode", "mixed", "decode"]
    assert composed.steps["num_padded_tokens"].sum() == 0


def test_requests_wait_for_their_arrival(tmp_path):
    trace = three_requests(tmp_path / "t.moeprof")
    composed = compose(trace, arrivals=[100.0, 0.0, 100.0], max_batch=8)
    order = [sorted({request for request, _ in step}) for step in shown(composed)]
    assert order == [[1], [1], [1], [1], [0, 2], [0]]
    starts = composed.steps["start_s"].tolist()
    assert starts[0] == 0.0 and starts[4] == 100.0
    requests = composed.requests.set_index("request")
    assert requests["arrival_s"].tolist() == [100.0, 0.0, 100.0]
    assert (requests["end_s"] > requests["arrival_s"]).all()


def test_mixes_are_drawn_with_a_seed(tmp_path):
    trace = lm(tmp_path / "t.moeprof", num_requests=16)
    composed = compose(trace, mix={"news": 3, "code": 1}, num_requests=400, seed=5, max_batch=64)
    domains = composed.requests["domain"].value_counts()
    assert set(domains.index) == {"news", "code"}
    assert abs(domains["news"] / 400 - 0.75) < 0.08
    prompts = composed.requests["prompt_id"].value_counts()
    assert len(prompts) == 8
    news = prompts[
        composed.requests.set_index("prompt_id")["domain"][prompts.index.unique()]
        .groupby(level=0)
        .first()[prompts.index]
        == "news"
    ]
    assert news.max() - news.min() <= 1
    assert any("more than once" in note for note in composed.info.notes)
    assert check(composed).ok
    again = compose(trace, mix={"news": 3, "code": 1}, num_requests=400, seed=5, max_batch=64)
    assert again.requests.equals(composed.requests)
    other = compose(trace, mix={"news": 3, "code": 1}, num_requests=400, seed=6, max_batch=64)
    assert not other.requests["prompt_id"].equals(composed.requests["prompt_id"])


def test_each_request_is_drawn_once_before_any_comes_again(tmp_path):
    trace = lm(tmp_path / "t.moeprof")
    composed = compose(trace, mix={"news": 1.0}, num_requests=3)
    assert composed.requests["prompt_id"].nunique() == 3
    assert not any("more than once" in note for note in composed.info.notes)


def test_ranks_become_one(tmp_path):
    trace = lm(tmp_path / "t.moeprof", num_ranks=2)
    composed = compose(trace, "static", max_batch=12)
    assert composed.ranks == (0,)
    assert len(composed.requests) == 12
    assert tokens_of(trace).equals(tokens_of(composed))
    assert check(composed).ok


def test_every_analysis_accepts_it(tmp_path):
    for trace in (lm(tmp_path / "lm.moeprof"), mt(tmp_path / "mt.moeprof")):
        for case in ("static", "chunked"):
            composed = compose(trace, **CASES[case])
            for analysis in (activation, batching, latency, locality, memory, gating):
                assert analysis(composed).name


def test_static_padding_counts_in_gating(tmp_path):
    composed = compose(three_requests(tmp_path / "t.moeprof"), "static", max_batch=2)
    table = gating(composed, values=[1.0]).table.set_index("phase")
    assert table.loc["prefill", "num_padded_tokens"] == 2
    assert table.loc["prefill", "num_slots"] == 8 * (6 + 2)
    assert table.loc["decode", "num_slots"] == 8 * 6


def test_a_temporary_trace_goes_away(tmp_path):
    composed = compose(lm(tmp_path / "t.moeprof"))
    path = Path(composed.path)
    assert path.exists()
    del composed
    gc.collect()
    assert not path.parent.exists()


def test_a_named_trace_stays(tmp_path):
    trace = lm(tmp_path / "t.moeprof")
    composed = compose(trace, path=tmp_path / "c.moeprof")
    assert tokens_of(open_trace(tmp_path / "c.moeprof")).equals(tokens_of(composed))
    with pytest.raises(MoeprofError, match="exists"):
        compose(trace, path=tmp_path / "c.moeprof")


def test_models_that_drop_are_refused(tmp_path):
    trace = lm(tmp_path / "t.moeprof", capacity_factor=1.0)
    with pytest.raises(MoeprofError, match="capacity rule capacity_factor 1") as caught:
        compose(trace)
    assert caught.value.hint
    never = lm(tmp_path / "n.moeprof", capacity_factor=16 / 3)
    assert check(compose(never, "static", max_batch=12)).ok


def test_missing_ranks_are_refused(tmp_path):
    trace = lm(tmp_path / "t.moeprof", num_ranks=2)
    object.__setattr__(trace.info, "missing_ranks", (1,))
    with pytest.raises(TraceError, match="lacks rank 1"):
        compose(trace)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"schedule": "dynamic"}, "unknown schedule"),
        ({"max_batch": 0}, "max_batch"),
        ({"max_batch": True}, "max_batch"),
        ({"chunk": 0}, "chunk"),
        ({"schedule": "static", "chunk": 4}, "no place"),
        ({"arrivals": [0.0]}, "one number for each of the 12"),
        ({"arrivals": [math.nan] * 12}, "0 or more"),
        ({"mix": {"nowhere": 1.0}}, "no request of the trace"),
        ({"mix": {"news": 0.0}}, "not all 0"),
        ({"mix": {"news": -1.0}}, "0 or more"),
        ({"mix": {}}, "names no domain"),
        ({"num_requests": 4}, "drawn requests"),
    ],
)
def test_bad_options_are_refused(tmp_path, options, message):
    trace = lm(tmp_path / "t.moeprof")
    with pytest.raises(UsageError, match=message):
        compose(trace, **options)


def record_tiny(build, path, prompts, *, batch_size: int, **options) -> Trace:
    import torch

    from moeprof.recording import record

    model = build()
    with record(model, path, timing=False, scores=True), torch.inference_mode():
        for start in range(0, len(prompts), batch_size):
            group = prompts[start : start + batch_size]
            width = max(len(ids) for ids in group)
            ids = torch.zeros((len(group), width), dtype=torch.int64)
            mask = torch.zeros_like(ids)
            for row, prompt in enumerate(group):
                span = slice(width - len(prompt), width)
                if options.get("right"):
                    span = slice(0, len(prompt))
                ids[row, span] = torch.tensor(prompt)
                mask[row, span] = 1
            model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=12, do_sample=False)
    return open_trace(path)


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "deepseek_v3"])
def test_equals_a_fresh_recording(tmp_path, name):
    torch = pytest.importorskip("torch")
    from tests import tiny_models

    generator = torch.Generator().manual_seed(11)
    prompts = [
        torch.randint(3, 99, (int(n),), generator=generator).tolist()
        for n in torch.randint(3, 15, (10,), generator=generator)
    ]
    build = getattr(tiny_models, name)
    alone = record_tiny(build, tmp_path / "1.moeprof", prompts, batch_size=1)
    fresh = record_tiny(build, tmp_path / "8.moeprof", prompts, batch_size=8)
    composed = compose(alone, "static", max_batch=8)
    found = agreement(composed, fresh)
    assert found.metric("agreement/differing_dispatches").value == 0
    assert found.metric("agreement/unmatched_tokens").value == 0
    assert found.table["num_dispatches"].min() > 0
    columns = ["step", "batch", "num_tokens", "num_padded_tokens", "phase"]
    assert composed.steps[columns].equals(fresh.steps[columns])
    keys = ["step", "row", "request", "position"]
    assert composed.routing(columns=keys).equals(fresh.routing(columns=keys))


def test_equals_a_fresh_recording_of_a_translation_model(tmp_path):
    torch = pytest.importorskip("torch")
    from moeprof.zoo.dispatch import fix_nllb_dispatch
    from tests.tiny_models import nllb_moe

    def build():
        model = nllb_moe()
        fix_nllb_dispatch(model)
        return model

    generator = torch.Generator().manual_seed(12)
    prompts = [
        torch.randint(3, 99, (int(n),), generator=generator).tolist()
        for n in torch.randint(3, 12, (6,), generator=generator)
    ]
    alone = record_tiny(build, tmp_path / "1.moeprof", prompts, batch_size=1, right=True)
    fresh = record_tiny(build, tmp_path / "8.moeprof", prompts, batch_size=4, right=True)
    composed = compose(alone, "static", max_batch=4)
    found = agreement(composed, fresh)
    assert found.metric("agreement/differing_dispatches").value == 0
    columns = ["step", "stack", "batch", "num_tokens", "num_padded_tokens", "phase"]
    assert composed.steps[columns].equals(fresh.steps[columns])
    assert check(composed).ok


def test_agreement_finds_flips_and_their_roots(tmp_path):
    def steps(flipped: bool):
        prompt = [
            HandToken(request=r, position=p, experts=[(0, 1), (2, 3)], phase="prefill")
            for r in range(2)
            for p in range(2)
        ]
        if flipped:
            prompt[1] = HandToken(request=0, position=1, experts=[(0, 4), (2, 5)], phase="prefill")
        return [prompt]

    one = hand_trace(tmp_path / "1.moeprof", steps(False))
    other = hand_trace(tmp_path / "2.moeprof", steps(True))
    same = agreement(one, one)
    assert same.metric("agreement/flip_rate").value == 0
    found = agreement(one, other)
    flips = found.tables["flips"]
    assert flips[["request", "position", "layer", "num_exchanged", "root"]].values.tolist() == [
        [0, 1, 0, 1, True],
        [0, 1, 1, 1, False],
    ]
    assert found.metric("agreement/flip_rate").value == 2 / 16
    assert found.metric("agreement/differing_dispatches").value == 2
    assert found.metric("agreement/untied_roots").value == 1
    assert found.findings[0].severity > same.findings[0].severity
    with pytest.raises(UsageError, match="not of one model"):
        agreement(one, lm(tmp_path / "3.moeprof"))


@pytest.mark.parametrize("name", ["zoo:lm", "zoo:mt"])
def test_equals_a_fresh_recording_of_a_built_in_model(tmp_path, name):
    pytest.importorskip("torch")
    from moeprof.recording.session import RecordOptions, record_model

    traces = []
    for batch_size in (1, 8):
        path = tmp_path / f"{batch_size}.moeprof"
        record_model(
            RecordOptions(
                model=name,
                output=str(path),
                batch_size=batch_size,
                limit=9,
                max_new_tokens=4,
                dtype="float32",
                device="cpu",
                profile=False,
                scores=True,
            )
        )
        traces.append(open_trace(path))
    composed = compose(traces[0], "static", max_batch=8)
    found = agreement(composed, traces[1])
    flips = found.tables["flips"]
    assert found.metric("agreement/untied_roots").value == 0, flips
    assert found.metric("agreement/unmatched_tokens").value == 0
    # Equal, or every difference follows from a tie.
    if not len(flips):
        assert found.metric("agreement/differing_dispatches").value == 0
    columns = ["step", "stack", "phase", "batch", "num_tokens", "num_padded_tokens"]
    assert composed.steps[columns].equals(traces[1].steps[columns])
    assert check(composed).ok


@pytest.mark.parametrize(
    ("stored", "gap", "tied"),
    [("float", 5e-6, True), ("float", 5e-5, False), ("halffloat", 5e-5, True)],
)
def test_ties_are_read_as_precisely_as_scores_are_stored(tmp_path, stored, gap, tied):
    def trace(name: str, experts: list[int], scores: list[float]) -> Trace:
        settings = {"score_dtype": "float16"} if stored == "halffloat" else {}
        unit = make_unit(0, num_tokens=1, slots=2)
        unit["steps"] |= {"phase": "prefill", "num_prefill_tokens": 1, "num_decode_tokens": 0}
        unit["routing/decoder"] |= {
            "phase": "prefill", "expert": np.array([experts]), "score": np.array([scores])
        }  # fmt: skip
        unit["requests"] = {
            "request": 0, "task": "lm", "num_sequences": 1, "num_prompt_tokens": 1,
            "num_output_tokens": 0, "arrival_s": 0.0,
        }  # fmt: skip
        info = make_info(num_sites=1, settings=settings)
        with TraceWriter.create(tmp_path / name, info) as writer:
            writer.append(unit)
        return open_trace(tmp_path / name)

    one = trace("1.moeprof", [0, 1], [0.4, 0.1])
    other = trace("2.moeprof", [0, 2], [0.4, 0.1 + gap])
    composed = compose(one, "static", max_batch=1)
    for first in (one, composed):
        assert str(first.stored_type("routing/decoder", "score")) == stored
        assert agreement(first, other).tables["flips"]["tied"].tolist() == [tied]
