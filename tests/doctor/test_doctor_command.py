"""The command as a whole: its screen, its document, its exit codes, its child processes."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest

from shaper.cli import doctor, main
from shaper.doctor.bounded import probe
from shaper.doctor.findings import Checks, Finding, Status, document, exit_code, finding_of, values
from shaper.doctor.screen import MAX_COLUMNS, render
from tests.doctor.fakes import KEY, ROOT, FakeServer, run_doctor, serving

ONE = Checks("A", "GPU 0")
SOME = [
    ONE.ok("a.one", "well", quantity_watts=1.0),
    Checks("A", "GPU 1").ok("a.one", "well"),
    Checks("A", "GPU 3").ok("a.one", "well"),
    Checks("A", "GPU 3").warn("a.two", "long " * 60, "do " * 60),
    Checks("B").fail("b.three", "broken", "mend it"),
]
DOCUMENT_KEYS = {"schema", "version", "verdict", "exit_code", "counts", "findings"}
FINDING_KEYS = {"section", "check", "subject", "status", "found", "advice", "data"}


def test_the_screen_keeps_its_width_and_joins_gpus_that_are_alike():
    """At most 100 columns, however wide the terminal is."""
    for columns in (20, 80, 100, 300):
        lines = render(SOME, colour=False, columns=columns).splitlines()
        assert max(map(len, lines)) <= max(60, min(columns, MAX_COLUMNS))
    text = render(SOME, colour=False)
    assert "GPU 0-1,3: well" in text
    assert text.splitlines()[-1] == "fail: 3 ok, 1 warn, 1 fail. Mend what fails."


def test_colour_is_asked_for():
    """Without it there is no code of the terminal."""
    assert "\x1b" not in render(SOME, colour=False)
    assert "\x1b[1;31m" in render(SOME, colour=True)


def test_colour_is_for_terminals_without_no_color(monkeypatch):
    """https://no-color.org."""
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    assert doctor._colour({})
    assert not doctor._colour({"NO_COLOR": "1"})
    assert not doctor._colour({"TERM": "dumb"})
    monkeypatch.setattr(sys.stdout, "isatty", lambda: False, raising=False)
    assert not doctor._colour({})


def test_the_exit_code_is_that_of_the_worst():
    """Warnings are no failure."""
    assert exit_code([]) == exit_code(SOME[:4]) == 0
    assert exit_code(SOME) == 1


def test_the_document_is_stable():
    """Keys, types, and no NaN; a finding is the same after its way through JSON."""
    odd = ONE.ok("a.nan", "odd\x1b[31m", ratio=float("nan"), names=("a",), path=Path("p"))
    found = json.loads(json.dumps(document([*SOME, odd]), allow_nan=False))
    assert set(found) == DOCUMENT_KEYS
    assert (found["schema"], found["verdict"], found["exit_code"]) == (1, "fail", 1)
    assert all(set(each) == FINDING_KEYS for each in found["findings"])
    assert found["findings"][-1]["data"] == {"ratio": None, "names": ["a"], "path": "p"}
    assert "\x1b" not in found["findings"][-1]["found"]
    assert finding_of(values(SOME[3])) == Finding(
        "A", "a.two", Status.WARN, ("long " * 60).strip(), ("do " * 60).strip(), "GPU 3"
    )


def test_a_warning_without_advice_is_refused():
    """Each says what to do."""
    with pytest.raises(ValueError, match=r"a\.b"):
        Finding("A", "a.b", Status.WARN, "odd")


