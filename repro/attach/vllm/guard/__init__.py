"""A plug-in that stops a vLLM server which would hang, and says why: HMR_GUARD=agree, or observe.

    plugin.py    the entry point; without HMR_GUARD it imports nothing else
    hooks.py     the table: which attribute of vLLM is replaced, by what
    worker.py    the hooks of a worker: the start vote, executions, collectives
    engine.py    the hooks of an EngineCore: executions that it counts and requests, questions
    frontend.py  the hook of a front end: the exit code of the server
    guard.py     the guard of a worker: C1 with a digest, and entries that are held back
    stream.py    what a rank issued, and the schedule that it expects next
    entry.py     one collective, and the 64-bit digests of sequences of them
    post.py      what a rank tells the others, and the first difference between ranks
    vote.py      a vote of all ranks through the store
    settings.py  what each rank says in the start vote
    prepare.py   what is built before the ranks communicate; builders.py is the registry of builders
    meeting.py   the keys in the store
    board.py     memory that an engine shares with its workers
    peers.py     which processes of the server have ended
    lookout.py   the thread that sees refusals and lost peers, and ends a blocked process
    stop.py      how a process ends, and with which exit code

docs/VLLM.md says what each mode does, and what is seen.
"""
