"""The program ``python -m repro COMMAND``, also installed as ``hmr``. README.md lists its commands."""

from __future__ import annotations

import os
import signal
import sys


def main() -> int:
    """Run the command that the command line names; return the exit code."""
    # During the imports below, Ctrl-C ends the process at once. The command line then installs its own handler.
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))

    from repro.commands.shared.output import guarded, open_standard_files

    open_standard_files()  # must come before any other file is opened

    from repro.commands import cli
    from repro.exit_codes import CANNOT_TELL

    return guarded(cli.main, CANNOT_TELL)


if __name__ == "__main__":
    sys.exit(main())
