"""A plug-in that stops a vLLM server which would hang, and says why: HMR_GUARD=agree, or observe.

    plugin.py    the entry point; without HMR_GUARD it imports nothing else
    hooks.py     the table: which attribute of vLLM is replaced, by what
    worker.py    the hooks of a worker: the start vote, executions, collectives
    engine.py    the hooks of an EngineCore: executions that it counts and requests, questions
    frontend.py  the hook of a front end: the exit code of the server
    schedule/    guard.py: C1 with a digest, and entries that are held back; stream.py: what a rank issued and expects;
                 entry.py: a collective and its digest; post.py: what ranks tell each other, and the first difference
    meeting/     meeting.py: the keys in the store; vote.py: a vote of all ranks; settings.py: what each rank says in
                 the start vote; board.py: memory that an engine shares with its workers
    preparation/ prepare.py: what is built before the ranks communicate; builders.py: the registry of builders
    ending/      stop.py: how a process ends, and its exit code; peers.py: which processes have ended; lookout.py: the
                 thread that sees refusals and lost peers

docs/VLLM.md says what each mode does, and what is seen.
"""
