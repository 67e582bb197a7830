"""Run an unchanged model on many ranks. A step issues these collectives, in order:

    what                       group   op                sizes                        dtype      where
    C1  step agreement         dp (1)  all_reduce, sum   13 x ranks or 16 x ranks (2)  int32      step/protocol.py
    in each layer:
        output of mixer (3)    tp      all_reduce, sum   rows x hidden                 model's    tensor.py
    C2  dispatch               ep      all_gather_v      rows of each rank (4)         bytes (5)  dispatch.py
    C3  combine                ep      reduce_scatter_v  rows of each rank (4)         model's    dispatch.py
        output of MoE (3)      tp      all_gather_v      rows of each tp rank          bytes      tensor.py
    "is anyone unfinished?"    dp (1)  all_reduce, max   1 number (6)                  int32      step/protocol.py

(1) The group is "world" (all ranks) if tp_size > 1 and the ranks compare their schedules (`checks` is not "observe").
(2) There are 13 numbers for each rank if `engine.protocol` is "0.20", and 16 if it is "0.33".
(3) This collective exists only if tp_size > 1.
(4) The sizes can be uneven, and 0 for some ranks.
(5) One row is [hidden, topk_weights, topk_ids] of a token, packed into bytes.
(6) The ranks ask this only after some of the steps. If `engine.protocol` is "0.33", the op is a sum of 2 numbers.

C1 comes first because it decides the sizes of C2 and C3. A rank without requests takes part in the step with a dummy
batch. If the MTP layer drafts tokens, it runs after these layers, with its own collectives.

If tp_size > 1, and dp_size is 1 or `expert_parallel` is false, the MoE of a layer has one all_reduce over tp instead of
C2, C3 and the all_gather_v. The Observer gets the name of the operation in this table, even if the backend runs another
operation instead (see `comm`).
"""
