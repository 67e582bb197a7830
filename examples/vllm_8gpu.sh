#!/bin/sh
# The experiment that decides vllm#41862, on one host with 8 GPUs:
#
#   pip install . py-spy                 # into the environment of vLLM 0.20 or newer
#   examples/vllm_8gpu.sh                # all cells: hours, most of them for loading the weights; Ctrl-C keeps the table
#   examples/vllm_8gpu.sh --to DIR       # go on in the folder of an earlier call
#   examples/vllm_8gpu.sh --list         # the cells, their flags, and what cannot start here
#
# The cells are {cold, warm kernel cache} x {GDN jit, triton} x {MoE jit, triton} x {TP8, DP8+EP8}, with the other flags of
# the report. Each start is recorded. After 120 s in which no rank recorded an event, `collect` looks at it from outside. At
# the end its processes are ended. The variable PYTHON names the Python of vLLM's environment. docs/ROOT-CAUSE.md, "The
# experiment that decides", says what the script writes.
#
# The flags exist in the wheels of vLLM 0.20.0, 0.32.0 and 0.33.0. The experiment was run on a CPU with vLLM 0.32. It has not
# been run on GPUs yet.
exec "${PYTHON:-python3}" -m repro cells "$@"
