"""The founding paper's translation model, a stack at a time, and one rank's share of 8 GPUs.

    python -m analysis.gpu.mt_headline --out DIR --routing TRACE [--lm-routing TRACE]   # one H200
    python -m analysis.gpu.mt_headline --out DIR --routing TRACE --tiny                 # on a CPU

Part ``mt-encoder`` encodes batches of sentences padded to 32 tokens, part ``mt-decoder`` makes
decode steps (NLLB-200's 54.5 B parameters, arXiv 2303.06182: 24 layers a stack, every fourth with
128 experts of 64 MiB, top-2; random bf16 weights; one stack on the device at a time). Each gate
computes its own choice, as it costs, and hands on the recorded one. TRACE is a routing twin's (see
`analysis.gpu.twins`); the traces of the project are called ``sample:twin-mt`` and
``sample:twin-lm``. Static gating has the paper's capacity, a slot for every token at every expert.
The dense twin has no experts and, in the layers that route, a network top_k times as wide. As a
control, moeprof's gating runs on uniform routing too, which keeps all experts busy.

Part ``rank-share`` is one rank's share of the paper's layout of 8 GPUs, of the language and the
translation model (see `analysis.gpu.rank_share`): total memory, static against dynamic.

Each gating of a stack runs at listed batches, then at doubled ones until memory ends or a pass
would take too long, which the result then says (``endings``). Batches too slow to be timed run
once, for their memory (``once``). What time there is (--seconds) goes first to what is judged: one
rank's share; of each stack the dense twin, which has a part of the time for its larger batches too,
the listed batches, the breakdown, then at least 20 repetitions of every row that the headline
takes. Larger batches come after that, and the control last, for which a part of the time is kept.
Written to DIR/mt_headline.json after every step.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from analysis.gpu import rank_share
from analysis.gpu.evidence import evidence, write_json
from analysis.gpu.headline_runs import (
    Choice,
    ForcedGate,
    Prepare,
    RunLimits,
    StepCursor,
    first_rows,
    print_headline,
    release,
)
from analysis.gpu.headline_series import DENSE_SHARES, TURNS, Series, ends_of, print_endings
from analysis.gpu.mt_routing import (
    LENGTH,
    RecordedBatches,
    decoder_steps,
    encoder_batches,
    uniform_control,
)
from analysis.gpu.mt_stacks import (
    MT_CONFIG,
    MtDecoder,
    MtEncoder,
    MtStack,
    dense_config,
    leave_out_padding,
    widen,
)
from analysis.gpu.paper_headline import LENGTH as LM_LENGTH
from analysis.gpu.paper_headline import TOKEN_FRACTION as LM_FRACTION
from analysis.gpu.paper_headline import recorded_choices
from analysis.gpu.time_spent import TimeSpent, print_seconds
from analysis.published import MEMORY_RATIOS, MT_GAINS
from moeprof.live.application import apply_gating
from moeprof.live.paper_lm import PaperLmConfig
from moeprof.replay.capacity import PAPER_LM, PAPER_MT, ModelShape

RESULT = "mt_headline.json"
MT_FRACTION = 1.0
PAST_TOKENS = 16
# Large enough for the device to be what a pass waits for.
BREAKDOWN_BATCHES: Mapping[str, int] = {"mt-encoder": 192, "mt-decoder": 1536}
GATINGS = ("dense", *TURNS)
# Static gating is at its best at small batches, and slow at large ones. A mask's time is predicted
# by the square of the step between two batches: no step may be so large that it forbids the next.
_ENCODER_STATIC = (1, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192)
_ENCODER = (1, 8, 16, 32, 48, 96, 128, 192, 256, 384, 512, 1024, 2048, 4096)
_DECODER_STATIC = (1, 8, 16, 48, 96, 192, 384, 768, 1024, 1536, 2048)
_DECODER = (1, 16, 48, 96, 192, 384, 768, 1536, 2048, 3072, 4096, 6144, 8192)
BATCHES: Mapping[str, Mapping[str, tuple[int, ...]]] = {
    "mt-encoder": {
        "dense": _ENCODER,
        "dynamic": _ENCODER,
        "static_mask": _ENCODER_STATIC,
        "static_grouped": _ENCODER_STATIC,
        "static_index": _ENCODER_STATIC,
        "dynamic_grouped": _ENCODER,
        "dynamic_loop": (1, 8, 16, 32, 48, 96, 192, 384, 1024, 4096),
        "control": (48, 192, 384, 1024, 2048, 4096),
    },
    "mt-decoder": {
        "dense": _DECODER,
        "dynamic": _DECODER,
        "static_mask": _DECODER_STATIC,
        "static_grouped": _DECODER_STATIC,
        "static_index": _DECODER_STATIC,
        "dynamic_grouped": _DECODER,
        "dynamic_loop": (1, 16, 48, 96, 384, 768, 1536, 3072, 6144),
        "control": (96, 384, 768, 1536, 3072, 6144, 8192),
    },
}
TINY_BATCHES = (1, 2)
# Sequences a rank has. The paper says neither whether its batch, 8 and 48, is a rank's nor how long
# sequences are; the last is the batch taken for a rank's, of 1,024 and 32 tokens, and is judged.
RANK_BATCHES = {"lm": (1, 4, 8), "mt": (6, 24, 48)}
PARTS = ("rank-share", "mt-encoder", "mt-decoder")
# Share of the time that is left for a part and those after it.
TIME_SHARES = {"rank-share": 0.2, "mt-encoder": 0.62, "mt-decoder": 1.0}
# Of a stack's time, when to be done: with the dense twin; of the gatings with listed batches,
# judged ones for the first time, larger ones, judged ones that are larger. The rest is the
# control's.
SHARES = {"dense": 0.2, "listed": 0.55, "judged": 0.68, "larger": 0.78, "again": 0.9}
# Of the control's time, listed batches; the rest is for its best one again.
CONTROL_LISTED = 0.6
LIMITS = RunLimits(seconds=0.4, least_repeats=2, most_repeats=20, point_seconds=4.0)
CLIMBING = dataclasses.replace(LIMITS, pass_seconds=4.0)
TINY_MOST_BATCH = 4
UNIFORM = "uniform routing: not run"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Setup:
    """What every part needs.

    Attributes:
        config: Shape of a stack.
        lm_config: Shape of the language model.
        routing: The translation twin's trace.
        lm_routing: The language twin's.
        device: ``cuda`` or ``cpu``.
        batches: By part, by gating; those of the control among them.
        rank_batches: By model.
        limits: Of a listed batch.
        climbing: Of a larger one.
        breakdown_batches: By part, whose pass is broken down.
    """

    config: PaperLmConfig
    lm_config: PaperLmConfig
    routing: str
    lm_routing: str
    device: str
    batches: Mapping[str, Mapping[str, Sequence[int]]]
    rank_batches: Mapping[str, Sequence[int]]
    limits: RunLimits
    climbing: RunLimits
    breakdown_batches: Mapping[str, int]


def setup_of(options: argparse.Namespace) -> Setup:
    """Returns the sizes asked for."""
    config, lm_config = MT_CONFIG, PaperLmConfig()
    batches: Mapping[str, Mapping[str, Sequence[int]]] = BATCHES
    limits, climbing = LIMITS, CLIMBING
    rank_batches: Mapping[str, Sequence[int]] = RANK_BATCHES
    breakdown_batches = BREAKDOWN_BATCHES
    if options.tiny:
        tiny: dict[str, Any] = {"vocab_size": 64, "d_model": 16, "d_ff": 32, "num_heads": 2}
        config = dataclasses.replace(config, **tiny)
        lm_config = dataclasses.replace(lm_config, **tiny)
        batches = {part: dict.fromkeys(own, TINY_BATCHES) for part, own in BATCHES.items()}
        rank_batches = dict.fromkeys(RANK_BATCHES, TINY_BATCHES)
        breakdown_batches = dict.fromkeys(BREAKDOWN_BATCHES, TINY_BATCHES[-1])
        limits = dataclasses.replace(limits, seconds=0.0)
        climbing = dataclasses.replace(climbing, seconds=0.0, most_batch=TINY_MOST_BATCH)
    return Setup(
        config=config,
        lm_config=lm_config,
        routing=options.routing,
        lm_routing=options.lm_routing,
        device="cpu" if options.tiny else "cuda",
        batches=batches,
        rank_batches=rank_batches,
        limits=limits,
        climbing=climbing,
        breakdown_batches=breakdown_batches,
    )


def build(part: str, config: PaperLmConfig, device: str) -> MtStack:
    """Returns the stack of a part."""
    return (MtEncoder if part == "mt-encoder" else MtDecoder)(config, device=device)


def passes(part: str, stack: MtStack, batches: RecordedBatches, cursor: StepCursor) -> Prepare:
    """Returns what makes passes over the first sentences of ``batches``.

    A decoder attends to `PAST_TOKENS` tokens before its own and to an encoder output of `LENGTH`
    tokens; their keys and values count as memory of the batch.
    """
    config, device = stack.config, stack.embedding.weight.device

    def prepare(batch: int) -> tuple[int, Callable[[], object]]:
        generator = torch.Generator().manual_seed(batch)
        length = LENGTH if part == "mt-encoder" else 1
        drawn = torch.randint(config.vocab_size, (batch, length), generator=generator)
        tokens = drawn.to(device)
        if part == "mt-encoder":
            assert batches.keep is not None
            keep = first_rows(batches.keep, batch)
            leave_out_padding(stack, keep)
            return batches.num_tokens(batch), lambda: stack(tokens, keep)
        # In the place of the encoder's output.
        noise = torch.Generator(device).manual_seed(batch)
        encoded = torch.empty(batch, LENGTH, config.d_model, device=device, dtype=torch.bfloat16)
        encoded.normal_(generator=noise)
        assert isinstance(stack, MtDecoder)
        with torch.no_grad():
            state = stack.begin(encoded, past_tokens=PAST_TOKENS, max_tokens=PAST_TOKENS + 1)
        del encoded

        def step() -> object:
            cursor.advance()
            return stack(tokens, state)

        return batches.num_tokens(batch), step

    return prepare


def force(stack: MtStack, choices: Sequence[Sequence[Choice]]) -> StepCursor:
    """Lets the gates of a stack hand on recorded choices and returns their cursor."""
    cursor = StepCursor(num_steps=len(choices[0]))
    for moe, own in zip(stack.moes, choices, strict=True):
        gate = moe.gate.gate if isinstance(moe.gate, ForcedGate) else moe.gate
        moe.gate = ForcedGate(gate, own, cursor)
    return cursor


def run_stack(
    part: str,
    setup: Setup,
    deadline_s: float,
    *,
    spent: TimeSpent,
    keep: Callable[[dict[str, Any]], None],
) -> dict[str, Any]:
    """Measures one stack under every gating.

    Args:
        part: Which.
        setup: Sizes and sources.
        deadline_s: When to be done, by `time.monotonic`.
        spent: Where the time goes.
        keep: Called with what there is, after every step.
    """
    config, device = setup.config, setup.device
    sizes = setup.batches[part]
    ends = ends_of(SHARES, time.monotonic(), deadline_s)
    with spent.part(f"{part}: routing"):
        recorded = (encoder_batches if part == "mt-encoder" else decoder_steps)(
            setup.routing, config, max(map(max, sizes.values())), device
        )
    print(f"{part}: {recorded.said}", flush=True)
    made: dict[str, Any] = {
        "config": dataclasses.asdict(config),
        "routing": recorded.said,
        "length": LENGTH,
        "past_tokens": PAST_TOKENS if part == "mt-decoder" else None,
        "token_fraction": MT_FRACTION,
        "num_distinct": recorded.num_distinct,
        "dense_leaves_out_padding": part == "mt-encoder",
        "published": dict(zip(("single_node", "multi_node"), MT_GAINS[part], strict=True)),
        "weight_bytes": None,
        "control": {"routing": UNIFORM, "rows": [], "skipped": [], "headline": []},
    }

    def series_of(order: Sequence[str], label: str, write: Callable[[], None]) -> Series:
        return Series(
            order=order, device=device, limits=setup.limits, climbing=setup.climbing, keep=write,
            spent=spent, label=label,
        )  # fmt: skip

    def write() -> None:
        made.update(series.result())
        known = {each["batch"] for each in made.get("active_experts", ())}
        ran = {row["batch"] for row in made["rows"]}
        made["active_experts"] = sorted(
            [
                *made.get("active_experts", ()),
                *({"batch": n, "mean": recorded.active_experts(n)} for n in ran - known),
            ],
            key=lambda each: each["batch"],
        )
        keep(made)

    series = series_of(GATINGS, part, write)
    run_dense(part, setup, series, made, recorded, ends["dense"])
    release(device)
    with spent.part(f"{part}: building"):
        stack = build(part, config, device)
    made["weight_bytes"] = weight_bytes(stack)
    cursor = force(stack, recorded.choices)

    @contextmanager
    def given(name: str) -> Iterator[Prepare]:
        fraction = MT_FRACTION if name.startswith("static") else None
        with apply_gating(stack, name, token_fraction=fraction):
            yield passes(part, stack, recorded, cursor)

    breakdown_batch = setup.breakdown_batches[part]
    series.run(TURNS, given, stack, sizes, breakdown_batch=breakdown_batch, ends=ends)
    release(device)

    with spent.part(f"{part}: control, routing"):
        control = uniform_control(recorded, config)
    cursor = force(stack, control.choices)

    def write_control() -> None:
        found = uniform.result()
        made["control"] = {
            "routing": control.said,
            "rows": [row for row in found["rows"] if row["gating"] == "dynamic"],
            "skipped": found["skipped"],
            "headline": found["headline"],
        }
        keep(made)

    @contextmanager
    def controlled(_: str) -> Iterator[Prepare]:
        with apply_gating(stack, "dynamic"):
            yield passes(part, stack, control, cursor)

    uniform = series_of(GATINGS, f"{part}: control", write_control)
    uniform.found.rows.extend(row for row in series.found.rows if row["gating"] != "dynamic")
    now = time.monotonic()
    with controlled("dynamic") as prepare:
        listed_s = now + CONTROL_LISTED * (deadline_s - now)
        uniform.sweep("dynamic", sizes["control"], prepare, until_s=listed_s)
    uniform.revisit(["dynamic"], controlled, until_s=deadline_s)
    write()
    print_headline(made["headline"])
    print_endings(made["endings"])
    single, several = MT_GAINS[part]
    print(f"the paper, over one mask: {single}x on one node, {several}x on several", flush=True)
    return made


def run_dense(
    part: str,
    setup: Setup,
    series: Series,
    made: dict[str, Any],
    recorded: RecordedBatches,
    until_s: float,
) -> None:
    """Measures the dense twin of a stack, which must not share the device with the experts.

    Args:
        part: Which stack.
        setup: Sizes and sources.
        series: Takes what is found.
        made: Takes the bytes of its weights.
        recorded: Batches; of their routing nothing is used.
        until_s: When to be done, by `time.monotonic`.
    """
    ends = ends_of(DENSE_SHARES, time.monotonic(), until_s)
    config, device = setup.config, setup.device
    with series.spent.part(f"{part}: building the dense twin"):
        stack = build(part, dense_config(config), device)
        widen(stack, config, device)
    made["dense_weight_bytes"] = weight_bytes(stack)
    prepare = passes(part, stack, recorded, StepCursor())

    @contextmanager
    def given(_: str) -> Iterator[Prepare]:
        yield prepare

    series.run(
        ["dense"], given, stack, setup.batches[part],
        breakdown_batch=setup.breakdown_batches[part], ends=ends,
    )  # fmt: skip


def weight_bytes(stack: MtStack) -> int:
    """Returns the bytes of a stack's parameters."""
    return sum(p.numel() * p.element_size() for p in stack.parameters())


