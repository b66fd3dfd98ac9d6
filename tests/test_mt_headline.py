"""The headline run of the translation model, and one rank's share, at tiny sizes on the CPU."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import time
import weakref

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402
from torch.utils._pytree import tree_leaves  # noqa: E402

from analysis import live_mt_parts  # noqa: E402
from analysis.gpu import (  # noqa: E402
    headline_runs,
    headline_series,
    mt_headline,
    mt_routing,
    rank_share,
)
from analysis.gpu.headline_runs import ForcedGate, RunLimits, StepCursor  # noqa: E402
from analysis.gpu.mt_stacks import (  # noqa: E402
    MT_CONFIG,
    MtDecoder,
    MtEncoder,
    UnpaddedFfn,
    dense_config,
    widen,
)
from analysis.live_gating_parts import ONCE_TITLE  # noqa: E402
from moeprof.live.application import apply_gating  # noqa: E402
from moeprof.live.kernels import KERNELS, kernel_named  # noqa: E402
from moeprof.live.paper_lm import PaperExperts, PaperFfn, PaperLmConfig  # noqa: E402
from moeprof.replay.capacity import PAPER_LM, PAPER_MT  # noqa: E402
from moeprof.reporting.document import assembled  # noqa: E402
from moeprof.reporting.layout import ReadingData  # noqa: E402
from moeprof.reporting.writing import Report  # noqa: E402
from moeprof.trace.synthetic import synthetic_trace  # noqa: E402

TINY = dataclasses.replace(
    MT_CONFIG, vocab_size=50, num_layers=8, d_model=16, d_ff=32, num_heads=2, num_experts=8
)


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all storages that operations made and that are still alive."""

    def __init__(self, *given):
        super().__init__()
        self.now = self.peak = 0
        self.known = {tensor.untyped_storage()._cdata for tensor in given}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor):
                self._count(leaf.untyped_storage())
        self.peak = max(self.peak, self.now)
        return out

    def _count(self, storage):
        key = storage._cdata
        if key in self.known:
            return
        self.known.add(key)
        size = storage.nbytes()
        self.now += size

        def gone():
            self.now -= size
            self.known.discard(key)

        weakref.finalize(storage, gone)


@pytest.fixture(scope="module")
def traces(tmp_path_factory):
    folder = tmp_path_factory.mktemp("traces")
    shape = {"num_requests": 24, "seed": 1, "prompt_tokens": 24, "output_tokens": 12}
    mt = synthetic_trace(
        folder / "mt.moeprof", num_sites=6, num_experts=128, layer_stride=4,
        stacks=("encoder", "decoder"), **shape,
    )  # fmt: skip
    small = synthetic_trace(
        folder / "small.moeprof", num_sites=2, num_experts=8, layer_stride=4,
        stacks=("encoder", "decoder"), **shape,
    )  # fmt: skip
    lm = synthetic_trace(folder / "lm.moeprof", num_sites=12, num_experts=512,
                         num_requests=8, prompt_tokens=256, length_spread=0.0)  # fmt: skip
    return {"mt": str(mt.path), "small": str(small.path), "lm": str(lm.path)}


@pytest.fixture(scope="module")
def result(traces, tmp_path_factory):
    folder = tmp_path_factory.mktemp("out")
    given = ["--tiny", "--out", str(folder), "--routing", traces["mt"]]
    assert mt_headline.main([*given, "--lm-routing", traces["lm"]]) == 0
    return json.loads((folder / mt_headline.RESULT).read_text())


def test_the_shape_is_the_papers():
    encoder = MtEncoder(device="meta")
    decoder = MtDecoder(device="meta", embedding=encoder.embedding)
    every = {id(p): p for stack in (encoder, decoder) for p in stack.parameters()}
    assert sum(p.numel() for p in every.values()) == PAPER_MT.num_params
    for stack in (encoder, decoder):
        assert [i for i, layer in enumerate(stack.layers) if layer.routes] == [3, 7, 11, 15, 19, 23]
        experts = [moe.experts for moe in stack.moes]
        held = sum(p.numel() * 2 for moe in experts for p in moe.parameters())
        assert held / 2**30 == pytest.approx(6 * 8, rel=0.001)
        assert experts[0].w_in.shape == (128, 8192, 2048)


