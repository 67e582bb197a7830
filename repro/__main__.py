"""python -m repro COMMAND: rebuild a hang, watch it, say who waits for whom, and pack that for others."""

from __future__ import annotations

import os
import signal
import sys

# Ctrl-C while the program is still being imported; `main` installs a handler that lets commands clean up.
signal.signal(signal.SIGINT, lambda *_: os._exit(130))

from repro.commands.output import guarded, open_standard_files  # noqa: E402  # after the handler, which is for this import

open_standard_files()  # before any other file is opened

from repro.commands import CANNOT_TELL  # noqa: E402
from repro.commands.cli import main  # noqa: E402

sys.exit(guarded(main, CANNOT_TELL))
