"""Count the GPUs of this machine."""

from __future__ import annotations

import subprocess
import sys


def count_gpus() -> int:
    """Return the number of CUDA devices; 0 if torch is not installed or cannot count them.

    A child process counts the devices, so that this process need not import torch, and does not use CUDA: a process
    that has used CUDA cannot fork ranks.
    """
    # an interpreter that has imported torch takes half a second to end, so this one does not tear down its modules
    ask = "import os, torch; print(torch.cuda.device_count(), flush=True); os._exit(0)"
    answer = subprocess.run([sys.executable, "-c", ask], capture_output=True, text=True)
    words = answer.stdout.split()
    return int(words[-1]) if answer.returncode == 0 and words else 0
