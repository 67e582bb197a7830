"""Count the GPUs of this machine."""

from __future__ import annotations

import subprocess
import sys


def count_gpus() -> int:
    """Return the number of CUDA devices; 0 if torch is not installed.

    A child process counts them, because a process that has used CUDA cannot fork ranks any more, and because this
    process should not have to import torch.
    """
    ask = "import torch; print(torch.cuda.device_count())"
    answer = subprocess.run([sys.executable, "-c", ask], capture_output=True, text=True)
    words = answer.stdout.split()
    return int(words[-1]) if answer.returncode == 0 and words else 0
