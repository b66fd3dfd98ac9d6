"""A plain torch model becomes recordable in two lines."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from recording_plain import (  # noqa: E402
    NUM_EXPERTS,
    TOP_K,
    WIDTH,
    OddBlock,
    OddExperts,
    OddModel,
)
from recording_runs import hook_count, record_run  # noqa: E402
from torch import nn  # noqa: E402

import moeprof  # noqa: E402
from moeprof.errors import CaptureError, MoeprofError, UsageError  # noqa: E402
from moeprof.trace.schema import SlotStatus  # noqa: E402
from moeprof.trace.validator import check  # noqa: E402


@pytest.fixture(autouse=True)
def _registry(monkeypatch: pytest.MonkeyPatch) -> None:
    from moeprof.recording import sites

    monkeypatch.setattr(sites, "_REGISTERED", {})
    torch.manual_seed(0)


def _ids(rows: int = 3, columns: int = 5) -> Any:
    return torch.randint(0, 50, (rows, columns), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    "arguments", [{"ids": "which", "weights": "how_much"}, {"ids": 1, "weights": 2}]
)
def test_by_name_and_by_position(arguments: dict[str, Any], tmp_path: Path) -> None:
    moeprof.register(OddExperts, **arguments)
    model = OddModel()
    with torch.no_grad():
        expected = model(_ids())
        run = record_run(model, tmp_path / "t.moeprof", lambda: model(_ids()))
    assert torch.equal(run.result, expected)
    sites = run.trace.sites
    assert [site.layer for site in sites] == [0, 1, 2]
    assert {(site.num_experts, site.top_k, site.matrices_per_expert) for site in sites} == {
        (NUM_EXPERTS, TOP_K, 2)
    }
    assert sites[0].expert_bytes == 2 * WIDTH * 24 * 4
    assert (sites[0].scoring, sites[0].renormalized) == ("softmax", False)
    assert run.trace.info.capture.num_executed_checked == 3
    assert run.trace.model.num_layers == {"decoder": 3}


def test_by_a_function(tmp_path: Path) -> None:
    """For a block that shows its choice to nobody: the function works it out."""

    class Secretive(OddBlock):
        def forward(self, x: Any) -> Any:
            y = super().forward(x)
            self.last = torch.softmax(self.gate(x.reshape(-1, WIDTH)), dim=-1).topk(TOP_K)
            return y

    def chosen(module: Any, args: Any, kwargs: Any, output: Any) -> Any:
        assert output.shape == args[0].shape
        return module.last[1], module.last[0]

    moeprof.register(Secretive, ids=chosen, num_experts=NUM_EXPERTS)
    model: Any = OddModel()
    model.layers = nn.ModuleList(Secretive() for _ in range(2))
    with torch.no_grad(), moeprof.record(model, tmp_path / "t.moeprof") as recorder:
        model(_ids())
    trace: Any = moeprof.open(recorder.path)
    assert check(trace).ok
    routing = trace.routing(columns=["row", "site", "expert", "weight"])
    for site, layer in enumerate(model.layers):
        weights, ids = layer.last
        mine = routing[routing["site"] == site]
        assert mine["expert"].tolist() == ids.reshape(-1).tolist()
        assert np.allclose(mine["weight"], weights.reshape(-1).detach(), rtol=1e-3)


def test_a_last_layer_that_sees_the_last_token_only(tmp_path: Path) -> None:
    moeprof.register(OddExperts, ids="which", weights="how_much")
    model = OddModel(prune=True)
    with torch.no_grad(), moeprof.record(model, tmp_path / "t.moeprof") as recorder:
        model(_ids())
        model(_ids(columns=1))
    trace: Any = moeprof.open(recorder.path)
    assert trace.complete
    assert check(trace).ok, check(trace).problems
    routing = trace.routing(steps=0, columns=["row", "site", "slot", "expert", "status"])
    last = routing[routing["site"] == 2]
    seen = last[last["status"] == SlotStatus.ROUTED]
    assert sorted(seen["row"].unique()) == [4, 9, 14]
    rest = last[~last["row"].isin([4, 9, 14])]
    assert (rest["status"] == SlotStatus.PRUNED_LAST_LAYER).all()
    assert (rest["expert"] == -1).all()
    layers = trace.layers[trace.layers["step"] == 0]
    assert layers["num_tokens"].tolist() == [15, 15, 3]
    decode = trace.routing(steps=1, columns=["row", "status"])
    assert (decode["status"] == SlotStatus.ROUTED).all()


def test_tokens_of_one_sequence_without_a_batch(tmp_path: Path) -> None:
    moeprof.register(OddExperts, ids="which", weights="how_much")
    model = OddModel()
    with torch.no_grad(), moeprof.record(model, tmp_path / "t.moeprof") as recorder:
        model(_ids()[0])
    trace: Any = moeprof.open(recorder.path)
    assert trace.steps["batch"].tolist() == [1]
    assert trace.steps["num_tokens"].tolist() == [5]


def test_buffers_used_again_for_the_next_pass(tmp_path: Path) -> None:
    """An engine may write ids, weights and tokens of every pass into the same memory."""

    class Reusing(OddBlock):
        def __init__(self) -> None:
            super().__init__()
            self.ids = torch.zeros(15, TOP_K, dtype=torch.int64)
            self.kept = torch.zeros(15, TOP_K)

        def forward(self, x: Any) -> Any:
            flat = x.reshape(-1, WIDTH)
            weights, ids = torch.softmax(self.gate(flat), dim=-1).topk(TOP_K)
            self.ids.copy_(ids)
            self.kept.copy_(weights)
            return self.experts(flat, self.ids, self.kept).reshape(x.shape)

    moeprof.register(OddExperts, ids="which", weights="how_much")
    model = OddModel()
    model.layers = nn.ModuleList(Reusing() for _ in range(2))
    batches = [_ids(), _ids().flip(0), _ids().flip(1)]
    tokens = torch.zeros_like(batches[0])

    def passes() -> None:
        for batch in batches:
            tokens.copy_(batch)
            model(tokens)

    with torch.no_grad():
        record_run(model, tmp_path / "t.moeprof", passes)


def test_tokens_that_choose_fewer_experts(tmp_path: Path) -> None:
    """Adaptive k: an id of -1 is a slot that holds none."""

    class Adaptive(OddBlock):
        def forward(self, x: Any) -> Any:
            weights, ids = torch.softmax(self.gate(x.reshape(-1, WIDTH)), dim=-1).topk(TOP_K)
            ids[weights[:, 0] > 0.3, 1] = -1
            self.last = ids, weights
            return x

    moeprof.register(Adaptive, ids=lambda module, *_: module.last, num_experts=NUM_EXPERTS)
    model: Any = OddModel()
    model.layers = nn.ModuleList([Adaptive()])
    with torch.no_grad(), moeprof.record(model, tmp_path / "t.moeprof") as recorder:
        model(_ids())
    trace: Any = moeprof.open(recorder.path)
    assert check(trace).ok, check(trace).problems
    ids = model.layers[0].last[0]
    routing = trace.routing(columns=["row", "slot", "expert", "status", "weight"])
    empty = routing["expert"] == -1
    assert 0 < empty.sum() < len(ids)
    assert routing["expert"].tolist() == ids.reshape(-1).tolist()
    assert (routing[empty]["status"] == SlotStatus.UNUSED).all()
    assert (routing[empty]["weight"] == 0).all()


def test_a_width_that_grows_is_an_error(tmp_path: Path) -> None:
    moeprof.register(
        OddBlock,
        ids=lambda module, args, *_: module.gate(args[0].reshape(-1, WIDTH)).topk(module.k)[::-1],
        num_experts=NUM_EXPERTS,
    )
    model: Any = OddModel()
    with (
        pytest.raises(CaptureError, match="chose 3 experts a token, after 2") as caught,
        torch.no_grad(),
        moeprof.record(model, tmp_path / "t.moeprof"),
    ):
        for k in (2, 3):
            for layer in model.layers:
                layer.k = k
            model(_ids())
    assert "-1" in caught.value.hint


def test_a_silent_site_that_declares_nothing(tmp_path: Path) -> None:
    moeprof.register(OddExperts, ids="which", weights="how_much")
    model: Any = OddModel()
    model.layers[1].forward = lambda x: x
    with (
        pytest.raises(
            CaptureError, match=r"2 of 3 MoE calls were seen \(silent: layers.1 \(1 step"
        ),
        torch.no_grad(),
        moeprof.record(model, tmp_path / "t.moeprof"),
    ):
        model(_ids())
    assert len(moeprof.open(tmp_path / "t.moeprof").steps) == 1


def test_two_threads_at_once(tmp_path: Path) -> None:
    import threading

    moeprof.register(OddExperts, ids="which", weights="how_much")
    model: Any = OddModel()
    inside, leave = threading.Event(), threading.Event()

    def wait(*_: Any) -> None:
        if threading.current_thread() is not threading.main_thread():
            inside.set()
            leave.wait(20)

    model.layers[0].register_forward_pre_hook(wait)
    with torch.no_grad(), moeprof.record(model, tmp_path / "t.moeprof") as recorder:
        other = threading.Thread(target=model, args=(_ids(),))
        other.start()
        inside.wait(20)
        with pytest.raises(MoeprofError, match="two threads at once"):
            model(_ids())
        leave.set()
        other.join()
        model(_ids())
    trace: Any = moeprof.open(recorder.path)
    assert len(trace.steps) == 2
    assert check(trace).ok


def test_recorders_that_end_in_another_order(tmp_path: Path) -> None:
    moeprof.register(OddExperts, ids="which", weights="how_much")
    model = OddModel()
    recorders = [moeprof.record(model, tmp_path / f"{i}.moeprof") for i in range(2)]
    for recorder in recorders:
        recorder.start()
    with torch.no_grad():
        model(_ids())
        recorders[0].stop()
        model(_ids())
    recorders[1].stop()
    assert hook_count(model) == 0
    assert [len(moeprof.open(recorder.path).steps) for recorder in recorders] == [1, 2]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"ids": "who", "weights": "how_much"}, "has no argument 'who'"),
        ({"ids": 1, "weights": 7}, "has no argument 7"),
        ({"ids": "which"}, "weights is missing"),
        ({"ids": lambda *_: None, "weights": "how_much"}, "weights must be left out"),
    ],
)
def test_registrations_that_make_no_sense(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        moeprof.register(OddExperts, **arguments)
    assert caught.value.hint


def test_an_unregistered_model_gets_the_hint() -> None:
    with pytest.raises(CaptureError, match="no Mixture-of-Experts layer") as caught:
        moeprof.record(OddModel(), "never.moeprof")
    assert "moeprof.register" in caught.value.hint


def test_fewer_experts_registered_than_there_are(tmp_path: Path) -> None:
    moeprof.register(OddExperts, ids="which", weights="how_much", num_experts=2)
    model = OddModel()
    with (
        pytest.raises(CaptureError, match=r"routed to expert \d, but has 2 experts") as caught,
        torch.no_grad(),
        moeprof.record(model, tmp_path / "t.moeprof"),
    ):
        model(_ids())
    assert "num_experts" in caught.value.hint
