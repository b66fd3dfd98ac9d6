"""Problems found in a trace: one sentence each, with how often and where first.

Leaves out the rules themselves (`validator`, `routing_rules`).
"""

from __future__ import annotations

from dataclasses import dataclass

SEVERITIES = ("error", "warning", "note")


@dataclass(frozen=True, kw_only=True)
class Problem:
    """Something a reader of the trace must know.

    Attributes:
        code: Stable name of the rule.
        severity: ``error`` (figures from this trace would be wrong), ``warning`` or ``note``.
        message: One sentence.
        table: Table it was found in; empty for the trace as a whole.
        where: Site, rank or part it concerns; empty where it concerns all.
    """

    code: str
    severity: str
    message: str
    table: str = ""
    where: str = ""


@dataclass
class _Entry:
    severity: str
    sentence: str
    table: str
    count: int
    first: str


class Problems:
    """Collects findings; the same rule at the same place is one problem with a count."""

    def __init__(self) -> None:
        self._entries: dict[tuple[str, str], _Entry] = {}

    def add(
        self,
        code: str,
        sentence: str,
        *,
        severity: str = "error",
        table: str = "",
        where: str = "",
        count: int = 1,
        first: str = "",
    ) -> None:
        """Adds a finding.

        Args:
            code: Stable name of the rule.
            sentence: The sentence, with ``{count}``, ``{first}`` and ``{where}`` to fill in.
            severity: One of `SEVERITIES`.
            table: Table it was found in.
            where: Site, rank or part it concerns.
            count: How often it was found now.
            first: Example, used for the first finding only.
        """
        entry = self._entries.get((code, where))
        if entry is None:
            self._entries[code, where] = _Entry(severity, sentence, table, count, first)
        else:
            entry.count += count

    def has(self, code: str) -> bool:
        """Returns True where the rule found something."""
        return any(key[0] == code for key in self._entries)

    def sorted(self) -> tuple[Problem, ...]:
        """Returns all problems, worst first."""
        found = [
            Problem(
                code=code,
                severity=entry.severity,
                message=entry.sentence.format(
                    count=f"{entry.count:,}", first=entry.first, where=where
                ),
                table=entry.table,
                where=where,
            )
            for (code, where), entry in self._entries.items()
        ]
        return tuple(sorted(found, key=lambda problem: SEVERITIES.index(problem.severity)))
