"""The public commands, one file each: flags in, exit code out (`repro.exit_codes`).

A command's file has two functions: ``add_arguments(parser)`` and ``run(args)``, which returns the exit code. `cli.py`
lists the commands, and imports only the one that is called. So keep imports that take time inside ``run`` where
``--help`` does without them.
"""
