"""Plug-ins for vLLM: a recorder, a guard, and expert parallelism on CPUs.

    plugin.py   the entry point of the recorder; if HMR_RECORD is not set, it imports nothing else
    hooks.py    the table: which attribute of vLLM is replaced, in which versions, by what
    worker.py   the hooks of a worker, which is a rank; they record phases, steps and layers
    harmless.py a ``with`` block that catches exceptions of the recorder, so that they do not reach the server
    habits.py   declares the schedule of an execution of the model: what `repeated.py` learned from earlier executions
    progress.py the phase, step and learned schedules of a worker; the hooks that are compiled from C read them, too
    exchange.py the hook of dispatch and combine
    dynamo.py   whether torch.compile traces a hook, which then does nothing
    qualified.py  corrects a verdict by what the engines were doing
    repeated.py learns which collectives follow each kind of step agreement; the recorder and the guard use it
    places.py   finds and replaces functions of vLLM by their names
    cpu_ep.py   the entry point of expert parallelism on a CPU
    processes/  the other processes of a rank, engine and front end: their hooks, and the worker's record of them
    guard/      the plug-in that stops a server which would hang
    cells/      the experiment that starts vLLM in many configurations

A rank of vLLM is several processes: a front end receives the requests, an engine schedules them, and a worker runs the
model. A cycle of waits can run through all of them. The rank has one witness, which its worker writes. The witness
shows where the worker waits. While the worker is idle, the witness shows where the engine and the front end of the rank
wait.
"""
