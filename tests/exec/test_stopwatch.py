"""What the stopwatch gives on the CPU, where work has ended when it is stopped."""

import time

import torch

from vlcache_connector.exec.stopwatch import Stopwatch


def test_each_piece_of_work_is_given_once_with_its_seconds() -> None:
    watch = Stopwatch(torch.device("cpu"))
    before = time.perf_counter()
    watch.start()
    time.sleep(0.01)
    watch.stop(7)
    ((num_tokens, seconds),) = watch.take()
    assert num_tokens == 7 and 0.01 <= seconds <= time.perf_counter() - before
    assert watch.take() == []


def test_a_stop_without_a_start_measures_nothing() -> None:
    watch = Stopwatch(torch.device("cpu"))
    watch.stop(1)
    watch.start()
    watch.stop(2)
    watch.stop(3)
    assert [num_tokens for num_tokens, _ in watch.take()] == [2]


def test_work_whose_size_is_known_late_is_extended() -> None:
    watch = Stopwatch(torch.device("cpu"))
    watch.extend(5)  # of nothing
    watch.start()
    watch.stop(0)
    watch.extend(3)
    watch.stop(0)  # the second stop of a step ends nothing
    watch.extend(4)
    assert [num_tokens for num_tokens, _ in watch.take()] == [7]
