"""Gating replay: against a per-token reference, a model that drops, and the paper's shapes."""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import replace

import numpy as np
import pytest

from moeprof.errors import TraceError, UsageError
from moeprof.replay.capacity import PAPER_LM, PAPER_LM_SMALL, PAPER_MT, ModelShape, device_bytes
from moeprof.replay.demand import dealt
from moeprof.replay.gates import gating
from moeprof.trace import schema
from moeprof.trace.handmade import HandToken, hand_trace
from moeprof.trace.reader import Trace, open_trace
from moeprof.trace.synthetic import synthetic_trace
from moeprof.trace.writer import TraceWriter

GIB = 2**30
MIB = 2**20


def reference(trace: Trace, *, fraction: float, devices: int, tile: int) -> dict:
    """Gates token by token, from the definition alone; padding must be 0."""
    order = {
        (int(row.rank), int(row.request)): index
        for index, row in enumerate(trace.requests.itertuples())
    }
    found: dict = defaultdict(lambda: defaultdict(float))
    for dispatch in trace.dispatches():
        site = next(s for s in trace.sites if s.site == dispatch.site)
        sums = found[dispatch.site, dispatch.phase]
        device = [order[dispatch.rank, int(r)] % devices for r in dispatch.requests]
        slots = [math.ceil(fraction * device.count(d)) for d in range(devices)]
        taken: dict = defaultdict(int)
        kept: dict = defaultdict(int)
        for choice in range(site.top_k):
            for token, experts in enumerate(dispatch.experts):
                key = (device[token], int(experts[choice]))
                kept[token] += taken[key] < slots[device[token]]
                sums["num_dropped"] += taken[key] >= slots[device[token]]
                taken[key] += 1
        counts = np.bincount(dispatch.experts.ravel(), minlength=site.num_experts)
        home = [e * devices // site.num_experts for e in range(site.num_experts)]
        sums["num_tokens"] += len(device)
        sums["num_slots"] += site.num_experts * sum(slots)
        sums["num_tokens_clipped"] += sum(kept[t] < site.top_k for t in range(len(device)))
        sums["num_tokens_lost"] += sum(kept[t] == 0 for t in range(len(device)))
        sums["dynamic_tile_rows"] += sum(math.ceil(n / tile) * tile for n in counts)
        sums["tile_rows"] += site.num_experts * math.ceil(sum(slots) / tile) * tile
        sums["num_dynamic_expert_calls"] += np.count_nonzero(counts)
        crossing = sum(
            home[e] != device[token] for token, row in enumerate(dispatch.experts) for e in row
        )
        counted = 8 * site.num_experts * (devices - 1)
        sums["dynamic_all_to_all_bytes"] += 2 * 4 * site.d_model * crossing + counted
        away = sum(slots[d] * sum(h != d for h in home) for d in range(devices))
        sums["all_to_all_bytes"] += 2 * 4 * site.d_model * away
    return found


@pytest.mark.parametrize("devices", [1, 3])
@pytest.mark.parametrize("fraction", [0.05, 0.3])
def test_equals_a_reference_token_by_token(tmp_path, devices, fraction):
    trace = synthetic_trace(
        tmp_path / "t.moeprof",
        num_requests=14,
        num_experts=[8, 5],
        top_k=[2, 3],
        num_sites=2,
        batch=5,
        mixed_steps=True,
        prompt_tokens=12,
        output_tokens=6,
    )
    table = gating(trace, values=[1.0, fraction], devices=devices, tile_rows=4).table
    table = table[table["value"] == fraction]
    expected = reference(trace, fraction=fraction, devices=devices, tile=4)
    assert len(table) == len(expected)
    for row in table.to_dict("records"):
        for name, value in expected[row["site"], row["phase"]].items():
            assert row[name] == value, (name, row["site"], row["phase"])


def test_first_choices_come_before_second_choices(tmp_path):
    tokens = [
        HandToken(request=0, position=0, experts=[(0, 1)]),
        HandToken(request=1, position=0, experts=[(1, 0)]),
        HandToken(request=2, position=0, experts=[(2, 1)]),
    ]
    trace = hand_trace(tmp_path / "t.moeprof", [tokens], num_experts=4)
    row = gating(trace, values=[1 / 3]).table.iloc[0]
    # One slot each: expert 0 takes token 0, expert 1 token 1, expert 2 token 2; all second
    # choices find their expert full.
    assert (row["num_dropped"], row["num_tokens_clipped"], row["num_tokens_lost"]) == (3, 3, 0)
    assert (row["num_slots"], row["num_placeholders"]) == (4, 1)


def test_the_paper_toy(tmp_path):
    experts = [0, 0, 0, 0, 1, 2]
    tokens = [
        HandToken(request=i, position=0, experts=[(e,)], phase="prefill")
        for i, e in enumerate(experts)
    ]
    trace = hand_trace(tmp_path / "t.moeprof", [tokens], num_experts=3)
    row = gating(trace, values=[0.5]).table.iloc[0]
    assert row["max_slots_per_expert"] == 3
    assert (row["num_slots"], row["num_dropped"], row["num_placeholders"]) == (9, 1, 4)
    assert row["num_tokens_lost"] == 1
    assert row["drops_class"] == "exact"


def shaped_trace(path, model: ModelShape, *, requests: int, tokens: int, devices: int = 1) -> Trace:
    """Writes one pass per stack of a model of this shape, routed at random."""
    info = schema.TraceInfo(
        model=schema.ModelInfo(name="shape", dtype="float16", static_bytes=model.static_bytes),
        sites=model.sites,
        mode="synthetic",
        created="2026-01-01T00:00:00+00:00",
    )
    rng = np.random.default_rng(0)
    with TraceWriter.create(path, info, flush_interval_s=float("inf")) as writer:
        for step, stack in enumerate(info.stacks):
            count = requests * tokens
            experts = [
                np.argsort(rng.random((count, s.num_experts)), axis=1)[:, :2]
                for s in info.sites_of(stack)
            ]
            phase = "encode" if stack == "encoder" else "prefill"
            writer.append(
                {
                    "steps": {
                        "step": step,
                        "stack": stack,
                        "phase": phase,
                        "batch": requests,
                        "num_tokens": count,
                        "num_prefill_tokens": count,
                        "num_decode_tokens": 0,
                        "num_padded_tokens": 0,
                        "probed": False,
                        "start_s": 0.0,
                    },
                    f"routing/{stack}": {
                        "step": step,
                        "row": np.arange(count),
                        "request": np.repeat(np.arange(requests), tokens),
                        "sequence": 0,
                        "parent_sequence": 0,
                        "position": np.tile(np.arange(tokens), requests),
                        "phase": phase,
                        "expert": np.concatenate(experts, axis=1),
                        "status": 0,
                    },
                }
            )
        writer.append(
            {
                "requests": {
                    "request": np.arange(requests),
                    "task": "lm",
                    "num_sequences": 1,
                    "arrival_s": 0.0,
                }
            }
        )
    return open_trace(path)


def test_published_profile_comes_out_of_a_trace_of_its_shape(tmp_path):
    one_layer = replace(PAPER_LM_SMALL, num_decoder_layers=2)
    trace = shaped_trace(tmp_path / "t.moeprof", one_layer, requests=4, tokens=2048)
    row = gating(trace, values=[0.05], devices=4).table.iloc[0]
    assert row["max_mask_elements"] == 421_888 * 256
    assert round(row["max_combine_bytes"] / MIB) == 412
    assert row["max_rows_per_expert"] == 412
    assert row["max_dispatched_bytes"] == 77.25 * MIB
    assert row["max_dynamic_dispatched_bytes"] == 6 * MIB
    assert row["num_expert_calls"] / 4 == 128
    assert row["waste_factor"] == pytest.approx(12.875)
    assert row["waste_factor_without_ceiling"] == pytest.approx(12.8)
    assert row["gemm_rows"] / row["dynamic_gemm_rows"] == pytest.approx(12.875)
    assert row["flops"] / row["dynamic_flops"] == pytest.approx(12.875)
    assert row["mask_flops"] == 4 * 4 * 2048 * 512 * 103 * 768


def test_waste_and_memory_of_the_translation_model(tmp_path):
    trace = shaped_trace(tmp_path / "t.moeprof", PAPER_MT, requests=2, tokens=8)
    result = gating(trace, values=[1.0], devices=8)
    assert set(result.table["waste_factor"].round(9)) == {64.0}
    assert set(result.table["num_dropped"]) == {0}
    assert set(result.table["drops_class"]) == {"exact"}
    memory = result.tables["memory"].set_index("cache_slots")
    assert memory.loc[16, "device_bytes"] / GIB == pytest.approx(17.49, abs=0.005)
    assert memory.loc[1, "freed_share"] == pytest.approx(0.322, abs=0.0005)
    assert memory.loc[10, "freed_bytes"] / GIB == pytest.approx(2.25, abs=0.005)
    assert memory.loc[1, "memory_ratio"] == pytest.approx(1.47, abs=0.005)
    assert memory.loc[10, "memory_ratio"] == pytest.approx(1.148, abs=0.0005)


def test_waste_and_static_bytes_of_the_language_model(tmp_path):
    trace = shaped_trace(tmp_path / "t.moeprof", PAPER_LM, requests=1, tokens=100)
    result = gating(trace, values=[0.05], devices=8)
    assert result.metric(
        "gating/waste_factor_without_ceiling/decoder/prefill/token_fraction-0.05"
    ).value == pytest.approx(12.8)
    memory = result.tables["memory"].set_index("cache_slots")
    assert memory.loc[64, "device_bytes"] / GIB == pytest.approx(12.49, abs=0.005)
    static = trace.info.model.static_bytes
    assert static is not None
    assert device_bytes(static, trace.sites, devices=8) == memory.loc[64, "device_bytes"]


def test_padding_counts_as_tokens_and_takes_no_slot(tmp_path):
    steps = [
        [HandToken(request=r, position=p, experts=[(0,)], phase="prefill") for p in range(n)]
        for r, n in ((0, 3), (1, 1))
    ]
    trace = hand_trace(tmp_path / "t.moeprof", [[*steps[0], *steps[1]]], num_experts=2)
    trace.steps.loc[0, ["batch", "num_padded_tokens"]] = (2, 2)
    row = gating(trace, values=[0.5]).table.iloc[0]
    assert (row["num_tokens"], row["num_padded_tokens"]) == (4, 2)
    assert row["max_slots_per_expert"] == 3
    assert row["num_dropped"] == 1
    assert row["waste_factor"] == 6 / 4
    # On two devices each row of three columns is one device's: ceil(0.5 x 3) slots.
    row = gating(trace, values=[0.5], devices=2).table.iloc[0]
    assert row["num_slots"] == 2 * (2 + 2)
    assert row["num_dropped"] == 1


def test_padding_goes_where_its_rows_go():
    one = np.array([[5, 3, 0]])
    sequences = np.array([[2, 1, 0]])
    # Four rows of four columns; one row has ended and goes to the empty device.
    found = dealt(np.array([8]), np.array([4]), num_tokens=one, num_sequences=sequences)
    assert found.tolist() == [[3, 1, 4]]
    # No rectangle: in proportion to tokens.
    found = dealt(np.array([9]), np.array([4]), num_tokens=one, num_sequences=sequences)
    assert found.sum() == 9 and found[0, 2] == 0
    none = dealt(np.array([0]), np.array([3]), num_tokens=one, num_sequences=sequences)
    assert none.tolist() == [[0, 0, 0]]


def test_last_layers_see_one_token_per_row(tmp_path):
    trace = synthetic_trace(
        tmp_path / "t.moeprof", num_requests=4, num_sites=2, batch=4, prune_last_layer=True
    )
    table = gating(trace, values=[1.0]).table.query("phase == 'prefill'")
    assert table["num_tokens"].tolist()[1] == 4
    assert table["num_slots"].tolist()[1] == 16 * 4
    assert table["num_padded_tokens"].tolist() == [0, 0]


def test_drops_are_exact_until_something_was_dropped(tmp_path):
    trace = synthetic_trace(tmp_path / "t.moeprof", num_requests=12, num_sites=3)
    result = gating(trace, values=[0.05, 1.0])
    classes = result.table.groupby(["value", "site"])["drops_class"].agg(set)
    assert classes[0.05].tolist() == [{"exact"}, {"estimate"}, {"estimate"}]
    assert classes[1.0].tolist() == [{"exact"}] * 3
    name = "gating/dropped_share/decoder/decode/token_fraction-{}"
    assert result.metric(name.format(0.05)).figure_class == "estimate"
    assert result.metric(name.format("1")).figure_class == "exact"
    assert result.metric(name.format("1").replace("dropped", "waste").replace("share", "factor"))


def test_own_rule_counts_what_the_recording_dropped(tmp_path):
    trace = synthetic_trace(
        tmp_path / "t.moeprof", num_requests=12, num_sites=2, capacity_factor=1.0
    )
    result = gating(trace, rule="model")
    recorded = trace.layers.dropna(subset=["site"]).groupby("site")["num_dropped"].sum()
    assert result.table.groupby("site")["num_dropped"].sum().tolist() == recorded.tolist()
    assert recorded.sum() > 0
    assert set(result.table["drops_class"]) == {"exact"}
    assert set(result.table["rule"]) == {"capacity_factor"}


@pytest.mark.parametrize("fraction", [0.25, 0.5])
def test_equals_the_drops_of_a_model(tmp_path, fraction):
    torch = pytest.importorskip("torch")
    from moeprof.recording import record
    from moeprof.zoo.dispatch import fix_nllb_dispatch
    from tests.tiny_models import nllb_moe

    model = nllb_moe(moe_eval_capacity_token_fraction=fraction)
    fix_nllb_dispatch(model)
    generator = torch.Generator().manual_seed(3)
    with record(model, tmp_path / "t.moeprof", timing=False), torch.inference_mode():
        for length in (9, 5):
            ids = torch.randint(3, 99, (3, length), generator=generator)
            mask = torch.ones_like(ids)
            mask[0, -2:] = 0
            ids[0, -2:] = 1
            model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=6, do_sample=False)
    trace = open_trace(tmp_path / "t.moeprof")
    assert trace.sites[0].capacity_rule is not None
    table = gating(trace, rule="model").table.set_index(["site", "phase"])
    status = trace.routing(columns=["rank", "step", "site", "position", "request", "status"])
    phase = trace.steps.set_index("step")["phase"]
    status["phase"] = status["step"].map(phase)
    status["dropped"] = status["status"] == schema.SlotStatus.DROPPED
    tokens = status.groupby(["site", "phase", "step", "request", "position"])["dropped"].sum()
    counted = tokens.groupby(["site", "phase"]).agg(
        ["sum", lambda n: (n > 0).sum(), lambda n: (n == 2).sum()]
    )
    assert counted["sum"].sum() > 0
    for key, row in counted.iterrows():
        found = table.loc[key, ["num_dropped", "num_tokens_clipped", "num_tokens_lost"]]
        assert found.tolist() == row.tolist(), key


