from __future__ import annotations

import dataclasses
import importlib.util

import pytest
import torch

from moeprof.errors import UsageError
from moeprof.live.experts import ACTIVATIONS, ExpertWeights, random_experts
from moeprof.live.kernels import KERNELS, dynamic, dynamic_loop, kernel_named
from moeprof.live.kernels.fused import FEW_TOKENS, can_fuse
from moeprof.live.kernels.slots import (
    combine_rows,
    queue_positions,
    rows_by_expert,
    within_capacity,
)

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
# Triton's interpreter multiplies no bfloat16.
HALF = torch.bfloat16 if ON_GPU else torch.float16
TOLERANCE = 5e-3 if ON_GPU else 1e-3
needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton is not installed"
)
# Rows behind the executed ones are whatever memory held; the interpreter computes and drops them.
pytestmark = [
    pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:divide by zero encountered:RuntimeWarning"),
]


def layer(num_tokens, num_experts, top_k, *, width=32, d_ff=40, dtype=torch.float64, **options):
    """Returns (hidden, ids, weights, experts) drawn from a seed."""
    generator = torch.Generator().manual_seed(num_tokens * 31 + num_experts)
    hidden = torch.randn(num_tokens, width, generator=generator, dtype=torch.float64)
    scores = torch.rand(num_tokens, num_experts, generator=generator)
    ids = scores.topk(top_k, dim=1).indices.contiguous()
    weights = torch.rand(num_tokens, top_k, generator=generator)
    experts = random_experts(
        num_experts=num_experts, d_model=width, d_ff=d_ff, dtype=torch.float64, **options
    )
    return (
        hidden.to(DEVICE, dtype),
        ids.to(DEVICE),
        weights.to(DEVICE),
        experts.to(device=DEVICE, dtype=dtype),
    )


def by_definition(hidden, ids, weights, experts):
    """The layer's output, expert by expert and token by token, in double precision."""
    experts = experts.to(dtype=torch.float64)
    out = torch.zeros(hidden.shape, dtype=torch.float64, device=hidden.device)
    function = ACTIVATIONS[experts.activation]
    for token, row in enumerate(hidden.double()):
        for expert, weight in zip(ids[token].tolist(), weights[token].double(), strict=True):
            if expert < 0:
                continue
            inner = experts.w_in[expert] @ row
            if experts.b_in is not None:
                inner = inner + experts.b_in[expert]
            if experts.gated:
                inner = function(inner[: experts.d_ff]) * inner[experts.d_ff :]
            else:
                inner = function(inner)
            result = experts.w_out[expert] @ inner
            if experts.b_out is not None:
                result = result + experts.b_out[expert]
            out[token] += weight * result
    return out


def error(out, reference):
    norm = torch.linalg.vector_norm
    return float(norm(out.double() - reference) / norm(reference).clamp(min=1e-30))


def small_plan(*, pairs):
    """Tiles that small layers fill several of; where pairs may run, tiles of their own."""
    from moeprof.live.kernels.tiles import ManyPlan, PairTiles, ProductTiles

    single = ProductTiles(32, 16, num_stages=2, num_warps=4, programs=1, flatten=not pairs)
    tall = dataclasses.replace(single, flatten=False)
    # 64 columns are the least that the matrix unit takes as its M side.
    short = dataclasses.replace(tall, columns=64, depth=32)
    pair = PairTiles(tall, tall, short, short, slow_stages=1)
    return ManyPlan(single, single, pair if pairs else None)


def test_queues_take_first_choices_before_second_ones():
    # Token 0 and 2 choose 1 first; token 1 chooses 1 second: it waits behind both.
    ids = torch.tensor([[1, 0], [0, 1], [1, 2], [-1, 1]])
    assert queue_positions(ids, 3).tolist() == [[0, 1], [0, 2], [1, 0], [-1, 3]]
    assert within_capacity(ids, 3, 2).tolist() == [[1, 0], [0, -1], [1, 2], [-1, -1]]
    assert within_capacity(ids, 3, None) is ids


def test_rows_are_sorted_by_expert_and_empty_slots_come_last():
    order = rows_by_expert(torch.tensor([[1, -1], [0, 1]]), 3)
    assert order.slots.tolist() == [2, 0, 3, 1]
    assert order.ends.tolist() == [1, 3, 3]


