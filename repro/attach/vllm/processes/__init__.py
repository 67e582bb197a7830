"""The processes that a rank of vLLM has besides its worker: the engine and the front end.

The front end receives requests and sends them to the engine. The engine (EngineCore) schedules the requests, and
requests executions of the model from the worker. The worker writes the rank's witness, also about the other two:

    engine.py  the hooks of an engine, which write what the engine does into its notes file
    front.py   the hooks of a front end, which write what the front end does into its notes file
    notes.py   the notes file of an engine or a front end: eight numbers, which the worker of the same rank reads
    mirror.py  records in the worker's witness what the notes files show, for example that the engine waits for an
               answer of the other engines, or that the engine counted a step without requesting an execution of the
               model

The hooks of the worker are in `repro/attach/vllm/worker.py`.
"""
