"""`shaper doctor`: one screen on this host and its server.

Exit code: 0 all is well, or there are warnings only; 1 something fails; 2 the command line
is wrong; 130 it was interrupted.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence

from shaper.cli.arguments import Parser
from shaper.doctor import gpus
from shaper.doctor.bounded import Probed, probe
from shaper.doctor.findings import Checks, Finding, document, exit_code, plain
from shaper.doctor.groups import group_findings
from shaper.doctor.host import host_findings
from shaper.doctor.screen import MAX_COLUMNS, render
from shaper.doctor.server import DEFAULT_URL, check_url, server_findings
from shaper.doctor.software import software_findings
from shaper.errors import ConfigError
from shaper.gpu.profiles import load_profile

# Opening the driver of eight GPUs without persistence mode takes some seconds.
_TIMEOUT_SECONDS = 20.0
# An import of vLLM takes some 10 s, and a cold disk some times that.
_IMPORT_SECONDS = 120.0
_MAX_SECONDS = 60.0
_INTERRUPTED = 130


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="shaper doctor",
        description="Whether this host can run the shaper, and how a running server fares. It "
        "reads only. Exit code: 0 well or warnings only, 1 something fails, 2 usage.",
    )
    parser.add_argument(
        "--url",
        help=f"of a running server; without it {DEFAULT_URL} is tried, and none need be there",
    )
    parser.add_argument("--emulate", metavar="GPU", help="show an emulated GPU, like h200-sxm")
    parser.add_argument(
        "--seconds",
        type=float,
        default=2.0,
        help="how long to measure the GPUs' meters (default 2; the window takes five and a load)",
    )
    parser.add_argument(
        "--timeout",
        type=float,
        default=_TIMEOUT_SECONDS,
        metavar="SECONDS",
        help=f"longest wait for a driver's or a server's answer (default {_TIMEOUT_SECONDS:g})",
    )
    parser.add_argument(
        "--quick", action="store_true", help="don't import torch and vLLM to see whether they load"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    return parser


def main(argv: Sequence[str]) -> int:
    """Runs all checks and prints them.

    Returns:
        1 where one fails, else 0.

    Raises:
        ConfigError: the command line is wrong.
    """
    options = _parser().parse_args(list(argv))
    for name, least, most in (("seconds", 0.1, _MAX_SECONDS), ("timeout", 0.1, 600.0)):
        value = getattr(options, name)
        if not (math.isfinite(value) and least <= value <= most):
            raise ConfigError(f"--{name} {value:g} is not between {least:g} and {most:g}")
    if options.emulate is not None:
        load_profile(options.emulate)
    url = None if options.url is None else check_url(options.url)
    try:
        findings = list(_all(options, url, os.environ))
    except KeyboardInterrupt:
        print("shaper doctor: interrupted", file=sys.stderr)
        return _INTERRUPTED
    if options.json:
        print(json.dumps(document(findings), indent=2))
        return exit_code(findings)
    columns = shutil.get_terminal_size((MAX_COLUMNS, 24)).columns
    text = render(findings, colour=_colour(os.environ), columns=columns)
    encoding = sys.stdout.encoding or "utf-8"
    print(text.encode(encoding, "replace").decode(encoding), end="")
    return exit_code(findings)


def _colour(environ: Mapping[str, str]) -> bool:
    # https://no-color.org: any value that is not empty.
    plain_terminal = environ.get("NO_COLOR") or environ.get("TERM") == "dumb"
    return sys.stdout.isatty() and not plain_terminal


def _all(
    options: argparse.Namespace, url: str | None, environ: Mapping[str, str]
) -> Iterator[Finding]:
    yield from _guarded("Software", lambda: software_findings(environ))
    if not options.quick:
        yield from _guarded("Software", _imports)
    yield from _guarded(gpus.SECTION, lambda: _gpus(options))
    yield from _guarded("Host", lambda: host_findings(environ))
    yield from _guarded("Server", lambda: server_findings(url, environ, options.timeout))
    yield from _guarded("Power groups", group_findings)


def _guarded(section: str, check: Callable[[], list[Finding]]) -> list[Finding]:
    """No check hides the others by failing in a way that nobody has thought of."""
    try:
        return check()
    except Exception as error:
        # The boundary: whatever it is, it is one line, and the other checks are made.
        said = f"the check itself failed: {type(error).__name__}: {plain(error, 200)}"
        return [Checks(section).fail("doctor.check", said, "report it, with this line")]


def _imports() -> list[Finding]:
    found = probe("shaper.doctor.import_check", [], _IMPORT_SECONDS)
    advice = "see what python -c 'import torch, vllm' says"
    return [*found.findings, *_ended(found, Checks("Software"), "software.imports", advice)]


def _gpus(options: argparse.Namespace) -> list[Finding]:
    arguments = json.dumps({"seconds": options.seconds, "emulate": options.emulate})
    # It is silent while it measures.
    found = probe("shaper.doctor.gpu_probe", [arguments], options.timeout + options.seconds)
    advice = (
        "the driver or a GPU hangs: see dmesg for Xid errors and nvidia-smi; a running engine goes "
        "on by prediction. Reset the GPU or restart the host"
    )
    ended = _ended(found, Checks(gpus.SECTION), "gpu.probe", advice)
    return [*sorted(found.findings, key=_order), *ended]


def _order(finding: Finding) -> tuple[bool, str]:
    """What GPUs say alike stands side by side."""
    places = (
        "driver",
        "order",
        "kinds",
        "readable",
        "profile",
        "version",
        "scope",
        "reads",
        "meter",
    )
    name = finding.check.rpartition(".")[2]
    place = places.index(name) if name in places else len(places)
    return bool(finding.subject), f"{place:02d}"


def _ended(found: Probed, checks: Checks, check: str, advice: str) -> list[Finding]:
    if found.hung:
        said = f"no answer in time while {found.stage}"
        return [checks.fail(check, said, advice, stage=found.stage, hung=True)]
    if found.error is not None:
        said = f"ended while {found.stage}: {found.error}"
        return [checks.fail(check, said, advice, stage=found.stage, hung=False)]
    return []
