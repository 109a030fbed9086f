"""flame/schedule.py: a learning rate that follows the time."""

import importlib
import io
import math
from pathlib import Path

import pytest
import torch


@pytest.fixture
def made(monkeypatch):
    """A function: return a schedule, and a function that gives it a step that ended at a time."""
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "flame")
    module = importlib.import_module("schedule")

    def make(seconds: float, warmup: int = 0, state: dict | None = None):
        schedule, times = module.TimeSchedule(seconds, warmup), [100.0]
        if state:
            schedule.__dict__.update(state)
        schedule.begin(lambda: times[-1])

        def end_step(after: float) -> float:
            times.append(100 + after)
            schedule.advance()
            return schedule.share

        return schedule, end_step

    return make


def test_the_first_step_takes_time_and_moves_nothing(made):
    schedule, end_step = made(100)
    assert end_step(20) == 0
    assert schedule(0) == 1
    assert end_step(60) == pytest.approx(0.5)
    assert schedule(1) == pytest.approx(0.5)
    assert end_step(80) == pytest.approx(0.75)
    assert end_step(100) == 1
    assert schedule(3) == pytest.approx(0)
    assert schedule.used == 100


def test_a_resumed_training_ends_when_all_its_time_is_over(made):
    schedule, end_step = made(100)
    end_step(10)
    assert end_step(55) == pytest.approx(0.5)
    again, end_step = made(100, state=dict(schedule.__dict__))
    assert end_step(15) == pytest.approx(0.5)  # compiled anew
    assert end_step(30) == pytest.approx(0.75)
    assert end_step(45) == 1
    assert again.used == 100


def test_no_time_left_is_the_end(made):
    _, end_step = made(10)
    assert end_step(12) == 1


def test_the_rate_rises_in_steps_first(made):
    schedule, end_step = made(100, warmup=4)
    end_step(0)
    assert [schedule(step) for step in range(5)] == [0.25, 0.5, 0.75, 1, 1]


def test_lambda_lr_saves_what_was_reached(made):
    schedule, end_step = made(100)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=3.0)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, schedule)
    end_step(0)
    end_step(25)
    optimizer.step()
    scheduler.step()
    assert optimizer.param_groups[0]["lr"] == pytest.approx(3 * (1 + math.cos(math.pi / 4)) / 2)
    file = io.BytesIO()
    torch.save(scheduler.state_dict(), file)
    file.seek(0)
    again, _ = made(100)
    other = torch.optim.lr_scheduler.LambdaLR(torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=3.0), again)
    other.load_state_dict(torch.load(file, weights_only=True))
    assert (again.used, again.share) == (25, 0.25)
