"""Recorded readings as a meter: a loop without a seam, and gaps that stay gaps."""

from __future__ import annotations

from argparse import Namespace

import pytest

from shaper.cli.replayed import check_gpu_count, take_replay
from shaper.config.model import build_config
from shaper.emulator.playback import PlaybackReader
from shaper.errors import ConfigError, GpuLostError, TraceError
from shaper.gpu.validation import SampleValidator
from shaper.recording.format import RecordingWriter
from tests.gpu.clocks import HandClock

HEADER = "read_seconds,gpu_index,instant_watts,energy_joules\n"


@pytest.fixture
def two(tmp_path):
    """Two GPUs, 100 readings in 1.98 s, with a second without any in the middle."""
    path = tmp_path / "two.csv"
    times = [50 + 0.02 * n + (1.0 if n >= 50 else 0.0) for n in range(100)]
    rows = [
        f"{t},{gpu},{300 + gpu + n % 3},{(t - 50) * 300}\n"
        for n, t in enumerate(times)
        for gpu in (4, 5)
    ]
    path.write_text(HEADER + "".join(rows))
    return path


def test_it_goes_round_and_its_counter_goes_on(two):
    """The screen, which knows of resets and jumps, has nothing to say over three loops."""
    clock, screen, reads, gaps = HandClock(1000.0), SampleValidator(), 0, 0
    reader = PlaybackReader(two, clock, first=1, count=1)
    assert [gpu.index for gpu in reader.gpus] == [5]
    energy = []
    for _ in range(450):
        try:
            (sample,) = reader.read()
        except GpuLostError:
            gaps += 1
        else:
            reads += 1
            assert sample.read_seconds == clock.now_seconds
            assert sample.instant_watts in (305.0, 306.0, 307.0)
            (passed,) = screen.pass_on((sample,))
            assert passed.energy_joules is not None
            energy.append(passed.energy_joules)
        clock.advance(0.02)
    assert energy == sorted(energy)
    assert energy[-1] == pytest.approx(300 * 449 * 0.02, rel=0.02)
    assert screen.rejected_readings == 0
    # A second of three is missing, of which a quarter is taken for a slow reader.
    assert 0.2 < gaps / (gaps + reads) < 0.34


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "no column read_seconds"),
        (HEADER, "has no rows"),
        (HEADER + "1,0,300,1\n", "two are needed"),
        (HEADER + "1,0,300,1\n1,0,300,1\n", "over no time"),
        ("read_seconds,instant_watts\n1,2\n", "no column gpu_index"),
        ("kind,read_seconds,gpu_index,start_seconds,end_seconds\nstep,,,1,2\n", "has no rows"),
    ],
)
def test_what_can_not_be_played_is_refused_before_a_start(tmp_path, text, says):
    """With the file and the reason."""
    path = tmp_path / "bad.csv"
    path.write_text(text)
    options = Namespace(emulate=f"replay:{path}")
    with pytest.raises(TraceError, match=says):
        take_replay(options, build_config({"gpu_profile": "h200-sxm"}))


def test_the_gpu_is_the_recordings_or_the_one_that_is_named(two, tmp_path):
    """A recording says which GPU it is of; a plain table of samples does not."""
    options = Namespace(emulate=f"replay:{two}")
    with pytest.raises(ConfigError, match="--gpu-profile"):
        take_replay(options, build_config({}))
    take_replay(options, build_config({"gpu_profile": "h100-sxm"}))
    assert (options.emulate, options.replay) == ("h100-sxm", two)
    for name in ("run.csv", "run.parquet"):
        writer = RecordingWriter(tmp_path / name, {"gpu": "l40s"})
        writer.write(samples=[reading for _ in range(2) for reading in _samples(two)])
        writer.close()
        options = Namespace(emulate=f"replay:{tmp_path / name}")
        take_replay(options, build_config({}))
        assert options.emulate == "l40s"
    options = Namespace(emulate="h200-sxm")
    take_replay(options, None)
    assert (options.emulate, options.replay) == ("h200-sxm", None)
    with pytest.raises(ConfigError, match="--shaper-off"):
        take_replay(Namespace(emulate=f"replay:{two}"), None)


_next = iter(range(100))


def _samples(path):
    clock = HandClock(float(next(_next)))
    return PlaybackReader(path, clock, count=2).read()


def test_a_recording_of_another_number_of_gpus_is_refused(two):
    """Of more, too: nobody knows which of them are meant."""
    check_gpu_count(two, 2, 1)
    check_gpu_count(two, 1, 2)
    for gpus, engines in ((1, 1), (2, 2), (4, 1)):
        with pytest.raises(ConfigError, match=r"is of 2 GPUs"):
            check_gpu_count(two, gpus, engines)
    with pytest.raises(TraceError, match="positions 2 to 2"):
        PlaybackReader(two, HandClock(), first=2)
