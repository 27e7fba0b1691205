"""`shaper predict`: what it prints, and what it refuses."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from shaper.cli.predict import main, sweep_values
from shaper.core.model.power_model import StepModel
from shaper.core.model.work import WorkCoefficients
from shaper.core.types import StepBatch
from shaper.emulator.shapes import known_models, load_model_config, load_shape
from shaper.errors import ConfigError, UnknownGpuError, UnknownModelError
from shaper.gpu.profiles import load_profile

H100_DECODE = ["--gpu", "h100-sxm", "--model", "llama-3.1-8b", "--decode-requests", "128"]


def ask(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    """What `--json` prints for these arguments."""
    assert main([*arguments, "--json"]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def test_the_answer_is_that_of_the_step_model(capsys: pytest.CaptureFixture[str]) -> None:
    """The command asks the equations that the controller and the emulated GPU use."""
    found = ask(capsys, *H100_DECODE, "--context-tokens", "700", "--sm-clock-hertz", "max")
    shape = WorkCoefficients.from_shape(load_shape("llama-3.1-8b"))
    batch = StepBatch(decode_requests=128, decode_tokens=128, decode_context_tokens=128 * 700)
    expected = StepModel(load_profile("h100-sxm"), shape).predict(batch)
    assert found["seconds"] == pytest.approx(expected.seconds)
    assert found["joules"] == pytest.approx(expected.joules)
    assert found["watts_per_gpu"] == pytest.approx(expected.watts)
    assert found["tokens_per_second"] == pytest.approx(128 / expected.seconds)
    assert found["tokens_per_joule"] == pytest.approx(128 / expected.joules)
    assert found["bound_by"] == "memory"


@pytest.mark.parametrize("name", known_models())
def test_shares_add_up(capsys: pytest.CaptureFixture[str], name: str) -> None:
    """The terms' shares of seconds and of joules are 1 in all, for each built-in shape."""
    found = ask(
        capsys, "--gpu", "b200-sxm", "--model", name, "--tp", "2", "--decode-requests", "16",
        "--prefill-tokens", "256",
    )  # fmt: skip
    terms = found["terms"].values()
    assert sum(term["seconds_share"] for term in terms) == pytest.approx(1.0)
    assert sum(term["joules_share"] for term in terms) == pytest.approx(1.0)


def test_a_cap_binds(capsys: pytest.CaptureFixture[str]) -> None:
    """Under a cap the clock falls until the power fits, and the step takes longer."""
    arguments = ["--gpu", "h100-sxm", "--prefill-tokens", "4096"]
    capped = ask(capsys, *arguments, "--power-cap-watts", "450")
    free = ask(capsys, *arguments)
    assert capped["bound_by"] == "power cap"
    assert 430.0 < capped["watts_per_gpu"] <= 450.0
    assert capped["sm_clock_hertz"] < free["sm_clock_hertz"]
    assert capped["seconds"] > free["seconds"]


def test_a_lower_clock_slows_a_prefill(capsys: pytest.CaptureFixture[str]) -> None:
    """The clock that is asked for is the one that is used."""
    found = ask(capsys, "--prefill-tokens", "2048", "--sm-clock-hertz", "990e6")
    assert found["sm_clock_hertz"] == 990e6
    assert found["bound_by"] == "compute"
    assert found["seconds"] > 1.5 * ask(capsys, "--prefill-tokens", "2048")["seconds"]


def test_returned_requests_cost(capsys: pytest.CaptureFixture[str]) -> None:
    """Requests that come back after being held lengthen the step."""
    more = ask(capsys, *H100_DECODE, "--returned-requests", "100")["seconds"]
    cost = load_profile("h100-sxm").host.returned_request_seconds
    assert more - ask(capsys, *H100_DECODE)["seconds"] == pytest.approx(100 * cost)


