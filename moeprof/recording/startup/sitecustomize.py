"""Runs first in a program started by `moeprof record -- PROGRAM`: arms the recorder.

Found through PYTHONPATH by Python itself. Hands on to a sitecustomize this one hides.
"""

import importlib.machinery
import importlib.util
import os
import sys

_here = os.path.dirname(os.path.abspath(__file__))


def _run_hidden() -> None:
    rest = [p for p in sys.path if os.path.abspath(p or os.curdir) != _here]
    spec = importlib.machinery.PathFinder.find_spec("sitecustomize", rest)
    if spec is not None and spec.loader is not None:
        spec.loader.exec_module(importlib.util.module_from_spec(spec))


_run_hidden()
if os.environ.get("MOEPROF_ATTACH"):
    try:
        from moeprof.recording import attachment
    except ImportError:
        # Another interpreter than the one moeprof is installed for: use these sources.
        sys.path.append(os.environ["MOEPROF_HOME"])
        from moeprof.recording import attachment
    attachment.arm()