def test_ranks_that_share_experts_are_one_dispatch(tmp_path):
    trace = synthetic_trace(tmp_path / "t.moeprof", num_requests=8, num_ranks=2, num_sites=1)
    apart = gating(trace, values=[1.0])
    ranks = tuple(replace(rank, expert_parallel=rank.rank) for rank in trace.info.ranks)
    trace.info = replace(trace.info, ranks=ranks)
    together = gating(trace, values=[1.0])
    assert together.table["num_tokens"].sum() == apart.table["num_tokens"].sum()
    assert together.table["num_dispatches"].sum() < apart.table["num_dispatches"].sum()
    assert together.table["num_dispatches"].sum() == trace.steps["step"].nunique()
    trace.info = replace(trace.info, missing_ranks=(1,))
    with pytest.raises(TraceError, match="lacks rank 1"):
        gating(trace, values=[1.0])


def test_shares_of_requests_add_up_and_intervals_hold_the_value(tmp_path):
    trace = synthetic_trace(tmp_path / "t.moeprof", num_requests=30, batch=4)
    stacks = gating(trace, rule="capacity_factor", values=[1.0], devices=2).tables["stacks"]
    for name in ("waste_factor", "dropped_share", "tile_ratio"):
        known = stacks[stacks[f"{name}_low"].notna()]
        assert len(known)
        assert (known[f"{name}_low"] <= known[name]).all()
        assert (known[name] <= known[f"{name}_high"]).all()
    assert stacks["waste_factor"].tolist() == pytest.approx(
        (stacks["num_slots"] / stacks["num_decisions"]).tolist()
    )
    # Without rounding the factor is the capacity factor itself: nothing varies.
    exact = stacks["waste_factor_without_ceiling"]
    assert exact.tolist() == pytest.approx([1.0] * len(stacks))
    assert stacks["waste_factor_without_ceiling_high"].dropna().tolist() == pytest.approx(
        [1.0] * stacks["waste_factor_without_ceiling_high"].notna().sum()
    )