def test_any_config_directory_will_do(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """A Hugging Face config directory is read like a built-in shape."""
    (tmp_path / "config.json").write_text(json.dumps(load_model_config("qwen3-8b")))
    mine = ask(capsys, "--model", str(tmp_path), "--decode-requests", "4")
    assert mine["seconds"] == ask(
        capsys, "--model", "qwen3-8b", "--decode-requests", "4"
    )["seconds"]  # fmt: skip


def test_a_sweep_prints_a_table_and_draws_it(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """One row per value, and a file that a browser opens without a network."""
    pytest.importorskip("plotly")
    page = tmp_path / "sweep.html"
    arguments = ["--gpu", "h100-sxm", "--sweep", "decode-requests=1..512"]
    assert main([*arguments, "--context-tokens", "500", "--plot", str(page)]) == 0
    rows = capsys.readouterr().out.splitlines()
    assert [int(row.split()[0]) for row in rows[1:]] == [2**k for k in range(10)]
    assert rows[0].split()[:2] == ["decode-requests", "ms"]
    assert "<script src=" not in page.read_text()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("decode-requests=1..6", [1.0, 2.0, 4.0, 6.0]),
        ("prefill-tokens=0..1000:500", [0.0, 500.0, 1000.0]),
        ("context-tokens=10,20", [10.0, 20.0]),
        ("tp=0..2", [0.0, 1.0, 2.0]),
    ],
)
def test_sweeps_are_read(text: str, expected: list[float]) -> None:
    """Doubling, even steps, and a list."""
    assert sweep_values(text)[1] == expected


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ([], ConfigError, "nothing to compute"),
        (["--decode-requests", "-1"], ConfigError, "-1 is below 0"),
        (["--decode-requests", "many"], ConfigError, "'many' is not a whole number"),
        (["--decode"], ConfigError, "unrecognized"),
        (["--gpu", "h100", "--decode-requests", "1"], UnknownGpuError, "h100-sxm"),
        (["--model", "gpt-9", "--decode-requests", "1"], UnknownModelError, "qwen3-8b"),
        (["--tp", "3", "--decode-requests", "1"], ConfigError, "3 does not divide the 32"),
        (["--tp", "0", "--decode-requests", "1"], ConfigError, "0 does not divide"),
        (
            ["--decode-requests", "1", "--context-tokens", "200000"],
            ConfigError,
            "200000 tokens is over llama-3.1-8b's limit of 131072",
        ),
        (
            ["--prefill-tokens", "2048", "--prefill-before-tokens", "131072"],
            ConfigError,
            "133120 tokens is over",
        ),
        (["--model", "llama-3.1-70b", "--decode-requests", "1"], ConfigError, "does not fit"),
        (
            ["--gpu", "l40s", "--decode-requests", "500", "--context-tokens", "8000"],
            ConfigError,
            "KV cache per GPU",
        ),
        (["--decode-requests", "1", "--sm-clock-hertz", "5e9"], ConfigError, "outside"),
        (["--decode-requests", "1", "--sm-clock-hertz", "fast"], ConfigError, "nor max"),
        (["--decode-requests", "1", "--power-cap-watts", "50"], ConfigError, "outside"),
        (
            ["--gpu", "l40s", "--model", "llama-3.1-70b", "--sweep", "decode-requests=1..8"],
            ConfigError,
            "does not fit",
        ),
        (["--sweep", "decode-requests"], ConfigError, "want NAME=1..512"),
        (["--sweep", "model=1..2"], ConfigError, "NAME one of"),
        (["--sweep", "tp=8..1"], ConfigError, "backwards"),
        (["--sweep", "tp=a..b"], ConfigError, "not numbers"),
        (["--decode-requests", "1", "--plot", "x.html"], ConfigError, "give --sweep too"),
        (
            ["--sweep", "decode-requests=1..2", "--plot", "x.png"],
            ConfigError,
            r"must end in \.html",
        ),
    ],
)
def test_what_is_impossible_is_refused(
    arguments: list[str], error: type[Exception], message: str
) -> None:
    """One line that says what is wrong with the request."""
    with pytest.raises(error, match=message):
        main(arguments)


def test_no_engine_is_started() -> None:
    """A prediction for a built-in shape loads neither torch nor vLLM."""
    code = (
        "import sys; from shaper.cli.main import main; "
        "code = main(['predict', '--decode-requests', '8', '--json']); "
        "assert not {'torch', 'vllm', 'transformers'} & set(sys.modules); sys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["decode_requests"] == 8


def test_a_sweep_leaves_out_what_is_impossible(capsys: pytest.CaptureFixture[str]) -> None:
    """A row that does not fit the memory is said on stderr, and costs the others nothing."""
    arguments = ["--gpu", "h100-sxm", "--model", "llama-3.1-8b"]
    assert main([*arguments, "--sweep", "decode-requests=1..512"]) == 0
    printed = capsys.readouterr()
    assert printed.out.count("\n") == 1 + 9
    assert "left out: decode-requests=512" in printed.err
    assert "does not fit" in printed.err