def test_rows_of_empty_slots_add_nothing_whatever_they_hold():
    ids = torch.tensor([[1, -1]])
    order = rows_by_expert(ids, 2)
    rows = torch.tensor([[2.0], [float("nan")]])
    assert combine_rows(rows, order, torch.tensor([[0.5, 9.0]])).tolist() == [[1.0]]


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("activation", ["relu", "silu", "gelu", "gelu_tanh"])
def test_every_kernel_computes_the_definition(name, gated, bias, activation):
    given = layer(11, 5, 2, gated=gated, bias=bias, activation=activation)
    given[1][3, 1] = -1
    given[1][7] = -1
    out = KERNELS[name](*given)
    assert error(out, by_definition(*given)) < 1e-12
    assert out.dtype == given[0].dtype
    assert not out[7].any()


@pytest.mark.parametrize("name", [name for name in KERNELS if name != "static_grouped"])
def test_capacity_drops_the_same_choices_everywhere(name):
    hidden, ids, weights, experts = layer(23, 4, 2, gated=True)
    kept = within_capacity(ids, 4, 5)
    assert int((kept < 0).sum()) > 0
    out = KERNELS[name](hidden, ids, weights, experts, capacity=5)
    assert error(out, by_definition(hidden, kept, weights, experts)) < 1e-12


def test_groups_have_their_own_share_of_the_capacity():
    hidden, ids, weights, experts = layer(10, 3, 1, gated=True)
    ids[:] = 0
    out = KERNELS["static_grouped"](hidden, ids, weights, experts, capacity=4, group_tokens=4)
    # Groups of 4, 4 and 2 tokens; ceil(4 x 4 / 10) = 2 slots each: the first two of each stay.
    kept = torch.tensor([0, 0, -1, -1, 0, 0, -1, -1, 0, 0], device=ids.device)[:, None]
    assert error(out, by_definition(hidden, kept, weights, experts)) < 1e-12


@pytest.mark.parametrize("name", KERNELS)
def test_no_token_and_no_executed_slot(name):
    hidden, ids, weights, experts = layer(6, 3, 2, gated=True, bias=True)
    assert KERNELS[name](hidden[:0], ids[:0], weights[:0], experts).shape == (0, 32)
    nothing = KERNELS[name](hidden, torch.full_like(ids, -1), weights, experts)
    assert not nothing.any()


@needs_triton
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize(
    ("num_tokens", "num_experts", "top_k", "activation"),
    [(1, 8, 2, "relu"), (5, 40, 3, "silu"), (33, 4, 1, "gelu_tanh"), (64, 3, 2, "gelu")],
)
def test_few_tokens_stream_the_active_experts(num_tokens, num_experts, top_k, activation, gated):
    from moeprof.live.kernels.few import StreamTiles, run_few

    given = layer(
        num_tokens, num_experts, top_k, dtype=HALF, gated=gated, bias=num_tokens != 5,
        activation=activation,
    )  # fmt: skip
    tiles = StreamTiles(columns=16, depth=16, num_stages=2, num_warps=4)
    out = run_few(*given, tiles_in=tiles, tiles_out=tiles)
    assert error(out, by_definition(*given)) < TOLERANCE
    again = run_few(*given, tiles_in=tiles, tiles_out=tiles)
    assert torch.equal(out, again)  # The counters were left at zero.


@needs_triton
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize(
    ("num_tokens", "num_experts", "top_k", "activation"),
    # Experts with under 64 rows, between 64 and 128, and several times 128.
    [(70, 40, 2, "relu"), (180, 4, 2, "silu"), (300, 3, 1, "gelu")],
)
def test_many_tokens_run_in_tiles_of_two_heights(num_tokens, num_experts, top_k, activation, gated):
    from moeprof.live.kernels.many import run_many

    given = layer(
        num_tokens, num_experts, top_k, dtype=HALF, gated=gated, bias=True, activation=activation
    )
    plan = small_plan(pairs=False)
    out = run_many(*given, plan=plan)
    assert error(out, by_definition(*given)) < TOLERANCE
    assert torch.equal(out, run_many(*given, plan=plan))


def ids_of(counts):
    """Expert ids [T, 2] that give expert e counts[e] rows, in an order drawn from a seed."""
    rows = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    rows = rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))]
    padded = torch.full((len(rows) + len(rows) % 2,), -1, dtype=torch.int64)
    padded[: len(rows)] = rows
    return padded.reshape(-1, 2).to(DEVICE)


# Rows of each expert: none, one, both short heights and one more, part of a tall tile, one whole,
# one more than that, and several.
EVERY_HEIGHT = [0, 1, 16, 17, 32, 33, 0, 128, 129, 300, 3, 5, 7]


