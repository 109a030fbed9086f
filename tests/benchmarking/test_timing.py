import math
import random

import pytest
import torch

from keyreduce.benchmarking import timing
from keyreduce.benchmarking.timing import (
    PeakMemory,
    RoundTimes,
    copies_past_cache,
    interleave,
    peak_memory,
    ratio,
    rotated,
)

CPU = torch.device("cpu")


class FakeMachine:
    """A clock that stands still but while a contender runs, and a record of who ran."""

    def __init__(self):
        self.now, self.calls = 0.0, []

    def contender(self, name: str, *seconds: float):
        """A function that takes these seconds, call by call, and the last of them ever after."""
        remaining = list(seconds)

        def run():
            self.calls.append(name)
            self.now += remaining.pop(0) if len(remaining) > 1 else remaining[0]

        return run


@pytest.fixture
def machine(monkeypatch) -> FakeMachine:
    machine = FakeMachine()
    monkeypatch.setattr(timing, "perf_counter", lambda: machine.now)
    return machine


def test_contenders_take_turns_after_warming_up(machine):
    ticks = []
    functions = {"a": machine.contender("a", 1.0), "b": machine.contender("b", 2.0)}
    timings = interleave(functions, CPU, rounds=3, progress=ticks.append)
    assert machine.calls == ["a"] * 4 + ["b"] * 4 + ["a", "b"] * 3
    assert timings == {"a": RoundTimes((1.0,) * 3), "b": RoundTimes((2.0,) * 3)}
    assert ticks == [1, 1, 1]


def test_warm_up_lasts_until_the_time_stops_falling(machine):
    # The third call is the first that none of the next three beats by 5%.
    run = machine.contender("a", 64.0, 8.0, 4.1, 4.0)
    assert interleave({"a": run}, CPU, rounds=2)["a"].seconds == (4.0, 4.0)
    assert len(machine.calls) == 3 + 3 + 2


def test_warm_up_is_bounded(machine):
    run = machine.contender("a", *(0.9**n for n in range(100)))
    timings = interleave({"a": run}, CPU, rounds=1, warmup=7)
    assert timings["a"].seconds == pytest.approx((0.9**7,))
    interleave({"b": machine.contender("b", 1.0)}, CPU, rounds=1, warmup=0)
    assert machine.calls == ["a"] * 8 + ["b"]


def test_interval_of_the_median_comes_from_order_statistics():
    # Conover, Practical Nonparametric Statistics: for n = 10 the 2nd and the 9th value enclose the median with 97.9%.
    assert RoundTimes(tuple(range(10, 0, -1))).interval == (2, 9)
    assert RoundTimes(tuple(range(1, 11))).median == 5.5
    # 6 values are the fewest whose range does so with 95%; with fewer the range is all there is.
    assert RoundTimes((3.0, 1.0, 2.0)).interval == (1.0, 3.0)
    assert RoundTimes((4.0,)).interval == (4.0, 4.0)


def test_interval_covers_the_true_median():
    generator = random.Random(0)
    draws = [RoundTimes(tuple(generator.expovariate(1.0) for _ in range(20))) for _ in range(400)]
    covered = sum(low <= math.log(2) <= high for low, high in (draw.interval for draw in draws))
    assert 0.93 < covered / len(draws) < 0.99


def test_ratio_is_taken_round_by_round():
    # The machine slows down tenfold half way; each round alone says 2.
    a, b = RoundTimes((2.0, 4.0, 20.0, 40.0)), RoundTimes((1.0, 2.0, 10.0, 20.0))
    assert ratio(a, b) == (2.0, (2.0, 2.0))
    assert ratio(RoundTimes((1.0, 6.0, 3.0)), RoundTimes((1.0, 2.0, 3.0))) == (1.0, (1.0, 3.0))
    with pytest.raises(ValueError, match="shorter"):
        ratio(RoundTimes((1.0, 1.0)), RoundTimes((1.0,)))


def test_peak_memory_of_a_cpu_is_that_of_tensors_alive_at_once():
    held = torch.ones(1000, dtype=torch.float32)

    def function():
        first = torch.zeros(1000)  # 4,000 bytes
        second = first + held.view(10, 100).view(-1)  # 8,000: what was there before, and its views, do not count
        del first
        third = second[:500].double()  # 4,000 and 4,000, since a view takes nothing
        del second
        return third + 1  # 4,000 and 4,000

    assert peak_memory(function, CPU) == PeakMemory(8_000, None)
    assert peak_memory(lambda: None, CPU).allocated == 0
    assert peak_memory(lambda: held.view(10, 100), CPU).allocated == 0
    with torch.inference_mode():
        assert peak_memory(function, CPU).allocated == 8_000


def test_warm_up_is_timed_apart(machine):
    timings = interleave({"a": machine.contender("a", 64.0, 8.0, 4.0), "b": machine.contender("b", 1.0)}, CPU, rounds=2)
    assert {name: timing.warmup_seconds for name, timing in timings.items()} == {"a": 64.0 + 8.0 + 4 * 4.0, "b": 4.0}


def test_time_of_one_step_of_several():
    timing = RoundTimes((2.0, 4.0), warmup_seconds=10.0).divided(4)
    assert (timing.seconds, timing.warmup_seconds) == ((0.5, 1.0), 10.0)


def test_inputs_are_rotated():
    seen = []
    call = rotated(seen.append, ["a", "b", "c"])
    for _ in range(4):
        call()
    assert seen == ["a", "b", "c", "a"]


@pytest.mark.parametrize(
    ("size", "copies"), [(0, 64), (1 << 20, 64), (3 << 20, 22), (64 << 20, 1), (65 << 20, 1), (1 << 40, 1)]
)
def test_rotated_inputs_fill_the_cache_twice(size, copies):
    assert copies_past_cache(size, CPU) == copies
    assert copies_past_cache(size, CPU, at_most=8) == min(copies, 8)


@pytest.mark.gpu
def test_cuda_times_and_memory():
    device, size = torch.device("cuda"), 64 << 20
    short, long = torch.ones(256, 256, device=device), torch.ones(4096, 4096, device=device)
    timings = interleave({"short": lambda: short @ short, "long": lambda: long @ long}, device, rounds=10)
    assert all(seconds > 0 for seconds in timings["short"].seconds)
    assert ratio(timings["long"], timings["short"])[0] > 2
    peak = peak_memory(lambda: torch.ones(size, dtype=torch.uint8, device=device), device)
    assert peak.allocated == size <= peak.reserved
