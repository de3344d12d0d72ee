"""Rows join and leave, whatever becomes of those who wait for them."""

import threading
import time

import pytest

from tests.tiny import model_directory
from whet.generate.opened import open_model
from whet.generate.rows import GREEDY, Row
from whet.serve.worker import Full, Job, Worker


@pytest.fixture
def worker(tmp_path):
    model = open_model(model_directory(tmp_path / "model", max_positions=4096)).model
    return Worker(model, set(), context=4000, batch_size=2, queue=2)


def job(number: int, deliver, end: int = 4000) -> Job:
    return Job(Row(number, (0, number), [1, 2, 3], end, GREEDY), deliver)


def test_a_reply_that_is_given_up_frees_its_row_at_once(worker):
    got, started, done = [], threading.Event(), threading.Event()
    worker.submit([job(0, lambda piece: (got.append(piece), started.set()))])
    worker.submit([job(1, lambda piece: None), job(2, lambda piece: None)])
    worker.submit([job(3, lambda piece: done.set(), end=4)])
    assert started.wait(10)
    worker.cancel({1, 2})  # one runs, one waits
    assert done.wait(10), "the third did not get the free row"
    worker.cancel({0})
    count, ended = len(got), time.monotonic() + 10
    while worker.running and time.monotonic() < ended:
        time.sleep(0.01)
    assert not worker.running
    assert len(got) < min(count + 50, 3000)


def test_the_queue_takes_all_of_a_request_or_nothing(worker):
    worker.submit([job(i, lambda piece: None) for i in range(3)])
    with pytest.raises(Full):
        worker.submit([job(i, lambda piece: None) for i in range(3, 6)])
    worker.cancel(set(range(3)))


def test_a_model_that_fails_says_so_and_goes_on(worker, monkeypatch, capsys):
    found, again = [], threading.Event()

    def broken(*args, **kwargs):
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(worker.model, "forward", broken)
        told = threading.Event()
        worker.submit([job(0, lambda what: (found.append(what), told.set()))])
        assert told.wait(10)
    assert isinstance(found[0], RuntimeError)
    worker.submit([job(1, lambda piece: again.set(), end=4)])
    assert again.wait(10)