def test_the_dense_twin_has_equal_operations():
    stack = MtEncoder(dense_config(TINY), device="cpu")
    widen(stack, TINY, "cpu")
    widths = [layer.ffn.w_in.out_features for layer in stack.layers]
    assert widths == [64 if TINY.is_moe_layer(i) else 32 for i in range(8)]
    assert not any(isinstance(module, PaperExperts) for module in stack.modules())
    assert all(not p.requires_grad for p in stack.parameters())
    assert all(isinstance(layer.ffn, PaperFfn) for layer in stack.layers)


@torch.no_grad()
def test_the_dense_twin_leaves_padding_to_no_wider_network(traces):
    """Its output is that of the same networks on all positions, which padding has none of."""
    recorded = mt_routing.encoder_batches(traces["small"], TINY, 4, "cpu")
    stack = MtEncoder(dense_config(TINY), device="cpu").double()
    widen(stack, TINY, "cpu")
    stack.double()
    wide = [layer.ffn for layer in stack.layers if isinstance(layer.ffn, UnpaddedFfn)]
    assert len(wide) == sum(TINY.is_moe_layer(index) for index in range(TINY.num_layers)) > 0
    widths = []
    for network in wide:
        network.w_in.register_forward_hook(lambda _, given, __: widths.append(given[0].shape[:-1]))
    tokens = torch.randint(50, (4, mt_routing.LENGTH))
    padded = stack(tokens, recorded.keep)
    assert set(widths) == {(4, mt_routing.LENGTH)}
    widths.clear()
    batch, run = mt_headline.passes("mt-encoder", stack, recorded, StepCursor())(4)
    run()
    assert batch == recorded.keep.sum() < 4 * mt_routing.LENGTH
    assert set(widths) == {(batch,)}
    again = stack(tokens, recorded.keep)
    torch.testing.assert_close(again[recorded.keep], padded[recorded.keep])
    hidden = torch.randn(4, mt_routing.LENGTH, TINY.d_model, dtype=torch.float64)
    assert not wide[0](hidden)[~recorded.keep].any() and wide[0](hidden)[recorded.keep].all()


@torch.no_grad()
def test_padding_changes_nothing_and_experts_do(traces):
    recorded = mt_routing.encoder_batches(traces["small"], TINY, 4, "cpu")
    stack = MtEncoder(TINY, device="cpu").double()
    mt_headline.force(stack, recorded.choices)
    tokens = torch.randint(50, (4, mt_routing.LENGTH))
    keep = recorded.keep
    assert not keep.all() and keep.any(dim=1).all()
    with apply_gating(stack, "static_mask", token_fraction=1.0):
        before = stack(tokens, keep)
        after = stack(torch.where(keep, tokens, 0), keep)
    assert torch.equal(before[keep], after[keep])
    with apply_gating(stack, "dynamic"):
        dynamic = stack(tokens, keep)
    torch.testing.assert_close(before[keep], dynamic[keep])
    for moe in stack.moes:
        moe.experts.w_out.zero_()
    with apply_gating(stack, "dynamic"):
        assert (stack(tokens, keep)[keep] - dynamic[keep]).abs().max() > 0.01


@torch.no_grad()
def test_a_decode_step_is_the_last_of_a_longer_decoding():
    """Cross-attention and the cache against attention written out."""
    stack = MtDecoder(dense_config(TINY), device="cpu").double()
    encoded = torch.randn(3, 7, 16, dtype=torch.float64)
    cross = stack.layers[0].cross_attention
    rows = torch.randn(3, 1, 16, dtype=torch.float64)
    key, value = cross.keys_values(encoded)
    query = cross.query(rows).view(3, 2, 8)
    both = cross.key_value(encoded)
    keys, values = both[..., :16].view(3, 7, 2, 8), both[..., 16:].view(3, 7, 2, 8)
    scores = torch.einsum("bhw,bshw->bhs", query, keys) / math.sqrt(8)
    mixed = torch.einsum("bhs,bshw->bhw", scores.softmax(-1), values).reshape(3, 1, 16)
    torch.testing.assert_close(cross(rows, key, value), cross.out(mixed))
    state = stack.begin(encoded, past_tokens=5, max_tokens=6)
    tokens = torch.randint(50, (3, 1))
    assert torch.equal(stack(tokens, state), stack(tokens, state))
    assert state.past.get_seq_length() == 5
    assert stack(tokens, state).shape == (3, 1)


