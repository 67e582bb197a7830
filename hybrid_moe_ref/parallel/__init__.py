"""Run an unchanged model on many ranks. A step issues these collectives, in order:

    what                    group   op                sizes                             dtype      where
    C1  step agreement      dp (1)  all_reduce, sum   13 or 16 numbers for each rank    int32      step/protocol.py
    for each layer:
        mixer, if tp > 1    tp      all_reduce, sum   rows x hidden                     model's    tensor.py
    C2  dispatch            ep      all_gather_v      rows of each rank; uneven, or 0   bytes (2)  dispatch.py
    C3  combine             ep      reduce_scatter_v  as C2                             model's    dispatch.py
        rows, if tp > 1     tp      all_gather_v      rows of each tp rank              bytes      tensor.py
    question, if it asks    dp (1)  all_reduce, max   1 number (0.33: sum of 2)         int32      step/protocol.py

(1) "world", all ranks, if tp_size > 1 and the schedules are compared (checks is not "observe")
(2) one row is [hidden, topk_weights, topk_ids] of a token, packed

C1 comes first because the sizes of C2 and C3 are its result. A rank without requests takes part with a dummy batch. The
drafter's passes follow the layers and have their own C2 and C3. Without expert parallelism over dp ranks, the MoE of a
layer has one all_reduce over tp instead of C2 and C3. The Observer gets the operation that the table names, even if
the backend uses another operation for it, see `comm`.
"""
