"""Errors a user can fix: one line, a hint and an exit code.

Leaves out everything that only a developer can fix; those stay ordinary exceptions.
"""

from __future__ import annotations

EXIT_ERROR = 1
EXIT_USAGE = 2
EXIT_BAD_TRACE = 3
EXIT_REGRESSION = 4


class MoeprofError(Exception):
    """A problem the user can fix.

    Args:
        message: One line that says what is wrong.
        hint: One line that says what to do about it.
        exit_code: Exit code of the command line; the class's own when None.
    """

    exit_code = EXIT_ERROR

    def __init__(self, message: str, *, hint: str = "", exit_code: int | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        if exit_code is not None:
            self.exit_code = exit_code


class UsageError(MoeprofError):
    """An argument that makes no sense (exit code 2)."""

    exit_code = EXIT_USAGE


class TraceError(MoeprofError):
    """A trace that cannot be read: damaged, foreign or of another version (exit code 3)."""

    exit_code = EXIT_BAD_TRACE


class CalibrationError(MoeprofError):
    """A calibration file that is missing, damaged or of another version (exit code 3)."""

    exit_code = EXIT_BAD_TRACE


class CaptureError(MoeprofError):
    """A recording that captured nothing, or less than it should have (exit code 1)."""


class MissingExtraError(MoeprofError):
    """An optional dependency that is not installed (exit code 1).

    Args:
        package: The missing import name.
        extra: The extra of this distribution that brings it.
        purpose: What needs it, as a verb phrase.
    """

    def __init__(self, package: str, *, extra: str, purpose: str) -> None:
        super().__init__(
            f"{purpose} needs the package '{package}', which is not installed",
            hint=f"pip install 'moeprof[{extra}]'",
        )
