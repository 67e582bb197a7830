"""Plug-ins for vLLM: a recorder, and expert parallelism on CPUs.

    plugin.py   the entry point of the recorder; without HMR_RECORD it imports nothing else
    hooks.py    the table: which attribute of vLLM is replaced, in which versions, by what
    worker.py   the hooks of a worker, which is a rank: phases, steps, dispatch and combine, layers
    engine.py   the hooks of an EngineCore, which writes what it does into a notes file
    front.py    the hooks of a front end, which starts an engine and waits for its outputs
    notes.py    the notes file of an engine or a front end, which the worker of the same rank reads
    harmless.py what keeps a failure of the recorder away from the server
    habits.py   the schedule that a rank declares: what its earlier executions issued
    mirror.py   the worker's record of what its engine does: questions, and executions that were left out
    qualified.py  what the engines add to a verdict
    cpu_ep.py   the entry point of expert parallelism on a CPU

A rank of vLLM is several processes, and a cycle of waits can run through all of them. The rank has one witness, which
its worker writes: it shows where the worker waits, and while the worker is idle, where its engine and its front end
wait.
"""
