"""The command line: parse, call, print, exit.

Commands import what they need when they run, so that `--help` stays quick. Machine output goes to
stdout, talk and progress to stderr. Leaves out every computation: the verbs call the functions of
the same name.
"""

from __future__ import annotations

import itertools
import json
import logging
import shlex
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import click

from moeprof.errors import (
    EXIT_BAD_TRACE,
    EXIT_ERROR,
    EXIT_USAGE,
    MissingExtraError,
    MoeprofError,
    TraceError,
)

if TYPE_CHECKING:
    from moeprof.reporting import Report
    from moeprof.trace.validator import CheckResult

EXIT_INTERRUPTED = 130
TRACE_SUFFIX = ".moeprof"
DEFAULT_CALIBRATION = "calibration.json"
DEFAULT_MOST_REPETITIONS = 20
FORMATS = ("html", "md", "json")
DEFAULT_FORMATS = ("json", "html")
SECTIONS = (
    "latency", "memory", "activation", "locality", "batching", "gating", "buffering", "balancing",
)  # fmt: skip
FIXES = ("nllb-dispatch", "none")
DTYPES = ("auto", "float32", "bfloat16", "float16")
_SCRIPT_KEY = "moeprof.script"
_SCRIPT_OPTIONS = ("fixes", "scores")
_EXTRA_PACKAGES = ("accelerate", "psutil", "safetensors", "tokenizers", "torch", "transformers")
_NUM_FINDINGS = 3
_LABEL_WIDTH = 28
_BYTE_UNITS = ((1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB"), (1, "bytes"))

AnyCommand = TypeVar("AnyCommand", bound=Callable[..., Any])


@dataclass
class Talk:
    """How much is said on stderr.

    Attributes:
        quiet: Results and errors only.
        verbose: Tracebacks and log messages too.
    """

    quiet: bool = False
    verbose: bool = False

    def say(self, text: str = "") -> None:
        """Prints talk."""
        if not self.quiet:
            click.echo(text, err=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line and returns its exit code.

    Args:
        arguments: What follows the program's name; those of this process when None.
    """
    talk = Talk()
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    try:
        code = cli.main(args=arguments, prog_name="moeprof", standalone_mode=False, obj=talk)
    except click.UsageError as error:
        where = error.ctx.command_path if error.ctx is not None else "moeprof"
        return _fail(talk, error.format_message(), f"{where} --help", EXIT_USAGE)
    except click.ClickException as error:
        return _fail(talk, error.format_message(), "", EXIT_ERROR)
    except click.Abort:
        return _fail(talk, "interrupted", "", EXIT_INTERRUPTED)
    except MoeprofError as error:
        return _fail(talk, error.message, error.hint, error.exit_code)
    except BrokenPipeError:
        raise
    except OSError as error:
        if error.strerror is None:
            return _unexpected(talk, error)
        name = f": {error.filename}" if error.filename else ""
        return _fail(talk, f"{error.strerror.lower()}{name}", "", EXIT_ERROR)
    # The last resort before the terminal: whatever it was, one line and a way to see more.
    except Exception as error:
        return _unexpected(talk, error)
    return code if isinstance(code, int) else 0


def _fail(talk: Talk, message: str, hint: str, code: int) -> int:
    if talk.verbose:
        click.echo(traceback.format_exc().rstrip(), err=True)
    click.echo(f"error: {_one_line(message)}", err=True)
    if hint:
        click.echo(f"hint: {_one_line(hint)}", err=True)
    return code


def _unexpected(talk: Talk, error: Exception) -> int:
    text = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
    hint = "" if talk.verbose else "run it again with -v to see where this happened"
    return _fail(talk, text, hint, EXIT_ERROR)


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _talkative(command: AnyCommand) -> AnyCommand:
    """Adds -q and -v, which every command and the program itself take."""

    def setter(name: str) -> Callable[[click.Context, click.Parameter, bool], None]:
        def set_flag(context: click.Context, _: click.Parameter, value: bool) -> None:
            if value:
                setattr(context.ensure_object(Talk), name, True)
                if name == "verbose":
                    logging.basicConfig(level=logging.INFO, stream=sys.stderr)

        return set_flag

    for flags, name, text in (
        (("-v", "--verbose"), "verbose", "Show log messages and tracebacks."),
        (("-q", "--quiet"), "quiet", "Print results and errors only."),
    ):
        command = click.option(
            *flags,
            is_flag=True,
            is_eager=True,
            expose_value=False,
            callback=setter(name),
            help=text,
        )(command)
    return command


class _RecordCommand(click.Command):
    """`record`, whose `--` starts a program: click would swallow it."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Keeps what follows `--` apart and parses the rest."""
        if "--" in args:
            at = args.index("--")
            ctx.meta[_SCRIPT_KEY] = args[at + 1 :]
            args = args[:at]
        return super().parse_args(ctx, args)


class _VerbGroup(click.Group):
    """A group that answers an unknown verb with the verbs there are."""

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Returns the command that ``args`` name."""
        name = args[0]
        if name not in self.commands and not name.startswith("-"):
            raise click.UsageError(
                f"there is no command '{name}'; the commands are {', '.join(self.commands)}", ctx
            )
        return super().resolve_command(ctx, args)

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Returns the verbs in the order people meet them."""
        return list(self.commands)


def _print_version(context: click.Context, _: click.Parameter, value: bool) -> None:
    if value:
        from moeprof import __version__

        click.echo(f"moeprof {__version__}")
        context.exit()


@click.group(cls=_VerbGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "--version",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=_print_version,
    help="Print the version.",
)
@_talkative
def cli() -> None:
    """Characterize Mixture-of-Experts inference.

    Record what the experts of a language or translation model do, check the trace, report on it:

    \b
      moeprof record zoo:lm
      moeprof report zoo-lm.moeprof
    """  # noqa: D301


@cli.command(cls=_RecordCommand)
@click.argument("model", required=False)
@click.option("--task", type=click.Choice(("lm", "mt")), help="What the model does; guessed.")
@click.option(
    "--prompts",
    type=click.Path(exists=True, dir_okay=False),
    help="Prompts: text, one a line, or JSON lines with text, domain and language.",
)
@click.option("--batch-size", type=click.IntRange(min=1), help="Prompts per batch.")
@click.option("--max-new-tokens", type=click.IntRange(min=1), help="Most tokens to generate.")
@click.option("--num-beams", type=click.IntRange(min=1), help="Beams of beam search.")
@click.option("--score", is_flag=True, help="Teacher-forced scoring instead of generation.")
@click.option("--limit", type=click.IntRange(min=1), help="Most prompts to run.")
@click.option("-o", "--output", type=click.Path(), help="The trace; named after the model.")
@click.option("--force", is_flag=True, help="Replace an existing trace.")
@click.option(
    "--device", type=click.Choice(("auto", "cpu", "cuda")), default="auto", show_default=True
)
@click.option("--dtype", type=click.Choice(DTYPES), default="auto", show_default=True)
@click.option(
    "--fix",
    "fixes",
    multiple=True,
    type=click.Choice(FIXES),
    help="Correct a known fault of the model's code; may be repeated.",
)
@click.option("--no-profile", is_flag=True, help="Skip the short pass that times kernels.")
@click.option("--scores", is_flag=True, help="Also store the scores of all experts.")
@click.option("--dry-run", is_flag=True, help="Say what would be recorded, and stop.")
@click.option("--report", "with_report", is_flag=True, help="Write the report too.")
@_talkative
@click.pass_context
def record(
    context: click.Context,
    /,
    model: str | None,
    *,
    output: str | None,
    force: bool,
    with_report: bool,
    dry_run: bool,
    **options: Any,
) -> int:
    """Record a model into a trace.

    MODEL is zoo:lm, zoo:mt, a local folder or a hub id. A program that builds a model itself is
    recorded with:

    \b
      moeprof record [-o TRACE] -- python my_script.py ARGUMENTS

    A trace is as sensitive as the text it was made from, although it stores no text: expert
    choices give tokens away.
    """  # noqa: D301
    talk = context.ensure_object(Talk)
    script: list[str] | None = context.meta.get(_SCRIPT_KEY)
    if script is not None:
        path = _script_output(context, script, model=model, output=output)
    elif model is None:
        raise click.UsageError("name a MODEL, or a program after --", context)
    else:
        path = Path(output or default_output(model))
    if not dry_run:
        _refuse_existing(path, force=force)
    options["fixes"] = tuple(options["fixes"])
    options["profile"] = not options.pop("no_profile")
    given = {name: value for name, value in options.items() if value is not None}
    with _extra("record", "recording a model"):
        if script is not None:
            code = _record_script(script, path, force=force, given=given)
            if code:
                return code
        else:
            _record_model(talk, path, model=model, force=force, dry_run=dry_run, **given)
    if not dry_run:
        _finish_recording(talk, path, with_report=with_report, force=force)
    return 0


def _record_model(talk: Talk, path: Path, *, dry_run: bool, **options: Any) -> None:
    from moeprof.recording.session import RecordOptions, record_model

    with _progress(talk) as progress:
        summary = record_model(
            RecordOptions(output=str(path), dry_run=dry_run, progress=progress, **options)
        )
    for line in summary.lines():
        if dry_run:
            click.echo(line)
        else:
            talk.say(line)


def _record_script(script: Sequence[str], path: Path, *, force: bool, given: dict[str, Any]) -> int:
    from moeprof.recording.script import record_script

    kept = {name: given[name] for name in _SCRIPT_OPTIONS if name in given}
    return record_script(list(script), str(path), force=force, **kept)


def _script_output(
    context: click.Context, script: Sequence[str], *, model: str | None, output: str | None
) -> Path:
    """Returns where the trace of a program goes, once the arguments make sense."""
    if model is not None:
        raise click.UsageError(f"name a MODEL or a program after --, not both: '{model}'", context)
    if not script:
        raise click.UsageError("no program follows --", context)
    for parameter in context.command.params:
        name = parameter.name or ""
        source = context.get_parameter_source(name)
        typed = source is not None and source.name == "COMMANDLINE"
        if typed and name not in (*_SCRIPT_OPTIONS, "output", "force", "with_report", "model"):
            raise click.UsageError(
                f"{parameter.opts[-1]} is for a MODEL; a program decides that itself", context
            )
    return Path(output or default_script_output(script))


def default_output(model: str) -> str:
    """Returns the name of the trace of ``model``: a folder, a hub id or ``zoo:NAME``."""
    name = model if ":" in model else PurePath(model).name or Path(model).resolve().name
    return name.replace(":", "-").replace("/", "-") + TRACE_SUFFIX


def default_script_output(script: Sequence[str]) -> str:
    """Returns the name of the trace of a program: the script's or the module's."""
    module = [after for flag, after in itertools.pairwise(script) if flag == "-m"]
    files = [PurePath(word).stem for word in script if word.endswith(".py")]
    name = (module or files or [PurePath(script[0]).name])[0]
    return name.replace(".", "-") + TRACE_SUFFIX


def _refuse_existing(path: Path, *, force: bool) -> None:
    """Refuses an output that exists, before anything takes time."""
    if path.exists() and not force:
        raise MoeprofError(
            f"{path} exists", hint="choose another name (-o), or replace it with --force"
        )


def _finish_recording(talk: Talk, path: Path, *, with_report: bool, force: bool) -> None:
    """Says what stands out in a new trace and what to do next."""
    from moeprof.reporting import CHARACTERIZATION
    from moeprof.reporting import report as characterize

    # Replays take far longer than the rest: without a page to write nobody waits for them.
    with _progress(talk) as progress:
        sections = None if with_report else CHARACTERIZATION
        page = characterize([path], sections=sections, progress=progress)
    findings = page.findings[:_NUM_FINDINGS]
    for finding in findings:
        talk.say(f"  - {finding.text}")
    talk.say(f"Wrote {path}; keep it as you keep the prompts: expert choices give tokens away")
    if with_report:
        _save(talk, page, path.with_suffix(""), DEFAULT_FORMATS, force=force)
    else:
        talk.say(f"Next: moeprof report {path}")


@cli.command()
@click.argument("traces", nargs=-1, required=True, metavar="TRACE...")
@click.option("-o", "--output", type=click.Path(), help="The page; named after the trace.")
@click.option(
    "-f",
    "--format",
    "formats",
    multiple=True,
    type=click.Choice(FORMATS),
    help="May be repeated; by default what OUTPUT ends in, else html. JSON always.",
)
@click.option(
    "--only",
    "sections",
    multiple=True,
    type=click.Choice(SECTIONS),
    help="Only this section; may be repeated. All by default.",
)
@click.option("--force", is_flag=True, help="Replace existing files.")
@_talkative
@click.pass_context
def report(
    context: click.Context,
    traces: tuple[str, ...],
    *,
    output: str | None,
    formats: tuple[str, ...],
    sections: tuple[str, ...],
    force: bool,
) -> int:
    """Characterize traces on one page, and replay them.

    TRACE is a trace, or sample:lm or sample:mt. The page needs no network; the same numbers are
    in the JSON file. Replays (gating, buffering, balancing) take most of the time; each says its
    settings, and which moeprof replay command goes further.
    """
    talk = context.ensure_object(Talk)
    base, formats = report_files(traces, output=output, formats=formats)
    for each in formats:
        _refuse_existing(_with_format(base, each), force=force)
    from moeprof.reporting import report as characterize

    with _progress(talk) as progress:
        page = characterize(list(traces), sections=sections or None, progress=progress)
    _save(talk, page, base, formats, force=force)
    return 0


def report_files(
    traces: Sequence[str], *, output: str | None, formats: Sequence[str]
) -> tuple[Path, tuple[str, ...]]:
    """Returns where a report goes: the path less its suffix, and the formats.

    Args:
        traces: What is reported on.
        output: What the caller asked for: a file, with or without suffix, or a folder.
        formats: The formats the caller asked for; the data (``json``) is written with each.
    """
    local = [trace for trace in traces if ":" not in trace]
    folder = Path(local[0]).parent if local else Path()
    stem = PurePath(traces[0]).name.removesuffix(TRACE_SUFFIX).replace(":", "-")
    base = folder / (stem if len(traces) == 1 else "report")
    if output is not None and Path(output).is_dir():
        base = Path(output) / base.name
    elif output is not None:
        base = Path(output)
        suffix = base.suffix.removeprefix(".")
        if suffix in FORMATS:
            base = base.with_suffix("")
            formats = formats or (suffix,)
    return base, tuple(dict.fromkeys(("json", *(formats or DEFAULT_FORMATS))))


def _with_format(base: Path, name: str) -> Path:
    return base.with_name(f"{base.name}.{name}")


def _save(talk: Talk, page: Report, base: Path, formats: Sequence[str], *, force: bool) -> None:
    """Writes a report; its data comes first, whatever the format."""
    paths = [_with_format(base, each) for each in formats]
    for path in paths:
        _refuse_existing(path, force=force)
    base.parent.mkdir(parents=True, exist_ok=True)
    written = dict.fromkeys(path for each in paths for path in page.save(each))
    for path in written:
        talk.say(f"Wrote {path}")


@cli.command()
@click.argument("traces", nargs=-1, required=True, metavar="TRACE...")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@_talkative
@click.pass_context
def check(context: click.Context, traces: tuple[str, ...], *, as_json: bool) -> int:
    """Check that traces are whole and make sense.

    Exits with 3 when one of them has an error; warnings and notes do not count.
    """
    from moeprof.trace.validator import check as check_trace

    talk = context.ensure_object(Talk)
    checked: list[dict[str, Any]] = []
    for trace in traces:
        try:
            checked.append({"trace": trace, **_check_facts(check_trace(trace))})
        except TraceError as error:
            problem = {"code": "unreadable", "severity": "error", "message": error.message}
            checked.append({"trace": trace, "ok": False, "problems": [problem]})
    if as_json:
        click.echo(json.dumps(checked, indent=2))
    else:
        for entry in checked:
            for line in _check_lines(entry, talk):
                click.echo(line)
    return 0 if all(entry["ok"] for entry in checked) else EXIT_BAD_TRACE


def _check_facts(result: CheckResult) -> dict[str, Any]:
    from dataclasses import asdict

    return {"ok": result.ok, "problems": [asdict(problem) for problem in result.problems]}


def _check_lines(entry: dict[str, Any], talk: Talk) -> Iterator[str]:
    counts: dict[str, int] = {}
    for problem in entry["problems"]:
        counts[problem["severity"]] = counts.get(problem["severity"], 0) + 1
    said = ", ".join(f"{n} {name}{'s' * (n != 1)}" for name, n in counts.items())
    verdict = "ok" if entry["ok"] else "not ok"
    yield f"{entry['trace']}: {verdict}" + (f" ({said})" if said else "")
    for problem in entry["problems"]:
        if talk.quiet and problem["severity"] != "error":
            continue
        where = f" [{problem['where']}]" if problem.get("where") else ""
        yield f"  {problem['severity']:<8}{problem['code']}: {problem['message']}{where}"


@cli.command("import")
@click.argument("source_format", metavar="FORMAT", type=click.Choice(("bigmoeonedge",)))
@click.argument("source", type=click.Path(), metavar="FILE")
@click.option("-o", "--output", type=click.Path(), help="The trace; named after the file.")
@click.option("--force", is_flag=True, help="Replace an existing trace.")
@_talkative
@click.pass_context
def import_command(
    context: click.Context,
    /,
    source_format: str,
    source: str,
    *,
    output: str | None,
    force: bool,
) -> int:
    """Turn another tool's trace into one of this project.

    bigmoeonedge: a ROUTE_CSV (route_trace v1) of a run on a device.
    """
    from moeprof.trace.foreign import import_trace

    trace = import_trace(source, output, source_format=source_format, force=force)
    context.ensure_object(Talk).say(f"Next: moeprof check {trace.path}")
    click.echo(str(trace.path))
    return 0


@cli.command()
@click.argument("trace", required=False)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@_talkative
def info(trace: str | None, *, as_json: bool) -> int:
    """Say what a trace holds, or what this machine can record.

    Without TRACE: which parts of a recording are possible here, and what is missing for the rest.
    """
    if trace is None:
        from moeprof.recording.hardware import capabilities

        facts = capabilities()
    else:
        from moeprof.trace.facts import trace_facts
        from moeprof.trace.reader import open_trace

        facts = trace_facts(open_trace(trace))
    if as_json:
        click.echo(json.dumps(facts, indent=2))
    else:
        for name, value in facts.items():
            for i, line in enumerate(_lines_of(value, is_bytes=name.endswith("_bytes"))):
                label = "" if i else name.removesuffix("_bytes").replace("_", " ")
                click.echo(f"{label:<{_LABEL_WIDTH}}{line}")
    return 0


def _lines_of(value: Any, *, is_bytes: bool = False) -> list[str]:
    """Returns a fact in words, one line each."""
    if isinstance(value, bool):
        return ["yes" if value else "no"]
    if value is None:
        return ["unknown"]
    if is_bytes:
        unit, name = next((unit, name) for unit, name in _BYTE_UNITS if value >= unit or unit == 1)
        return [f"{value / unit:,.1f} {name}" if unit > 1 else f"{value} {name}"]
    if isinstance(value, float):
        return [f"{value:.3g}"]
    if isinstance(value, dict):
        return [f"{key}: {_lines_of(each)[0]}" for key, each in value.items()] or ["none"]
    if isinstance(value, (list, tuple)):
        return [str(each) for each in value] or ["none"]
    return [f"{value:,}" if isinstance(value, int) else str(value)]


@cli.group(cls=_VerbGroup)
@_talkative
def replay() -> None:
    """Replay a trace against an optimization: a table, or CSV."""


def _replayed(command: AnyCommand) -> AnyCommand:
    """Adds the trace and what every replay prints."""
    for option in (
        click.option("--force", is_flag=True, help="Replace an existing file."),
        click.option("-o", "--output", type=click.Path(), help="Write CSV to this file."),
        click.option("--csv", "as_csv", is_flag=True, help="Print every column as CSV."),
        click.argument("trace"),
    ):
        command = option(command)
    return _talkative(command)


def _listed(name: str, kind: Callable[[str], Any] = str, **more: Any) -> Callable[[Any], Any]:
    """Returns an option that takes values with commas between them, and may be repeated."""

    def parse(
        context: click.Context, parameter: click.Parameter, texts: tuple[str, ...]
    ) -> list[Any] | None:
        if not texts:
            return None
        try:
            every = [each.strip() for text in texts for each in text.split(",")]
            return [kind(each) for each in every if each]
        except ValueError:
            raise click.BadParameter(
                f"'{','.join(texts)}' is no list of numbers", context, parameter
            ) from None

    return click.option(name, callback=parse, multiple=True, **more)


@replay.command()
@_replayed
@click.option(
    "--rule",
    type=click.Choice(("token_fraction", "capacity_factor", "model")),
    default="token_fraction",
    show_default=True,
    help="How slots per expert follow from tokens; model: the model's own rule.",
)
@_listed("--values", float, help="Parameters of the rule: 0.05,1.0")
@click.option(
    "--devices",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    help="Devices that share the experts.",
)
@click.option("--tile-rows", type=click.IntRange(min=1), help="Rows of a tile.")
@click.pass_context
def gating(context: click.Context, /, **options: Any) -> int:
    """Static against dynamic gating: slots, drops, padding, bytes, operations."""
    return _replay(context, "gating", options, columns=_GATING_COLUMNS)


@replay.command()
@_replayed
@_listed("--policies", help="Cache policies: lru,min,bound")
@_listed("--capacities", help="Sizes of the cache: slots (16), bytes (4000MiB), 25%")
@click.option("--scope", type=click.Choice(("layer", "stack", "global")), help="What shares it.")
@click.option(
    "--semantics",
    type=click.Choice(("batch", "batch_hits_first", "sequential")),
    help="What a dispatch does to the cache.",
)
@click.option("--initial", type=click.Choice(("empty", "full")), help="What it holds at first.")
@click.option("--devices", type=click.IntRange(min=1), help="Devices that share the experts.")
@click.pass_context
def buffering(context: click.Context, /, **options: Any) -> int:
    """Expert caches: hits and bytes moved by policy and size."""
    return _replay(context, "buffering", options)


@replay.command()
@_replayed
@click.option("--devices", type=click.IntRange(min=1), help="Devices of all nodes.")
@_listed("--planners", help="Who places experts: contiguous,greedy,eplb")
@click.option("--num-redundant", type=click.IntRange(min=0), help="Extra replicas per layer.")
@click.option("--groups", type=click.IntRange(min=1), help="Expert groups.")
@click.option("--nodes", type=click.IntRange(min=1), help="Nodes.")
@click.option(
    "--rule",
    "replica_rule",
    type=click.Choice(("even", "round_robin")),
    help="How replicas share their expert's rows.",
)
@click.pass_context
def balancing(context: click.Context, /, **options: Any) -> int:
    """Expert placements: load of the fullest device by planner."""
    return _replay(context, "balancing", options)


_GATING_COLUMNS = (
    "rule", "value", "stack", "phase", "layer", "num_tokens", "num_padded_tokens",
    "max_slots_per_expert", "waste_factor", "waste_factor_without_ceiling", "dropped_share",
    "lost_share", "drops_class", "tile_ratio", "max_mask_bytes",
)  # fmt: skip
"""What fits a terminal; CSV has every column."""


def _replay(
    context: click.Context,
    name: str,
    options: dict[str, Any],
    *,
    columns: Sequence[str] | None = None,
) -> int:
    """Runs a replay and prints its table on stdout, its findings on stderr."""
    from moeprof import replay as analyses
    from moeprof.trace.reader import open_trace

    talk = context.ensure_object(Talk)
    path, output = options.pop("trace"), options.pop("output")
    as_csv, force = options.pop("as_csv"), options.pop("force")
    if output is not None:
        _refuse_existing(Path(output), force=force)
    given = {option: value for option, value in options.items() if value is not None}
    result = getattr(analyses, name)(open_trace(path), **given)
    if output is not None:
        from moeprof.reporting.writing import write_files

        write_files({Path(output): result.table.to_csv(index=False)})
        talk.say(f"Wrote {output}")
    elif as_csv:
        click.echo(result.table.to_csv(index=False), nl=False)
    else:
        shown = result.table if columns is None else result.table[list(columns)]
        click.echo(shown.to_string(index=False, float_format="{:.4g}".format, na_rep=""))
    for finding in result.findings:
        talk.say(f"  - {finding.text}")
    return 0


@cli.command()
@click.option("--device", help="cpu or cuda; a GPU if there is one.")
@click.option("-o", "--output", type=click.Path(), help="The file.  [default: calibration.json]")
@_listed(
    "--expert-bytes",
    help="Sizes of experts that predictions are wanted for, or their shapes where small:"
    " 9MiB,256x48",
)
@click.option("--dtype", type=click.Choice(DTYPES[1:]), help="Of weights and rows.")
@_listed("--policies", help="Cache policies to time; all of them.")
@_listed("--kernels", help="Gating kernels to time; all of them.")
@click.option(
    "--ranks",
    type=click.IntRange(min=1),
    help="Processes whose all-to-all is timed; a GPU each, none on a CPU. 1: do not.",
)
@click.option(
    "--trials-from",
    type=click.Path(),
    help="Measure constants only; take what trials say from another machine's file.",
)
@click.option(
    "--pool",
    "pooled_files",
    type=click.Path(),
    multiple=True,
    help="Measure nothing; put calibrations of one kind of machine together. Say it for each.",
)
@click.option(
    "--quiet-core",
    is_flag=True,
    help="Keep the measuring thread on a quiet core; measure again where it was disturbed.",
)
@click.option("--force", is_flag=True, help="Replace an existing file.")
@_talkative
@click.pass_context
def calibrate(
    context: click.Context,
    /,
    *,
    device: str | None,
    output: str | None,
    expert_bytes: list[str] | None,
    dtype: str | None,
    policies: list[str] | None,
    kernels: list[str] | None,
    ranks: int | None,
    trials_from: str | None,
    pooled_files: tuple[str, ...],
    quiet_core: bool,
    force: bool,
) -> int:
    """Measure what this machine does, once, for predictions.

    Writes a JSON file that `moeprof verify` and `moeprof.replay.cost` take. Nothing else should
    run on the machine meanwhile.
    """
    talk = context.ensure_object(Talk)
    target = Path(output or DEFAULT_CALIBRATION)
    _refuse_existing(target, force=force)
    with _extra("record", "measuring this machine"):
        from dataclasses import replace

        from moeprof.live.calibration import calibrate as measure
        from moeprof.live.calibration import device_named, sizes_for
        from moeprof.live.calibration_sizes import asked_sizes
        from moeprof.live.exchange_times import visible_ranks
    from moeprof.replay.calibration_file import read_calibration, write_calibration

    if pooled_files:
        measured = ("device", "expert_bytes", "dtype", "policies", "kernels", "ranks",
                    "trials_from", "quiet_core")  # fmt: skip
        said = [name for name in measured if context.params[name] not in (None, False)]
        if said:
            option = said[0].replace("_", "-")
            raise click.UsageError(f"--pool measures nothing: leave out --{option}", context)
        return _pool_calibrations(talk, pooled_files, target, force=force)
    place = device_named(device)
    sizes = sizes_for(place)
    if dtype is not None:
        sizes = replace(sizes, dtype=dtype)
    given: dict[str, Any] = {"policies": policies, "kernels": kernels}
    if expert_bytes is not None:
        expert_sizes, widths = asked_sizes(expert_bytes, dtype=sizes.dtype)
        given |= {"expert_bytes": expert_sizes, "widths": dict(widths)}
    if trials_from is not None:
        given["trials_from"] = read_calibration(trials_from)
    num_ranks = visible_ranks(place) if ranks is None else ranks
    with _progress(talk) as show:
        found = measure(
            place,
            sizes=sizes,
            num_ranks=None if num_ranks == 1 else num_ranks,
            quiet_core=quiet_core,
            command=shlex.join(["moeprof", *sys.argv[1:]]),
            progress=lambda item, done, total: show("calibrating", done, total, item),
            **{name: value for name, value in given.items() if value is not None},
        )
    write_calibration(found, target, force=force)
    copy = found.device_copy_bytes_per_s.median / 1e9
    link = found.to_device.sizes[-1] / found.to_device.times_s[-1].median / 1e9
    rate = found.matrix_flops_per_s.median / 1e12
    whose = "" if found.trials_of is None else f" of {found.trials_of.machine}"
    talk.say(f"{found.name}: {copy:,.1f} GB/s on the device, {link:,.1f} GB/s to it, "
             f"{rate:,.2f} TFLOP/s, {len(found.trials)} trials{whose}")  # fmt: skip
    if found.num_disturbed:
        talk.say(f"No core stayed quiet for {found.num_disturbed} parts and steps of trials: they "
                 "were measured all the same")  # fmt: skip
    talk.say(f"Next: moeprof verify TRACE --calibration {target}")
    click.echo(str(target))
    return 0


def _pool_calibrations(talk: Talk, files: Sequence[str], target: Path, *, force: bool) -> int:
    """Writes what calibrations say together."""
    from dataclasses import replace

    from moeprof.live.calibration import pooled
    from moeprof.replay.calibration_file import read_calibration, write_calibration

    command = shlex.join(["moeprof", *sys.argv[1:]])
    found = replace(pooled([read_calibration(path) for path in files]), command=command)
    write_calibration(found, target, force=force)
    talk.say(f"{found.name}: {len(files)} calibrations, {len(found.trials)} trials")
    talk.say(f"Next: moeprof verify TRACE --calibration {target}")
    click.echo(str(target))
    return 0


@cli.command()
@click.argument("trace")
@click.option("--calibration", type=click.Path(), help="From `moeprof calibrate`.")
@_listed(
    "--settings",
    help="lru:25%,min:32:split,lru:25%:ahead=2,gating:dynamic; ahead=N copies N experts ahead.",
)
@click.option("--predict-only", is_flag=True, help="Predict; run nothing.")
@click.option("--predictions", type=click.Path(), help="Judge these, from --predict-only.")
@click.option("-o", "--output", type=click.Path(), help="Write JSON to this file.")
@click.option("--stack", help="Stack of the trace; the last one.")
@click.option("--phase", help="Steps that are judged: decode, prefill, all, ...")
@click.option("--shape", help="Of random experts: D_MODELxD_FF[:ungated][:bias]")
@click.option("--dtype", type=click.Choice(DTYPES[1:]), help="Of weights and rows.")
@click.option("--max-steps", type=click.IntRange(min=1), help="Most steps to run.")
@click.option("--repetitions", type=click.IntRange(min=1), help="Least repetitions of each.")
@click.option("--most-repetitions", type=click.IntRange(min=1), help="Most of each, to reach 2 %.")
@click.option("--rounds", type=click.IntRange(min=1), help="Over which the least are spread.")
@click.option("--device", help="cpu or cuda; a GPU if there is one.")
@click.option("--weights", type=click.Choice(("auto", "random")), default="auto")
@_listed("--only", help="Run these settings of the predictions.")
@click.option(
    "--continue",
    "earlier",
    type=click.Path(),
    help="Add visits to this earlier run of the same predictions on such a machine.",
)
@click.option("--most-seconds", type=float, help="Repeat less, to end by then.")
@click.option("--share-host", is_flag=True, help="One host copy of random experts for all layers.")
@click.option(
    "--quiet-core",
    is_flag=True,
    help="Keep the measuring thread on a quiet core; set steps aside where it was disturbed.",
)
@click.option("--force", is_flag=True, help="Replace an existing file.")
@_talkative
@click.pass_context
def verify(context: click.Context, /, trace: str, **options: Any) -> int:
    """Predict settings, run them here, and print how far off the predictions were.

    The trace's own routing drives the layers; the weights are the model's where it can be opened,
    else random. Settings are run in rounds, all in each, so that a slow stretch of the machine is
    not one setting's; those not yet known to 2 % are then run again.
    """
    talk = context.ensure_object(Talk)
    output, force = options["output"], options["force"]
    if output is not None:
        _refuse_existing(Path(output), force=force)
    if options["predict_only"] and (output is None or options["predictions"] is not None):
        raise click.UsageError("--predict-only writes new predictions: give -o FILE", context)
    if (options["calibration"] is None) == (options["predictions"] is None):
        raise click.UsageError("give --calibration FILE, or --predictions FILE", context)
    with _extra("record", "running layers"):
        from moeprof.live import verification, verification_files
    from moeprof.replay.calibration_file import read_calibration
    from moeprof.replay.cost_model import UNJUDGED
    from moeprof.replay.serving_settings import parse_setting
    from moeprof.trace.reader import open_trace

    opened = open_trace(trace)
    if options["earlier"] is not None and options["predictions"] is None:
        raise click.UsageError("--continue goes with the --predictions of that run", context)
    earlier, is_serial = None, False
    with _progress(talk) as show:
        if options["earlier"] is not None:
            earlier = verification_files.read_verification(options["earlier"])
        if options["predictions"] is not None:
            made = verification_files.read_predictions(options["predictions"])
            said = [name for name in _OF_PREDICTIONS if options[name] is not None]
            if said:
                option = said[0].replace("_", "-")
                raise click.UsageError(f"--{option} is that of the predictions", context)
        else:
            machine = read_calibration(options["calibration"])
            is_serial = machine.is_serial
            names = options["settings"]
            made = verification.make_predictions(
                opened,
                machine,
                None if names is None else [parse_setting(name) for name in names],
                _verify_options(options),
                progress=lambda item, done, total: show("predicting", done, total, item),
            )
        if options["predict_only"]:
            verification_files.write_predictions(made, output, force=force)
            if is_serial:
                talk.say(f"Note: {UNJUDGED}")
            talk.say(f"Next: moeprof verify {trace} --predictions {output}")
            click.echo(output)
            return 0
        command = shlex.join(["moeprof", *sys.argv[1:]])

        def write(found: Any, *, replace: bool = force) -> None:
            if output is not None:
                verification_files.write_verification(
                    found, output, command=command, earlier=earlier, force=replace
                )

        result = verification.verify(
            opened,
            predictions=made,
            device=options["device"],
            weights=options["weights"],
            share_host=options["share_host"],
            only=options["only"],
            most_repetitions=options["most_repetitions"],
            most_s=options["most_seconds"],
            quiet_core=options["quiet_core"],
            earlier=earlier,
            # What took the time is on disk before anything else is made of it.
            keep=write,
            progress=lambda item, done, total: show("measuring", done, total, item),
        )
    write(result, replace=True)
    if output is not None:
        talk.say(f"Wrote {output}")
    shown = result.table.reindex(columns=list(_VERIFY_COLUMNS))
    click.echo(shown.to_string(index=False, float_format="{:.4g}".format, na_rep=""))
    for note in result.notes:
        talk.say(f"  ({note})")
    for finding in result.findings:
        talk.say(f"  - {finding.text}")
    return 0


_OF_PREDICTIONS = (
    "settings", "stack", "phase", "shape", "dtype", "max_steps", "repetitions", "rounds",
)  # fmt: skip
_PREDICTED_OPTIONS = (*_OF_PREDICTIONS, "most_repetitions")
_VERIFY_COLUMNS = (
    "setting", "percentile", "predicted_ms", "low_ms", "high_ms", "measured_ms", "measured_spread",
    "error", "inside", "naive_bandwidth_error", "naive_mean_error",
)  # fmt: skip


def _verify_options(options: dict[str, Any]) -> Any:
    """Returns what is run, from the command line."""
    from moeprof.live.verification_options import VerifyOptions
    from moeprof.replay.expert_shapes import parse_shape

    names = [name for name in _PREDICTED_OPTIONS if name not in ("settings", "shape")]
    given = {name: options[name] for name in names if options[name] is not None}
    if options["shape"] is not None:
        dtype = {"dtype": options["dtype"]} if options["dtype"] else {}
        given["shape"] = parse_shape(options["shape"], **dtype)
    if "repetitions" in given:
        given.setdefault("most_repetitions", max(given["repetitions"], DEFAULT_MOST_REPETITIONS))
    return VerifyOptions(**given)


@contextmanager
def _extra(extra: str, purpose: str) -> Iterator[None]:
    """Turns a missing optional package into an error that says how to get it."""
    try:
        yield
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in _EXTRA_PACKAGES:
            raise
        raise MissingExtraError(package, extra=extra, purpose=purpose) from error


class _Show(Protocol):
    """Shows how far something is; ``item`` is what is being done."""

    def __call__(self, label: str, done: int, total: int, item: str = "") -> None: ...


@contextmanager
def _progress(talk: Talk) -> Iterator[_Show]:
    """Yields ``show(label, done, total, item)``, a progress bar on a terminal's stderr."""
    bars: dict[str, Any] = {}
    hidden = talk.quiet or not sys.stderr.isatty()

    def finish() -> None:
        for bar in bars.values():
            bar.render_finish()
        bars.clear()

    def show(label: str, done: int, total: int, item: str = "") -> None:
        if hidden:
            return
        if label not in bars:
            finish()
            bars[label] = click.progressbar(
                length=total, label=label, file=sys.stderr, item_show_func=str
            )
        bars[label].length = total
        bars[label].current_item = item
        bars[label].update(done - bars[label].pos)
        bars[label].render_progress()

    try:
        yield show
    finally:
        finish()
