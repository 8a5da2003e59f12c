"""Medians, and the Markdown table that they go into."""

import statistics
import subprocess
from typing import List, NamedTuple, Optional, Sequence

REASON_MAX = 300


class Row(NamedTuple):
    """One line of the table, its cells as text."""

    what: str
    target: str
    ours: str
    others: str


def spread(values: Sequence[float], form: str = "%.2f", unit: str = "") -> str:
    """Return the median of `values`, with the least and the greatest where there are several; "-" for none."""
    if not values:
        return "-"
    if len(values) == 1:
        return form % values[0] + unit
    shown = tuple(form % value for value in (statistics.median(values), min(values), max(values)))
    return "%s%s (%s to %s)" % (shown[0], unit, shown[1], shown[2])


def judged(values: Sequence[float], limit: float, form: str = "%.2f", unit: str = "", is_least: bool = False) -> str:
    """Return the median, and say when it misses the target: it may be `limit` at most, or with `is_least` at least."""
    if not values:
        return "-"
    median = statistics.median(values)
    is_missed = median < limit if is_least else median > limit
    return spread(values, form, unit) + (", **missed**" if is_missed else "")


def ratios(above: Sequence[float], below: Sequence[float]) -> List[float]:
    """Divide round by round: what was measured one after the other saw the same machine."""
    return [one / other for one, other in zip(above, below)]


def slope(xs: Sequence[float], ys: Sequence[float]) -> float:
    """Return the slope of the line that fits best."""
    return statistics.linear_regression(xs, ys).slope


def failed(name: str, error: Exception) -> Row:
    """Return the line of what could not be measured, with the reason in one line."""
    text = str(error)
    if isinstance(error, subprocess.CalledProcessError):
        said = error.stderr or b""
        said = said.decode(errors="replace") if isinstance(said, bytes) else said
        text += ": " + said.strip().rpartition("\n")[2]
    reason = " ".join(text.split()).replace("|", "\\|")
    return Row(name, "", "**failed**", "%s: %s" % (type(error).__name__, reason[:REASON_MAX]))


def table(rows: Sequence[Row], title: Optional[str] = None) -> str:
    """Return the rows as a Markdown table."""
    lines = [title, ""] if title else []
    lines += ["| what | target | rjupyter | others |", "|---|---|---|---|"]
    cells = [(row.what, row.target, row.ours, row.others) for row in rows]
    lines += ["| %s |" % " | ".join(cell or "-" for cell in row) for row in cells]
    return "\n".join(lines)