@pytest.mark.parametrize(
    "arguments",
    [
        ("--urll", "x"),
        ("extra",),
        ("--url", "ftp://x"),
        ("--seconds", "nan"),
        ("--seconds", "-1"),
        ("--timeout", "0"),
        ("--emulate", "h300"),
    ],
)
def test_a_wrong_command_line_is_one_line_and_2(capsys, arguments):
    """Before anything is looked at."""
    assert main.main(["doctor", *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert len(captured.err.splitlines()) == 1


def test_a_check_that_fails_by_itself_is_a_finding():
    """One broken check hides no other, and nobody sees a traceback."""

    def broken() -> list[Finding]:
        raise KeyError("oops")

    (found,) = doctor._guarded("Host", broken)
    assert found.status is Status.FAIL
    assert "oops" in found.found


def test_an_interrupted_doctor_shows_no_traceback(monkeypatch, capsys):
    """Ctrl-C is one line and 130."""

    def interrupted(*_: object) -> list[Finding]:
        raise KeyboardInterrupt

    monkeypatch.setattr(doctor, "software_findings", interrupted)
    assert main.main(["doctor", "--quick"]) == 130
    assert capsys.readouterr().err == "shaper doctor: interrupted\n"


def child(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str) -> str:
    (tmp_path / "odd_probe.py").write_text(text)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{ROOT}")
    return "odd_probe"


def test_a_child_that_crashes_is_told_with_its_last_line(tmp_path, monkeypatch):
    """What it found before stays."""
    module = child(
        tmp_path,
        monkeypatch,
        "from shaper.doctor.bounded import *\nfrom shaper.doctor.findings import Checks\n"
        "print('noise'); print('{\"finding\": {}}'); print('[1]')\n"
        "say_findings([Checks('A').ok('a.b', 'c')]); say_stage('it falls')\n"
        "raise SystemExit('no such driver')",
    )
    found = probe(module, [], 60.0)
    assert [finding.check for finding in found.findings] == ["a.b"]
    assert (found.stage, found.hung) == ("it falls", False)
    assert "no such driver" in (found.error or "")


def test_a_child_that_says_nothing_is_ended(tmp_path, monkeypatch):
    """The deadline is on silence; it may not even heed a signal."""
    module = child(
        tmp_path,
        monkeypatch,
        "import signal, time\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        'print(\'{"stage": "it waits"}\', flush=True)\ntime.sleep(600)',
    )
    found = probe(module, [], 2.0)
    assert found.hung
    assert found.error is None


def test_a_host_without_a_gpu_is_told_so_and_what_to_do(tmp_path):
    """Exit code 1, the other checks made, and a server beside it looked at."""
    script = tmp_path / "none.json"
    script.write_text('{"gpus": []}')
    with serving(FakeServer()) as server:
        plain = {"PYTHONIOENCODING": "ascii", "SHAPER_ADMIN_KEY": KEY}
        result = run_doctor("--url", server.url, gpus=script, environ=plain)
    assert result.returncode == 1
    assert "--emulate" in result.stdout
    assert "--shaper-off" in result.stdout
    assert re.search(r"ok +routes", result.stdout)
    assert max(map(len, result.stdout.splitlines())) <= MAX_COLUMNS
    assert "\x1b" not in result.stdout
    assert result.stderr == ""
    assert KEY not in result.stdout


def shape_of(text: str) -> list[str]:
    """Sections, and the checks of each with its status and subject; numbers and findings out."""
    found = []
    for line in text.splitlines():
        match = re.match(r"  (ok|warn|fail) +((?:\w+ )+?) +(GPU [\d,-]+:)?", line)
        if match:
            found.append(" ".join(filter(None, (match[1], match[2].strip(), match[3]))))
        elif line and not line.startswith(" "):
            found.append(line.partition(":")[0])
    return found


def test_the_documented_screen_is_what_is_printed():
    """The part about GPUs has the same checks, with the same outcome."""
    text = (ROOT / "docs" / "doctor.md").read_text()
    (documented,) = re.findall(r"```text\n(.*?)```", text, flags=re.DOTALL)
    printed = run_doctor("--quick", "--emulate", "h200-sxm", "--seconds", "1.2").stdout
    lines = shape_of(printed)
    assert shape_of(documented) == lines[lines.index("GPUs") : lines.index("Host")]
    assert max(map(len, documented.splitlines())) <= MAX_COLUMNS


def test_each_check_is_documented():
    """The table in the document has every name that the code gives, and no other."""
    sources = [*(ROOT / "shaper" / "doctor").glob("*.py"), ROOT / "shaper/cli/doctor.py"]
    name = r"((?:software|gpu|host|server|group|doctor)\.\w+)"
    given = {x for path in sources for x in re.findall(f'"{name}"', path.read_text())}
    text = (ROOT / "docs" / "doctor.md").read_text()
    assert given == set(re.findall(f"`{name}`", text))


def test_the_plug_in_takes_hold_of_the_installed_vllm():
    """The child that imports it says so, within its deadline."""
    found = probe("shaper.doctor.import_check", [], 200.0)
    assert (found.hung, found.error) == (False, None)
    said = {finding.check: finding.status for finding in found.findings}
    assert said == {"software.torch_runs": Status.OK, "software.plugin_runs": Status.OK}
