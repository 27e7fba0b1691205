"""`--emulate replay:FILE`: what to emulate beside recorded readings, checked before a start."""

from __future__ import annotations

import argparse
from pathlib import Path

from shaper.config.model import ShaperConfig
from shaper.emulator.playback import recorded_readings
from shaper.errors import ConfigError
from shaper.gpu.profiles import known_profiles, load_profile
from shaper.recording.format import recorded_meta

PREFIX = "replay:"


def take_replay(options: argparse.Namespace, config: ShaperConfig | None) -> None:
    """Turns `replay:FILE` into the GPU to emulate (`options.emulate`) and the file
    (`options.replay`, None where nothing is played), in place.

    Raises:
        ConfigError: nothing says which GPU, or `--shaper-off` leaves no reader.
        TraceError: the file can't be read, or holds too little.
    """
    options.replay = None
    if options.emulate is None or not options.emulate.startswith(PREFIX):
        return
    if config is None:
        raise ConfigError(
            "--emulate replay:FILE plays readings to the shaper, and --shaper-off leaves it out: "
            "name a GPU with --emulate"
        )
    path = Path(options.emulate.removeprefix(PREFIX)).expanduser().resolve()
    recorded_readings(path)
    gpu = config.gpu_profile or recorded_meta(path).get("gpu")
    if not gpu:
        raise ConfigError(
            f"--emulate replay: {path} does not say which GPU it is of, and its steps must take "
            f"some GPU's time: give --gpu-profile, one of {', '.join(known_profiles())}"
        )
    load_profile(str(gpu))
    options.emulate, options.replay = str(gpu), path


def check_gpu_count(path: Path, gpu_count: int, engines: int) -> None:
    """A recording has one reading for each GPU of the server.

    Args:
        path: of the recording.
        gpu_count: of each engine.
        engines: data-parallel ranks.

    Raises:
        ConfigError: it has more or fewer.
        TraceError: it can't be read.
    """
    found = len(recorded_readings(path)[0])
    if found != gpu_count * engines:
        raise ConfigError(
            f"--emulate replay: {path} is of {found} GPUs, and the server has {gpu_count * engines}"
            f" (--tensor-parallel-size {gpu_count}, --data-parallel-size {engines}): they must "
            "be as many"
        )
