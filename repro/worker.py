"""The program of one rank of a lab run: `torchrun … -m repro.worker SCENARIO --variant V`.

The program is `repro.lab.rank.worker`.
"""

from __future__ import annotations

import sys

from repro.hosts.parent import die_with_parent, end_without_launcher

if __name__ == "__main__":
    die_with_parent()  # before the imports, which take seconds on a busy machine
    end_without_launcher()

    from repro.lab.rank.worker import main

    sys.exit(main())