def test_verdicts_name_number_interval_and_ceiling(tmp_path):
    trace = synthetic_trace(tmp_path / "t.moeprof", num_requests=30, batch=4)
    model = replace(trace.info.model, random_weights=False)
    trace.info = replace(trace.info, model=model)
    texts = [finding.text for finding in gating(trace, values=[0.05, 1.0]).findings]
    assert all(text.startswith("Do not try static gating") for text in texts)
    assert all("Do nothing: this run executed the routed rows" in text for text in texts)
    assert all(" to " in text and "No gating can process fewer" in text for text in texts)
    rule = schema.CapacityRule(rule="token_fraction", value=1.0)
    trace.info = replace(
        trace.info, sites=tuple(replace(site, capacity_rule=rule) for site in trace.sites)
    )
    trace.executed["num_executed_rows"] *= 8
    text = gating(trace, rule="model").findings[0].text
    assert text.startswith("Try dynamic gating in decode")
    short = synthetic_trace(tmp_path / "s.moeprof", num_requests=4)
    short.info = replace(short.info, model=model)
    texts = [finding.text for finding in gating(short).findings]
    assert texts[0].startswith("Not enough evidence on static gating")
    assert "record about 6 more" in texts[-1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rule": "fraction"}, "unknown rule"),
        ({"rule": "model"}, "has no capacity rule"),
        ({"values": []}, "no values"),
        ({"values": 0.5}, "several numbers"),
        ({"values": [-1.0]}, "above 0"),
        ({"values": [True]}, "above 0"),
        ({"devices": 0}, "devices"),
        ({"devices": 1.5}, "devices"),
        ({"tile_rows": 0}, "tile_rows"),
        ({"rule": "model", "values": [1.0]}, "takes no values"),
    ],
)
def test_bad_options_are_refused(tmp_path, options, message):
    trace = synthetic_trace(tmp_path / "t.moeprof", num_requests=2, num_sites=1)
    with pytest.raises(UsageError, match=message):
        gating(trace, **options)


