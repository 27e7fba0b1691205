"""What can't work is said in one line, with what to do, before anything starts; exit code 2."""

from __future__ import annotations

import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

from shaper.cli import main
from tests.cli.test_cli import EMULATED, refused

ROOT = Path(__file__).resolve().parents[2]
# Makes packages of these names missing in a process, though they are installed.
BLOCKED = """
import runpy, sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {names!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Block())
sys.argv = {argv!r}
runpy.run_module({module!r}, run_name="__main__", alter_sys=True)
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "there").mkdir()
    (tmp_path / "latin.toml").write_bytes(b'gpu_profile = "\xe9"')
    (tmp_path / "deep.json").write_text('{"limits": ' + "[" * 100_000)
    return tmp_path


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (("--record", "{}/missing/run.csv"), "--record .*no directory .*missing; make it first"),
        (("--record", "{}/run.txt"), r"must end in \.csv or \.parquet"),
        (("--record", "{}"), "must end in"),
        (("--record", "/proc/run.csv"), "--record /proc/run.csv: no file can be made"),
        (("--power-shaper-config", '{{"decision_log": "{}/missing/log"}}'), "log: .*no dir"),
        (("--power-shaper-config", '{{"decision_log": "{}/there"}}'), "decision_log .*a directory"),
        (("--power-shaper-config", '{{"record_directory": "{}/missing"}}'), "directory: .*no"),
        (("--power-shaper-config", "{}/latin.toml"), "latin.toml is not UTF-8"),
        (("--power-shaper-config", "{}/deep.json"), "is not valid JSON"),
        (("--power-shaper-config", "{}"), "neither a JSON object nor a readable file"),
    ],
)  # fmt: skip
def test_a_server_s_files_are_checked_before_it_starts(
    folder: Path, capsys: pytest.CaptureFixture[str], more: tuple[str, ...], says: str
) -> None:
    """An engine would find out after the model is loaded, inside a traceback."""
    line = refused(capsys, *EMULATED, *(text.format(folder) for text in more))
    assert re.search(says, line), line


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("simulate", "--json", "{}/there"), "--json .*is a directory"),
        (("simulate", "--gpu", "h300", "--trace", "{}/none.csv"), "unknown GPU"),
        (("simulate", "--trace", "{}/none.csv"), "none.csv can't be read: No such file"),
        (("predict", "--sweep", "tp=1,2", "--plot", "{}/missing/a.html"), "--plot .*no directory"),
        (("fit", "{}/none.csv"), "none.csv can't be read: No such file"),
        (("fit", "{}/none.csv", "--output", "{}/missing/a.toml"), "--output .*no directory"),
        (("budget", "set"), "no limit is given: write shaper budget set 500W@1s"),
    ],
)
def test_other_commands_say_it_at_once(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
    arguments: tuple[str, ...], says: str,
) -> None:  # fmt: skip
    """Before minutes of running."""
    monkeypatch.setenv("SHAPER_ADMIN_KEY", "0123456789abcdef")
    line = refused(capsys, *(text.format(folder) for text in arguments))
    assert re.search(says, line), line


@pytest.mark.parametrize(
    ("missing", "arguments"),
    [
        ("pyarrow", (*EMULATED, "--record", "{}/run.parquet")),
        ("pyarrow", ("record", "{}/run.parquet", "--emulate", "h200-sxm")),
        ("plotly", ("simulate", "--report", "{}/a.html")),
        ("plotly", ("predict", "--sweep", "tp=1,2", "--plot", "{}/a.html")),
        ("scipy", ("fit", "{}/run.csv")),
    ],
)
def test_a_missing_package_is_named_with_a_command_that_installs_it(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
    missing: str, arguments: tuple[str, ...],
) -> None:  # fmt: skip
    """By its own name: this project is on no index."""
    monkeypatch.setitem(sys.modules, missing, None)
    line = refused(capsys, *(text.format(folder) for text in arguments))
    assert f"{sys.executable} -m pip install {missing}" in line
    assert not list(folder.glob("run*"))


def blocked(module: str, names: tuple[str, ...], *argv: str) -> subprocess.CompletedProcess[str]:
    code = BLOCKED.format(names=names, argv=["-m", *argv], module=module)
    return subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )


@pytest.mark.parametrize(
    ("module", "names", "argv", "says"),
    [
        ("shaper", ("vllm",), ("simulate", "--duration", "2s"), "vLLM can't be imported.*setup"),
        ("shaper", ("torch",), ("simulate", "--duration", "2s"), "vLLM can't be imported"),
        ("bench.rack", ("plotly", "aiohttp"), (), "needs aiohttp, plotly.*pip install aiohttp"),
    ],
)
def test_a_process_without_them_says_so(
    module: str, names: tuple[str, ...], argv: tuple[str, ...], says: str
) -> None:
    """No traceback, whichever of their modules is imported first."""
    found = blocked(module, names, *argv)
    assert found.returncode == 2, found.stderr
    assert found.stderr.count("\n") == 1, found.stderr
    assert re.search(says, found.stderr)


@pytest.mark.parametrize(
    ("name", "arguments", "says"),
    [
        ("studies.calibrate", ["h300"], "invalid choice"),
        ("studies.calibrate", ["h200-sxm", "--data", "/nowhere"], "/nowhere"),
        ("studies.contention", ["--engines", "x"], "x"),
        ("studies.contention", ["--json", "/nowhere/a"], "--json .*no directory"),
        ("control", ["--only", "x"], "invalid choice"),
        ("control", ["--processes", "0"], "give 1 or more"),
        ("control", ["--json", "/nowhere/a"], "--json .*no directory"),
        ("overhead", ["--sizes", "x"], "x"),
        ("overhead", ["--json", "/nowhere/a"], "--json .*no directory"),
        ("fidelity", ["--data", "/nowhere"], "/nowhere"),
        ("demo", ["--trace", "/nowhere.csv"], "."),
        ("studies.summarise", ["/nowhere.csv"], "can't be read"),
        ("rack", ["--trace", "/nowhere.csv"], "can't be read"),
        ("rack", ["--json", "/nowhere/a"], "can't be written"),
    ],
)
def test_benchmarks_say_it_in_one_line(
    capsys: pytest.CaptureFixture[str], name: str, arguments: list[str], says: str
) -> None:
    """With the command's name, and code 2."""
    assert importlib.import_module(f"bench.{name}").main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1, captured.err
    assert captured.err.startswith(f"bench.{name}: error: ")
    assert re.search(says, captured.err)


def test_a_command_s_help_needs_no_vllm() -> None:
    """Nor does the list of commands."""
    for argv in (("simulate", "--help"), ("fit", "--help"), ("predict", "--help"), ("--help",)):
        found = blocked("shaper", ("vllm", "torch", "plotly", "pyarrow", "scipy"), *argv)
        assert (found.returncode, found.stderr) == (0, "")
    assert main.main(["predict"]) is not None