@needs_triton
@pytest.mark.parametrize(
    ("counts", "single"),
    [
        (EVERY_HEIGHT, False),
        ([40, 50, 60, 128], True),
        ([40, 1], False),  # Half of the active experts fill their tall tile in part: still pairs.
        ([40, 41, 1], True),
        ([0, 0, 0, 1], False),
        ([200], False),
        ([0, 0], False),
        ([1, 0, 2] * 300, False),
    ],
)
def test_the_device_chooses_pairs_and_each_row_is_in_one_tile(counts, single):
    from moeprof.live.kernels import tiles
    from moeprof.live.kernels.sorting import sort_rows

    # Slots behind the rows are empty, so that there is always a token.
    ids = torch.cat([ids_of(counts), torch.full((3, 2), -1, device=DEVICE)])
    hidden = torch.randn(len(ids), 16, device=DEVICE, dtype=HALF)
    sent = sort_rows(hidden, ids, len(counts), pairs=True)
    assert sent.counts.tolist() == counts
    assert sent.tables.paired.tolist() == [not single]
    slots = (ids.flatten() >= 0).nonzero().flatten()
    assert torch.equal(sent.rows[sent.place[slots].long()], hidden[slots // 2])
    heights = {"tall": tiles.TALL, "low": tiles.LOW, "high": tiles.HIGH}
    totals = dict(zip(heights, sent.tables.totals.tolist(), strict=True))
    if single:
        assert not any(totals.values())
        return
    assert totals == {
        "tall": sum(-(-count // 128) for count in counts if count > 32),
        "low": sum(0 < count <= 16 for count in counts),
        "high": sum(16 < count <= 32 for count in counts),
    }
    covered = []
    for name, height in heights.items():
        for expert, first, left, _ in getattr(sent.tables, name)[: totals[name]].tolist():
            covered += [(row, expert) for row in range(first, first + min(left, height))]
    owners = [expert for expert, count in enumerate(counts) for _ in range(count)]
    assert sorted(covered) == list(enumerate(owners))


@needs_triton
@pytest.mark.parametrize(("counts", "single"), [([40, 1], False), ([40, 50, 60, 128], True)])
def test_single_products_leave_at_once_where_pairs_run(counts, single):
    from moeprof.live.kernels.many import grouped_product
    from moeprof.live.kernels.sorting import sort_rows

    ids = ids_of(counts)
    hidden, _, _, experts = layer(
        len(ids), len(counts), 2, width=16, dtype=HALF, gated=False, bias=False
    )
    sent = sort_rows(hidden, ids, len(counts), pairs=True)
    out = torch.full((ids.numel(), experts.d_ff), 7.0, device=DEVICE, dtype=HALF)
    grouped_product(sent, sent.rows, experts.w_in, None, out, tiles=small_plan(pairs=True).tiles_in)
    assert bool((out == 7).all()) is not single


@needs_triton
@pytest.mark.parametrize(
    ("gated", "bias", "activation"),
    [(False, True, "relu"), (True, True, "gelu_tanh"), (True, False, "silu")],
)
def test_pairs_compute_the_definition(gated, bias, activation):
    from moeprof.live.kernels.many import run_many

    ids = ids_of(EVERY_HEIGHT)
    # Neither tiles of 32 and 64 columns nor steps of 16 and 32 end where a matrix does.
    hidden, _, weights, experts = layer(
        len(ids), len(EVERY_HEIGHT), 2, width=24, dtype=HALF, gated=gated, bias=bias,
        activation=activation,
    )  # fmt: skip
    given = hidden, ids, weights, experts
    out = run_many(*given, plan=small_plan(pairs=True))
    assert error(out, by_definition(*given)) < TOLERANCE
    single = run_many(*given, plan=small_plan(pairs=False))
    assert error(out, single.double()) < TOLERANCE


@needs_triton
@pytest.mark.parametrize("counts", [[200], [0, 0, 0, 90, 0], [3, 30] * 6, [64] * 4])
def test_pairs_of_any_routing(counts):
    from moeprof.live.kernels.many import run_many

    ids = ids_of(counts)
    hidden, _, weights, experts = layer(
        len(ids), len(counts), 1, dtype=HALF, gated=False, bias=True
    )
    weights = weights.expand(-1, 2).contiguous()
    out = run_many(hidden, ids, weights, experts, plan=small_plan(pairs=True))
    assert error(out, by_definition(hidden, ids, weights, experts)) < TOLERANCE
    again = run_many(hidden, ids, weights, experts, plan=small_plan(pairs=True))
    assert torch.equal(out, again)


@needs_triton
@pytest.mark.parametrize("gated", [False, True])
def test_pairs_are_considered_from_a_mean_number_of_rows_on(gated, monkeypatch):
    from moeprof.live.kernels import tiles

    monkeypatch.setattr(tiles, "PAIR_FROM_ROWS", 10)
    plan = tiles.GATED_PLAN if gated else tiles.PLAN
    assert tiles.plan_for(80, 8, gated=gated) == plan
    assert tiles.plan_for(79, 8, gated=gated) == dataclasses.replace(plan, pair=None)
    monkeypatch.setattr(tiles, "PAIR_FROM_ROWS", None)
    assert tiles.plan_for(1 << 20, 8, gated=gated).pair is None


def test_programs_of_a_pair_fit_a_multiprocessor_together():
    from moeprof.live.kernels import tiles

    for plan, gated in ((tiles.PLAN, False), (tiles.GATED_PLAN, True)):
        for name in ("in", "out"):
            tall, short = (getattr(plan.pair, f"{kind}_{name}") for kind in ("tall", "short"))
            matrices = 2 if gated and name == "in" else 1
            steps = [
                (height + matrices * each.columns) * each.depth * 2 * each.num_stages
                for each, height in ((tall, tiles.TALL), (short, tiles.HIGH))
            ]
            # 1 KiB is the driver's, and some bytes of each are barriers.
            assert sum(size + 1024 + 256 for size in steps) <= 228 * 1024
            assert short.columns % 64 == 0  # What the matrix unit takes as its M side.


def test_short_products_that_make_no_one_launch_are_refused():
    from moeprof.live.kernels.tiles import PLAN

    pair, change = PLAN.pair, dataclasses.replace
    # Other columns are what gated experts need.
    change(pair, short_in=change(pair.short_in, columns=64))
    with pytest.raises(ValueError, match="one launch"):
        change(pair, short_in=change(pair.short_in, depth=32))
    for wrong in ({"programs": 2}, {"flatten": True}, {"registers": 100}):
        short = change(pair.short_in, **wrong)
        with pytest.raises(ValueError, match="one program per multiprocessor"):
            change(pair, short_in=short, short_out=short)
    most = pair.short_in.num_stages - 1
    change(pair, slow_stages=most)
    for stages in (0, most + 1):
        with pytest.raises(ValueError, match=f"from 1 to {most}: {stages}"):
            change(pair, slow_stages=stages)


@needs_triton
@pytest.mark.parametrize(
    ("done", "total", "now", "begun", "ahead"),
    [
        (0, 100, 0, 0, False),  # Nobody has begun.
        (1, 100, 0, 0, True),
        (50, 100, 2048, 0, False),  # Both have half behind them.
        (51, 100, 2048, 0, True),
        (50, 100, 2048 + 1024, 2048, False),  # Half of what was left when this one began.
        (51, 100, 2048 + 1024, 2048, True),
        (99, 100, 4096, 0, False),  # The other one is over: full speed.
        (99, 100, 4096, 4096, False),
        (600_000, 1_000_000, 2048, 0, True),  # In 32 bits the product is negative.
    ],
)
def test_a_stream_is_ahead_of_the_share_it_must_have_done(done, total, now, begun, ahead):
    from tests.pace_kernel import ask_is_ahead

    given = [torch.tensor([each], dtype=torch.int32, device=DEVICE) for each in (done, total, now)]
    begun_at, out = (torch.tensor([each], dtype=torch.int32, device=DEVICE) for each in (begun, -1))
    ask_is_ahead[(1,)](*given, begun_at, out)
    assert bool(out.item()) is ahead


@needs_triton
@pytest.mark.parametrize(
    ("product", "done", "total", "said"),
    [
        (0, 0, 100, 0),
        (0, 50, 100, 1152),
        (0, 66, 1, 2304),  # Half a round of programs, one tile: not more than the product.
        (1, 0, 100, 2304),
        (1, 50, 100, 3200),
        (1, 66, 1, 4096),
        (0, 999_999, 1_000_000, 2303),  # In 32 bits the product is negative.
    ],
)
def test_a_product_is_never_said_to_be_further_than_it_can_be(product, done, total, said):
    from tests.pace_kernel import say_how_far

    given = [torch.tensor([each], dtype=torch.int32, device=DEVICE) for each in (done, total, -1)]
    say_how_far[(1,)](*given, PRODUCT=product)
    assert given[-1].item() == said


@needs_triton
@pytest.mark.parametrize("kernel", ["few", "many", "pairs"])
def test_kernels_take_empty_slots_and_one_expert_for_all(kernel):
    from moeprof.live.kernels import few, many

    stream = few.StreamTiles(columns=16, depth=16, num_stages=2, num_warps=4)
    options = {"tiles_in": stream, "tiles_out": stream}
    run = few.run_few
    if kernel != "few":
        options, run = {"plan": small_plan(pairs=kernel == "pairs")}, many.run_many
    hidden, ids, weights, experts = layer(40, 6, 2, dtype=HALF, gated=False, bias=True)
    some = ids.masked_fill(torch.rand(ids.shape, device=ids.device) < 0.4, -1)
    one = torch.full_like(ids, -1)
    one[:, 1] = 5
    for chosen in (some, one):
        out = run(hidden, chosen, weights, experts, **options)
        reference = by_definition(hidden, chosen, weights, experts)
        assert error(out, reference) < TOLERANCE
    nothing = run(hidden, torch.full_like(ids, -1), weights, experts, **options)
    assert not nothing.any()


@needs_triton
@pytest.mark.parametrize("tokens", [FEW_TOKENS, FEW_TOKENS + 1])
def test_the_kernel_is_chosen_by_the_number_of_tokens(tokens, monkeypatch):
    from moeprof.live.kernels import few, fused, many

    ran = []
    monkeypatch.setattr(fused, "can_fuse", lambda *_: True)
    monkeypatch.setattr(few, "run_few", lambda *given: ran.append("few"))
    monkeypatch.setattr(many, "run_many", lambda *given: ran.append("many"))
    dynamic(*layer(tokens, 4, 2, gated=False))
    assert ran == ["few" if tokens <= FEW_TOKENS else "many"]


@pytest.mark.skipif(ON_GPU, reason="a GPU runs the kernels")
def test_without_a_gpu_the_plain_kernel_runs():
    given = layer(9, 4, 2, gated=True)
    assert not can_fuse(given[0], given[3])
    assert torch.equal(dynamic(*given), dynamic_loop(*given))


@pytest.mark.gpu
@pytest.mark.parametrize("num_tokens", [1, 8, 64, 65, 1000, 3000])
def test_what_users_run_on_a_gpu(num_tokens):
    hidden, ids, weights, experts = layer(
        num_tokens, 64, 4, width=256, d_ff=264, dtype=HALF, gated=True, bias=True
    )
    assert can_fuse(hidden, experts)
    reference = dynamic_loop(
        hidden.double(), ids, weights.double(), experts.to(dtype=torch.float64)
    )
    out = dynamic(hidden, ids, weights, experts)
    assert error(out, reference) < TOLERANCE
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = dynamic(hidden, ids, weights, experts)
    graph.replay()
    assert torch.equal(captured, out)


@pytest.mark.gpu
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("counts", [EVERY_HEIGHT, [5000, 700, *[7] * 200], [60] * 64])
def test_plans_of_pairs_on_a_gpu(counts, bias, gated):
    from moeprof.live.kernels import tiles
    from moeprof.live.kernels.many import run_many

    ids = ids_of(counts)
    hidden, _, weights, experts = layer(
        len(ids), len(counts), 2, width=264, d_ff=520, dtype=HALF, gated=gated, bias=bias
    )
    plan = tiles.GATED_PLAN if gated else tiles.PLAN
    reference = dynamic_loop(
        hidden.double(), ids, weights.double(), experts.to(dtype=torch.float64)
    )
    out = run_many(hidden, ids, weights, experts, plan=plan)
    assert error(out, reference) < TOLERANCE
    other = torch.cuda.Stream()
    other.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(other):
        elsewhere = run_many(hidden, ids, weights, experts, plan=plan)
    torch.cuda.current_stream().wait_stream(other)
    assert torch.equal(elsewhere, out)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = [run_many(hidden, ids, weights, experts, plan=plan) for _ in range(3)]
    for _ in range(5):
        graph.replay()
        assert all(torch.equal(each, out) for each in captured)


def test_an_unknown_kernel_is_named():
    with pytest.raises(UsageError, match="unknown gating 'statc_mask'"):
        kernel_named("statc_mask")


def test_weights_that_do_not_belong_together_are_refused():
    with pytest.raises(UsageError, match="do not belong together"):
        ExpertWeights(w_in=torch.zeros(2, 6, 4), w_out=torch.zeros(2, 4, 6), gated=True)
    with pytest.raises(UsageError, match="unknown activation"):
        ExpertWeights(w_in=torch.zeros(2, 6, 4), w_out=torch.zeros(2, 4, 6), activation="tanh")
    with pytest.raises(UsageError, match="b_out is"):
        ExpertWeights(
            w_in=torch.zeros(2, 6, 4), w_out=torch.zeros(2, 4, 6), b_out=torch.zeros(2, 5)
        )
