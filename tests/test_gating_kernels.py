"""Kernels beside the floor: the script at a tiny size, what it holds outputs to, and the page."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import json
import sys
import types
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")

import moeprof  # noqa: E402
from analysis import live_results as page  # noqa: E402
from analysis.gpu import gating_kernels as script  # noqa: E402
from analysis.gpu.kernel_tuning import forget_tuning  # noqa: E402
from analysis.live_evidence import read_evidence  # noqa: E402
from moeprof.live.ceilings import Ceilings  # noqa: E402
from moeprof.live.experts import ExpertWeights, random_experts  # noqa: E402
from moeprof.live.kernels import KERNELS, dynamic_loop, static_grouped  # noqa: E402
from moeprof.live.repetitions import Repetitions, repeat  # noqa: E402
from moeprof.live.source_digest import source_digest  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")

CEILINGS = Ceilings(
    copy_bytes_per_s=1e9,
    matrix_flops_per_s=1e9,
    copy=Repetitions((1.0, 1.0)),
    matrix=Repetitions((1.0, 1.0)),
)


def layer(num_tokens, num_experts, top_k, dtype=torch.bfloat16):
    """Returns (hidden, ids, weights, experts), each token's experts different ones."""
    torch.manual_seed(num_tokens + top_k)
    experts = random_experts(
        num_experts=num_experts, d_model=32, d_ff=48, gated=False, bias=True, activation="relu",
        dtype=dtype,
    )  # fmt: skip
    hidden = torch.randn(num_tokens, 32).to(dtype)
    ids = torch.rand(num_tokens, num_experts).topk(top_k, dim=1).indices
    return hidden, ids, script.slot_weights(ids), experts


# What is held to what.


def test_the_definition_by_hand():
    # Expert 0 doubles, expert 1 negates what is negative and adds 1; rectified before.
    experts = ExpertWeights(
        w_in=torch.tensor([[[2.0]], [[-1.0]]]), w_out=torch.ones(2, 1, 1),
        b_in=torch.zeros(2, 1), b_out=torch.tensor([[0.0], [1.0]]), activation="relu",
    )  # fmt: skip
    hidden = torch.tensor([[3.0], [-4.0], [5.0], [6.0]])
    ids = torch.tensor([[0, 1], [1, -1], [1, 1], [-1, -1]])
    weights = torch.tensor([[1.0, 10.0], [0.5, 9.0], [1.0, 2.0], [1.0, 1.0]])
    out = script.exact_output(hidden, ids, weights, experts)
    # 6 + 10 (0 + 1); (4 + 1) / 2; (0 + 1) (1 + 2); nothing.
    assert out.tolist() == [[16.0], [2.5], [3.0], [0.0]] and out.dtype == torch.float64


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("capacity", [None, 3, 300])
def test_every_kernel_computes_the_definition_with_what_it_drops(kernel, capacity):
    # In two groups, of 1,024 tokens and of 276, each with its own share of the capacity.
    hidden, ids, weights, experts = layer(1300, 4, 2, dtype=torch.float64)
    ids[7] = -1
    out = KERNELS[kernel](hidden, ids, weights, experts, capacity=capacity)
    definition = script.Definition((hidden, ids, weights, experts))
    # Masks keep weights in single precision.
    assert definition.error(kernel, capacity, out) < 1e-6


def test_groups_drop_other_slots_than_the_whole():
    hidden, ids, weights, experts = layer(1300, 4, 2, dtype=torch.float64)
    out = static_grouped(hidden, ids, weights, experts, capacity=300)
    definition = script.Definition((hidden, ids, weights, experts))
    assert definition.error("static_mask", 300, out) > script.TOLERANCE


@pytest.fixture(scope="module")
def many():
    """A layer of as many tokens as are judged, its output in half precision, the definition's."""
    given = layer(16_384, 16, 2)
    return given, dynamic_loop(*given), script.exact_output(*given)


def norm_error(out, reference):
    return float(torch.linalg.vector_norm(out.double() - reference) / torch.norm(reference))


def zeroed(out, given):
    out[123] = 0


def without_a_slot(out, given):
    hidden, ids, weights, experts = given
    kept = ids[123:124].clone()
    kept[0, 0] = -1
    out[123] = dynamic_loop(hidden[123:124], kept, weights[123:124], experts)[0]


def with_a_slot_twice(out, given):
    hidden, ids, weights, experts = given
    once = ids[123:124].clone()
    once[0, 1] = -1
    out[123] += dynamic_loop(hidden[123:124], once, weights[123:124], experts)[0]