def test_sentences_come_as_they_were_recorded(traces):
    recorded = mt_routing.encoder_batches(traces["small"], TINY, 30, "cpu")
    frame = mt_routing.open_trace(traces["small"]).routing(stack="encoder")
    known = set()
    for _, own in frame.groupby(["step", "request"], sort=False):
        by_slot = own.pivot_table(index=["position"], columns=["site", "slot"], values="expert")
        if mt_routing.SHORTEST <= len(by_slot) <= mt_routing.LENGTH:
            known.add(by_slot.to_numpy().astype(int).tobytes())
    ids = torch.cat([own[0][0] for own in recorded.choices], dim=1)
    ids = ids.view(30, mt_routing.LENGTH, -1)
    found = {ids[i][recorded.keep[i]].numpy().tobytes() for i in range(30)}
    assert found == known and recorded.num_distinct == len(known)
    padding = recorded.keep.logical_not()
    assert (ids[padding] == -1).all() and (ids[recorded.keep] >= 0).all()
    assert recorded.num_tokens(3) == int(recorded.keep[:3].sum())


def test_steps_come_as_they_were_recorded(traces):
    recorded = mt_routing.decoder_steps(traces["small"], TINY, 40, "cpu")
    frame = mt_routing.open_trace(traces["small"]).routing(stack="decoder")
    frame = frame[frame["phase"] == "decode"]
    seen = {
        tuple(own.sort_values(["site", "slot"])["expert"])
        for _, own in frame.groupby(["step", "request", "position"])
    }
    steps = len(recorded.choices[0])
    assert 1 < steps <= mt_routing.DECODE_STEPS
    for step in range(steps):
        ids = torch.cat([own[step][0] for own in recorded.choices], dim=1)
        assert ids.shape == (40, 4)
        assert set(map(tuple, ids.tolist())) <= seen
    assert recorded.num_tokens(7) == 7


def test_uniform_control_keeps_padding_and_draws_distinct_experts(traces):
    recorded = mt_routing.encoder_batches(traces["small"], TINY, 30, "cpu")
    control = mt_routing.uniform_control(recorded, TINY)
    ids = control.choices[0][0][0]
    flat = recorded.keep.reshape(-1)
    assert (ids[~flat] == -1).all()
    assert (ids[flat][:, 0] != ids[flat][:, 1]).all()
    counts = np.bincount(ids[flat].reshape(-1), minlength=8)
    assert counts.min() > 0.5 * counts.mean()
    assert control.active_experts(30) == 8


def test_gates_follow_the_cursor():
    class Own(torch.nn.Module):
        def forward(self, hidden):
            self.rows = len(hidden)

    choices = [(torch.full((5, 2), step), torch.ones(5, 2)) for step in range(3)]
    cursor = StepCursor(num_steps=3)
    gate = ForcedGate(Own(), choices, cursor)
    seen = []
    for _ in range(4):
        seen.append(gate(torch.zeros(2, 4, dtype=torch.float64))[0][0, 0].item())
        cursor.advance()
    assert seen == [0, 1, 2, 0] and gate.gate.rows == 2


def test_batches_that_would_take_too_long_are_not_tried():
    def prepare(batch):
        return batch, lambda: time.sleep(0.002)

    limits = RunLimits(seconds=0, least_repeats=2, point_seconds=1.0)
    run = headline_runs.run_gating("x", (1, 2, 1000, 2000), prepare, "cpu", limits=limits)
    assert [row["batch"] for row in run.rows] == [1, 2]
    assert [row["batch"] for row in run.skipped] == [1000, 2000]
    assert all("predicted" in row["reason"] for row in run.skipped)
    over = dataclasses.replace(limits, deadline_s=time.monotonic() - 1)
    run = headline_runs.run_gating("x", (1,), prepare, "cpu", limits=over)
    assert not run.rows and "time given" in run.skipped[0]["reason"]


def test_a_series_ends_where_memory_does():
    def prepare(batch):
        def run():
            if batch > 2:
                raise torch.OutOfMemoryError("no more\nat all")

        return batch, run

    run = headline_runs.run_gating("x", (1, 2, 3, 4), prepare, "cpu")
    assert [row.get("out_of_memory") for row in run.rows] == [None, None, "no more"]


