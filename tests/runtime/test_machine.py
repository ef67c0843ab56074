import subprocess
import sys

from sp3llm.runtime.machine import peak_memory

CHILD = "from sp3llm.runtime.machine import peak_memory; print(peak_memory())"
PARENT = f"""
import subprocess, sys
held = bytearray(b"1") * {2**29}
del held
done = subprocess.run([sys.executable, "-c", {CHILD!r}], capture_output=True, text=True, check=True)
from sp3llm.runtime.machine import peak_memory
print(peak_memory(), done.stdout)
"""


def test_the_peak_of_a_process_is_not_that_of_the_one_that_started_it():
    done = subprocess.run(
        [sys.executable, "-c", PARENT], capture_output=True, text=True, check=True
    )
    parent, child = map(int, done.stdout.split())
    assert parent > 2**29 > 2 * child


def test_the_peak_stays_when_the_memory_is_given_back():
    before = peak_memory()
    held = bytearray(b"1") * (before + 2**28)
    del held
    assert peak_memory() > before + 2**28
