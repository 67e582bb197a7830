#!/bin/sh
# The experiment that decides vllm#41862, on one host with 8 GPUs:
#
#   pip install . py-spy                 # into the environment of vLLM 0.20 or newer
#   examples/vllm_8gpu.sh                # all cells: hours, most of them for loading the weights; Ctrl-C keeps the table
#   examples/vllm_8gpu.sh --to DIR       # go on in the folder of an earlier call
#   examples/vllm_8gpu.sh --list         # the cells, their flags, and what cannot start here
#
# {cold, warm kernel cache} x {GDN jit, triton} x {MoE jit, triton} x {TP8, DP8+EP8}. Each start is recorded, looked at
# from outside after 120 s in which no rank recorded an event, and ended. The flags are those of the report. PYTHON names
# the Python of vLLM's environment. What it writes: docs/ROOT-CAUSE.md, "The experiment that decides".
#
# The flags were read in the wheels of vLLM 0.20.0, 0.32.0 and 0.33.0. On a CPU the experiment was run with vLLM 0.32; on
# GPUs it has not been run by this project.
exec "${PYTHON:-python3}" -m repro cells "$@"
