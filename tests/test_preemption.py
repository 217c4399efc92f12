"""When a run saves, and what a signal does to it."""

import os
import signal
from collections.abc import Iterator

import pytest

from scclr.config.errors import UserError
from scclr.config.schema import CheckpointConfig
from scclr.run.preemption import LEAVE, NOT_DUE, REPEAT_SECONDS, SAVE, SILENT, STOPPED, CheckpointSchedule, Stop


@pytest.fixture
def stop() -> Iterator[Stop]:
    with Stop() as stop:
        yield stop


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time that passes in the module is what a test puts here."""
    now = [100.0]
    monkeypatch.setattr("scclr.run.preemption.time.monotonic", lambda: now[0])
    return now


def signals_only(stop: Stop) -> CheckpointSchedule:
    return CheckpointSchedule(steps=None, seconds=None, total=9, stop=stop)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2])
def test_a_signal_waits_for_the_step(stop: Stop, number: int, capsys: pytest.CaptureFixture[str]) -> None:
    schedule = CheckpointSchedule(steps=10, seconds=None, total=25, stop=stop)
    with stop.deferred():
        assert [schedule.due(done) for done in (9, 10, 20, 24, 25)] == [NOT_DUE, SAVE, SAVE, NOT_DUE, SAVE]
        os.kill(os.getpid(), number)
        assert schedule.due(7) == LEAVE
        with pytest.raises(SystemExit, match=f"^{STOPPED}$"):
            schedule.saved(LEAVE)
    name = signal.Signals(number).name
    assert capsys.readouterr().err == f"stopped by {name}; type the same command to go on\n"


def test_repeats_are_ignored_for_a_while_and_then_do_not_wait(stop: Stop, clock: list[float]) -> None:
    """A job-wide signal comes from its sender and again, perhaps as another one, from the launcher of the process."""
    with stop.deferred():
        os.kill(os.getpid(), signal.SIGUSR1)
        for _ in range(3):
            clock[0] += REPEAT_SECONDS / 4
            os.kill(os.getpid(), signal.SIGTERM)
        assert stop.signal == signal.SIGUSR1
        clock[0] += REPEAT_SECONDS / 4
        with pytest.raises(SystemExit):
            os.kill(os.getpid(), signal.SIGTERM)


def test_a_signal_outside_the_loop_ends_the_run_and_its_repeats_are_ignored(stop: Stop, clock: list[float]) -> None:
    with pytest.raises(SystemExit, match=f"^{STOPPED}$"):
        os.kill(os.getpid(), signal.SIGTERM)
    clock[0] += REPEAT_SECONDS / 2
    os.kill(os.getpid(), signal.SIGTERM)
    clock[0] += REPEAT_SECONDS / 2
    with pytest.raises(SystemExit):
        os.kill(os.getpid(), signal.SIGTERM)


def test_a_stop_inside_another_hands_its_signal_over(stop: Stop) -> None:
    """The command line has one around everything, the training one of its own."""
    with Stop() as inner:
        with inner.deferred():
            os.kill(os.getpid(), signal.SIGINT)
            assert signals_only(inner).due(1) == LEAVE
            with pytest.raises(KeyboardInterrupt):
                inner.leave()
        os.kill(os.getpid(), signal.SIGINT)  # at once after the first: ignored
    os.kill(os.getpid(), signal.SIGTERM)  # by the outer one as well


@pytest.mark.parametrize(("name", "value", "lines"), [("RANK", "0", 1), ("RANK", "1", 0), (SILENT, "1", 0)])
def test_one_process_speaks_for_a_run(
    stop: Stop, name: str, value: str, lines: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    group = {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}
    for key, text in {**group, name: value}.items():
        monkeypatch.setenv(key, text)
    with pytest.raises(SystemExit):
        stop.leave()
    assert len(capsys.readouterr().err.splitlines()) == lines


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
            schedule = signals_only(stop)
            os.kill(os.getpid(), signal.SIGUSR2)
            assert (schedule.due(1), calls) == (LEAVE, [])
            schedule.saved(LEAVE)
            assert (schedule.due(2), calls) == (NOT_DUE, [signal.SIGUSR2])
        os.kill(os.getpid(), signal.SIGUSR2)
        assert len(calls) == 2, "it is installed again"
    finally:
        signal.signal(signal.SIGUSR2, before)


def test_by_the_clock_saving_takes_a_fiftieth_of_the_time(stop: Stop, clock: list[float]) -> None:
    schedule, saves = CheckpointSchedule(steps=None, seconds=60, total=10**9, stop=stop), []
    for second in range(1, 2000):
        clock[0] += 1
        if schedule.due(second):
            clock[0] += 3  # what it costs to save
            schedule.saved(SAVE)
            saves.append(second)
    assert saves[:3] == [60, 210, 360]


@pytest.mark.parametrize(
    ("every", "steps", "seconds"),
    [("500", 500, None), ("30s", None, 30), ("1.5min", None, 90), ("2h", None, 7200)],
)
def test_checkpoints_are_counted_in_steps_or_seconds(every: str, steps: int | None, seconds: float | None) -> None:
    config = CheckpointConfig(every)
    assert (config.steps, config.seconds) == (steps, seconds)


@pytest.mark.parametrize("every", ["0", "-1", "0s", "10 minutes", "1d", ""])
def test_other_intervals_are_refused(every: str) -> None:
    with pytest.raises(UserError, match="as in 10min"):
        CheckpointConfig(every)
