"""python -m repro COMMAND: rebuild a hang, watch it, say who waits for whom, and pack that for others."""

from __future__ import annotations

import os
import signal
import sys

# Ctrl-C while the program is still being imported; commands that need more than to stop install their own.
signal.signal(signal.SIGINT, lambda *_: os._exit(130))

from repro.cli import main  # noqa: E402  # after the handler, which is for this import

sys.exit(main())
