"""One recording from the command line: load a model, run its prompts, close the trace.

Leaves out loading (`moeprof.zoo`) and hooks (`recorder`).
"""

from __future__ import annotations

import shlex
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from moeprof.errors import MoeprofError, UsageError
from moeprof.recording.summary import recording_lines

if TYPE_CHECKING:
    from moeprof.recording.recorder import Recorder
    from moeprof.zoo.batching import Batch
    from moeprof.zoo.loader import LoadedModel
    from moeprof.zoo.prompts import Prompt

Progress = Callable[[str, int, int], None]

DEFAULT_BATCH_SIZE = 8
DEFAULT_NEW_TOKENS = 48
PROFILED_PASSES = 10
BYTES_PER_DECISION = 2.6
DRY_RUN_TOKENS = 4
SECONDS_PER_HOUR = 3600
EXIT_INTERRUPTED = 130


@dataclass(frozen=True, kw_only=True)
class RecordOptions:
    """What `moeprof record MODEL` was asked for.

    Attributes:
        model: ``zoo:lm``, ``zoo:mt``, a local folder or a hub id.
        output: Path of the trace.
        task: ``lm`` or ``mt``; None takes it from the model.
        prompts: File of prompts; None takes the built-in ones.
        batch_size: Prompts per batch.
        max_new_tokens: Tokens generated per prompt.
        num_beams: Beams of beam search.
        score: Teacher-forced scoring of the prompts instead of generation.
        force: Replace an existing trace.
        device: ``auto``, ``cpu`` or ``cuda``.
        dtype: ``auto``, ``float32``, ``bfloat16`` or ``float16``.
        fixes: Names of fixes to apply; ``none`` applies none.
        limit: At most this many prompts.
        profile: Run the short profiled pass.
        scores: Store affinities of the selected experts.
        dry_run: Describe what would be recorded.
        progress: Called with (what, done, total).
    """

    model: str
    output: str
    task: str | None = None
    prompts: str | None = None
    batch_size: int | None = None
    max_new_tokens: int | None = None
    num_beams: int | None = None
    score: bool = False
    force: bool = False
    device: str = "auto"
    dtype: str = "auto"
    fixes: tuple[str, ...] = ()
    limit: int | None = None
    profile: bool = True
    scores: bool = False
    dry_run: bool = False
    progress: Progress | None = None


@dataclass(frozen=True)
class RecordSummary:
    """What a recording did.

    Attributes:
        path: The trace; None after a dry run.
        text: Lines for a person.
    """

    path: str | None
    text: tuple[str, ...]

    def lines(self) -> list[str]:
        """Returns the lines."""
        return list(self.text)


