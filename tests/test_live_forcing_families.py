"""Every kind of MoE module computes with the routing it is given: verified by intervention."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

import recording_models  # noqa: E402
import tiny_models  # noqa: E402
from forcing_tools import (  # noqa: E402
    SCALE,
    changed_rows,
    expert_parameters,
    nllb_moe,
    reseeded,
    routing_for,
    scaled_weights,
)

import moeprof  # noqa: E402
from moeprof.errors import UsageError  # noqa: E402
from moeprof.live import force_routing  # noqa: E402
from moeprof.recording.sites import find_sites  # noqa: E402
from moeprof.replay import agreement  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")

ROWS, COLUMNS, NEW_TOKENS = 2, 6, 3


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


LMS: dict[str, Callable[[], Any]] = {**tiny_models.LMS, **recording_models.FAMILIES}
del LMS["aria"]
MTS: dict[str, Callable[[], Any]] = {"nllb_moe": nllb_moe, "switch": tiny_models.switch}
EVERY = {**LMS, **MTS}


def inputs(seed: int = 3) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {"input_ids": torch.randint(5, 95, (ROWS, COLUMNS), generator=generator)}


def generate(model: Any, given: dict[str, Any], num_beams: int = 1) -> torch.Tensor:
    return model.generate(
        **given,
        max_new_tokens=NEW_TOKENS,
        min_new_tokens=NEW_TOKENS,
        do_sample=False,
        num_beams=num_beams,
    )


def first_block(model: Any) -> Any:
    """The last site with a block that can be called alone."""
    return [site for site in find_sites(model) if site.kind == "ffn"][-1]


def one_pass(name: str, model: Any, num_rows: int, seed: int = 0) -> Any:
    encoder = (num_rows,) if name in MTS else ()
    return routing_for(model, (num_rows,), encoder_tokens=encoder, seed=seed)


def run_block(site: Any, hidden: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        out = site.modules.block(hidden)
    out = out[0] if isinstance(out, tuple) else out
    return out.reshape(-1, out.shape[-1])


@pytest.mark.parametrize("name", EVERY)
def test_exactly_the_forced_tokens_run_an_expert(name):
    model = EVERY[name]()
    site = first_block(model)
    index = [s.name for s in find_sites(model) if s.stack == site.stack].index(site.name)
    routing = one_pass(name, model, num_rows=10)
    forced_ids = routing.stack(site.stack).sites[index].experts
    width = getattr(model.config.get_text_config(), "hidden_size", None) or model.config.d_model
    hidden = torch.randn(2, 5, width, generator=torch.Generator().manual_seed(5))
    num_changed = 0
    with force_routing(model, routing, loop=True):
        before = run_block(site, hidden)
        for expert in range(site.num_weighted):
            kept = [p.clone() for p in expert_parameters(site, expert)]
            assert kept
            for parameter in expert_parameters(site, expert):
                parameter.mul_(SCALE)
            changed = changed_rows(before, run_block(site, hidden))
            for parameter, old in zip(expert_parameters(site, expert), kept, strict=True):
                parameter.copy_(old)
            assert changed == {t for t, ids in enumerate(forced_ids) if expert in ids}
            num_changed += len(changed)
        assert torch.equal(run_block(site, hidden), before)
    weighted = forced_ids < site.num_weighted
    assert num_changed == weighted.sum() > 0


@pytest.mark.parametrize("name", sorted(set(EVERY) - {"llama4"}))
def test_the_forced_weights_multiply_what_the_experts_put_out(name):
    model = EVERY[name]()
    site = first_block(model)
    routing = one_pass(name, model, num_rows=10)
    width = getattr(model.config.get_text_config(), "hidden_size", None) or model.config.d_model
    hidden = torch.randn(2, 5, width, generator=torch.Generator().manual_seed(5))
    out = []
    for factor in (0.0, 1.0, 2.0):
        with force_routing(model, scaled_weights(routing, factor), loop=True):
            out.append(run_block(site, hidden))
    step = out[1] - out[0]
    assert float(step.abs().max()) > 1e-3
    torch.testing.assert_close(out[2] - out[0], 2 * step, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", EVERY)
def test_generate_runs_as_recorded_and_a_recording_of_it_says_so(name, tmp_path):
    """Prefill, decode and padding: another model, forced, records the same tables."""
    given = inputs()
    mask = torch.ones_like(given["input_ids"])
    padded = (1, slice(0, 2)) if name in LMS else (1, slice(COLUMNS - 2, COLUMNS))
    mask[padded], given["input_ids"][padded] = 0, 0
    given["attention_mask"] = mask
    with moeprof.record(EVERY[name](), tmp_path / "one.moeprof") as recorder:
        generate(recorder.model, given)
    one = moeprof.open(tmp_path / "one.moeprof")
    other = reseeded(EVERY[name](), seed=9)
    own = generate(other, given)
    forced = force_routing(other, one)
    with forced, moeprof.record(other, tmp_path / "two.moeprof"):
        generate(other, given)
    two = moeprof.open(tmp_path / "two.moeprof")
    columns = ["step", "stack", "site", "request", "position", "slot", "expert", "status"]
    first = one.routing(columns=[*columns, "weight"])
    second = two.routing(columns=[*columns, "weight"])
    assert first[columns].equals(second[columns])
    torch.testing.assert_close(
        torch.tensor(first["weight"].to_numpy()),
        torch.tensor(second["weight"].to_numpy()),
        rtol=1e-3,
        atol=1e-6,
    )
    assert not agreement(one, two).tables["flips"].shape[0]
    assert any("not the model's own choice" in note for note in two.info.notes)
    assert "one.moeprof" in "".join(two.info.notes)
    assert two.info.capture.num_executed_disagreeing == 0
    assert two.info.capture.num_executed_checked > 0 or name in ("jetmoe", "llama4")
    assert dict(forced.passes) == {s: (two.steps["stack"] == s).sum() for s in two.stacks}
    assert moeprof.check(two).ok
    assert torch.equal(generate(other, given), own)


def test_without_forcing_the_other_model_chooses_otherwise(tmp_path):
    """The test above can fail."""
    given = inputs()
    traces = []
    for seed in (None, 9):
        model = tiny_models.mixtral() if seed is None else reseeded(tiny_models.mixtral(), seed)
        path = tmp_path / f"{seed}.moeprof"
        with moeprof.record(model, path):
            generate(model, given)
        traces.append(moeprof.open(path))
    assert agreement(*traces).tables["flips"].shape[0]


def test_a_recorder_that_came_first_sees_the_forced_experts_too(tmp_path):
    model = tiny_models.mixtral()
    given = inputs()
    routing = routing_for(model, [ROWS * COLUMNS] + [ROWS] * (NEW_TOKENS - 1))
    with moeprof.record(model, tmp_path / "t.moeprof"), force_routing(model, routing):
        generate(model, given)
    trace = moeprof.open(tmp_path / "t.moeprof")
    for dispatch, site in zip(trace.dispatches(weights=True), [0, 1, 2] * NEW_TOKENS, strict=True):
        own = routing.stack().sites[site]
        rows = slice(own.starts[dispatch.step], own.starts[dispatch.step + 1])
        assert (dispatch.experts == own.experts[rows]).all()
        assert (dispatch.weights == own.weights[rows]).all()
    assert "generate" not in vars(model)


@pytest.mark.parametrize("name", ["mixtral", "nllb_moe"])
def test_beams_are_rows_like_others(name, tmp_path):
    given = inputs()
    path = tmp_path / "beams.moeprof"
    model = EVERY[name]()
    with moeprof.record(model, path):
        generate(model, given, num_beams=3)
    trace = moeprof.open(path)
    with force_routing(reseeded(model, 4), trace) as forced:
        generate(model, given, num_beams=3)
    assert forced.passes["decoder"] == len(trace.steps[trace.steps["stack"] == "decoder"])


def test_experts_that_choose_inside_are_refused():
    model = recording_models.aria()
    shape = routing_for(tiny_models.mixtral(), [4])
    with pytest.raises(UsageError, match="chooses experts inside") as refused:
        force_routing(model, shape)
    assert "moeprof.register" in refused.value.hint


def test_nllb_as_shipped_is_refused_where_it_ignores_its_router():
    model = tiny_models.nllb_moe()
    routing = routing_for(model, [4], encoder_tokens=[4])
    with pytest.raises(UsageError, match="experts 0 and 1") as refused:
        force_routing(model, routing)
    assert "fix_nllb_dispatch" in refused.value.hint


@pytest.mark.parametrize("name", MTS)
def test_slots_left_empty_run_nothing(name, tmp_path):
    """As after a capacity drop: the token runs the experts that are left, if any."""
    model = EVERY[name]()
    routing = routing_for(model, [ROWS], encoder_tokens=[ROWS * COLUMNS])
    for stack in routing.stacks.values():
        for index, site in enumerate(stack.sites):
            empty = (slice(1, None, 3), index % site.top_k)
            site.experts[empty], site.weights[empty] = -1, 0.0
    with force_routing(model, routing), moeprof.record(model, tmp_path / "t.moeprof"):
        model.generate(**inputs(), max_new_tokens=1, min_new_tokens=1, num_beams=1)
    trace = moeprof.open(tmp_path / "t.moeprof")
    assert trace.info.capture.num_executed_checked == len(trace.sites)
    assert trace.info.capture.num_executed_disagreeing == 0
    for dispatch in trace.dispatches():
        site = next(
            site for site in routing.stacks[dispatch.stack].sites if site.layer == dispatch.site % 2
        )
        used = [sorted(row[row >= 0].tolist()) for row in dispatch.experts]
        assert used == [sorted(row[row >= 0].tolist()) for row in site.experts]
        assert any(len(row) < site.top_k for row in used)
