"""What a verification says: named checks, each passed, failed or skipped, with a sentence."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

Status = Literal["passed", "failed", "skipped"]


@dataclass(frozen=True)
class Check:
    """One check of a folder.

    Attributes:
        name: what was looked at, e.g. "weights".
        status: "passed", "failed", or "skipped" where there was nothing to look at.
        sentence: what was found.
    """

    name: str
    status: Status
    sentence: str


@dataclass(frozen=True)
class Verification:
    """All checks of a folder.

    Attributes:
        folder: last component of its path.
        checks: in the order they were made.
    """

    folder: str
    checks: tuple[Check, ...]

    @property
    def passed(self) -> bool:
        """Whether no check has failed."""
        return not self.failed

    @property
    def failed(self) -> tuple[Check, ...]:
        """The checks that have failed."""
        return tuple(check for check in self.checks if check.status == "failed")

    def to_dict(self) -> dict[str, Any]:
        """Return the verification as plain JSON."""
        return {"folder": self.folder, "passed": self.passed, "checks": [asdict(check) for check in self.checks]}


def outcome(name: str, problems: list[str], fine: str) -> Check:
    """Return a check that failed if there are problems, which are listed, and passed otherwise.

    Args:
        name: of the check.
        problems: phrases; the first three are shown.
        fine: the sentence if there are none.
    """
    if not problems:
        return Check(name, "passed", fine)
    more = f"; and {len(problems) - 3} more" if len(problems) > 3 else ""
    return Check(name, "failed", f"{'; '.join(problems[:3])}{more}.")
