"""`moeprof record -- PROGRAM` records what the program runs, and lets it be."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")

import moeprof
from moeprof.cli import main
from moeprof.recording.script import record_script
from moeprof.trace.validator import check

TESTS = Path(__file__).parent

HEAD = """
import sys
import torch
torch.set_num_threads(1)
import moeprof
from recording_plain import OddExperts, OddModel
moeprof.register(OddExperts, ids="which", weights="how_much")
model = OddModel()
ids = torch.randint(0, 50, (2, 4))
torch.set_grad_enabled(False)
"""


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(TESTS))


def _write(name: str, body: str, *, head: str = HEAD) -> str:
    Path(name).write_text(head + textwrap.dedent(body))
    return name


def _record(*arguments: str, options: tuple[str, ...] = ()) -> int:
    return main(["record", *options, "--", *arguments])


def _record_only(output: str, *arguments: str) -> int:
    """Records without the findings that the command line ends with."""
    return record_script(list(arguments), output)


def _trace(name: str) -> Any:
    return moeprof.open(name)


def test_a_script_with_arguments(capfd: pytest.CaptureFixture[str]) -> None:
    _write(
        "run.py",
        """
        import os, subprocess
        print("arguments", sys.argv, __name__)
        print("told", file=sys.stderr)
        print("children get", subprocess.check_output(["env"], text=True).count("MOEPROF_ATTACH"))
        # The first call is recorded, too, although nothing could be attached before it.
        for _ in range(3):
            model(ids)
        """,
    )
    assert _record(sys.executable, "run.py", "--flag", "a b", options=("--scores",)) == 0
    out, err = capfd.readouterr()
    assert "arguments ['run.py', '--flag', 'a b'] __main__" in out
    assert "children get 0" in out
    assert "told" in err
    assert "Next: moeprof report run.moeprof" in err
    trace = _trace("run.moeprof")
    assert trace.complete
    assert len(trace.steps) == 3
    assert check(trace).ok
    assert trace.info.command.startswith("moeprof record -- ")
    assert trace.info.command.endswith("run.py --flag 'a b'")
    assert trace.routing(columns=["score"])["score"].notna().all()


def test_a_transformers_program_that_only_generates(capfd: pytest.CaptureFixture[str]) -> None:
    head = """
import warnings
import torch
import tiny_models
torch.set_num_threads(1)
warnings.simplefilter("ignore")
"""
    _write(
        "generate.py",
        """
        first, second = tiny_models.mixtral(), tiny_models.olmoe()
        dense = tiny_models._build("LlamaForCausalLM", "LlamaConfig", **tiny_models.COMMON)
        ids = torch.randint(5, 90, (2, 4))
        settings = dict(attention_mask=torch.ones_like(ids), max_new_tokens=3, do_sample=False,
                        eos_token_id=None)
        dense.generate(ids, **settings)
        for _ in range(2):
            first.generate(ids, **settings)
        second.generate(ids, **settings)
        """,
        head=head,
    )
    assert _record_only("generate.moeprof", sys.executable, "generate.py") == 0
    trace = _trace("generate.moeprof")
    assert trace.model.architecture == "MixtralForCausalLM"
    assert trace.steps["phase"].tolist() == ["prefill", "decode", "decode"] * 2
    assert trace.requests["num_output_tokens"].tolist() == [3] * 4
    assert check(trace).ok
    assert "not recorded: OlmoeForCausalLM" in capfd.readouterr().err


def test_a_module_that_exits_with_a_code_of_its_own(capfd: pytest.CaptureFixture[str]) -> None:
    Path("package").mkdir()
    Path("package/__init__.py").write_text("")
    _write("package/work.py", "model(ids)\nprint(sys.argv[1:])\nsys.exit(7)\n")
    assert _record(sys.executable, "-m", "package.work", "x") == 7
    out, err = capfd.readouterr()
    assert "['x']" in out
    last = err.strip().splitlines()[-1]
    assert last == (
        "the program ended with exit code 7; what was recorded is in package-work.moeprof"
    )
    assert _trace("package-work.moeprof").complete


def test_a_script_that_fails(capfd: pytest.CaptureFixture[str]) -> None:
    # It shows its errors in a way of its own, as some libraries do.
    body = """
    sys.excepthook = lambda *_: print("my own words", file=sys.stderr)
    model(ids)
    raise RuntimeError("no")
    """
    _write("fails.py", body)
    assert _record(sys.executable, "fails.py") == 1
    err = capfd.readouterr().err
    assert "my own words" in err
    last = err.strip().splitlines()[-1]
    assert last == (
        "the program ended with exit code 1; what was recorded is in fails.moeprof, "
        "marked incomplete"
    )
    trace = _trace("fails.moeprof")
    assert not trace.complete
    assert len(trace.steps) == 1
    assert check(trace).ok


def test_a_script_that_leaves_no_time(capfd: pytest.CaptureFixture[str]) -> None:
    _write("leaves.py", "import os\nmodel(ids)\nos._exit(0)\n")
    assert _record(sys.executable, "leaves.py") == 1
    err = capfd.readouterr().err
    assert "error: the program left without ending its recording" in err
    assert "hint:" in err


def test_a_script_without_a_moe_model(capfd: pytest.CaptureFixture[str]) -> None:
    head = "import torch\n"
    _write("dense.py", "torch.nn.Linear(2, 2)(torch.ones(1, 2))\n", head=head)
    assert _record(sys.executable, "dense.py") == 1
    err = capfd.readouterr().err
    assert "error: no Mixture-of-Experts model ran in" in err
    assert "moeprof.register" in err
    assert not Path("dense.moeprof").exists()


def test_a_program_that_is_not_there(capfd: pytest.CaptureFixture[str]) -> None:
    assert _record("no-such-program") == 1
    err = capfd.readouterr().err
    assert "cannot start no-such-program" in err
    assert err.count("\n") == 2


def test_python_where_the_path_has_none(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")
    Path("hello.py").write_text("import sys; print(sys.executable)\n")
    assert _record("python", "hello.py") == 1  # No model ran in it.
    assert sys.executable in capfd.readouterr().out


def test_interrupted(capfd: pytest.CaptureFixture[str]) -> None:
    """Ctrl-C reaches the program and moeprof alike."""
    _write(
        "loops.py",
        """
        import time
        for step in range(10000):
            model(ids)
            print(step, flush=True)
            time.sleep(0.01)
        """,
    )
    process = subprocess.Popen(
        [sys.executable, "-m", "moeprof", "record", "--", sys.executable, "loops.py"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": f"{TESTS.parent}:{TESTS}"},
        start_new_session=True,
    )
    assert process.stdout is not None
    for line in process.stdout:
        if int(line) == 20:
            break
    os.killpg(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert err.strip().splitlines()[-1].startswith("the program ended with exit code 130")
    trace = _trace("loops.moeprof")
    assert not trace.complete
    assert len(trace.steps) > 20
    assert check(trace).ok


def test_an_output_that_exists_is_refused_before_the_program_starts(
    capfd: pytest.CaptureFixture[str],
) -> None:
    Path("taken.moeprof").mkdir()
    begun = time.monotonic()
    assert _record("sleep", "30", options=("-o", "taken.moeprof")) == 1
    assert time.monotonic() - begun < 20
    assert "taken.moeprof exists" in capfd.readouterr().err
