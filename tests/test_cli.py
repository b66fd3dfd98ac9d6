from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import click
import pytest

from moeprof import cli
from moeprof.errors import MoeprofError
from moeprof.trace import schema
from moeprof.trace.synthetic import synthetic_trace

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def run(capsys, monkeypatch, tmp_path):
    """Runs the command line in an empty folder: (exit code, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)

    def runner(*arguments: str) -> tuple[int, str, str]:
        code = cli.main([str(argument) for argument in arguments])
        out, err = capsys.readouterr()
        return code, out, err

    return runner


@pytest.fixture
def trace_path(tmp_path) -> Path:
    path = tmp_path / "small.moeprof"
    synthetic_trace(path, num_requests=12, num_sites=2, num_experts=8, top_k=2, seed=0)
    return path


def assert_one_line_and_hint(err: str, *, hint: str) -> None:
    lines = err.strip().splitlines()
    assert lines[0].startswith("error: ")
    assert lines[1].startswith("hint: ")
    assert hint in lines[1]
    assert len(lines) == 2


class Summary:
    findings = ()

    def lines(self) -> list[str]:
        return ["model  a model"]


@pytest.fixture
def recorded(monkeypatch):
    """Options of every call of `record_model`; nothing is recorded."""
    from moeprof.recording import session

    calls = []

    def record_model(options):
        calls.append(options)
        return Summary()

    monkeypatch.setattr(session, "record_model", record_model)
    return calls


# Arguments


def test_an_unknown_command_lists_the_commands(run):
    code, _, err = run("reprot", "x")
    assert code == 2
    assert ", ".join(cli.cli.commands) in err
    assert {"record", "report", "check", "info"} <= set(cli.cli.commands)
    assert_one_line_and_hint(err, hint="moeprof --help")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("record",), "name a MODEL"),
        (("record", "zoo:lm", "--task", "vision"), "'lm', 'mt'"),
        (("record", "zoo:lm", "--fix", "everything"), "'nllb-dispatch', 'none'"),
        (("record", "zoo:lm", "--batch-size", "0"), "x>=1"),
        (("record", "zoo:lm", "--prompts", "nowhere.txt"), "nowhere.txt"),
        (("record", "zoo:lm", "--banana"), "--banana"),
        (("record", "--"), "no program"),
        (("record", "zoo:lm", "--", "python", "x.py"), "not both"),
        (("record", "--batch-size", "4", "--", "python", "x.py"), "--batch-size"),
        (("report",), "TRACE"),
        (("report", "x", "-f", "pdf"), "'html', 'md', 'json'"),
        (("check",), "TRACE"),
    ],
)
def test_arguments_that_make_no_sense_exit_with_2(run, arguments, said):
    code, out, err = run(*arguments)
    assert (code, out) == (2, "")
    assert said in err
    assert_one_line_and_hint(err, hint=f"moeprof {arguments[0]} --help")


@pytest.mark.parametrize("verb", ["record", "report", "check", "info"])
def test_every_command_explains_itself(run, verb):
    code, out, _ = run(verb, "--help")
    assert code == 0
    assert out.startswith(f"Usage: moeprof {verb}")
    for parameter in cli.cli.commands[verb].params:
        if isinstance(parameter, click.Option):
            assert parameter.opts[-1] in out


def test_version(run):
    from moeprof import __version__

    assert run("--version") == (0, f"moeprof {__version__}\n", "")


def test_the_choices_are_those_of_the_functions_called():
    from moeprof.reporting import writing
    from moeprof.zoo import loader

    assert set(cli.FORMATS) == set(writing.FORMATS)
    assert set(cli.FIXES) == {*loader.FIXES, "none"}
    assert set(cli.DTYPES) == {*loader.DTYPES, "auto"}
    assert cli.TRACE_SUFFIX == schema.TRACE_SUFFIX


# record


def test_record_passes_its_options_on(run, recorded, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("hello\n")
    run(
        "record", "some/model", "--task", "mt", "--prompts", prompts, "--batch-size", "3",
        "--max-new-tokens", "7", "--num-beams", "2", "--score", "--limit", "5", "--device", "cpu",
        "--dtype", "bfloat16", "--fix", "nllb-dispatch", "--no-profile", "--scores", "--dry-run",
        "--force",
    )  # fmt: skip
    (options,) = recorded
    assert (options.model, options.task, options.prompts) == ("some/model", "mt", str(prompts))
    assert (options.batch_size, options.max_new_tokens, options.num_beams) == (3, 7, 2)
    assert (options.score, options.scores, options.profile) == (True, True, False)
    assert (options.limit, options.device, options.dtype) == (5, "cpu", "bfloat16")
    assert tuple(options.fixes) == ("nllb-dispatch",)
    assert options.dry_run and options.force
    assert Path(options.output) == Path("model.moeprof")


def test_a_dry_run_answers_on_stdout(run, recorded):
    code, out, err = run("record", "zoo:lm", "--dry-run")
    assert (code, out, err) == (0, "model  a model\n", "")


def test_record_refuses_an_existing_output_before_it_loads_anything(run, recorded, tmp_path):
    (tmp_path / "zoo-lm.moeprof").mkdir()
    code, _, err = run("record", "zoo:lm")
    assert code == 1
    assert_one_line_and_hint(err, hint="--force")
    assert recorded == []


@pytest.mark.parametrize(
    ("model", "name"),
    [
        ("zoo:lm", "zoo-lm.moeprof"),
        ("org/model-8x7b", "model-8x7b.moeprof"),
        ("./models/mixtral/", "mixtral.moeprof"),
        ("/abs/olmoe", "olmoe.moeprof"),
    ],
)
def test_a_trace_is_named_after_the_model(model, name):
    assert cli.default_output(model) == name


@pytest.mark.parametrize(
    ("script", "name"),
    [
        (["python", "my_script.py", "--x", "other.py"], "my_script.moeprof"),
        (["python3", "-m", "package.module"], "package-module.moeprof"),
        (["./run"], "run.moeprof"),
    ],
)
def test_a_trace_is_named_after_the_program(script, name):
    assert cli.default_script_output(script) == name


def test_what_follows_two_dashes_reaches_the_program_as_it_is(run, monkeypatch):
    from moeprof.recording import script as module

    calls = []

    def record_script(argv, output, **options):
        calls.append((argv, output, options))
        return 7

    monkeypatch.setattr(module, "record_script", record_script)
    code, _, _ = run(
        "record", "-o", "a.moeprof", "--", "python", "x.py", "--force", "-o", "b", "--"
    )
    assert code == 7
    assert calls[0][0] == ["python", "x.py", "--force", "-o", "b", "--"]
    assert calls[0][1] == "a.moeprof"
    assert calls[0][2]["force"] is False


def test_a_missing_extra_says_how_to_get_it(run, monkeypatch):
    from moeprof.recording import session

    def record_model(options):
        raise ModuleNotFoundError(
            "No module named 'transformers.models'", name="transformers.models"
        )

    monkeypatch.setattr(session, "record_model", record_model)
    code, _, err = run("record", "zoo:lm")
    assert code == 1
    assert "'transformers', which is not installed" in err
    assert_one_line_and_hint(err, hint="pip install 'moeprof[record]'")


# report


@pytest.mark.parametrize(
    ("traces", "output", "formats", "expected"),
    [
        (["a/lm.moeprof"], None, (), ("a/lm", ("json", "html"))),
        (["a/lm.moeprof/"], None, (), ("a/lm", ("json", "html"))),
        (["a/lm.moeprof", "b/mt.moeprof"], None, (), ("a/report", ("json", "html"))),
        (["sample:mt"], None, (), ("sample-mt", ("json", "html"))),
        (["sample:mt"], "x.html", (), ("x", ("json", "html"))),
        (["sample:mt"], "x.html", ("html", "md", "json", "md"), ("x", ("json", "html", "md"))),
        (["sample:mt"], "v1.2", ("json",), ("v1.2", ("json",))),
    ],
)
def test_where_a_report_goes(traces, output, formats, expected):
    base, chosen = cli.report_files(traces, output=output, formats=formats)
    assert (base, chosen) == (Path(expected[0]), expected[1])


def test_a_report_into_a_folder_is_named_after_the_trace(tmp_path):
    base, _ = cli.report_files(["a/lm.moeprof"], output=str(tmp_path), formats=())
    assert base == tmp_path / "lm"


def test_report_refuses_existing_files_before_it_reads_the_trace(run, tmp_path):
    (tmp_path / "x.json").write_text("{}")
    code, _, err = run("report", "nowhere.moeprof", "-o", "x", "-f", "html", "-f", "json")
    assert code == 1
    assert "x.json exists" in err
    assert_one_line_and_hint(err, hint="--force")


def test_report_writes_what_was_asked_for(run, trace_path, tmp_path):
    code, out, err = run("report", trace_path, "-o", "page", *("-f", "md", "-f", "json"))
    assert (code, out) == (0, "")
    assert err.splitlines()[-2:] == ["Wrote page.json", "Wrote page.md"]
    assert json.loads((tmp_path / "page.json").read_text())
    assert not (tmp_path / "page.html").exists()


# check and info


def test_check_of_a_good_trace(run, trace_path):
    code, out, _ = run("check", trace_path)
    assert code == 0
    assert out.startswith(f"{trace_path}: ok")


def test_check_answers_for_every_trace_and_exits_with_3(run, trace_path):
    code, out, _ = run("check", trace_path, "nowhere.moeprof", "--json")
    assert code == 3
    good, bad = json.loads(out)
    assert good["ok"] and good["trace"] == str(trace_path)
    assert not bad["ok"]
    assert bad["problems"][0]["severity"] == "error"


def test_check_names_what_is_wrong(run, trace_path):
    victim = next((trace_path / "routing").rglob("*.parquet"))
    victim.unlink()
    code, out, _ = run("check", trace_path)
    assert code == 3
    assert ": not ok (" in out
    assert "  error" in out


@pytest.mark.parametrize("verb", ["report", "info"])
def test_a_trace_of_a_newer_version_exits_with_3(run, trace_path, verb):
    info = trace_path / schema.INFO_FILE
    info.write_text(info.read_text().replace('"schema_version": 1', '"schema_version": 99'))
    code, out, err = run(verb, trace_path)
    assert (code, out) == (3, "")
    assert_one_line_and_hint(err, hint="upgrade")


def test_info_of_a_trace(run, trace_path):
    code, out, _ = run("info", trace_path, "--json")
    assert code == 0
    facts = json.loads(out)
    assert facts["schema_version"] == schema.SCHEMA_VERSION
    assert facts["complete"] is True
    assert facts["requests"] == 12
    assert facts["decisions"] == facts["tokens"]["decoder"] * 2 * 2
    assert 0 < facts["routing_bytes_per_decision"] < facts["size_bytes"]
    code, out, _ = run("info", trace_path)
    assert "decoder: 2 sites, 8 experts, top 2" in out


def test_info_of_this_machine(run):
    code, out, _ = run("info", "--json")
    assert code == 0
    facts = json.loads(out)
    assert facts["can_record"] is True
    assert isinstance(facts["energy_counter"], bool)
    assert "can record" in run("info")[1]


def test_sizes_are_said_in_the_unit_that_fits(run, trace_path):
    _, out, _ = run("info", trace_path)
    assert any(line.startswith("size ") and line.endswith(" KiB") for line in out.splitlines())


# errors


@pytest.fixture
def failing(monkeypatch):
    """Makes `info` fail with a given error."""
    from moeprof.recording import hardware

    def fail_with(error: BaseException) -> None:
        def fail():
            raise error

        monkeypatch.setattr(hardware, "capabilities", fail)

    return fail_with


def test_an_error_of_ours_is_one_line_a_hint_and_its_exit_code(run, failing):
    failing(MoeprofError("it is\nbroken", hint="mend it", exit_code=4))
    code, out, err = run("info")
    assert (code, out) == (4, "")
    assert err == "error: it is broken\nhint: mend it\n"


def test_an_unexpected_error_is_one_line_and_says_how_to_see_more(run, failing):
    failing(ZeroDivisionError("division by zero"))
    code, _, err = run("info")
    assert code == 1
    assert err.startswith("error: ZeroDivisionError: division by zero\n")
    assert_one_line_and_hint(err, hint="-v")


@pytest.mark.parametrize("arguments", [("-v", "info"), ("info", "-v")])
def test_verbose_shows_the_traceback(run, failing, arguments):
    failing(ZeroDivisionError("division by zero"))
    code, _, err = run(*arguments)
    assert code == 1
    assert "Traceback" in err
    assert err.strip().endswith("error: ZeroDivisionError: division by zero")


def test_a_file_that_cannot_be_written_is_named(run, failing):
    failing(PermissionError(13, "Permission denied", "/x/y"))
    code, _, err = run("info")
    assert (code, err) == (1, "error: permission denied: /x/y\n")


def test_interruption_is_one_line(run, failing):
    failing(KeyboardInterrupt())
    code, _, err = run("info")
    assert code == 130
    assert err.strip() == "error: interrupted"


def test_quiet_leaves_only_results(run, trace_path):
    assert run("report", trace_path, "-q", "-o", "page.json") == (0, "", "")


# as a process


def spawn(*arguments: str, **options) -> subprocess.Popen:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        [sys.executable, "-m", "moeprof", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        **options,
    )


def test_the_module_runs_from_anywhere_and_returns_the_exit_code(tmp_path):
    process = spawn("check", "nowhere.moeprof", cwd=tmp_path)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 3
    assert "nowhere.moeprof" in out
    assert err == ""


def test_a_closed_pipe_ends_quietly(tmp_path):
    process = spawn("record", "--help", cwd=tmp_path)
    process.stdout.close()
    err = process.stderr.read()
    process.wait(timeout=60)
    process.stderr.close()
    assert "Traceback" not in err


def test_a_real_interruption_leaves_no_traceback(tmp_path):
    fifo = tmp_path / "pipe.moeprof"
    fifo.mkdir()
    os.mkfifo(fifo / schema.INFO_FILE)
    process = spawn("info", str(fifo), cwd=tmp_path)
    # Opening the pipe for writing waits until the command reads its trace.
    writer = os.open(fifo / schema.INFO_FILE, os.O_WRONLY)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    os.close(writer)
    assert process.returncode == 130
    assert err.strip() == "error: interrupted"