def run_rank_share(setup: Setup, deadline_s: float) -> dict[str, Any]:
    """Measures one rank's share of both models under each gating."""
    settings: list[dict[str, Any]] = []
    skipped: list[dict[str, Any]] = []
    for model, batches in setup.rank_batches.items():
        # The judged batch first.
        for batch in sorted(batches, reverse=True):
            if time.monotonic() > deadline_s:
                reason = "the time given to this part is up"
                skipped.append({"model": model, "batch_per_rank": batch, "reason": reason})
                continue
            settings.append(share_setting(model, batch, setup, judged=batch == max(batches)))
            release(setup.device)
    return {
        "ranks": rank_share.RANKS,
        "published": dict(MEMORY_RATIOS),
        "settings": settings,
        "skipped": skipped,
    }


def share_setting(model: str, batch: int, setup: Setup, *, judged: bool) -> dict[str, Any]:
    """Returns the memory of one rank's share of a model at a batch per rank."""
    device, ranks = setup.device, rank_share.RANKS
    if model == "lm":
        config, fraction, whole = setup.lm_config, LM_FRACTION, PAPER_LM
        length = LM_LENGTH if device != "cpu" else LENGTH
        choices, said = recorded_choices(setup.lm_routing, config, ranks * batch * length, "cpu")
        rank, routing = rank_share.rank_routing(choices, config.num_experts, device)
        share = rank_share.lm_share(config, batch, length, fraction, device)
    else:
        config, fraction, whole, length = setup.config, MT_FRACTION, PAPER_MT, LENGTH
        encoded = encoder_batches(setup.routing, config, ranks * batch, "cpu")
        decoded = decoder_steps(setup.routing, config, ranks * batch, "cpu")
        rank, routing = rank_share.rank_routing(
            [own[0] for own in encoded.choices], config.num_experts, device
        )
        _, steps = rank_share.rank_routing(
            [own[0] for own in decoded.choices], config.num_experts, device, rank
        )
        routing += steps
        said = f"{encoded.said}; then {decoded.said.split('; ', maxsplit=1)[1]}"
        assert encoded.keep is not None
        keep = encoded.keep[rank * batch : (rank + 1) * batch].to(device)
        share = rank_share.mt_share(config, keep, fraction, PAST_TOKENS, device)
    tokens = batch * length
    widest = max(routing, key=lambda each: each.num_received)
    predicted_weights = predicted_weight_bytes(whole, config, len(routing))
    rows = []
    for gating in rank_share.GATINGS:
        row = rank_share.measure(share, gating, routing, device)
        layer = rank_share.moe_layer_bytes(
            gating, config, num_tokens=tokens, fraction=fraction, routing=widest
        )
        row |= {"layer_bytes": layer, "predicted_bytes": row["weight_bytes"] + layer}
        rows.append(row)
        peak = row["peak_bytes"]
        print(
            f"  {model} share, batch {batch} a rank, {gating:20s}:"
            f" {'not counted' if peak is None else f'{peak / 2**30:7.2f} GiB'},"
            f" {row['predicted_bytes'] / 2**30:7.2f} GiB by arithmetic on the largest layer",
            flush=True,
        )
    return {
        "model": model,
        "batch_per_rank": batch,
        "tokens_per_rank": tokens,
        "judged": judged,
        "token_fraction": fraction,
        "routing": said,
        "rank": rank,
        "rows_received_most": widest.num_received,
        "rows_received_mean": widest_mean(routing),
        "weight_bytes_by_shape": predicted_weights if device != "cpu" else None,
        "rows": rows,
        "ratios": ratios(rows, "peak_bytes"),
        "predicted_ratios": ratios(rows, "predicted_bytes"),
        "goal": MEMORY_RATIOS[model],
    }


