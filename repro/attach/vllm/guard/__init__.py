"""A plug-in that stops a vLLM server which would hang, and says why. With HMR_GUARD=observe it only says why.

A worker of vLLM is a rank. An engine (EngineCore) is the process that schedules requests for one or more workers. At
each step, before the workers issue the step's collectives, they compare what they have issued so far and what they
expect to issue. A thread in each worker and engine sees which processes have ended.

    plugin.py    the entry point; if HMR_GUARD is not set, it imports nothing else
    hooks.py     the table: which attribute of vLLM is replaced, by what
    worker.py    the hooks of a worker: the start vote (have all ranks the same settings?), executions of the model,
                 collectives
    engine.py    the hooks of an engine: the executions that it requests and counts, its questions to other engines
    frontend.py  the hook of a front end (the process that started the engine): the exit code of the server
    schedule/    guard.py: compares the ranks at each step (C1); stream.py: what a rank has issued and expects next;
                 entry.py: one collective and its digest; post.py: the state of a rank, and how two states differ
    meeting/     meeting.py: the keys in torch's store; vote.py: a vote of all ranks; settings.py: what each rank says
                 in the start vote; board.py: memory that an engine shares with its workers
    preparation/ prepare.py: builds kernels before the ranks communicate; builders.py: the table of what is built
    ending/      stop.py: how a process ends, and its exit code; peers.py: which processes have ended; guard_thread.py:
                 the thread that ends a process if the main thread does not

docs/VLLM.md says what each mode does, and which differences the guard finds.
"""
