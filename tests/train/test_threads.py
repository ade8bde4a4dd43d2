"""What is said where more threads want to run than there are processors."""

import os
import subprocess
import sys
import time

import pytest
import torch

from seal_fast.train import threads


@pytest.fixture
def two_processors(monkeypatch):
    """Of the machine, and two threads of torch."""
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)


def said(watch, seconds: float) -> str:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if sentence := watch.sentence():
            return sentence
        time.sleep(0.01)
    return ""


@pytest.mark.parametrize(("running", "fewer"), [(2, None), (2.4, None), (2.75, 1), (3, 1), (8, 1)])
def test_threads_are_too_many_where_their_mean_exceeds_the_processors(running, fewer, two_processors):
    counts = iter([int(running * (number + 1)) - int(running * number) for number in range(10_000)])
    with threads.Watch(every=0.001, count=lambda: next(counts)) as watch:
        sentence = said(watch, 0.2 if fewer is None else 10)
        assert watch.sentence() == ""  # once
    if fewer is None:
        assert sentence == ""
    else:
        expected = f"{running:.1f} threads want to run on this machine's 2 processors, 2 of torch among them: "
        assert sentence == f"{expected}OMP_NUM_THREADS={fewer} may be many times as fast."


@pytest.mark.skipif(threads.runnable() is None, reason="only Linux tells how many threads want to run")
def test_busy_programs_are_counted(two_processors):
    busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(4)]
    try:
        with threads.Watch(every=0.05) as watch:
            assert "OMP_NUM_THREADS=1" in said(watch, 30)
    finally:
        for process in busy:
            process.kill()
            process.wait()


def test_one_thread_waits_for_nobody(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    with threads.Watch(every=0.001, count=lambda: 100) as watch:
        assert said(watch, 0.2) == ""


def test_a_system_that_stops_telling_is_left_alone(two_processors):
    counts = iter([2, 2, None])
    with threads.Watch(every=0.001, count=lambda: next(counts)) as watch:
        assert said(watch, 0.1) == ""


def test_a_system_that_does_not_tell_is_not_asked_again(two_processors):
    with threads.Watch(every=0.001, count=lambda: None) as watch:
        assert said(watch, 0.1) == ""


@pytest.mark.parametrize(
    ("number", "usable", "local", "expected"),
    [
        (2, 2, None, ""),
        (8, 2, None, "8 threads, where this run may use 2 processors: set OMP_NUM_THREADS=2."),
        (8, 1, None, "8 threads, where this run may use 1 processor: set OMP_NUM_THREADS=1."),
        (4, 8, 2, ""),
        (4, 8, 4, "4 threads in each of 4 processes, where this run may use 8 processors: set OMP_NUM_THREADS=2."),
        (1, 8, 16, ""),
    ],
)
def test_threads_of_the_run_itself(number, usable, local, expected, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: number)
    monkeypatch.setattr(threads, "processors", lambda: usable)
    if local:
        monkeypatch.setenv("WORLD_SIZE", str(local))
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(local))
    assert threads.too_many_threads().removeprefix("torch computes on ") == expected


@pytest.mark.parametrize(
    ("content", "expected"), [("150000 100000\n", 2), ("50000 100000\n", 1), ("max 100000\n", 8), ("", 8), (None, 8)]
)
def test_a_container_s_quota_counts(content, expected, tmp_path, monkeypatch):
    path = tmp_path / "cpu.max"
    if content is not None:
        path.write_text(content)
    monkeypatch.setattr(threads, "_QUOTA", path)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    assert threads.processors() == expected
