"""Attaches the recorder to whatever MoE model a foreign program builds and runs.

Nothing heavy is imported before the program itself imports torch. The first outermost module that
runs and holds MoE sites is recorded; how it went is left in a status file for `script`.
"""

from __future__ import annotations

import atexit
import importlib.abc
import importlib.machinery
import json
import os
import shlex
import sys
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
        self._handle: Any = None
        self._dense: set[int] = set()
        self._others: set[int] = set()
        self._failed = False
        self._busy = False

    def arm(self) -> None:
        """Waits for torch and transformers to be imported."""
        callbacks = {TORCH_MODULE: self._torch_imported, GENERATION_MODULE: self._wrap_generate}
        sys.meta_path.insert(0, _AfterImport(callbacks))
        hook = sys.excepthook

        def failed(kind: Any, error: Any, traceback: Any) -> None:
            self._failed = True
            hook(kind, error, traceback)

        sys.excepthook = failed
        atexit.register(self._finish)

    def _torch_imported(self, module: Any) -> None:
        self._handle = module.register_module_forward_pre_hook(self._module_runs)

    def _wrap_generate(self, module: Any) -> None:
        mixin = module.GenerationMixin
        original = mixin.generate

        def generate(model: Any, *args: Any, **kwargs: Any) -> Any:
            self._consider(model)
            # The recorder wraps `generate` on the instance it was just attached to.
            own = model.__dict__.get("generate")
            if own is not None and not getattr(own, "moeprof_entered", False):
                own.moeprof_entered = True
                return own(*args, **kwargs)
            return original(model, *args, **kwargs)

        generate.__doc__ = original.__doc__
        mixin.generate = generate

    def _module_runs(self, module: Any, args: Any) -> None:
        if self._recorder is None and not self._busy:
            self._consider(module)

    def _consider(self, model: Any) -> None:
        """Attaches to ``model`` if it holds MoE sites and nothing is attached yet."""
        if id(model) in self._dense or self._busy:
            return
        if self._recorder is not None:
            if model is not self._recorder.model:
                self._others.add(id(model))
            return
        from moeprof.errors import CaptureError, MoeprofError
        from moeprof.recording.recorder import Recorder, RecorderOptions

        self._busy = True
        try:
            settings = self._settings
            fixes = _apply_fixes(model, settings["fixes"])
            options = RecorderOptions(
                scores=settings["scores"],
                force=settings["force"],
                fixes=fixes,
                command=settings["command"],
            )
            recorder = Recorder(model, settings["output"], options)
            recorder.start()
        except CaptureError:
            self._dense.add(id(model))
            return
        except MoeprofError as error:
            self._report(error)
            raise SystemExit(error.exit_code) from error
        finally:
            self._busy = False
        self._recorder = recorder
        if self._handle is not None:
            self._handle.remove()

    def _finish(self) -> None:
        """Ends the recording when the program ends."""
        from moeprof.errors import MoeprofError

        recorder = self._recorder
        if recorder is None:
            return
        try:
            if self._failed:
                recorder.abort()
            else:
                recorder.stop()
        except MoeprofError as error:
            self._report(error)
            return
        self._write_status({"attached": type(recorder.model).__name__, "failed": self._failed})

    def _report(self, error: Any) -> None:
        self._write_status(
            {"error": error.message, "hint": error.hint, "exit_code": error.exit_code}
        )

    def _write_status(self, status: dict[str, Any]) -> None:
        with suppress(OSError):
            Path(self._settings["status"]).write_text(json.dumps(status), encoding="utf-8")


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