def weighted_as_the_other(out, given):
    hidden, ids, weights, experts = given
    out[123] = dynamic_loop(hidden[123:124], ids[123:124], weights[123:124].flip(1), experts)[0]


def swapped(out, given):
    out[[123, 4567]] = out[[4567, 123]]


def no_number(out, given):
    out[123, 5] = torch.nan


@pytest.mark.parametrize(
    "spoil",
    [zeroed, without_a_slot, with_a_slot_twice, weighted_as_the_other, swapped, no_number],
)
def test_one_wrong_token_of_many_is_noticed(many, spoil):
    given, out, reference = many
    assert script.token_error(out, reference) < script.TOLERANCE / 2
    wrong = out.clone()
    spoil(wrong, given)
    assert script.token_error(wrong, reference) > script.TOLERANCE
    if spoil is not no_number:
        # A norm over the whole layer would have let it pass.
        assert norm_error(wrong, reference) < 1.5e-2


@pytest.mark.parametrize("top_k", [1, 2, 8])
def test_no_slot_of_any_token_is_too_small_to_be_missed(top_k):
    hidden, ids, weights, experts = layer(300, 16, top_k)
    reference = script.exact_output(hidden, ids, weights, experts)

    def least_error(other_ids, other_weights):
        out = script.exact_output(hidden, other_ids, other_weights, experts)
        return min(script.token_error(out[[i]], reference[[i]]) for i in range(len(out)))

    for slot in range(top_k):
        missing = ids.clone()
        missing[:, slot] = -1
        twice = weights.clone()
        twice[:, slot] *= 2
        assert least_error(missing, weights) > 2 * script.TOLERANCE
        assert least_error(ids, twice) > 2 * script.TOLERANCE
        if slot:
            order = list(range(top_k))
            order[slot - 1], order[slot] = slot, slot - 1
            assert least_error(ids, weights[:, order]) > script.TOLERANCE


def test_small_and_empty_tokens_are_held_to_what_is_usual():
    reference = torch.tensor([[4.0], [4.0], [4.0], [0.01], [0.0]]).double()
    out = reference.clone()
    out[3] += 0.004  # A rounding of what cancelled out: 1 % of a tenth of 4.
    assert script.token_error(out, reference) == pytest.approx(0.01)
    out[4] = 0.4  # Nothing was to be executed.
    assert script.token_error(out, reference) == pytest.approx(1.0)
    nothing = torch.zeros(3, 2).double()
    assert script.token_error(nothing, nothing) == 0.0
    assert script.token_error(nothing + 1e-3, nothing) > 1e-3
    assert script.token_error(torch.full((3, 2), torch.nan), nothing) == torch.inf


# The script.


@pytest.fixture
def quick(monkeypatch):
    """No ceilings measured, one repetition of everything, no uneven routing."""
    monkeypatch.setattr(script, "measure_ceilings", lambda device, **waits: CEILINGS)
    monkeypatch.setattr(script, "EXPONENTS", (2.2,))
    monkeypatch.setattr(script, "GRAPH_CALLS", 2)


@pytest.fixture(scope="module")
def tiny_run(tmp_path_factory):
    """What the script writes at a tiny size, and which kernels were timed how."""
    folder = tmp_path_factory.mktemp("tiny")
    asked = []

    def noted(function, **given):
        asked.append(given.get("ahead", False))
        return repeat(function, **{**given, "repeats": 2, "warmup": 0})

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(script, "repeat", noted)
        patch.setattr(script, "measure_ceilings", lambda device, **waits: CEILINGS)
        patch.setattr(script, "GRAPH_CALLS", 2)
        assert script.main(["--out", str(folder), "--tiny"]) == 0
    return json.loads((folder / script.RESULT).read_text()), asked


def test_it_names_the_code_the_command_and_what_was_not_run(tiny_run):
    data, _ = tiny_run
    assert data["complete"] and data["failures"] == []
    assert data["source_sha256"] == source_digest(Path(moeprof.__file__).parent)
    assert data["command"].startswith("python -m analysis.gpu.gating_kernels --out")
    reason = data["public_not_run"]["vLLM fused_experts"]
    assert "experts here have a ReLU without a gate" in reason
    timed = {row["kernel"] for row in data["rows"]}
    for name in script.PUBLIC:
        assert (name in timed) != (name in data["public_not_run"])
    assert not {script.LM.name, script.MT.name} - {row["geometry"] for row in data["rows"]}


