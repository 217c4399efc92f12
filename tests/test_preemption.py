"""When a run saves, and what a signal does to it."""

import os
import signal
from collections.abc import Iterator

import pytest

from scclr.config import CheckpointConfig, UserError
from scclr.preemption import LEAVE, NOT_DUE, SAVE, STOPPED, Pace, Stop


@pytest.fixture
def stop() -> Iterator[Stop]:
    with Stop() as stop:
        yield stop


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2])
def test_a_signal_waits_for_the_step(stop: Stop, number: int) -> None:
    pace = Pace(steps=10, seconds=None, total=25, stop=stop)
    with stop.deferred():
        assert [pace.due(done) for done in (9, 10, 20, 24, 25)] == [NOT_DUE, SAVE, SAVE, NOT_DUE, SAVE]
        os.kill(os.getpid(), number)
        assert pace.due(7) == LEAVE
        with pytest.raises(SystemExit) as stopped:
            pace.saved(LEAVE)
    assert stopped.value.code == STOPPED


def test_a_second_signal_does_not_wait(stop: Stop) -> None:
    with stop.deferred():
        os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_outside_the_loop_a_signal_is_obeyed_at_once(stop: Stop) -> None:
    with pytest.raises(SystemExit):
        os.kill(os.getpid(), signal.SIGUSR1)


def test_an_ignored_signal_stays_ignored() -> None:
    before = signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    try:
        with Stop() as stop:
            os.kill(os.getpid(), signal.SIGUSR1)
        assert stop.signal is None
    finally:
        signal.signal(signal.SIGUSR1, before)


def test_an_older_handler_has_the_last_word() -> None:
    """As submitit's, which puts the job back into the queue, or goes on."""
    calls: list[int] = []
    before = signal.signal(signal.SIGUSR2, lambda number, frame: calls.append(number))
    try:
        with Stop() as stop, stop.deferred():
            pace = Pace(steps=None, seconds=None, total=9, stop=stop)
            os.kill(os.getpid(), signal.SIGUSR2)
            assert (pace.due(1), calls) == (LEAVE, [])
            pace.saved(LEAVE)
            assert (pace.due(2), calls) == (NOT_DUE, [signal.SIGUSR2])
        os.kill(os.getpid(), signal.SIGUSR2)
        assert len(calls) == 2, "it is back in its place"
    finally:
        signal.signal(signal.SIGUSR2, before)


def test_another_process_was_signalled(stop: Stop) -> None:
    with pytest.raises(SystemExit):
        Pace(steps=None, seconds=None, total=9, stop=stop).saved(LEAVE)


def test_by_the_clock_saving_takes_a_fiftieth_of_the_time(stop: Stop, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("scclr.preemption.time.monotonic", lambda: now[0])
    pace, saves = Pace(steps=None, seconds=60, total=10**9, stop=stop), []
    for second in range(1, 2000):
        now[0] += 1
        if pace.due(second):
            now[0] += 3  # what it costs to save
            pace.saved(SAVE)
            saves.append(second)
    assert saves[:3] == [60, 210, 360]


@pytest.mark.parametrize(
    ("every", "steps", "seconds"),
    [("500", 500, None), ("30s", None, 30), ("1.5min", None, 90), ("2h", None, 7200), ("0s", None, 0)],
)
def test_every(every: str, steps: int | None, seconds: float | None) -> None:
    config = CheckpointConfig(every)
    assert (config.steps, config.seconds) == (steps, seconds)


@pytest.mark.parametrize("every", ["0", "-1", "10 minutes", "1d", ""])
def test_every_is_checked(every: str) -> None:
    with pytest.raises(UserError, match="as in 10min"):
        CheckpointConfig(every)
