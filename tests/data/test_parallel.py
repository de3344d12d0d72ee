import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest

from whet.data.parallel import ordered_map, usable_cores
from whet.errors import UserError


def slow_square(number):
    time.sleep(0.02 if number % 3 == 0 else 0)
    return number * number


def fails(number):
    if number == 3:
        raise ValueError("three")
    if number == 5:
        raise UserError("five")
    return number


def dies(number):
    if number == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    return number


@pytest.mark.parametrize("workers", [0, 2])
def test_results_come_in_order(workers):
    assert list(ordered_map(slow_square, range(30), workers)) == [n * n for n in range(30)]


def test_items_are_taken_as_they_are_needed():
    """Memory stays bounded however long the input is."""
    taken = []

    def items() -> Iterator[int]:
        for number in range(1000):
            taken.append(number)
            yield number

    results = ordered_map(slow_square, items(), 2)
    assert next(results) == 0
    assert len(taken) < 50
    results.close()
    assert multiprocessing.active_children() == []


def test_the_callers_script_is_not_run_again(tmp_path):
    """Without `if __name__ == "__main__"` it would start processes without end."""
    script = tmp_path / "script.py"
    mapped = "print(list(ordered_map(len, ['ab', 'c'], 2)))"
    script.write_text(f"print('once')\nfrom whet.data.parallel import ordered_map\n{mapped}\n")
    found = subprocess.run([sys.executable, script], capture_output=True, text=True, check=True)
    assert found.stdout == "once\n[2, 1]\n"


def test_errors_come_out_and_processes_end():
    with pytest.raises(ValueError, match="three") as error:
        list(ordered_map(fails, range(5), 1))
    assert "in fails" in error.value.__notes__[0]
    with pytest.raises(UserError, match="five"):
        list(ordered_map(fails, [1, 5], 1))
    with pytest.raises(UserError, match="a worker process was killed"):
        list(ordered_map(dies, range(4), 1))
    assert multiprocessing.active_children() == []


def test_cores():
    assert usable_cores() >= 1


def test_what_cannot_be_pickled_is_told_as_such():
    with pytest.raises((AttributeError, TypeError, pickle.PicklingError), match="pickle"):
        ordered_map(lambda number: number, range(3), 1)
    assert multiprocessing.active_children() == []
