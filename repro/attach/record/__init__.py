"""Record a torch.distributed program without changing it.

A hook is code that replaces a function of torch or of another library: it records the call, and calls the function.

``python -m repro record -- PROGRAM…`` starts the program with HMR_RECORD=DIR and with ``site/`` on PYTHONPATH. Python
then runs ``site/sitecustomize.py`` in every interpreter of the program, also in spawned children and under torchrun:

    site/sitecustomize.py   if HMR_RECORD is set, calls start.begin(); else imports nothing of this repository
    start.py                the table: which function installs the hooks of a module when the program imports the module
    imports.py              calls a function right after a module has been imported
    rank.py                 this process as a rank: its witness file, its background thread, and how it ends
    children.py             how a child process of multiprocessing ends
    attendant.py            the background thread: writes stacks and dumps when the watcher requests them
    collectives.py          hooks of torch's process groups: the collectives that the program calls in Python
    methods.py                  the table of the methods that are hooked, and how to read their arguments
    compiled/                   the same hooks in C, with the writer of the witness; used if they could be compiled
    functional.py           hooks of functional collectives (DTensor, torch.compile), which torch calls in C++
    ddp.py                  hooks of DistributedDataParallel, whose collectives torch also calls in C++
    groups.py               names and members of groups; hooks of the functions that create groups
    locks.py, builds.py     waits for lock files, and builds (of extensions, of kernels)
    modules.py              the torch.nn.Module, FSDP group or pipeline stage that a collective belongs to

The hooks never change a result of the program, and raise no exception into it. They install no signal handler. They do
not replace functions of torch.distributed that issue collectives, because torch.compile would not recognise the
replacements.
"""