def test_intervals_cover_other_traffic_of_the_same_law(tmp_path, monkeypatch):
    from moeprof.trace import synthetic

    truth = synthetic.synthetic_truth

    def one_law(info):
        law = {**info.settings["synthetic"], "seed": 7}
        return truth(replace(info, settings={"synthetic": law}))

    monkeypatch.setattr(synthetic, "synthetic_truth", one_law)
    inside: dict = defaultdict(list)
    for batch in (1, 8, 32):
        found: dict = defaultdict(list)
        for seed in range(16):
            trace = synthetic_trace(
                tmp_path / "t.moeprof",
                force=True,
                num_requests=64,
                num_sites=1,
                seed=seed,
                batch=batch,
                prompt_tokens=16,
                output_tokens=12,
                weights=False,
                executed=False,
                timed=False,
            )
            for row in gating(trace, values=[0.25]).tables["stacks"].to_dict("records"):
                for name in ("waste_factor", "dropped_share", "tile_ratio"):
                    bounds = (row[name], row[f"{name}_low"], row[f"{name}_high"])
                    found[name, row["phase"]].append(bounds)
        for (name, _), rows in found.items():
            values = np.array(rows, float)
            if values[:, 0].std() > 0:
                centre = values[:, 0].mean()
                known = values[np.isfinite(values[:, 1])]
                inside[name].append((known[:, 1] <= centre) & (centre <= known[:, 2]))
    for name, hits in inside.items():
        assert 0.80 <= np.concatenate(hits).mean() <= 0.99, name


def test_a_trace_without_tokens_has_nothing_to_say(tmp_path):
    info = schema.TraceInfo(model=schema.ModelInfo(name="empty"), sites=PAPER_LM.sites)
    TraceWriter.create(tmp_path / "t.moeprof", info).close()
    result = gating(open_trace(tmp_path / "t.moeprof"))
    assert result.table.empty
    assert not result.metrics


def test_unknown_shapes_leave_bytes_unknown(tmp_path):
    tokens = [HandToken(request=r, position=0, experts=[(r,)]) for r in range(3)]
    row = gating(hand_trace(tmp_path / "t.moeprof", [tokens]), values=[1.0]).table.iloc[0]
    assert row["dispatched_bytes"] is None and row["flops"] is None
    assert row["weight_bytes"] == 8 << 20 and row["dynamic_weight_bytes"] == 3 << 20
