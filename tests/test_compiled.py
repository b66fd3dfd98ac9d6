"""Loops that are compiled once and kept: what they were compiled with must be what there is."""

from __future__ import annotations

import importlib
import os
import sys

import pytest

from moeprof.replay import compiled as compiling

LOOP = """
from moeprof.replay.compiled import compiled
from {name}_constants import STEP

@compiled("int64(int64)")
def stepped(value):
    return value + STEP
"""


@pytest.fixture
def loop_of(tmp_path, monkeypatch):
    """Makes a loop that takes a constant from another module, with the sources as they are now."""
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr("numba.core.config.CACHE_DIR", str(tmp_path / "cache"))
    name = f"loop_of_{tmp_path.name.replace('-', '_')}"
    (tmp_path / f"{name}.py").write_text(LOOP.format(name=name))

    def made(step, sources):
        (tmp_path / f"{name}_constants.py").write_text(f"STEP = {step}\n")
        os.utime(tmp_path / f"{name}_constants.py", (step, step))
        monkeypatch.setattr(compiling, "_sources", lambda: sources)
        for each in (name, f"{name}_constants"):
            sys.modules.pop(each, None)
        importlib.invalidate_caches()
        return importlib.import_module(name).stepped

    yield made, tmp_path / "cache"
    for each in (name, f"{name}_constants"):
        sys.modules.pop(each, None)


def test_a_loop_is_compiled_again_when_what_it_takes_from_elsewhere_changes(loop_of):
    made, cache = loop_of
    assert made(3, "first")(1) == 4
    assert made(5, "second")(1) == 6
    kept = {path.name.split(".stepped-")[1].split("-")[0] for path in cache.rglob("*.nbi")}
    assert kept == {"first", "second"}


def test_what_is_compiled_is_known_by_every_source_that_may_be_in_it(monkeypatch, tmp_path):
    package = tmp_path / "moeprof"
    for part in ("replay/cache", "live", "zoo"):
        (package / part).mkdir(parents=True)
        (package / part / "one.py").write_text("A = 1\n")
    monkeypatch.setattr(compiling, "__file__", str(package / "replay" / "compiled.py"))

    def told():
        compiling._sources.cache_clear()
        return compiling._sources()

    try:
        first = told()
        assert told() == first
        (package / "zoo" / "one.py").write_text("A = 22\n")
        assert told() == first
        (package / "replay" / "cache" / "one.py").write_text("A = 22\n")
        second = told()
        assert second != first
        (package / "live" / "two.py").write_text("")
        assert told() not in (first, second)
    finally:
        compiling._sources.cache_clear()
