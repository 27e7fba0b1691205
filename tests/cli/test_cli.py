"""The command line: what it refuses, in one line, and what it passes on."""

from __future__ import annotations

import argparse
import json
import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

from shaper.cli import main, serve, serve_flags
from shaper.config.sources import CONFIG_VARIABLE, load_config
from shaper.core.model.profile import GpuProfile
from shaper.core.types import PowerLimit
from shaper.emulator.activate import EMULATE_VARIABLE
from shaper.emulator.serving import batch_defaults, fill_in
from shaper.engine import preflight
from shaper.errors import ConfigError, EngineError
from shaper.gpu.profiles import load_profile


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (
        "SHAPER_ADMIN_KEY",
        "SHAPER_CONFIG",
        "SHAPER_EMULATE",
        "SHAPER_LIMITS",
        "VLLM_PLUGINS",
    ):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def taken_port() -> Iterator[int]:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        yield listener.getsockname()[1]


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """Runs a command that must fail; returns its one line."""
    assert main.main(list(arguments)) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    lines = captured.err.splitlines()
    assert len(lines) == 1, captured.err
    assert lines[0].startswith("shaper: error: ")
    return lines[0]


EMULATED = ("serve", "llama-3.1-8b", "--emulate", "h200-sxm", "--port", "0")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("srve",), "did you mean 'serve'"),
        (("frobnicate",), "commands: budget, doctor, fit, mode, predict, record, serve, simulate"),
        (("version", "now"), "no arguments"),
        (("serve", "llama-3.1-8b", "--emulate", "h300"), r"unknown GPU 'h300'; known: .*h200-sxm"),
        (("serve", "llama-9", "--emulate", "h200-sxm", "--port", "0"), "llama-9.*qwen3-8b"),
        (("serve", "./not-here", "--port", "0"), "not-here.*no such directory"),
        (("serve", "a/b/c", "--port", "0"), "no Hugging Face id"),
        (("serve", "llama-3.1-8b", "--port", "0"), "without weights: add --emulate"),
        ((*EMULATED, "--power-limit", "560"), "560W@1s"),
        ((*EMULATED, "--power-limit", "560000W@1s"), "milliwatts"),
        ((*EMULATED, "--power-limit", "560W@100ms", "--power-limit", "600W@1s"), "contradict"),
        ((*EMULATED, "--power-limit", "50W@1s"), "50 W over 1 s is not above .* idle"),
        ((*EMULATED, "--itl-target", "50"), "no unit"),
        ((*EMULATED, "--itl-target", "50s"), "itl_target_seconds=50"),
        ((*EMULATED, "--power-shaper-config", '{"limts": []}'), "did you mean 'limits'"),
        ((*EMULATED, "--power-limit"), "expected one argument"),
        ((*EMULATED, "--gpu-limit", "650W"), "650W@1s|no window"),
        ((*EMULATED, "--gpu-limit", "90W@1s"), "each GPU draws idle"),
        ((*EMULATED, "--ramp-limit", "200W"), "--ramp-limit: '200W' has the unit 'W'"),
        ((*EMULATED, "--ttft-target", "1"), "--ttft-target: '1' has no unit"),
        ((*EMULATED, "--policy", "predictve"), "policy.*'predictive' or 'fixed'"),
        ((*EMULATED, "--policy", "reactive"), "shaper simulate --policy reactive"),
        ((*EMULATED, "--shaper-off", "--gpu-limit", "650W@1s"), "contradicts --gpu-limit"),
        (("budget",), "required: action"),
        (("budget", "sett"), "invalid choice.*set"),
        (("budget", "set", "500W"), "no window"),
        (("budget", "set", "none", "500W@1s"), "'none' has no window"),
        (("mode", "onn"), "invalid choice.*shadow"),
        (("budget", "show"), "set SHAPER_ADMIN_KEY"),
        (
            (*EMULATED, "--shadow", "--power-shaper-config", '{"shadow": false}'),
            "--shadow and --power-shaper-config both give 'shadow'",
        ),
        (("serve", "m", "--port", "99999"), "between 0 and 65535"),
        (("serve", "m", "--port", "http"), "not a number"),
        (("serve", "m", "--host", "192.0.2.1", "--port", "0"), "can't listen on 192.0.2.1"),
    ],
)
def test_bad_input_is_one_line_and_code_2(
    capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], message: str
) -> None:
    """It says what is wrong and what to do, before vLLM is even imported."""
    line = refused(capsys, *arguments)
    assert re.search(message, line), line


