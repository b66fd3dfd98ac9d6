from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

import moeprof

ROOT = Path(__file__).resolve().parents[1]
MAX_WHEEL_BYTES = 60 << 20


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)],
        cwd=ROOT,
        check=True,
        capture_output=True,
    )
    (path,) = folder.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def names(wheel) -> list[str]:
    with zipfile.ZipFile(wheel) as archive:
        return archive.namelist()


def test_the_wheel_holds_one_package_and_its_metadata(names):
    tops = {name.split("/")[0] for name in names}
    assert tops == {"moeprof", f"moeprof-{moeprof.__version__}.dist-info"}


def test_the_wheel_is_typed_and_licensed(names):
    assert "moeprof/py.typed" in names
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_the_wheel_holds_every_module(names):
    modules = {p.relative_to(ROOT).as_posix() for p in (ROOT / "moeprof").rglob("*.py")}
    assert modules <= set(names)
    assert not [name for name in names if "__pycache__" in name]


@pytest.mark.parametrize("model", ["lm", "mt"])
def test_the_wheel_holds_the_zoo(names, model):
    files = {Path(name).name for name in names if name.startswith(f"moeprof/zoo/{model}/")}
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= files


@pytest.mark.parametrize("sample", ["lm", "mt", "twin-lm", "twin-mt"])
def test_the_wheel_holds_the_samples(names, sample):
    assert f"moeprof/samples/{sample}.moeprof/trace.json" in names
    source = ROOT / "traces" / "samples" / f"{sample}.moeprof"
    files = {p.relative_to(source).as_posix() for p in source.rglob("*") if p.is_file()}
    prefix = f"moeprof/samples/{sample}.moeprof/"
    assert files == {n.removeprefix(prefix) for n in names if n.startswith(prefix)}


def test_the_wheel_is_small(wheel):
    assert wheel.stat().st_size < MAX_WHEEL_BYTES


def test_the_unpacked_wheel_works_from_an_empty_folder(wheel, tmp_path):
    site, folder = tmp_path / "site", tmp_path / "empty"
    folder.mkdir()
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    environment = {**os.environ, "PYTHONPATH": str(site)}
    for name in ("NUMBA_CACHE_DIR", "NUMBA_DISABLE_JIT"):
        environment.pop(name, None)

    def run(*arguments: str) -> str:
        done = subprocess.run(
            [sys.executable, *arguments],
            cwd=folder,
            env=environment,
            capture_output=True,
            text=True,
            check=True,
        )
        return done.stdout

    where = run("-c", "import moeprof; print(moeprof.__file__)").strip()
    assert Path(where).is_relative_to(site)
    assert "sample:mt: ok" in run("-m", "moeprof", "check", "sample:mt")
    # One section that compiles loops where the wheel lies, on a page made from its templates.
    run("-m", "moeprof", "report", "sample:mt", "--only", "balancing")
    assert "<html" in (folder / "sample-mt.html").read_text()
    assert (folder / "sample-mt.json").exists()
    assert list(site.rglob("*.nbi"))
    assert "zoo:lm" in run("-m", "moeprof", "record", "zoo:lm", "--dry-run", "--device", "cpu")


def test_every_requirement_is_pinned_once_and_without_a_local_version():
    pins = [
        line
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if line and not line.startswith("#")
    ]
    assert all(re.fullmatch(r"[A-Za-z0-9._-]+==[A-Za-z0-9.]+", line) for line in pins)
    pinned = [canonical(line.split("==")[0]) for line in pins]
    assert len(set(pinned)) == len(pinned)
    assert "torch==2.13.0" in pins
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    requirements = [
        *project["project"]["dependencies"],
        *project["project"]["optional-dependencies"]["record"],
        *project["project"]["optional-dependencies"]["tensorboard"],
        *project["dependency-groups"]["dev"],
    ]
    wanted = {canonical(re.match(r"[A-Za-z0-9._-]+", each).group()) for each in requirements}
    assert wanted <= set(pinned)


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def test_make_help_lists_every_target():
    makefile = (ROOT / "Makefile").read_text()
    targets = re.search(r"^\.PHONY: (.*)$", makefile, re.MULTILINE).group(1).split()
    environment = {k: v for k, v in os.environ.items() if not k.startswith("MAKE")}
    shown = subprocess.run(
        ["make", "help"], cwd=ROOT, env=environment, capture_output=True, text=True, check=True
    ).stdout
    assert [line.split()[0] for line in shown.splitlines()] == targets
    assert all(len(line.split(maxsplit=1)[1]) > 5 for line in shown.splitlines())


def test_continuous_integration_runs_the_documented_targets():
    script = (ROOT / ".ci" / "run").read_text()
    assert re.findall(r"^make (\w+)$", script, re.MULTILINE) == ["check", "test", "demo"]
    assert os.access(ROOT / ".ci" / "run", os.X_OK)
