"""The findings on one screen, at most 100 columns wide.

GPUs that are found alike share a line, so that eight of them still fit.
"""

from __future__ import annotations

import textwrap
from collections.abc import Hashable, Sequence
from dataclasses import replace

from shaper.doctor.findings import Finding, Status, counts, plain, verdict

MAX_COLUMNS = 100
_TITLE_COLUMNS = 16
_COLOURS = {Status.OK: "32", Status.WARN: "33", Status.FAIL: "1;31"}
_VERDICTS = {
    Status.OK: "Nothing to do.",
    Status.WARN: "It works; see the warnings.",
    Status.FAIL: "Mend what fails.",
}


def render(findings: Sequence[Finding], *, colour: bool, columns: int = MAX_COLUMNS) -> str:
    """The screen, with a newline at its end.

    Args:
        findings: in the order of the screen; those of one section stand together.
        colour: whether the three words of a status are coloured.
        columns: of the terminal; more than 100 are not used, fewer than 60 not obeyed.
    """
    columns = max(60, min(columns, MAX_COLUMNS))
    lines: list[str] = []
    section = None
    for finding in alike(findings):
        if finding.section != section:
            section = finding.section
            lines += ["", section] if lines else [section]
        lines += _lines(finding, colour=colour, columns=columns)
    numbers = counts(findings)
    worst = verdict(findings)
    word = _word(worst, worst.value, colour=colour)
    said = f"{numbers['ok']} ok, {numbers['warn']} warn, {numbers['fail']} fail"
    lines += ["", f"{word}: {said}. {_VERDICTS[worst]}"]
    return "\n".join(lines) + "\n"


def alike(findings: Sequence[Finding]) -> list[Finding]:
    """Findings that differ in their subject alone become one, in the place of the first."""
    groups: dict[Hashable, list[Finding]] = {}
    for place, finding in enumerate(findings):
        # Two without a subject are two.
        own = None if finding.subject else place
        key = (finding.section, finding.check, finding.status, finding.found, finding.advice, own)
        groups.setdefault(key, []).append(finding)
    return [replace(each[0], subject=_subjects(each)) for each in groups.values()]


def _subjects(findings: Sequence[Finding]) -> str:
    """`GPU 0`, `GPU 1`, `GPU 2` as `GPU 0-2`."""
    names = [finding.subject for finding in findings]
    if len(names) == 1:
        return names[0]
    words = [name.rpartition(" ") for name in names]
    kinds = {kind for kind, _, _ in words}
    if len(kinds) > 1 or not all(number.isdigit() for _, _, number in words):
        return ", ".join(names)
    runs: list[list[int]] = []
    for number in sorted(int(number) for _, _, number in words):
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    spans = [f"{run[0]}-{run[-1]}" if len(run) > 1 else f"{run[0]}" for run in runs]
    return f"{kinds.pop()} {','.join(spans)}"


def _lines(finding: Finding, *, colour: bool, columns: int) -> list[str]:
    status = _word(finding.status, f"{finding.status.value:<4}", colour=colour)
    title = finding.check.rpartition(".")[2].replace("_", " ")
    indent = " " * (8 + _TITLE_COLUMNS)
    # A driver's own message names its GPU.
    named = not finding.subject or finding.found.startswith(f"{finding.subject} ")
    found = plain(finding.found if named else f"{finding.subject}: {finding.found}")
    wrapped = textwrap.wrap(found, columns - len(indent), break_on_hyphens=False) or [""]
    lines = [f"  {status}  {title:<{_TITLE_COLUMNS}}{wrapped[0]}"]
    lines += [f"{indent}{line}" for line in wrapped[1:]]
    if finding.advice is not None:
        lines += textwrap.wrap(
            plain(finding.advice),
            columns,
            initial_indent=f"{indent}-> ",
            subsequent_indent=f"{indent}   ",
            break_on_hyphens=False,
        )
    return lines


def _word(status: Status, text: str, *, colour: bool) -> str:
    return f"\x1b[{_COLOURS[status]}m{text}\x1b[0m" if colour else text