def record_model(options: RecordOptions) -> RecordSummary:
    """Loads a model, records its prompts and returns what happened.

    Raises:
        MoeprofError: Anything the user can fix: model, prompts, output, capture.
    """
    import torch

    from moeprof.recording.recorder import Recorder, RecorderOptions
    from moeprof.zoo.batching import batches
    from moeprof.zoo.loader import load

    tell = options.progress or _silent
    for name in ("batch_size", "max_new_tokens", "num_beams", "limit"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise UsageError(f"--{name.replace('_', '-')} must be at least 1, not {value}")
    prompts = _given_prompts(options.prompts)
    tell(f"loading {options.model}", 0, 1)
    loaded = load(
        options.model,
        task=options.task,
        device=options.device,
        dtype=None if options.dtype == "auto" else options.dtype,
        fixes=tuple(f for f in options.fixes if f != "none") if options.fixes else ("auto",),
    )
    prompts = prompts or _default_prompts(loaded)
    prompts = prompts[: options.limit] if options.limit else prompts
    groups = list(batches(loaded, prompts, options.batch_size or DEFAULT_BATCH_SIZE))
    if options.dry_run:
        return RecordSummary(path=None, text=tuple(_describe(loaded, groups, options)))
    if options.score:
        _check_scoring(loaded, groups)
    recorder = Recorder(
        loaded.model,
        options.output,
        RecorderOptions(
            task=loaded.task,
            name=loaded.name,
            mode="score" if options.score else "generate",
            scores=options.scores,
            force=options.force,
            fixes=loaded.fixes,
            weight_hash=loaded.weight_hash,
            command=command_line(),
        ),
    )
    run = _score if options.score else _generate
    with _telling_of_interrupts(recorder), recorder, torch.inference_mode():
        for done, batch in enumerate(groups):
            tell("recording", done, len(groups))
            recorder.announce([_label(prompt) for prompt in batch.prompts])
            run(loaded, batch, options)
        if options.profile:
            tell("profiling kernels", len(groups), len(groups))
            short = _shortened(options)
            recorder.profile(lambda: run(loaded, groups[0], short))
        tell("recording", len(groups), len(groups))
    return RecordSummary(path=str(recorder.path), text=tuple(recording_lines(recorder.path)))


@contextmanager
def _telling_of_interrupts(recorder: Recorder) -> Iterator[None]:
    """Turns Ctrl-C into an error that says what was kept."""
    try:
        yield
    except KeyboardInterrupt:
        steps = recorder.num_committed_steps
        kept = f"{steps} steps are safe in {recorder.path}, marked incomplete"
        raise MoeprofError(
            f"interrupted: {kept if steps else 'nothing was recorded yet'}",
            exit_code=EXIT_INTERRUPTED,
        ) from None


def _silent(what: str, done: int, total: int) -> None:
    return


def command_line() -> str:
    """Returns the command line of this process, with the program's own name first."""
    return shlex.join(["moeprof", *sys.argv[1:]])


def _given_prompts(path: str | None) -> list[Prompt]:
    from moeprof.zoo.prompts import read_prompts

    return list(read_prompts(path)) if path is not None else []


def _default_prompts(loaded: LoadedModel) -> list[Prompt]:
    """Returns the model's own prompts, or those of the built-in model of the same task."""
    if loaded.prompts:
        return list(loaded.prompts)
    from moeprof.zoo.catalog import builtin
    from moeprof.zoo.prompts import read_prompts

    return list(read_prompts(builtin(f"zoo:{loaded.task}").folder / "prompts.jsonl"))


def _label(prompt: Prompt) -> Any:
    from moeprof.recording.tokens import RequestLabel

    return RequestLabel(
        prompt_id=prompt.id,
        domain=prompt.domain,
        language=prompt.language,
        source_language=prompt.source_language,
    )


def _generate(loaded: LoadedModel, batch: Batch, options: RecordOptions) -> None:
    settings: dict[str, Any] = {
        "max_new_tokens": options.max_new_tokens or DEFAULT_NEW_TOKENS,
        "do_sample": False,
        "num_beams": options.num_beams or 1,
        **batch.generate_kwargs,
    }
    model: Any = loaded.model
    model.generate(**batch.inputs, **settings)


def _score(loaded: LoadedModel, batch: Batch, options: RecordOptions) -> None:
    """Runs one teacher-forced forward pass, as the founding paper measured its LM."""
    model: Any = loaded.model
    if loaded.task == "lm":
        model(**batch.inputs, use_cache=False)
        return
    model(**batch.inputs, **batch.targets, use_cache=False)


def _check_scoring(loaded: LoadedModel, groups: Sequence[Batch]) -> None:
    if loaded.task == "mt" and any(not batch.targets for batch in groups):
        raise MoeprofError(
            "--score needs a reference translation for every prompt",
            hint="give prompts as JSON lines with a field 'reference', or leave out --score",
        )


def _shortened(options: RecordOptions) -> RecordOptions:
    from dataclasses import replace

    return replace(options, max_new_tokens=PROFILED_PASSES)


def _describe(loaded: LoadedModel, groups: Sequence[Batch], options: RecordOptions) -> list[str]:
    """Returns what a recording would hold, from one short run that is not recorded."""
    import torch

    from moeprof.recording.anatomy import anatomy
    from moeprof.recording.sites import find_sites, geometry

    found = find_sites(loaded.model)
    parts = anatomy(loaded.model, found)
    sites = geometry(loaded.model, found, {})
    lines = [f"{loaded.name}: {loaded.architecture}, {len(sites)} MoE sites"]
    for site, found_site in zip(sites, found, strict=True):
        timed = ["moe"]
        timed += ["gate"] if found_site.modules.router is not None else []
        timed += ["experts"] if found_site.modules.experts is not None else []
        timed += [n for n in ("dispatch", "combine") if hasattr(found_site.modules.block, n)]
        timed += ["shared_experts"] if found_site.shared else []
        seen = "each step" if found_site.expert_modules else "probed steps"
        lines.append(
            f"  site {site.site}: {site.stack} layer {site.layer}, {site.num_experts} experts, "
            f"top-{site.top_k}, {site.expert_bytes / 1024:.0f} KiB each; times "
            f"{', '.join(timed)}; executed rows: {seen}"
        )
    layers = sum(bool(layer.attention) for layer in parts.layers)
    lines.append(f"  attention timed in {layers} of {len(parts.layers)} layers")
    if groups:
        run = _score if options.score else _generate
        begun = time.perf_counter()
        with torch.inference_mode():
            run(loaded, groups[0], _with_tokens(options, DRY_RUN_TOKENS))
        elapsed_s = time.perf_counter() - begun
        tokens = groups[0].num_tokens + len(groups[0].prompts) * DRY_RUN_TOKENS
        slots = sum(site.top_k for site in sites)
        hourly = tokens / elapsed_s * slots * BYTES_PER_DECISION * SECONDS_PER_HOUR
        lines.append(
            f"  about {hourly / 1e6:.0f} MB per hour (estimate: {tokens / elapsed_s:.0f} tokens/s "
            f"x {slots} slots x {BYTES_PER_DECISION} bytes)"
        )
    return lines


def _with_tokens(options: RecordOptions, tokens: int) -> RecordOptions:
    from dataclasses import replace

    return replace(options, max_new_tokens=tokens)
