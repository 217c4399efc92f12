"""When a run saves, and what a signal does to it."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from scclr.config.errors import UserError
from scclr.config.schema import CheckpointConfig
from scclr.run.checkpoint import PERIOD, Checkpoints
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


def test_repeats_do_not_reach_the_handler_that_was_there_before(clock: list[float]) -> None:
    """The default would end the process with another code than 75, or with KeyboardInterrupt while it ends."""
    numbers = {signal.SIGTERM: signal.SIG_DFL, signal.SIGINT: signal.default_int_handler}
    for number, handler in numbers.items():
        signal.signal(number, handler)
    for number in numbers:
        with pytest.raises((SystemExit, KeyboardInterrupt)), Stop():
            os.kill(os.getpid(), number)
        clock[0] += REPEAT_SECONDS / 2
        for repeat in numbers:
            os.kill(os.getpid(), repeat)
        with pytest.raises((SystemExit, KeyboardInterrupt)), Stop():  # of another run
            os.kill(os.getpid(), number)
    clock[0] += REPEAT_SECONDS
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_repeats_are_ignored_until_the_interpreter_has_ended() -> None:
    script = """
import os, signal, sys
from scclr.run.preemption import Stop
class Last:
    def __del__(self, kill=os.kill, number=signal.SIGTERM, process=os.getpid()):
        kill(process, number)  # when modules are cleared, after the handlers
sys.last = Last()
with Stop():
    os.kill(os.getpid(), signal.SIGTERM)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (STOPPED, "stopped by SIGTERM; type the same command to go on\n")


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


class Others:
    """The other processes of a group, of which one has an answer of its own; the clock moves by ``pace`` a step."""

    def __init__(self, clock: list[float], stop: Stop, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.clock, self.stop, self.folder, self.answer, self.asked = clock, stop, folder, 0, list[int]()
        monkeypatch.setattr("scclr.run.checkpoint.distributed.world_size", lambda: 2)
        monkeypatch.setattr("scclr.run.checkpoint.distributed.all_reduce_max", self.all_reduce_max)

    def all_reduce_max(self, value: int) -> int:
        self.asked.append(self.step)
        return max(value, self.answer)

    def train(self, *, steps: int | None, total: int, pace: float, start: int = 0) -> Iterator[tuple[int, int]]:
        schedule = CheckpointSchedule(steps=steps, seconds=None if steps else 1e9, total=total, stop=self.stop)
        checkpoints = Checkpoints(self.folder, schedule, {})
        for self.step in range(start + 1, total + 1):
            self.clock[0] += pace
            yield self.step, checkpoints.due(self.step)


@pytest.fixture
def others(clock: list[float], stop: Stop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Others:
    return Others(clock, stop, tmp_path, monkeypatch)


def test_by_the_clock_processes_ask_each_other_every_eight_steps(others: Others) -> None:
    assert [step for step, due in others.train(steps=None, total=50, pace=0.01) if due] == [50]
    assert others.asked == [1, 9, 17, 25, 33, 41, 49, 50]


def test_slow_steps_are_asked_about_every_second(others: Others) -> None:
    assert [step for step, due in others.train(steps=None, total=9, pace=0.4, start=2) if due] == [9]
    assert others.asked == [3, 5, 7, 9]


def test_processes_ask_again_when_the_slowest_of_them_wants_it(others: Others) -> None:
    others.answer = 5  # not due, and 3 steps take another process a second
    assert [step for step, due in others.train(steps=None, total=9, pace=0.01) if due] == [9]
    assert others.asked == [1, 4, 7, 9]


def test_checkpoints_by_steps_are_exact_in_a_group(others: Others) -> None:
    assert [step for step, due in others.train(steps=3, total=20, pace=0.01) if due] == [3, 6, 9, 12, 15, 18, 20]


@pytest.mark.parametrize("own", [True, False])
def test_a_signal_to_one_process_ends_all_within_eight_steps(own: bool, others: Others) -> None:
    with others.stop.deferred():
        for step, due in others.train(steps=None, total=50, pace=0.01):
            if step == 10 and own:
                os.kill(os.getpid(), signal.SIGTERM)
            if step == 10 and not own:
                others.answer = LEAVE * PERIOD
            if due:
                assert (step, due) == (17, LEAVE)
                break
        others.stop.signal = None


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
