"""A gate: scores must not fall far below those of an earlier report."""

from __future__ import annotations

from eval.compare import headlines, require_same_settings
from eval.config import Gate
from infra.artifacts.artifact import Artifact, open_artifact
from infra.errors import RegressionError, UserError


def require(report: Artifact, gate: Gate) -> None:
    """Check a report against an earlier one.

    Raises:
        RegressionError: a headline fell further than the gate allows.
        UserError: the reports have no protocol in common, or a named one is missing.
    """
    earlier = open_artifact(gate.report, "report")
    now, before = headlines(report), headlines(earlier)
    names = gate.protocols or [name for name, row in now.items() if name in before and row["is_fraction"]]
    if missing := [name for name in names if name not in now or name not in before]:
        raise UserError(f"gate: {missing[0]}: not in both {report.url} and {gate.report}; name another protocol")
    if not names:
        raise UserError(f"gate: {gate.report} has no protocol in common with {report.url}; compare with another")
    require_same_settings(earlier, report, names)
    fallen = []
    for name in names:
        new, old = now[name]["value"], before[name]["value"]
        loss = {"higher": old - new, "lower": new - old}.get(now[name]["better"], 0.0)
        if not loss <= gate.max_drop:  # also where it is not a number
            fallen.append(f"{name} {old:.4f} to {new:.4f}")
    if fallen:
        raise RegressionError(f"regression against {gate.report}: {'; '.join(fallen)} (allowed {gate.max_drop:g})")