def test_control_routes_are_named_once_and_last() -> None:
    """vLLM builds its engine's arguments several times; the last one sees requests first."""
    from shaper.server.middleware import CONTROL_ROUTES, add_middleware

    arguments = argparse.Namespace(middleware=["mine.Layer"])
    for _ in range(3):
        add_middleware(arguments, CONTROL_ROUTES)
        add_middleware(arguments, "other.Layer")
        add_middleware(arguments, CONTROL_ROUTES)
    assert arguments.middleware == ["mine.Layer", "other.Layer", CONTROL_ROUTES]


def test_a_port_in_use_is_refused(capsys: pytest.CaptureFixture[str], taken_port: int) -> None:
    """Written either way, and on the address that is asked for."""
    for said in (("--port", str(taken_port)), (f"--port={taken_port}",)):
        line = refused(capsys, "serve", "m", "--host", "127.0.0.1", *said)
        assert f"port {taken_port} is in use" in line


def test_a_missing_vllm_says_what_to_install(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """vLLM is a peer of this package and may not be there."""

    def missing(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", missing)
    assert "pip install" in refused(capsys, *EMULATED)


def test_a_command_without_a_traceback() -> None:
    """The installed command, as a shell runs it: code 2, one line on stderr."""
    done = subprocess.run(
        [sys.executable, "-m", "shaper", "serve", "nowhere/at/all", "--port", "0"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert "Traceback" not in done.stderr


def test_help_shows_the_shaper_s_flags_first(capsys: pytest.CaptureFixture[str]) -> None:
    """And points to vLLM's; the bare command lists the subcommands."""
    assert main.main(["serve", "--help"]) == 0
    text = capsys.readouterr().out
    for flag in (
        "--power-limit",
        "--emulate",
        "--shadow",
        "--itl-target",
        "--shaper-off",
        "--gpu-limit",
    ):
        assert flag in text
    assert "--help=all" in text
    assert main.main(["--help"]) == 0
    assert "predict" in capsys.readouterr().out
    assert main.main([]) == 2


def test_version_names_what_runs(capsys: pytest.CaptureFixture[str]) -> None:
    """The package and Python, and vLLM where there is one."""
    assert main.main(["version"]) == 0
    text = capsys.readouterr().out
    assert f"vllm-shaper {metadata.version('vllm-shaper')}" in text
    assert "vllm" in text
    assert "python 3" in text


def options(*arguments: str) -> argparse.Namespace:
    return serve_flags.new_parser().parse_known_args(list(arguments))[0]


def test_vllm_s_flags_pass_untouched() -> None:
    """In their order, values that look odd included; only ours are taken out."""
    line = [
        "m",
        "--max-num-seqs=7",
        "--power-limit",
        "500W@1s",
        "--hf-overrides",
        '{"a": 1}',
        "-O3",
    ]
    found, passed_on = serve_flags.new_parser().parse_known_args(line)
    assert passed_on == ["m", "--max-num-seqs=7", "--hf-overrides", '{"a": 1}', "-O3"]
    assert found.limits == [PowerLimit(500.0, 1.0)]
    assert "limits" not in options("--power", "x")


def test_flags_and_environment_make_one_config(monkeypatch: pytest.MonkeyPatch) -> None:
    """A flag wins over the environment; the children read back what the parent built."""
    monkeypatch.setenv("SHAPER_LIMITS", "300W@1s")
    monkeypatch.setenv("SHAPER_MARGIN_RATIO", "0.02")
    given = options("--power-limit", "640W@100ms", "--power-limit", "560W@1s", "--itl-target=50ms")
    config = serve_flags.shaper_config(given)
    assert config is not None
    assert [limit.watts for limit in config.limits] == [640.0, 560.0]
    assert config.itl_target_seconds == 0.05
    assert config.margin_ratio == 0.02
    environ = {"VLLM_PLUGINS": "mine", "VLLM_TARGET_DEVICE": "cpu"}
    serve.prepare_environment(environ, config, options("--emulate", "l40s"))
    assert load_config(None, {CONFIG_VARIABLE: environ[CONFIG_VARIABLE]}) == config
    assert environ[EMULATE_VARIABLE] == "l40s"
    assert environ["VLLM_PLUGINS"] == "mine,shaper,shaper_emulated"
    assert "VLLM_TARGET_DEVICE" not in environ


def test_the_shaper_can_be_left_out() -> None:
    """`--shaper-off` leaves no config behind, not even an inherited one."""
    assert serve_flags.shaper_config(options("--shaper-off")) is None
    environ = {CONFIG_VARIABLE: "{}", EMULATE_VARIABLE: "h100-sxm"}
    serve.prepare_environment(environ, None, options("--shaper-off"))
    assert CONFIG_VARIABLE not in environ
    assert EMULATE_VARIABLE not in environ


def test_a_profile_s_path_reaches_the_children_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They may run in another directory."""
    (tmp_path / "mine.toml").write_text("")
    monkeypatch.chdir(tmp_path)
    environ: dict[str, str] = {}
    serve.prepare_environment(environ, None, options("--emulate", "mine.toml"))
    assert environ[EMULATE_VARIABLE] == str(tmp_path / "mine.toml")


def arguments_of_vllm(model: str = "llama-3.1-8b", **changes: object) -> argparse.Namespace:
    values: dict[str, object] = {
        "model_tag": model,
        "model": "default",
        "served_model_name": None,
        "tokenizer": None,
        "distributed_executor_backend": None,
        "load_format": "auto",
        "max_num_batched_tokens": None,
        "max_num_seqs": None,
        "max_model_len": None,
        "async_scheduling": None,
        "gpu_memory_utilization": 0.9,
        "tensor_parallel_size": 1,
        "pipeline_parallel_size": 1,
        "speculative_config": None,
    }
    return argparse.Namespace(**(values | changes))


def h200() -> GpuProfile:
    return load_profile("h200-sxm")


def test_emulation_takes_a_real_gpu_s_defaults() -> None:
    """What vLLM would take on that GPU, and what the user said stays."""
    arguments = arguments_of_vllm()
    idle_watts = fill_in(arguments, h200())
    assert idle_watts == h200().power.context_watts
    assert (arguments.max_num_batched_tokens, arguments.max_num_seqs) == (8192, 1024)
    assert arguments.served_model_name == ["llama-3.1-8b"]
    assert arguments.async_scheduling is True
    assert arguments.max_model_len is None
    assert Path(arguments.model_tag, "config.json").is_file()
    said = arguments_of_vllm(
        max_num_batched_tokens=512, max_num_seqs=9, async_scheduling=False, max_model_len=777
    )
    fill_in(said, h200())
    assert (said.max_num_batched_tokens, said.max_num_seqs) == (512, 9)
    assert said.async_scheduling is False
    assert said.max_model_len == 777
    assert batch_defaults(load_profile("b200-sxm")) == (16384, 1024)
    assert batch_defaults(load_profile("a100-sxm-80gb")) == (2048, 256)


def test_a_context_that_does_not_fit_is_shortened() -> None:
    """A built-in's own context can be longer than the KV cache of a small GPU."""
    arguments = arguments_of_vllm(gpu_memory_utilization=0.6)
    fill_in(arguments, load_profile("l40s"))
    assert 1024 <= arguments.max_model_len < 131072
    assert arguments.max_model_len % 1024 == 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pipeline_parallel_size": 2}, "--pipeline-parallel-size"),
        ({"speculative_config": {"method": "ngram"}}, "--speculative-config"),
        ({"distributed_executor_backend": "ray"}, "contradicts"),
        ({"tensor_parallel_size": 3}, "3 does not divide"),
        ({"model_tag": "llama-3.1-70b"}, "does not fit h200-sxm.*--tensor-parallel-size"),
    ],
)
def test_what_can_not_be_emulated_is_refused(changes: dict[str, Any], message: str) -> None:
    """Before an engine starts."""
    with pytest.raises(ConfigError, match=message):
        fill_in(arguments_of_vllm(**changes), h200())


def test_a_config_directory_without_a_tokenizer_gets_one(tmp_path: Path) -> None:
    """And is served under the name that was given."""
    from shaper.emulator.shapes import load_model_config

    (tmp_path / "config.json").write_text(json.dumps(load_model_config("qwen3-8b")))
    arguments = arguments_of_vllm(str(tmp_path))
    fill_in(arguments, h200())
    assert arguments.model == str(tmp_path)
    assert Path(arguments.tokenizer, "tokenizer.json").is_file()
    assert arguments.served_model_name == [str(tmp_path)]


def test_only_vllm_s_own_parser_knows_a_config_file_s_port() -> None:
    """The early check leaves it alone; a plain line has vLLM's default."""
    assert preflight.early_address(["m", "--config", "x.yaml"]) == (None, None)
    assert preflight.early_address(["m", "--uds", "/tmp/x"]) == (None, None)
    assert preflight.early_address(["m", "--host=::1"]) == ("::1", 8000)


def test_errors_of_the_engine_are_lines_too(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A message with line breaks becomes one line."""

    def fail(arguments: object) -> int:
        raise EngineError("first\n  second")

    monkeypatch.setattr(serve, "main", fail)
    assert refused(capsys, "serve") == "shaper: error: first second"


def test_a_stop_drains_unless_the_user_says_how_long() -> None:
    """60 s by default; what was given holds, 0 as well."""
    pytest.importorskip("vllm")
    parse = serve._parse_with_vllm
    given = [parse(["m", *said]).shutdown_timeout for said in ([], ["--shutdown-timeout", "0"])]
    assert given == [60, 0]
