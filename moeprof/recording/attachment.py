"""Attaches the recorder to whatever MoE model a foreign program builds and runs.

Nothing heavy is imported before the program itself imports torch. The first outermost module that
runs and holds MoE sites is recorded; how it went is left in a status file for `script`.
"""

from __future__ import annotations

import atexit
import functools
import importlib.abc
import importlib.machinery
import json
import os
import shlex
import signal
import sys
import weakref
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moeprof.recording.recorder import Recorder

SETTINGS_VARIABLE = "MOEPROF_ATTACH"
HOME_VARIABLE = "MOEPROF_HOME"
TORCH_MODULE = "torch.nn.modules.module"
GENERATION_MODULE = "transformers.generation.utils"


class _AfterImport(importlib.abc.MetaPathFinder):
    """Calls back once a module has been imported; finds nothing itself."""

    def __init__(self, callbacks: dict[str, Any]) -> None:
        self._callbacks = callbacks

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        """Wraps the loader of a module that is waited for."""
        callback = self._callbacks.pop(name, None)
        if callback is None:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        if spec is None or spec.loader is None:
            return None
        loader: Any = spec.loader
        execute = loader.exec_module

        def exec_module(module: ModuleType) -> None:
            execute(module)
            callback(module)

        loader.exec_module = exec_module
        return spec


class Attachment:
    """Waits for a model with MoE sites and records it.

    Args:
        settings: ``output``, ``force``, ``scores``, ``fixes``, ``command``, ``status``.
    """

    def __init__(self, settings: dict[str, Any]) -> None:
        self._settings = settings
        self._recorder: Recorder | None = None
        self._pid = os.getpid()
        self._dense: weakref.WeakSet[Any] = weakref.WeakSet()
        self._others: set[str] = set()
        self._restore_call: Any = None
        self._busy = False

    def arm(self) -> None:
        """Waits for torch and transformers to be imported."""
        callbacks = {TORCH_MODULE: self._watch_calls, GENERATION_MODULE: self._wrap_generate}
        sys.meta_path.insert(0, _AfterImport(callbacks))
        atexit.register(self._finish)

    def _watch_calls(self, module: Any) -> None:
        """Looks at every module that is called, until one is recorded.

        Before the call and not by a hook in it: a hook attached during a call misses that call.
        """
        module_class = module.Module
        original = module_class.__call__

        @functools.wraps(original)
        def call(called: Any, *args: Any, **kwargs: Any) -> Any:
            if not self._busy and called not in self._dense:
                self._consider(called)
            return original(called, *args, **kwargs)

        module_class.__call__ = call
        self._restore_call = functools.partial(setattr, module_class, "__call__", original)

    def _wrap_generate(self, module: Any) -> None:
        mixin = module.GenerationMixin
        original = mixin.generate

        @functools.wraps(original)
        def generate(model: Any, *args: Any, **kwargs: Any) -> Any:
            if not self._busy and model not in self._dense:
                self._consider(model)
            # The recorder wraps `generate` on the instance it was just attached to.
            own = vars(model).get("generate")
            if own is not None and not getattr(own, "moeprof_entered", False):
                own.moeprof_entered = True
                return own(*args, **kwargs)
            return original(model, *args, **kwargs)

        mixin.generate = generate

    def _consider(self, model: Any) -> None:
        """Attaches to ``model`` if it holds MoE sites and nothing is attached yet."""
        from moeprof.errors import CaptureError, MoeprofError
        from moeprof.recording.recorder import Recorder, RecorderOptions

        if self._recorder is not None:
            if model is not self._recorder.model:
                self._note_other(model)
            return
        self._busy = True
        try:
            settings = self._settings
            options = RecorderOptions(
                scores=settings["scores"],
                force=settings["force"],
                fixes=_apply_fixes(model, settings["fixes"]),
                command=settings["command"],
            )
            recorder = Recorder(model, settings["output"], options)
            recorder.start()
        except CaptureError:
            self._dense.add(model)
            return
        except MoeprofError as error:
            self._report(error)
            raise SystemExit(error.exit_code) from error
        finally:
            self._busy = False
        self._recorder = recorder
        if self._restore_call is not None:
            self._restore_call()
        self._write_status({"attached": type(model).__name__, "finished": False})

    def _note_other(self, model: Any) -> None:
        """Notes a model that generates besides the one that is recorded."""
        from moeprof.errors import CaptureError
        from moeprof.recording.sites import find_sites

        try:
            find_sites(model)
        except CaptureError:
            self._dense.add(model)
        else:
            self._others.add(type(model).__name__)

    def _finish(self) -> None:
        """Ends the recording when the program ends."""
        recorder = self._recorder
        if recorder is None or os.getpid() != self._pid:
            return
        from moeprof.errors import MoeprofError

        # Python keeps the exception that ended the program, whatever hook showed it.
        ended_by = getattr(sys, "last_type", None)
        try:
            if ended_by is not None:
                recorder.abort()
            else:
                recorder.stop()
        except MoeprofError as error:
            self._report(error)
            return
        self._write_status(
            {
                "attached": type(recorder.model).__name__,
                "finished": True,
                "others": sorted(self._others),
            }
        )
        if ended_by is KeyboardInterrupt:
            _die_of_interrupt()

    def _report(self, error: Any) -> None:
        self._write_status(
            {"error": error.message, "hint": error.hint, "exit_code": error.exit_code}
        )

    def _write_status(self, status: dict[str, Any]) -> None:
        with suppress(OSError):
            Path(self._settings["status"]).write_text(json.dumps(status), encoding="utf-8")


def _die_of_interrupt() -> None:
    """Ends the process as Python does after Ctrl-C; code that ran since makes it forget."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            stream.flush()
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    os.kill(os.getpid(), signal.SIGINT)


def _apply_fixes(model: Any, fixes: Sequence[str]) -> tuple[str, ...]:
    if "nllb-dispatch" not in fixes:
        return ()
    from moeprof.zoo.dispatch import fix_nllb_dispatch

    return ("nllb-dispatch",) if fix_nllb_dispatch(model) else ()


def arm() -> None:
    """Arms the recorder in this process, as its environment asks."""
    text = os.environ.pop(SETTINGS_VARIABLE, "")
    if text:
        Attachment(json.loads(text)).arm()


def environment(settings: dict[str, Any], base: dict[str, str]) -> dict[str, str]:
    """Returns the environment in which a program arms itself.

    Args:
        settings: See `Attachment`.
        base: The environment to start from.
    """
    package = Path(__file__).resolve().parent
    startup = str(package / "startup")
    path = os.pathsep.join(p for p in (startup, base.get("PYTHONPATH", "")) if p)
    return {
        **base,
        SETTINGS_VARIABLE: json.dumps(settings),
        HOME_VARIABLE: str(package.parent.parent),
        "PYTHONPATH": path,
    }


def command_of(argv: Sequence[str]) -> str:
    """Returns the command line as stored in the trace."""
    return "moeprof record -- " + shlex.join(argv)