def test_everything_is_written(result):
    assert result["tiny"] and set(result["parts"]) == set(mt_headline.PARTS)
    for name in ("mt-encoder", "mt-decoder"):
        part = result["parts"][name]
        assert {row["gating"] for row in part["rows"]} == {"dense", *KERNELS}
        # Two batches are listed, a third one is twice as large, and there it ends.
        assert len(part["rows"]) == 3 * (1 + len(KERNELS)) and not part["once"]
        assert {row["batch"] for row in part["skipped"]} == {2 * mt_headline.TINY_MOST_BATCH}
        assert {each["gating"] for each in part["endings"]} == {"dense", *KERNELS}
        assert all("larger than 4" in each["said"] for each in part["endings"])
        assert {row["baseline"] for row in part["headline"]} == {"dense", *KERNELS} - {"dynamic"}
        assert part["published"]["single_node"] < part["published"]["multi_node"]
        assert [row["batch"] for row in part["control"]["rows"]] == [1, 2]
        assert len(part["control"]["headline"]) == len(KERNELS)
        for each in (*part["headline"], *part["control"]["headline"]):
            assert each["best_repetitions"] == each["baseline_repetitions"] == 20
            assert each["equal_terms_repetitions"] in (20, None)
        assert {row["batch"] for row in part["active_experts"]} == {1, 2, 4}
        for row in part["rows"]:
            rate = row["num_tokens"] / np.median(row["times_ms"]) * 1e3
            assert row["tokens_per_s"] == pytest.approx(rate, rel=1e-3)
    encoded = result["parts"]["mt-encoder"]["rows"]
    assert all(17 <= row["num_tokens"] / row["batch"] <= 32 for row in encoded)
    assert len(result["source_sha256"]) == 64
    assert result["wall_s"] >= sum(result["seconds_by_part"].values()) * 0.9


def test_sentences_come_again_in_batches_larger_than_what_is_held(traces):
    held = mt_routing.encoder_batches(traces["small"], TINY, 3, "cpu")
    more = mt_routing.RecordedBatches(
        choices=held.choices, keep=held.keep.repeat(3, 1), said="", num_distinct=3
    )
    assert held.num_tokens(8) == more.num_tokens(8)
    assert held.active_experts(8) == held.active_experts(3)
    stack = MtEncoder(TINY, device="cpu")
    cursor = mt_headline.force(stack, held.choices)
    prepare = mt_headline.passes("mt-encoder", stack, held, cursor)
    num_tokens, run = prepare(8)
    assert num_tokens == more.num_tokens(8)
    with torch.no_grad(), apply_gating(stack, "dynamic"):
        assert run().shape == (8, mt_routing.LENGTH, 16)


def test_who_takes_all_the_time_there_is_leaves_some_for_the_control(traces, tmp_path, monkeypatch):
    """On a clock that only these steps move."""

    class Clock:
        now = 0.0

        def monotonic(self):
            return self.now

    clock, given = Clock(), {}

    def taking(kind):
        def take(self, name, *_, until_s, **__):
            given[self.label, kind, str(name)] = until_s - clock.now
            clock.now = max(clock.now, until_s)

        return take

    for module in (mt_headline, headline_series):
        monkeypatch.setattr(module, "time", clock)
    for kind in ("sweep", "climb", "revisit"):
        monkeypatch.setattr(mt_headline.Series, kind, taking(kind))
    arguments = ["--tiny", "--out", str(tmp_path), "--routing", traces["mt"], "--seconds", "100"]
    assert mt_headline.main([*arguments, "--parts", "mt-encoder", "mt-decoder"]) == 0
    for part in ("mt-encoder", "mt-decoder"):
        label = f"{part}: control"
        assert given[label, "sweep", "dynamic"] > 2
        for name in mt_headline.GATINGS:
            assert given[part, "sweep", name] > 0 and given[part, "climb", name] > 0
    assert clock.now == pytest.approx(100)


def test_time_that_is_up_is_said(traces, tmp_path):
    given = ["--tiny", "--out", str(tmp_path), "--routing", traces["mt"], "--seconds", "0"]
    assert mt_headline.main([*given, "--parts", "rank-share", "mt-encoder"]) == 0
    written = json.loads((tmp_path / mt_headline.RESULT).read_text())
    assert all("time given" in part["not_run"] for part in written["parts"].values())


def lm_routing(num_experts=64, tokens=96, seed=0):
    rng = np.random.default_rng(seed)
    chance = rng.random((rank_share.RANKS * tokens, num_experts)) ** 0.2
    chance *= np.linspace(0.8, 1, num_experts)
    ids = torch.from_numpy(np.argsort(-chance, axis=1)[:, :2].copy())
    return [(ids, torch.full(ids.shape, 0.5))]


