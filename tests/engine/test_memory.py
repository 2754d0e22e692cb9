import platform
import subprocess
import sys

import pytest

# In a process of its own: the setting cannot be taken back.
PROGRAM = """
import resource
import statistics
import torch
from ssod_imwa.engine.memory import keep_freed_memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(2**24)  # 64 MB, which glibc by itself always takes from the system
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

torch.set_num_threads(1)
if {keep}:
    assert keep_freed_memory()
print(statistics.median_low(faults() for _ in range(25)))
"""


def faults(*, keep):
    program = [sys.executable, "-c", PROGRAM.format(keep=keep)]
    return int(subprocess.run(program, check=True, capture_output=True, text=True).stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc")
def test_freed_memory_is_taken_again_without_page_faults():
    without = faults(keep=False)
    assert without > 0
    assert faults(keep=True) < without / 10
