"""Runs in processes side by side, and searches that ask for runs as they go.

A search is a generator: it yields the runs that it needs next, is sent their outcomes in that
order, and returns what it found. Many of them go on at once, so that no core waits for the
longest; a run that two of them ask for is done once. A run that an earlier
command has kept is not done again.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Generator, Iterable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self, TypeVar

from shaper.errors import EngineError


@dataclass(frozen=True, slots=True)
class Run:
    """What is run, and what it is called while it runs."""

    name: str
    what: Any


T = TypeVar("T")
Search = Generator[Sequence[Run], Sequence[Any], T]


def together(runs: Sequence[Run]) -> Search[Sequence[Any]]:
    """A search that needs these runs and nothing after them."""
    return (yield runs)


def _end_with_parent() -> None:
    # A run whose command was killed has no reader.
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _start_worker() -> None:
    # Ctrl-C reaches all processes; the command ends these.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    os.environ["VLLM_LOGGING_LEVEL"] = "ERROR"
    # A process for each core; a pool of threads in each would only get in the way.
    os.environ["OMP_NUM_THREADS"] = "1"


@dataclass(frozen=True, slots=True)
class Told:
    """A run that is over, for who follows along."""

    name: str
    outcome: Any
    done: int
    known: int
    """Runs that were asked for until now; searches may ask for more."""
    kept: bool
    """It was done by an earlier command."""


class Runner:
    """Runs things in processes; a context manager that ends them.

    Mutable state: the outcomes so far, and the processes, which start with the first run.

    Args:
        call: makes an outcome of what is run, in another process: a function of a module, or a
            `functools.partial` of one.
        key: the name of a run; equal runs have equal ones.
        processes: side by side.
        load: an outcome that an earlier command has kept under a name, or None.
        save: keeps one.
        tell: is told each run that is over.
    """

    def __init__(
        self,
        call: Callable[[Any], Any],
        key: Callable[[Any], str],
        processes: int,
        load: Callable[[str], Any] = lambda name: None,
        save: Callable[[str, Any], None] = lambda name, outcome: None,
        tell: Callable[[Told], None] = lambda told: None,
    ) -> None:
        self._call, self._key, self._tell = call, key, tell
        self._load, self._save = load, save
        self._processes = processes
        self._outcomes: dict[str, Any] = {}
        self._pending: dict[Future[Any], tuple[str, str]] = {}
        self._pool: ProcessPoolExecutor | None = None
        self._others: set[multiprocessing.process.BaseProcess] = set()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._pool is None:
            return
        if error is not None:
            # A run takes up to minutes; one that is stopped is not waited for.
            for process in set(multiprocessing.active_children()) - self._others:
                process.terminate()
        self._pool.shutdown(cancel_futures=True)

    def drive(self, searches: Iterable[Search[T]]) -> list[T]:
        """Let searches go on until each has found its answer; the answers in their order.

        Raises:
            ConfigError: something can't be run.
            EngineError: a process was killed.
        """
        left = dict(enumerate(searches))
        asked: dict[int, list[str]] = {}
        answers: dict[int, T] = {}

        def go_on(index: int, outcomes: Sequence[Any] | None) -> None:
            try:
                runs = left[index].send(outcomes)  # type: ignore[arg-type]  # None starts it
            except StopIteration as stop:
                answers[index] = stop.value
                del left[index]
                return
            asked[index] = [self._ask(run) for run in runs]

        for index in list(left):
            go_on(index, None)
        while left:
            ready = [i for i in left if all(name in self._outcomes for name in asked[i])]
            for index in ready:
                go_on(index, [self._outcomes[name] for name in asked[index]])
            if not ready:
                self._wait()
        return [answers[index] for index in sorted(answers)]

    def _ask(self, run: Run) -> str:
        name = self._key(run.what)
        waiting = {each for each, _ in self._pending.values()}
        if name in self._outcomes or name in waiting:
            return name
        kept = self._load(name)
        if kept is not None:
            self._over(name, run.name, kept, True)
            return name
        if self._pool is None:
            self._others = set(multiprocessing.active_children())
            context = multiprocessing.get_context("spawn")
            self._pool = ProcessPoolExecutor(self._processes, context, _start_worker)
        self._pending[self._pool.submit(self._call, run.what)] = (name, run.name)
        return name

    def _wait(self) -> None:
        done, _ = wait(self._pending, return_when=FIRST_COMPLETED)
        for future in done:
            name, shown = self._pending.pop(future)
            try:
                outcome = future.result()
            except BrokenProcessPool as error:
                raise EngineError(
                    "a process that ran a part was killed, for want of memory perhaps; try again "
                    "with fewer --processes: bench.rack goes on where it stopped"
                ) from error
            self._save(name, outcome)
            self._over(name, shown, outcome, False)

    def _over(self, name: str, shown: str, outcome: Any, kept: bool) -> None:
        self._outcomes[name] = outcome
        done = len(self._outcomes)
        self._tell(Told(shown, outcome, done, done + len(self._pending), kept))