def test_a_ranks_routing_is_counted():
    choices = lm_routing()
    rank, (routing,) = rank_share.rank_routing(choices, 64, "cpu")
    ids = choices[0][0].numpy()
    received = [((ids // 8) == r).sum() for r in range(rank_share.RANKS)]
    assert rank == int(np.argmax(received)) and routing.num_received == max(received)
    assert routing.num_own == 2 * 96
    mine = ids[rank * 96 : (rank + 1) * 96]
    assert torch.equal(routing.own[0], torch.from_numpy(mine))
    for sender in range(rank_share.RANKS):
        rows = ids[sender * 96 : (sender + 1) * 96]
        for expert in range(8):
            assert routing.counts[sender, expert] == (rows == rank * 8 + expert).sum()


def test_fairseq_mask_is_the_lean_mask():
    ids = torch.tensor([[0, 1], [0, 2], [0, -1], [2, 0], [1, 0]])
    weights = torch.rand(5, 2)
    for slots in (1, 2, 5):
        lean = rank_share.combine_mask(ids, weights, 3, slots)
        assert torch.equal(rank_share.fairseq_mask(ids, weights, 3, slots), lean)


@pytest.mark.parametrize("gating", [*rank_share.STATIC, "dynamic_loop"])
@torch.no_grad()
def test_a_layers_memory_is_as_arithmetic_says(gating):
    """The peak of all storages a layer makes, counted one by one on the CPU."""
    config = PaperLmConfig(vocab_size=8, num_layers=1, moe_every=1, d_model=64, d_ff=256,
                           num_heads=2, num_experts=64)  # fmt: skip
    tokens, fraction = 384, 0.25
    own = dataclasses.replace(config, num_experts=8)
    block = rank_share.PaperMoe(own, device=torch.device("cpu"), dtype=torch.bfloat16)
    for parameter in block.parameters():
        parameter.normal_()
    layer = rank_share.RankMoe(config, block, fraction)
    _, (routing,) = rank_share.rank_routing(lm_routing(tokens=tokens), 64, "cpu")
    layer.route(gating, routing)
    # The gate's logits are of no account at the paper's width; here they would be.
    layer.gate.gate.forward = lambda _: None
    hidden = torch.randn(1, tokens, 64).bfloat16()
    layer(hidden)
    with LiveBytes(hidden, *layer.parameters(), *routing.own, routing.counts) as live:
        out = layer(hidden)
    expected = rank_share.moe_layer_bytes(
        gating, config, num_tokens=tokens, fraction=fraction, routing=routing
    )
    stream = 2 * hidden.nbytes
    assert out.shape == hidden.shape
    assert live.peak == pytest.approx(expected - stream, rel=0.2)


@torch.no_grad()
def test_a_rank_with_all_experts_computes_the_layer(monkeypatch):
    """With one rank nothing crosses, so values are real: they must be those of the kernels."""
    monkeypatch.setattr(rank_share, "RANKS", 1)
    config = PaperLmConfig(vocab_size=8, num_layers=1, moe_every=1, d_model=32, d_ff=64,
                           num_heads=2, num_experts=8)  # fmt: skip
    block = rank_share.PaperMoe(config, device=torch.device("cpu"), dtype=torch.float64)
    for parameter in block.parameters():
        parameter.normal_()
    layer = rank_share.RankMoe(config, block, 1.0)
    (ids, weights) = lm_routing(num_experts=8, tokens=24)[0]
    ids[4] = -1
    _, (routing,) = rank_share.rank_routing([(ids, weights)], 8, "cpu")
    hidden = torch.randn(1, 24, 32, dtype=torch.float64)
    own = block.experts
    experts = rank_share.ExpertWeights(
        w_in=own.w_in, w_out=own.w_out, b_in=own.b_in, b_out=own.b_out, activation="relu"
    )
    expected = kernel_named("dynamic_loop")(hidden[0], ids, weights.double(), experts)
    for gating in rank_share.GATINGS:
        layer.route(gating, routing)
        torch.testing.assert_close(layer(hidden)[0], expected, rtol=1e-5, atol=1e-5)


def test_one_ranks_share_is_the_papers(result):
    part = result["parts"]["rank-share"]
    assert part["ranks"] == 8 and part["published"] == {"lm": 1.36, "mt": 1.1}
    judged = {each["model"]: each for each in part["settings"] if each["judged"]}
    assert set(judged) == {"lm", "mt"}
    for each in part["settings"]:
        assert [row["gating"] for row in each["rows"]] == list(rank_share.GATINGS)
        assert all(row["peak_bytes"] is None for row in each["rows"])
        assert each["ratios"]["static_mask over dynamic"] is None
        assert each["rows_received_most"] >= each["rows_received_mean"] > 0


@pytest.mark.parametrize(("whole", "config"), [(PAPER_LM, PaperLmConfig()), (PAPER_MT, MT_CONFIG)])
def test_weights_of_a_share_are_those_that_the_replay_computes(whole, config):
    """Without a device: the same modules on no device."""
    if whole is PAPER_LM:
        share = rank_share.lm_share(config, 1, 8, 0.05, "meta")
    else:
        keep = torch.ones(1, 8, dtype=torch.bool, device="meta")
        share = rank_share.mt_share(config, keep, 1.0, 4, "meta")
    predicted = mt_headline.predicted_weight_bytes(whole, config, len(share.blocks))
    assert share.weight_bytes == predicted
    assert len(share.blocks) == 12


@pytest.fixture(scope="module")
def counted(result):
    """The result as a device that counts memory would have written it."""
    data = copy.deepcopy(result)
    for each in data["parts"]["rank-share"]["settings"]:
        for row in each["rows"]:
            row["peak_bytes"] = row["predicted_bytes"]
            row["activation_bytes"] = row["predicted_bytes"] - row["weight_bytes"]
        each["ratios"] = mt_headline.ratios(each["rows"], "peak_bytes")
    for name in live_mt_parts.STACKS:
        own = data["parts"][name]
        own["skipped"] = [{"gating": "dynamic", "batch": n, "reason": "too slow"} for n in (8, 4)]
        own["breakdown"] = [
            {"gating": "dynamic", "batch": 2, "parts_ms": {"all": 3.0, "gate": 1.0, "head": 0.5}}
        ]
        for row in own["rows"]:
            row["extra_bytes"] = row["num_tokens"] << 20
        out = {"gating": "static_mask", "batch": 4, "out_of_memory": "no more"}
        own["rows"].append(out)
    return data


def test_goals_are_held_to_the_rows(counted):
    goals = {goal.quantity: goal for goal in live_mt_parts.mt_goals(counted)}
    assert len(goals) == 4
    for name, label in live_mt_parts.STACKS.items():
        (goal,) = [goal for goal in goals.values() if goal.quantity.startswith(label)]
        rates = {}
        for row in counted["parts"][name]["rows"]:
            if "times_ms" in row:
                rate = row["num_tokens"] / np.median(row["times_ms"]) * 1e3
                rates[row["gating"]] = max(rate, rates.get(row["gating"], 0))
        gain = float(goal.found.partition("x")[0])
        assert gain == pytest.approx(rates["dynamic"] / rates["static_mask"], abs=0.011)
        assert goal.met is None and "uniform" in goal.found
    settings = counted["parts"]["rank-share"]["settings"]
    for model, least in (("lm", 1.36), ("mt", 1.1)):
        (setting,) = [each for each in settings if each["model"] == model and each["judged"]]
        peaks = {row["gating"]: row["peak_bytes"] for row in setting["rows"]}
        ratio = peaks["static_mask"] / peaks["dynamic"]
        label = live_mt_parts.MODELS[model]
        (goal,) = [goal for goal in goals.values() if goal.quantity.startswith(label)]
        assert goal.found.startswith(f"{ratio:.2f}x") and goal.met == (ratio >= least)
        assert goal.goal == f"at least {least:g}x"
        assert setting["tokens_per_rank"] == max(
            each["tokens_per_rank"] for each in settings if each["model"] == model
        )


def test_the_part_shows_every_section(counted, tmp_path):
    described = live_mt_parts.mt_part(counted)
    reading = ReadingData(eyebrow="e", part="p", range="r", ranges="s", method=[])
    text = Report(assembled([described], title="t", reading=reading)).markdown
    for label in (*live_mt_parts.STACKS.values(), "One rank's share"):
        assert label in text
    assert "timed up to batch" in text and "too slow" not in text
    assert "Not among these results" not in text
    # Results from before every series said how it ended.
    before = copy.deepcopy(counted)
    for part in before["parts"].values():
        part.pop("endings", None)
    described = live_mt_parts.mt_part(before)
    text = Report(assembled([described], title="t", reading=reading)).markdown
    assert "batches from 4 up: too slow" in text
    rows = live_mt_parts.mt_rows(counted)
    assert set(rows) == {"mt-encoder", "mt-decoder", "rank-share"}
    assert len(rows["rank-share"]) == 4 * len(rank_share.GATINGS)
    assert len(live_mt_parts.mt_readme_rows(counted)) == 3
    live_mt_parts.draw_mt(counted, tmp_path / "mt.png")
    assert (tmp_path / "mt.png").stat().st_size > 5000


def shown(data):
    """The tables, the notes and the facts of the part that the page makes of a result."""
    described = live_mt_parts.mt_part(data).data
    tables = {
        (section["title"], table["title"]): table["rows"]
        for section in described["sections"]
        for table in section["tables"]
    }
    notes = " ".join(note for section in described["sections"] for note in section["notes"])
    return tables, notes, {fact["label"]: fact["lines"] for fact in described["facts"]}


def test_what_ran_once_and_the_control_are_shown(counted):
    data = copy.deepcopy(counted)
    encoder, decoder = (data["parts"][name] for name in live_mt_parts.STACKS)
    encoder["once"] = []
    decoder.pop("once")
    encoder["control"]["rows"] = []
    tables, notes, facts = shown(data)
    assert not any(title == ONCE_TITLE for _, title in tables)
    control = "On uniform routing, which keeps all experts busy in large batches"
    assert ("MT decoder", control) in tables and ("MT encoder", control) not in tables
    batches = [row["batch"] for row in tables["MT decoder", control]]
    assert batches == [row["batch"] for row in decoder["control"]["rows"]]
    once = headline_runs.run_once(lambda batch: (32 * batch, lambda: None), 64, "cpu")
    once |= {"gating": "dynamic", "pass_ms": 8000.0, "extra_bytes": 5 << 30}
    encoder["once"] = [once]
    reason = "the time given to this gating is up"
    encoder["control"]["skipped"] = [
        {"gating": "dynamic", "batch": batch, "reason": reason} for batch in (96, 48)
    ]
    tables, notes, facts = shown(data)
    ((row,),) = [rows for (_, title), rows in tables.items() if title == ONCE_TITLE]
    # 64 sentences of 32 tokens in 8 s.
    assert row["tokens_per_s"] == 256 and row["pass_ms"] == 8000
    assert f"On uniform routing not tried: {live_mt_parts.GATINGS['dynamic']}, batches from 48" in (
        notes
    )
    assert set(live_mt_parts.mt_rows(data)) >= {"mt-encoder-once"}
    assert "mt-decoder-once" not in live_mt_parts.mt_rows(data)
    assert facts["Model, MT encoder"][0].startswith("24 layers, one in 4 with 128 experts, top-2")
    (code,) = facts["Code"]
    assert code.startswith(f"sha256 {data['source_sha256'][:16]} of the package moeprof, ")
    assert ("MT encoder", "What moeprof's gains rest on") in tables


def test_padding_that_the_dense_twin_computed_is_said(counted):
    """In runs from before it left padding out."""
    data = copy.deepcopy(counted)
    own = data["parts"]["mt-encoder"]
    told = str(live_mt_parts.mt_part(data).findings)
    assert "also computes padding" not in told and "dense twin of equal FLOPs is" in told
    del own["dense_leaves_out_padding"]
    told = str(live_mt_parts.mt_part(data).findings)
    rows = [row for row in own["rows"] if row["gating"] == "dense" and "num_tokens" in row]
    share = sum(row["num_tokens"] for row in rows) / sum(32 * row["batch"] for row in rows)
    assert f"it also computes padding, {100 * (1 - share):.0f}% of all positions" in told
    # Of d_model 16 and d_ff 32, four layers: 8,192 for attention, 6,144 for networks, 4,096 wide.
    more = (8192 + 6144 + 4096) / (8192 + 6144 + 4096 * share)
    assert f"and so {more:.2f} times the operations" in told
    for row in rows:
        row["num_tokens"] = 32 * row["batch"]
    assert "also computes padding" not in str(live_mt_parts.mt_part(data).findings)


def test_parts_that_wait_for_the_host_are_said(counted):
    data = copy.deepcopy(counted)
    own = data["parts"]["mt-encoder"]
    (whole,) = [row for row in own["rows"] if (row["gating"], row["batch"]) == ("dynamic", 2)]
    own["breakdown"][0]["parts_ms"]["all"] = 2.2 * whole["median_ms"]
    _, notes, _ = shown(data)
    assert "a pass of batch 2 takes longer than whole: " in notes
    assert f"{live_mt_parts.GATINGS['dynamic']} 2.2 times. There the device waits" in notes
    own["breakdown"][0]["parts_ms"]["all"] = 1.1 * whole["median_ms"]
    _, notes, _ = shown(data)
    assert "{} 2.2 times".format(live_mt_parts.GATINGS["dynamic"]) not in notes


def test_the_ratio_at_half_the_tokens_stands_beside_the_judged(counted):
    (row,) = [each for each in live_mt_parts.mt_readme_rows(counted) if "share of 8" in each[0]]
    settings = counted["parts"]["rank-share"]["settings"]
    said = []
    for model in ("lm", "mt"):
        judged, fewer = sorted(
            (each for each in settings if each["model"] == model),
            key=lambda each: -each["tokens_per_rank"],
        )[:2]
        assert judged["judged"] and 2 * fewer["tokens_per_rank"] == judged["tokens_per_rank"]
        said.append(f"{fewer['ratios'][live_mt_parts.JUDGED_RATIO]:.2f}x")
    assert row[1].endswith(
        f"; the paper does not say how many tokens: with half of them {', '.join(said)}"
    )


def test_repetitions_of_the_script_are_those_that_gains_ask_for(counted):
    tables, notes, _ = shown(counted)
    rows = tables["MT decoder", "What moeprof's gains rest on"]
    assert {row["its_repetitions"] for row in rows} == {headline_series.JUDGED_REPEATS}
    assert "20 repetitions each" in notes and "Not measured again" not in notes


def test_what_a_ranks_share_rests_on_is_said(counted):
    data = copy.deepcopy(counted)
    share = data["parts"]["rank-share"]
    lm, mt = live_mt_parts.judged_settings(share).values()
    lm |= {"rank": 4, "rows_received_most": 19333, "rows_received_mean": 16567.25}
    weights = lm["rows"][0]["weight_bytes"]
    lm["weight_bytes_by_shape"] = weights
    mt["weight_bytes_by_shape"] = mt["rows"][0]["weight_bytes"] + 1024
    share["skipped"] = [{"model": "mt", "batch_per_rank": 6, "reason": "no time"}]
    _, notes, _ = shown(data)
    assert "rank 4, whose largest layer receives 19,333 rows, a mean one 16,567" in notes
    ratio = lm["predicted_ratios"][live_mt_parts.JUDGED_RATIO]
    assert f"by arithmetic static over dynamic is {ratio:.2f}" in notes
    assert notes.count("as arithmetic on shapes has it.") == 1
    assert "arithmetic on shapes has +1,024 bytes." in notes
    assert "Not run: MT of 54.5B, 6 sequences a rank: no time." in notes
    # On a CPU the weights are not held to arithmetic.
    lm["weight_bytes_by_shape"] = mt["weight_bytes_by_shape"] = None
    assert "arithmetic on shapes has" not in shown(data)[1]


def test_what_was_not_run_is_not_measured(counted, result):
    assert all(goal.verdict == "not measured" for goal in live_mt_parts.mt_goals(None))
    assert len(live_mt_parts.mt_goals(None)) == 4
    # On the CPU memory is not counted.
    assert live_mt_parts.ran(result, "rank-share") is None
    part = copy.deepcopy(counted)
    part["parts"]["mt-decoder"] = {"not_run": "time"}
    del part["parts"]["rank-share"]
    verdicts = [goal.verdict for goal in live_mt_parts.mt_goals(part)]
    assert verdicts == ["no goal set", *["not measured"] * 3]
    assert live_mt_parts.mt_part(part).data["banners"] == [
        "Not among these results: mt-decoder, rank-share."
    ]
    nothing = {**part, "parts": {}}
    assert not live_mt_parts.mt_rows(nothing) and not live_mt_parts.mt_readme_rows(nothing)
    assert live_mt_parts.mt_part(nothing).data["sections"] == []