def test_every_row_names_its_own_routing(tiny_run):
    data, _ = tiny_run
    for row in data["rows"]:
        said = row["routing_source"]
        assert "16 experts top-2" in said
        assert f"{row['num_tokens']} tokens" in said and f"seed {row['num_tokens']}" in said
        exponent = row["routing"].removeprefix("zipf ")
        assert (f"Zipf law of exponent {exponent} " in said) == (row["routing"] != "uniform")
    assert set(data["routing"]) == {row["routing"] for row in data["rows"]}
    assert all("256 tokens" in said for said in data["routing"].values())


def test_a_later_geometry_does_not_rename_what_is_judged():
    def row(geometry, num_tokens, routing="uniform"):
        said = f"{routing}: {geometry}, {num_tokens} tokens"
        return {
            "geometry": geometry, "num_tokens": num_tokens, "routing": routing,
            "routing_source": said,
        }  # fmt: skip

    rows = [row("lm", 8), row("lm", 16384), row("mt", 64), row("mt", 2048), row("mt", 64, "zipf 1")]
    assert script.largest_sources(rows) == {
        "uniform": "uniform: lm, 16384 tokens",
        "zipf 1": "zipf 1: mt, 64 tokens",
    }


def test_the_host_is_ahead_where_layers_are_timed_one_by_one(tiny_run):
    data, asked = tiny_run
    assert asked == [row["ahead"] for row in data["rows"]]
    assert {row["ahead"] for row in data["rows"] if row["num_tokens"] <= 64} == {False}
    assert {row["ahead"] for row in data["rows"] if row["num_tokens"] > 64} == {True}


def test_outputs_of_every_kernel_are_held_to_the_definition(tiny_run):
    data, _ = tiny_run
    checked = data["check"]
    assert set(checked["largest_relative_error"]) == {row["kernel"] for row in data["rows"]}
    assert set(checked["largest_relative_error"]) == set(checked["cases_by_kernel"])
    assert checked["tolerance"] == script.TOLERANCE
    assert checked["cases_by_kernel"]["static_grouped"] == checked["num_cases"] == 12
    assert checked["cases_by_kernel"]["transformers grouped_mm"] == 3
    for row in data["rows"]:
        assert 0 < row["relative_error"] < script.TOLERANCE


def spoiled(kernel, num_tokens):
    """Returns ``kernel``, a slot of one token weighted a tenth too little at some size only."""

    def call(hidden, ids, weights, experts, **options):
        if len(hidden) == num_tokens:
            weights = weights.clone()
            weights[0, 0] *= 0.9
        return kernel(hidden, ids, weights, experts, **options)

    return call


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize(
    ("kernel", "num_tokens", "where"),
    [
        # One token is in the first shape of the check, 8 in the second and the first that is timed.
        ("dynamic", 1, "on small layers"),
        ("static_grouped", 8, "on small layers"),
        ("static_index", 256, "lm, 256 tokens, uniform, eager"),
        ("moe-ops", 1, "on small layers"),
        ("moe-ops", 8, "lm, 8 tokens, zipf 2.2, eager"),
        ("transformers grouped_mm", 256, "mt, 256 tokens, zipf 2.2, eager"),
    ],
)
def test_a_kernel_that_is_off_is_named_and_the_result_written(
    tmp_path, monkeypatch, capsys, kernel, num_tokens, where
):
    if kernel in KERNELS:
        wrong = spoiled(KERNELS[kernel], num_tokens)
        monkeypatch.setattr(script, "KERNELS", {**KERNELS, kernel: wrong})
    else:
        # Stands for whichever is installed: what is timed is checked under its own name.
        wrong = spoiled(script.transformers_grouped, num_tokens)
        monkeypatch.setattr(script, "_ON_GPU_ONLY", ())
        monkeypatch.setattr(script, "PUBLIC", {**script.PUBLIC, kernel: ("torch", wrong)})
    assert script.main(["--out", str(tmp_path), "--tiny"]) == 1
    lines = capsys.readouterr().err.splitlines()
    assert all(f"outputs of {kernel} are off" in line for line in lines)
    assert any(where in line and "at most 0.02 is allowed" in line for line in lines)
    data = json.loads((tmp_path / script.RESULT).read_text())
    assert data["complete"] and len(data["failures"]) == len(lines)


