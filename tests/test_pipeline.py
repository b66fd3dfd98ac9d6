"""The pipeline against a plain account of it, one lookup after the other, and by hand in pieces."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from calibrations import exactly, flat, hand_calibration, streamed_times, surface

from moeprof.replay import buffer_plans, cost_model, pipeline
from moeprof.replay.calibration_file import Curve, ExpertTimes
from moeprof.replay.execution_orders import execution_order, is_streamed
from moeprof.replay.expert_shapes import ExpertShape
from moeprof.replay.serving_settings import parse_setting
from moeprof.trace.handmade import HandToken, hand_trace
from moeprof.trace.synthetic import synthetic_trace

SHAPE = ExpertShape(d_model=8, d_ff=8, dtype="bfloat16")


@pytest.fixture(scope="module")
def trace(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return synthetic_trace(
        tmp_path_factory.mktemp("pipeline") / "t.moeprof",
        num_requests=5,
        num_sites=3,
        num_experts=16,
        top_k=3,
        batch=3,
        prompt_tokens=5,
        output_tokens=8,
        seed=5,
    )


def uneven_machine() -> Any:
    """Every constant another, so that none can stand in for another."""
    return hand_calibration(
        to_device=Curve(sizes=(256.0, 1024.0), times_s=(exactly(11e-5), exactly(17e-5))),
        device_expert=ExpertTimes(
            expert_bytes=(384,),
            by_rows=(Curve(sizes=(1.0, 64.0), times_s=(exactly(5e-5), exactly(9e-5))),),
        ),
        host_expert=surface(31e-5),
        expert_host_s=exactly(7e-5),
        slot_host_s=exactly(1e-5),
        known_s=exactly(13e-5),
        load_host_s=exactly(2e-5),
        fetch_s=exactly(3e-5),
        return_host_s=exactly(4e-5),
        sort_device=flat(6e-5),
        combine_host_s=exactly(8e-5),
        combine_device=flat(10e-5),
        sync_s=exactly(12e-5),
        foresee_s=exactly(14e-5),
    )


def account(trace: Any, setting: Any, machine: Any) -> list[float]:
    """The three clocks of a buffer that runs expert by expert, written out over its plan."""
    routed = buffer_plans.read_routed_rows(trace, "decoder")
    plan = buffer_plans.plan_buffer(trace, routed, setting)
    expert_s = machine.device_expert.at(SHAPE.expert_bytes, routed.rows)
    copy_s = float(machine.to_device.at(SHAPE.block_bytes))
    host_s = float(machine.host_expert.at(SHAPE.expert_bytes, 1))
    launch = machine.expert_host_s.median + machine.slot_host_s.median
    found = []
    arrived, finished = {}, {}
    arrived_ahead = {}
    is_ahead = bool(setting.prefetch)
    for step in range(len(routed.steps)):
        host = device = link = 0.0
        for dispatch in range(routed.step_starts[step], routed.step_starts[step + 1]):
            first, end = routed.starts[dispatch], routed.starts[dispatch + 1]
            slots = routed.num_tokens[dispatch] * routed.top_k[dispatch]
            host += machine.known_s.median
            host = device = max(host, device + float(machine.sort_device.at(slots)))
            fetched = device
            waiting = [at for at in range(first, end) if plan.loads[at]]
            for at in range(first, end + 1):
                if at == end and is_ahead:
                    host += machine.foresee_s.median
                while waiting and (at == end or plan.after[waiting[0]] < at - first):
                    copied = waiting.pop(0)
                    host += machine.load_host_s.median
                    start = max(link, host)
                    if plan.after[copied] >= 0:
                        start = max(start, finished[first + plan.after[copied]])
                    link = arrived[copied] = start + copy_s
                if at == end or plan.on_host[at]:
                    continue
                start = max(device, host)
                if plan.awaits[at] >= 0:
                    start = max(start, arrived[plan.awaits[at]])
                if plan.ahead.awaits[at] >= 0:
                    start = max(start, arrived_ahead[plan.ahead.awaits[at]])
                host += launch
                device = finished[at] = max(start + expert_s[at], host)
            for copy in np.flatnonzero(plan.ahead.dispatch == dispatch):
                host += machine.load_host_s.median
                start = max(link, host)
                if plan.ahead.after[copy] >= 0:
                    start = max(start, finished[first + plan.ahead.after[copy]])
                link = arrived_ahead[copy] = start + copy_s
            own = int(plan.on_host[first:end].sum())
            if own:
                host = max(host, fetched + machine.fetch_s.median)
                host += own * host_s + machine.return_host_s.median
            begun = host
            host += machine.combine_host_s.median
            device = max(device, begun) + float(machine.combine_device.at(slots))
            device = max(device, host)
        found.append(max(host, device, link) + machine.sync_s.median)
    return found


def two_sites_s(tmp_path: Path, text: str, **changes: Any) -> list[float]:
    """Returns the time of passes of one token: 0 then 4, 1 then 5, again and again."""
    steps = [[HandToken(request=0, position=i, experts=[[i % 2], [4 + i % 2]])] for i in range(5)]
    made = hand_trace(tmp_path / "hand.moeprof", steps, num_experts=8)
    given = {"streamed": streamed_times(), "foresee_s": exactly(0.0)} | changes
    question = cost_model.question_of(made, shape=SHAPE, phase="all")
    work = cost_model.work_of(question, parse_setting(text), hand_calibration(**given))
    return pipeline.step_times(work)[0].tolist()


def test_copies_ahead_by_hand(tmp_path: Path) -> None:
    # Copies 10 s, pieces 2 s, a slot for each site: every lookup misses.
    assert two_sites_s(tmp_path / "a", "lru:1") == [24] * 5
    # From the third pass on it is known what follows. Pass 3: 0 is copied until 10 and read until
    # 12, 4 copied ahead until 20 and read until 22, 1 copied ahead for the next pass until 30. From
    # then on: read until 2, the next site's expert ahead until 10, the next pass's until 20.
    assert two_sites_s(tmp_path / "b", "lru:1:ahead=1") == [24, 24, 30, 20, 20]
    # 1 s to foresee hides behind the device, or delays what is copied ahead.
    slow = two_sites_s(tmp_path / "c", "lru:1:ahead=1", foresee_s=exactly(1.0))
    assert slow == [24, 24, 30, 21, 21]
    # Likewise 1 s to ask for a copy that goes by itself, as those ahead do.
    asked = two_sites_s(tmp_path / "d", "lru:1:ahead=1", load_host_s=exactly(1.0))
    assert asked == [24, 24, 30, 21, 21]
    # A device that is the host: twice foreseen, two experts of 4 s; two copies, in pass 3 three.
    serial = two_sites_s(
        tmp_path / "e", "lru:1:ahead=1", is_serial=True, foresee_s=exactly(1.0),
        streamed=None,
    )  # fmt: skip
    assert serial == [30, 30, 40, 30, 30]


@pytest.mark.parametrize(
    "text",
    [
        "lru:2",
        "lru:5",
        "paper:4",
        "lru:4:host",
        "lru:4:split",
        "min:6",
        "lru:3:ahead=1",
        "paper:2:ahead=4",
        "lru:2:split:ahead=2",
        "lru:2:host:ahead=3",
        "min:4:ahead=2",
    ],
)
def test_expert_by_expert(trace: Any, text: str) -> None:
    setting, machine = parse_setting(text), uneven_machine()
    question = cost_model.question_of(trace, shape=SHAPE, phase="all")
    work = cost_model.work_of(question, setting, machine)
    np.testing.assert_allclose(pipeline.step_times(work)[0], account(trace, setting, machine))


def modelled_s(tmp_path: Path, dispatches: Any, text: str, **changes: Any) -> list[float]:
    steps = [
        [HandToken(request=0, position=i, experts=[[expert]]) for expert in experts]
        for i, experts in enumerate(dispatches)
    ]
    made = hand_trace(tmp_path / "hand.moeprof", steps, num_experts=8)
    given = {"streamed": streamed_times()} | changes
    question = cost_model.question_of(made, shape=SHAPE, phase="all")
    work = cost_model.work_of(question, parse_setting(text), hand_calibration(**given))
    return pipeline.step_times(work)[0].tolist()


def test_pieces_by_hand(tmp_path: Path) -> None:
    # Copies 10 s, pieces 2 s however many experts. All at once: two copies, one piece. Then the
    # hit of 1 hides behind the copy of 2.
    assert modelled_s(tmp_path, ([0, 1], [1, 2], [1, 2]), "lru:4") == [22, 12, 2]
    # Two slots, five experts: two copies and a piece, twice; then one of each.
    assert modelled_s(tmp_path / "b", ([0, 1, 2, 3, 4],), "lru:2") == [22 + 22 + 12]
    # One hit, whose slot the miss takes: the copy waits for the piece of the hit.
    assert modelled_s(tmp_path / "c", ([1], [1, 2]), "lru:1") == [12, 2 + 10 + 2]
    # No buffer: one piece.
    assert modelled_s(tmp_path / "d", ([0, 1, 2],), "unbuffered") == [2]


def test_handovers(tmp_path: Path) -> None:
    # The chain of one slot: each copy waits for a reader, each reader for a copy.
    late = {"handover_s": exactly(0.5)}
    assert modelled_s(tmp_path, ([0, 1],), "lru:1", **late) == [10.5 + 2 + 10.5 + 2 + 0.5]
    one_by_one = late | {"streamed": None}
    assert modelled_s(tmp_path / "b", ([0, 1],), "lru:1", **one_by_one) == [2 * 14 + 3 * 0.5]
    # Nobody waits where all are there.
    assert modelled_s(tmp_path / "c", ([0], [0]), "lru:1", **late)[1] == 2


def test_host_copies_come_last(tmp_path: Path) -> None:
    # 3 s on the host; the copy for later waits for the piece of the hits.
    assert modelled_s(tmp_path, ([0], [0, 1]), "lru:4:host") == [10, 2 + 10]
    found = modelled_s(tmp_path / "b", ([0], [0, 1]), "lru:4:host", handover_s=exactly(0.5))
    assert found == [10, 2 + 0.5 + 10]


def test_the_host_launches_pieces(tmp_path: Path) -> None:
    streamed = streamed_times(
        known_s=exactly(1.0),
        piece_host=Curve(sizes=(1.0, 2.0), times_s=(exactly(3.0), exactly(4.0))),
        slot_host_s=exactly(0.5),
        load_host_s=exactly(0.25),
        combine_host_s=exactly(5.0),
    )
    # Asked for at 1.25 and 1.5, launched by 6, there at 21.25; the piece ends at 23.25.
    assert modelled_s(tmp_path, ([0, 1], [0, 1]), "lru:4", streamed=streamed) == [
        23.25,
        1 + 4.5 + 5,
    ]
    assert modelled_s(tmp_path / "b", ([0],), "unbuffered", streamed=streamed) == [1 + 3 + 5]


def test_which_dispatches_are_streamed() -> None:
    tokens = np.array([1, 64, 65], np.int32)
    able = hand_calibration(streamed=streamed_times())
    assert is_streamed(tokens, SHAPE, able).tolist() == [True, True, False]
    for shape, machine in (
        (dataclasses.replace(SHAPE, dtype="float32"), able),
        (dataclasses.replace(SHAPE, d_ff=12), able),
        (SHAPE, hand_calibration()),
        (SHAPE, dataclasses.replace(able, is_serial=True)),
    ):
        assert not is_streamed(tokens, shape, machine).any()


@pytest.mark.parametrize("d_ff", [4, 8, 12, 16])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_the_rule_is_the_live_buffer_s(
    d_ff: int, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch = pytest.importorskip("torch")
    # Optional, like torch: without it no machine streams, and there is no rule to compare.
    pytest.importorskip("triton", reason="Triton is not installed")
    from moeprof.live.kernels import streamed
    from moeprof.live.setting_runs import geometry_of

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device: (9, 0))
    shape = ExpertShape(d_model=16, d_ff=d_ff, dtype=dtype)
    can = streamed.can_stream(geometry_of(shape).block_shape, "cuda")
    able = hand_calibration(streamed=streamed_times(most_tokens=streamed.STREAMED_TOKENS))
    tokens = np.array([streamed.STREAMED_TOKENS, streamed.STREAMED_TOKENS + 1], np.int32)
    assert is_streamed(tokens, shape, able).tolist() == [can, False]


@pytest.mark.parametrize(
    "text",
    ["lru:2", "paper:4", "lru:4:split", "min:3:host", "unbuffered", "lru:2:ahead=3",
     "layers:2:ahead=1", "lru:4:split:ahead=2"],
)  # fmt: skip
@pytest.mark.parametrize("streamed", [True, False])
def test_an_order_leaves_nothing_out(trace: Any, text: str, streamed: bool) -> None:
    routed = buffer_plans.read_routed_rows(trace, "decoder")
    plan = buffer_plans.plan_buffer(trace, routed, parse_setting(text))
    order = execution_order(routed, plan, np.full(len(routed.site), streamed))
    assert sorted(order.lookups.tolist()) == np.flatnonzero(plan.on_host == 0).tolist()
    is_ahead = order.copied < 0
    assert sorted(order.copied[~is_ahead].tolist()) == np.flatnonzero(plan.loads).tolist()
    place = {lookup: index for index, lookup in enumerate(order.lookups.tolist())}
    piece_of = np.repeat(np.arange(len(order.lookup_starts) - 1), np.diff(order.lookup_starts))
    copy_of = {lookup: index for index, lookup in enumerate(order.copied.tolist())}
    for lookup, copy in enumerate(plan.awaits.tolist()):
        if copy >= 0:
            # The piece waits for this copy, or for one behind it on the same stream.
            assert order.awaits[piece_of[place[lookup]]] >= copy_of[copy]
    num_pieces = np.diff(order.piece_starts)
    of_dispatch = np.repeat(np.arange(len(num_pieces)), np.diff(order.copy_starts))[is_ahead]
    assert of_dispatch.tolist() == plan.ahead.dispatch.tolist()
    assert (len(of_dispatch) > 0) == plan.ahead.used.any() == ("ahead" in text)
    # After all pieces; where its slot was read in this dispatch it waits, streamed for the last.
    assert order.before[is_ahead].tolist() == num_pieces[of_dispatch].tolist()
    read = routed.starts[of_dispatch] + plan.ahead.after
    waits = plan.ahead.after >= 0
    expected = [
        last - 1 if streamed else piece_of[place[lookup]] - order.piece_starts[dispatch]
        for last, lookup, dispatch in zip(
            num_pieces[of_dispatch][waits], read[waits].tolist(), of_dispatch[waits], strict=True
        )
    ]
    assert order.after[is_ahead][waits].tolist() == expected
    assert (order.after[is_ahead][~waits] < 0).all()
    copies = np.flatnonzero(is_ahead)
    for lookup, copy in enumerate(plan.ahead.awaits.tolist()):
        if copy >= 0:
            assert order.awaits[piece_of[place[lookup]]] >= copies[copy]
    assert (order.after < order.before).all()
    for first, end in zip(order.copy_starts[:-1], order.copy_starts[1:], strict=True):
        assert (np.diff(order.before[first:end]) >= 0).all()
