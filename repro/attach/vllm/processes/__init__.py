"""The engine and the front end of a rank: what they do, and the worker's record of both.

    engine.py  the hooks of an EngineCore, which writes what it does into a notes file
    front.py   the hooks of a front end, which starts an engine and waits for its outputs
    notes.py   the notes file of an engine or a front end, which the worker of the same rank reads
    mirror.py  the worker's record of its engine: the engine's questions to the other engines, and the executions of
               the model that the engine counted but did not request

The hooks of the worker are in `repro/attach/vllm/worker.py`.
"""