@pytest.mark.usefixtures("quick")
def test_what_is_no_number_is_off(tmp_path, monkeypatch, capsys):
    wrong = {**KERNELS, "dynamic": lambda hidden, *given, **options: hidden * torch.nan}
    monkeypatch.setattr(script, "KERNELS", wrong)
    assert script.main(["--out", str(tmp_path), "--tiny"]) == 1
    assert "outputs of dynamic are off: on small layers" in capsys.readouterr().err


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("everywhere", [True, False])
def test_a_public_kernel_that_fails_does_not_cost_the_run(tmp_path, monkeypatch, everywhere):
    """In every case it is not timed, in some it is."""

    def failing(hidden, ids, weights, experts):
        # Of 512 experts the check has three cases; in one all tokens go to experts 0 and 1.
        if everywhere or (experts.num_experts == 512 and ids.max() != 1):
            raise ValueError("no such tile\nand more")
        return script.transformers_grouped(hidden, ids, weights, experts)

    public = {**script.PUBLIC, "moe-ops": ("torch", failing)}
    monkeypatch.setattr(script, "PUBLIC", public)
    monkeypatch.setattr(script, "_ON_GPU_ONLY", ())
    assert script.main(["--out", str(tmp_path), "--tiny"]) == 0
    data = json.loads((tmp_path / script.RESULT).read_text())
    assert data["check"]["raised"] == {"moe-ops": "ValueError: no such tile"}
    timed = "moe-ops" in {row["kernel"] for row in data["rows"]}
    assert timed == ("moe-ops" in data["check"]["largest_relative_error"])
    assert timed == (not everywhere)
    assert data["public_not_run"].get("moe-ops", "") == (
        "" if timed else "ValueError: no such tile"
    )


class Autotuner:
    """As Triton's, as far as it is asked."""

    def __init__(self, **chosen):
        self.cache = chosen


def test_others_choose_their_tiles_anew(monkeypatch):
    class Touchy:
        def __getattribute__(self, name):
            raise ImportError(name)

    package, module = types.ModuleType("tuned"), types.ModuleType("tuned.gemm")
    other = types.ModuleType("tunedtoo")
    module.first, module.unused = Autotuner(a=1, b=2), Autotuner()
    package.again, package.touchy, other.first = module.first, Touchy(), Autotuner(a=1)
    for each in (package, module, other):
        monkeypatch.setitem(sys.modules, each.__name__, each)
    assert forget_tuning(["tuned", "absent"]) == 1
    assert module.first.cache == {} and other.first.cache == {"a": 1}
    assert forget_tuning(["tuned"]) == 0


@pytest.mark.usefixtures("quick")
def test_no_choice_of_another_size_is_timed(tmp_path, monkeypatch):
    """A kernel that chooses once would take for 256 tokens what it chose for the check's few."""
    module = types.ModuleType("tuned")
    module.gemm = Autotuner()
    monkeypatch.setitem(sys.modules, "tuned", module)

    def choosing(hidden, ids, weights, experts):
        module.gemm.cache.setdefault("experts", len(hidden))
        chosen.append((len(hidden), module.gemm.cache["experts"]))
        return script.transformers_grouped(hidden, ids, weights, experts)

    chosen = []
    monkeypatch.setattr(script, "PUBLIC", {"moe-ops": ("tuned", choosing)})
    monkeypatch.setattr(script, "_ON_GPU_ONLY", ())
    monkeypatch.setattr(script.importlib.util, "find_spec", lambda name: name)
    assert script.main(["--out", str(tmp_path), "--tiny"]) == 0
    sizes = {pair for pair in chosen if pair[0] in (8, 256)}
    assert (256, 256) in sizes and (8, 8) in sizes
    # The check's own cases have 1 and 8 tokens.
    assert sizes <= {(8, 1), (8, 8), (256, 256)}


