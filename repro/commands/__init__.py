"""The public commands, one file each: flags in, exit code out (`repro.exit_codes`).

A command's file has two functions: ``add_arguments(parser)`` and ``run(args)``, which returns the exit code. `cli.py`
lists the commands, and imports only the file of the command that the user calls. `shared/` has what several commands
need. If an import takes time and ``--help`` does not need it, put the import inside ``run``.
"""
