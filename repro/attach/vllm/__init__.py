"""Plug-ins for vLLM: a recorder, and expert parallelism on CPUs.

    plugin.py   the entry point of the recorder; without HMR_RECORD it imports nothing else
    hooks.py    the table: which attribute of vLLM is replaced, in which versions, by what
    worker.py   the hooks of a worker, which is a rank; they record phases, steps and layers
    engine.py   the hooks of an EngineCore, which writes what it does into a notes file
    front.py    the hooks of a front end, which starts an engine and waits for its outputs
    notes.py    the notes file of an engine or a front end, which the worker of the same rank reads
    harmless.py a ``with`` block that catches exceptions of the recorder, so that they do not reach the server
    habits.py   the schedule that a rank declares: the collectives that its earlier executions of the model issued
    exchange.py the hook of dispatch and combine
    mirror.py   the worker's record of its engine: the engine's questions to the other engines, and the executions of
                the model that the engine counted but did not request
    qualified.py  corrects a verdict by what the engines were doing
    repeated.py learns an execution's collectives from those of earlier executions
    places.py   finds and replaces functions of vLLM by their names
    cpu_ep.py   the entry point of expert parallelism on a CPU
    guard/      the plug-in that stops a server which would hang
    cells/      the experiment that starts vLLM in many configurations

A rank of vLLM is several processes, and a cycle of waits can run through all of them. The rank has one witness, which
its worker writes: it shows where the worker waits, and while the worker is idle, where its engine and its front end
wait.
"""
