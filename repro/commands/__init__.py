"""The public commands, one file each: flags in, exit code out (`repro.exit_codes`).

A command's file has two functions: ``add_arguments(parser)`` and ``run(args)``, which returns the exit code. `cli.py`
lists the commands, and imports only the file of the command that is called. If ``--help`` does not need an import that
takes time, put the import inside ``run``.
"""
