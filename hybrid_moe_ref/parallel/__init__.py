"""Run an unchanged model on many ranks.

The collectives of a step, by the names that the rest of the code uses:

    C1  agreement   all-reduce over the ranks that must act alike, int32[13, ranks]: the rows of each rank, the graph
                    mode that it could run, and hashes of its schedule and, under tensor parallelism, of its tokens
    C2  dispatch    all-gather-v over all ranks, before the experts of a layer (`dispatch`)
    C3  combine     reduce-scatter-v over all ranks, after the experts

Tensor parallelism adds an all-reduce for each mixer and MLP, see `tensor`.
"""
