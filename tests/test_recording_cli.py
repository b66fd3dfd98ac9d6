"""`moeprof record MODEL` on the built-in models: what it records, says and refuses."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")

import moeprof  # noqa: E402
from moeprof.cli import main  # noqa: E402
from moeprof.recording.session import RecordOptions, record_model  # noqa: E402
from moeprof.trace.validator import check  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")

TESTS = Path(__file__).parent
SHORT = ("--limit", "4", "--batch-size", "2", "--max-new-tokens", "3", "--no-profile")


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_num_threads(1)
    monkeypatch.chdir(tmp_path)


def _record(*arguments: str) -> int:
    return main(["record", *arguments])


def _record_only(model: str, output: str = "t.moeprof", **options: Any) -> Any:
    """Records without the findings that the command line ends with; returns the trace."""
    settings = {"limit": 4, "batch_size": 2, "max_new_tokens": 3, "profile": False, **options}
    summary = record_model(RecordOptions(model=model, output=output, **settings))
    assert summary.path == output
    return moeprof.open(output)


def _error(capsys: pytest.CaptureFixture[str]) -> tuple[str, str]:
    """Returns the message and the hint; fails where more than that was said."""
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 2, lines
    message, hint = lines
    assert message.startswith("error: ")
    assert hint.startswith("hint: ")
    return message.removeprefix("error: "), hint.removeprefix("hint: ")


def test_a_language_model(capsys: pytest.CaptureFixture[str]) -> None:
    assert _record("zoo:lm", *SHORT) == 0
    out, err = capsys.readouterr()
    assert not out
    lines = err.splitlines()
    names = [line.split()[0] for line in lines[:10]]
    assert names == [
        "model", "MoE", "requests", "tokens", "capture", "execution", "time", "memory", "routing",
        "trace",
    ]  # fmt: skip
    assert "Wrote zoo-lm.moeprof" in err
    assert lines[-1] == "Next: moeprof report zoo-lm.moeprof"
    trace: Any = moeprof.open("zoo-lm.moeprof")
    assert trace.complete
    assert check(trace).ok
    assert trace.info.mode == "generate"
    assert len(trace.requests) == 4
    assert trace.requests["domain"].notna().all()
    assert trace.requests["prompt_id"].notna().all()
    assert trace.requests["num_output_tokens"].between(1, 3).all()
    assert trace.model.weight_hash
    assert not trace.model.random_weights


def test_a_translation_model_with_beams() -> None:
    trace = _record_only("zoo:mt", num_beams=2, scores=True, profile=True)
    assert check(trace).ok
    assert trace.stacks == ("encoder", "decoder")
    assert trace.requests["num_sequences"].tolist() == [2] * 4
    assert trace.requests["language"].notna().all()
    assert "nllb-dispatch" in trace.model.fixes or not trace.info.capture.num_executed_disagreeing
    assert len(trace.kernels) > 0
    assert trace.routing(columns=["score"])["score"].notna().all()


@pytest.mark.parametrize("name", ["zoo:lm", "zoo:mt"])
def test_scoring(name: str) -> None:
    trace = _record_only(name, score=True)
    assert trace.info.mode == "score"
    assert check(trace).ok
    assert set(trace.steps["phase"]) == ({"prefill"} if name == "zoo:lm" else {"encode", "prefill"})
    assert trace.requests["num_output_tokens"].tolist() == [0] * 4


def test_the_fault_is_recorded_where_no_fix_is_wanted() -> None:
    from moeprof.zoo.dispatch import needs_nllb_dispatch_fix
    from moeprof.zoo.loader import load

    if not needs_nllb_dispatch_fix(load("zoo:mt", device="cpu", fixes=()).model):
        pytest.skip("this transformers dispatches correctly")
    options = RecordOptions(
        model="zoo:mt", output="t.moeprof", fixes=("none",), limit=2, max_new_tokens=2,
        profile=False,
    )  # fmt: skip
    lines = record_model(options).lines()
    assert sum("DISAGREES" in line for line in lines) == 1
    assert main(["check", "-q", "t.moeprof"]) == 3


def test_a_dry_run_records_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    assert _record("zoo:mt", "--dry-run") == 0
    out = capsys.readouterr().out
    assert "4 MoE sites" in out
    assert "encoder layer 1, 16 experts, top-2" in out
    assert "executed rows: each step" in out
    assert "attention timed in 8 of 8 layers" in out
    assert "MB per hour" in out
    assert not list(Path().iterdir())


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("empty.txt", b"\n\n", "holds no prompts"),
        ("binary.txt", b"abc\n\x00\x01", "binary"),
        ("latin.txt", "caf\xe9\n".encode("latin-1"), "not valid UTF-8"),
        ("broken.jsonl", b"{oops\n", "not JSON"),
    ],
)
def test_bad_prompts(
    name: str, content: bytes, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    Path(name).write_bytes(content)
    assert _record("zoo:lm", "--prompts", name) == 1
    message, _ = _error(capsys)
    assert said in message
    assert not Path("zoo-lm.moeprof").exists()


def test_prompts_of_ones_own() -> None:
    Path("p.txt").write_text("One line.\nAnother, a bit longer.\n\nA third\n")
    trace = _record_only("zoo:lm", prompts="p.txt")
    assert trace.requests["prompt_id"].tolist() == ["p-1", "p-2", "p-4"]
    stored = b"".join(p.read_bytes() for p in Path("t.moeprof").rglob("*") if p.is_file())
    assert b"Another" not in stored


def test_scoring_a_translation_needs_references(capsys: pytest.CaptureFixture[str]) -> None:
    Path("p.txt").write_text("One line.\n")
    assert _record("zoo:mt", "--prompts", "p.txt", "--score") == 1
    message, hint = _error(capsys)
    assert "reference translation" in message
    assert "reference" in hint


def test_a_dense_model(capsys: pytest.CaptureFixture[str]) -> None:
    import shutil

    import transformers

    from moeprof.zoo.catalog import builtin

    config = transformers.LlamaConfig(
        vocab_size=5000, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=2,
    )  # fmt: skip
    model_class: Any = transformers.LlamaForCausalLM
    model_class(config).save_pretrained("dense")
    for file in builtin("zoo:lm").folder.glob("tokenizer*"):
        shutil.copy(file, "dense")
    capsys.readouterr()
    assert _record("./dense") == 1
    message, hint = _error(capsys)
    assert "has no Mixture-of-Experts layer" in message
    assert "dense models have no routing" in hint
    assert not Path("dense.moeprof").exists()


def test_an_output_that_exists(capsys: pytest.CaptureFixture[str]) -> None:
    _record_only("zoo:lm", "zoo-lm.moeprof", limit=1)
    assert _record("zoo:lm", *SHORT) == 1
    message, hint = _error(capsys)
    assert message == "zoo-lm.moeprof exists"
    assert "--force" in hint
    assert len(_record_only("zoo:lm", "zoo-lm.moeprof", limit=2, force=True).requests) == 2


def test_interrupted(tmp_path: Path) -> None:
    """One line, exit code 130, and the steps recorded so far."""
    process = subprocess.Popen(
        [sys.executable, "-m", "moeprof", "record", "zoo:lm", "--max-new-tokens", "180"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(TESTS.parent), "OMP_NUM_THREADS": "1"},
    )
    deadline = time.monotonic() + 200
    log = tmp_path / "zoo-lm.moeprof"
    while not (log.exists() and "steps" in _commits(log)) and time.monotonic() < deadline:
        assert process.poll() is None
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=100)
    assert process.returncode == 130
    assert not out
    [line] = err.strip().splitlines()
    assert line.startswith("error: interrupted: ")
    trace: Any = moeprof.open("zoo-lm.moeprof")
    assert f"{len(trace.steps)} steps are safe in zoo-lm.moeprof, marked incomplete" in line
    assert len(trace.steps) > 0
    assert not trace.complete
    assert check(trace).ok


def _commits(path: Path) -> str:
    return "".join(log.read_text() for log in path.glob("commits*"))