def predicted_weight_bytes(whole: ModelShape, config: PaperLmConfig, num_layers: int) -> int:
    """Returns what `moeprof.replay.capacity` says a rank holds, gates in single precision."""
    gates = num_layers * config.num_experts * config.d_model
    return whole.device_bytes(devices=rank_share.RANKS) + 2 * gates


def widest_mean(routing: Sequence[rank_share.RankRouting]) -> float:
    """Returns the mean of the rows that the rank receives in a layer."""
    return sum(each.num_received for each in routing) / len(routing)


def ratios(rows: Sequence[Mapping[str, Any]], field: str) -> dict[str, float | None]:
    """Returns total memory of each static gating over moeprof's and over the paper's dynamic."""
    found = {row["gating"]: row[field] for row in rows}
    return {
        f"{static} over {dynamic}": (
            found[static] / found[dynamic] if found[static] and found[dynamic] else None
        )
        for static in rank_share.STATIC
        for dynamic in rank_share.DYNAMIC
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures and writes."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--routing", required=True, help="trace of the translation twin")
    parser.add_argument("--lm-routing", default="sample:twin-lm", help="of the language twin")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--seconds", type=float, default=460.0, help="time for all parts")
    parser.add_argument("--tiny", action="store_true", help="small sizes, on the CPU")
    options = parser.parse_args(arguments)
    setup = setup_of(options)
    spent = TimeSpent()
    begun = time.monotonic()
    end = begun + options.seconds
    given = sys.argv[1:] if arguments is None else list(arguments)
    command = shlex.join(["python", "-m", "analysis.gpu.mt_headline", *given])
    result = evidence(command, setup.device) | {"tiny": options.tiny, "parts": {}}

    def write(part: str, made: dict[str, Any]) -> None:
        result["parts"][part] = made
        result["wall_s"] = time.monotonic() - begun
        result["seconds_by_part"] = spent.seconds
        write_json(options.out / RESULT, result)

    for part in options.parts:
        now = time.monotonic()
        is_last = part == options.parts[-1]
        deadline_s = end if is_last else now + TIME_SHARES[part] * (end - now)
        keep = functools.partial(write, part)
        if now > end:
            made = {"not_run": "the time given was up before it began"}
        elif part == "rank-share":
            with spent.part(part):
                made = run_rank_share(setup, deadline_s)
        else:
            made = run_stack(part, setup, deadline_s, spent=spent, keep=keep)
        keep(made)
        release(setup.device)
        print(f"{part} after {result['wall_s']:.0f} s", flush=True)
    print_seconds(spent.seconds)
    print(f"written to {options.out / RESULT}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
