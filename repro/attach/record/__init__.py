"""Record a torch.distributed program without changing it.

``python -m repro record -- PROGRAM…`` starts the program with HMR_RECORD=DIR and with ``site/`` on PYTHONPATH. Python
then runs ``site/sitecustomize.py`` in every interpreter of the program, also in spawned children and under torchrun:

    site/sitecustomize.py   with HMR_RECORD set, calls start.begin(); without it, imports nothing of ours
    start.py                which module of the program gets which hooks, as soon as the program imports it
    imports.py              calls a function right after a module has been imported
    rank.py                 the rank that this process is: its witness file, thread and end
    collectives.py          torch's process groups: what the program calls in Python
    methods.py                  the table of those calls
    compiled/                   the same hooks and the writer of the witness in C, where they could be built
    functional.py           what torch calls in C++: functional collectives, the reducer of DDP
    groups.py               creation of groups, which all ranks take part in
    locks.py, builds.py     waits and work of one rank
    modules.py              the module that a collective belongs to; FSDP and pipeline stages

The hooks never change a result and never raise into the program. They own no signal, and replace no function of
torch.distributed that torch.compile knows.
"""