def test_why_public_kernels_are_not_run(monkeypatch):
    monkeypatch.setattr(script.importlib.util, "find_spec", lambda name: None)
    calls, not_run = script.public_kernels()
    assert not calls and not_run["moe-ops"] == "not installed"
    assert not_run["vLLM fused_experts"].endswith("; not installed either")
    monkeypatch.setattr(script.importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    calls, not_run = script.public_kernels()
    assert list(calls) == ["transformers grouped_mm"] and not_run["moe-ops"] == "needs a GPU"
    # Not even where it is installed: no geometry here has experts that it computes.
    assert "installed" not in not_run["vLLM fused_experts"]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert list(script.public_kernels()[0]) == list(script.PUBLIC)


def test_a_graph_hands_out_what_its_replay_writes(monkeypatch):
    """Without a GPU, a graph is whatever replays as it is told to."""
    own = torch.ones(2)
    graphs = []

    class Graph:
        def replay(self):
            own.fill_(7.0)

    @contextlib.contextmanager
    def recording(graph):
        graphs.append(graph)
        yield

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", recording)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    replay, out = script.captured(lambda: own)
    assert script.rewritten(replay, out).tolist() == [7.0, 7.0]
    # What was there before does not count.
    assert script.rewritten(lambda: None, out).tolist() == [0.0, 0.0]

    def refused():
        if graphs[1:]:
            raise RuntimeError("operation not permitted when stream is capturing")
        return torch.zeros(2)

    assert script.captured(refused) is None


# The page.


@pytest.fixture(scope="module")
def bare():
    return dataclasses.replace(read_evidence(), additions={})


def later(data):
    """Returns a result as a later run writes it."""
    data = copy.deepcopy(data)
    for row in data["rows"]:
        row |= {"routing_source": "its own", "relative_error": 0.004}
        row["ahead"] = row["num_tokens"] > 64
    errors = data["check"]["largest_relative_error"]
    data["check"] |= {"tolerance": 0.02, "cases_by_kernel": dict.fromkeys(errors, 36)}
    data["check"]["cases_by_kernel"]["transformers grouped_mm"] = 9
    data["public_not_run"] = {"vLLM fused_experts": "it has no such experts"}
    data["failures"] = []
    return data


def before(data):
    """Returns a result as runs wrote it at first."""
    data = copy.deepcopy(data)
    for row in data["rows"]:
        for each in ("routing_source", "relative_error", "extra_bytes", "ahead"):
            row.pop(each, None)
    for each in ("tolerance", "cases_by_kernel", "raised"):
        del data["check"][each]
    for each in ("public_not_run", "failures", "source_sha256"):
        del data[each]
    return data


def kernels_part(bare, data):
    report = page.results_page(dataclasses.replace(bare, kernels=data))
    (part,) = [each for each in report.json_data["traces"] if each["id"] == "kernels"]
    return part, json.dumps(part)


def test_the_page_reads_results_of_before_and_says_what_later_ones_add(bare):
    part, text = kernels_part(bare, before(bare.kernels))
    assert "of each kind the result keeps the description of the last." in text
    assert "kernels agree with float64 in 36 cases each" in text
    assert "asks for all repetitions" not in text and "did not time" not in text
    part, text = kernels_part(bare, later(bare.kernels))
    assert "those described above are of 16,384 tokens, every row of the run has its own" in text
    assert "description of the last" not in text
    assert "held to float64, token by token, in 9 to 36 cases each" in text
    assert "the host asks for all repetitions before the first begins" in text
    assert "did not time. vLLM fused_experts: it has no such experts." in text
    assert not any("Wrong" in each for each in part["banners"])


def test_the_page_shows_the_routing_of_every_size_and_the_errors_of_timed_layers(bare):
    part, text = kernels_part(bare, bare.kernels)
    known = all("routing_source" in row for row in bare.kernels["rows"])
    assert ("Routing of every geometry and size" in text) == known
    data = later(bare.kernels)
    names = dict.fromkeys(
        (row["geometry"], row["num_tokens"], row["routing"]) for row in data["rows"]
    )
    for row in data["rows"]:
        row["routing_source"] = f"drawn for {row['num_tokens']} tokens <b>"
        row["extra_bytes"] = 4096 if row["mode"] == "eager" else None
        row["relative_error"] = 0.007 if row["kernel"] == "static_mask" else 0.004
    data["check"]["raised"] = {"transformers grouped_mm": "ValueError: no such tile", "x": "y"}
    part, text = kernels_part(bare, data)
    tables = {table["title"]: table["rows"] for table in part["sections"][0]["tables"]}
    rows = tables["Routing of every geometry and size"]
    assert [(row["geometry"], row["num_tokens"], row["routing"]) for row in rows] == list(names)
    assert all(row["is"] == f"drawn for {row['num_tokens']} tokens <b>" for row in rows)
    assert "on the layers that are timed 7.0e-03, of moeprof's 4.0e-03." in text
    assert "not held to that. transformers grouped_mm: ValueError: no such tile." in text
    every = tables["Every kernel, size and routing"]
    # Graphs count no memory; a public kernel of before has no error and no memory.
    assert {row["extra_memory"] for row in every if row["mode"] == "graph"} == {""}
    assert "4 KiB" in {row["extra_memory"] for row in every if row["mode"] == "eager"}
    assert {row["largest_token_error"] for row in every} <= {"7.0e-03", "4.0e-03", ""}
    report = page.results_page(dataclasses.replace(bare, kernels=data))
    assert "tokens <b>" not in report.html and "tokens <b>" not in report.markdown


def test_the_page_says_that_a_kernel_was_off(bare):
    data = later(bare.kernels)
    data["failures"] = [script.off_said("moe-ops", 0.5, "on small layers")]
    part, _ = kernels_part(bare, data)
    assert (
        "Wrong: outputs of moe-ops are off: on small layers, relative error of a token 5.0e-01."
        in part["banners"]
    )
