"""A process that claims at random from a group of this host, and logs what it ran.

    python tests/group/group_member.py DIRECTORY LOG SEED

SIGUSR1 makes it kill itself in the middle of its next claim, holding the lock; SIGUSR2 makes
it stop itself there. SIGTERM ends it. Each line of the log is a list: a word and numbers.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from shaper.core.ledger.shared import EngineShare, Step
from shaper.core.types import PowerLimit, StepPrediction
from shaper.group import join_group
from shaper.group.reservations import Reservations
from tests.group.group_judge import Device, Drawn

LIMITS = (PowerLimit(1100.0, 0.1), PowerLimit(900.0, 1.0))
IDLE_WATTS, REST_WATTS, REST_AFTER_SECONDS = 100.0, 80.0, 0.3
MOST_WATTS = 900.0
NAME = "chaos"


class Member:
    """One engine, more or less."""

    def __init__(self, directory: Path, log: Path, seed: int) -> None:
        self.random = random.Random(seed)
        self.descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        self.group = join_group(
            NAME,
            LIMITS,
            idle_watts=IDLE_WATTS,
            rest_watts=REST_WATTS,
            rest_after_seconds=REST_AFTER_SECONDS,
            label=f"member {seed}",
            directory=directory,
        )
        now = time.monotonic()
        self.device = Device(Drawn(IDLE_WATTS, REST_WATTS, REST_AFTER_SECONDS, now, now))
        self.write("joined", now)
        self.then: int | None = None
        self.ended = threading.Event()

    def write(self, *line: Any) -> None:
        """One line, at once."""
        os.write(self.descriptor, json.dumps(line).encode() + b"\n")

    def turn(self) -> None:
        """Finish what is over; look, decide, claim and run."""
        now, device, chance = time.monotonic(), self.device, self.random
        share = EngineShare(IDLE_WATTS + chance.choice((0.0, 30.0)))
        while device.flying and (device.flying[0][1] <= now or chance.random() < 0.05):
            start, end, watts = device.flying[0]
            if now <= start:
                break
            self.write("cut", start, end, min(end, now))
            device.finish(now)
            self.group.commit(device.committed(), share, now)
        if len(device.flying) > 1:
            return
        start, seconds = device.free_seconds(now), chance.uniform(0.003, 0.03)
        view = self.group.query(start, now, share)
        fits = min(part.max_watts(seconds) for part in view.parts)
        watts = min(chance.choice((300.0, MOST_WATTS, MOST_WATTS)), fits)
        if watts <= IDLE_WATTS:
            return
        # Others claim in between.
        time.sleep(chance.choice((0.0, 0.002)))
        run = start, start + seconds, watts
        step = Step(start, StepPrediction(seconds, watts * seconds))
        if self.group.reserve(device.committed([run]), share, time.monotonic(), step):
            self.write("run", *run)
            device.launch(run)
        else:
            self.write("refused", now)

    def beat(self) -> None:
        """The sampler's thread."""
        while not self.ended.wait(0.02):
            self.group.tick(time.monotonic())

    def live(self) -> None:
        """Until SIGTERM."""
        original = Reservations.commit

        def commit(rows: Reservations, *args: Any) -> None:
            original(rows, *args)
            gate = self.group._gate
            if self.then is not None and gate is not None and gate.held:
                then, self.then = self.then, None
                self.write("inside", time.monotonic())
                os.kill(os.getpid(), then)

        Reservations.commit = commit  # type: ignore[method-assign, assignment]
        signal.signal(signal.SIGUSR1, lambda *_: setattr(self, "then", signal.SIGKILL))
        signal.signal(signal.SIGUSR2, lambda *_: setattr(self, "then", signal.SIGSTOP))
        signal.signal(signal.SIGTERM, lambda *_: self.ended.set())
        beat = threading.Thread(target=self.beat)
        beat.start()
        while not self.ended.is_set():
            self.turn()
            time.sleep(self.random.uniform(0.0, 0.004))
        beat.join()
        self.group.leave()
        self.write("left", time.monotonic())


if __name__ == "__main__":
    Member(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])).live()
