"""Split a model over the ranks: decide which part each rank holds, and what its layers then communicate.

layout         how the model is split over the ranks of a ParallelConfig
shares         the sizes of one tensor-parallel rank's part of the model, and its part of each parameter
tensor         tensor parallelism, applied to an unchanged model
expert         expert parallelism, applied to an unchanged model
dispatch       the EP backend of a layer: dispatch (C2) and combine (C3)
"""
