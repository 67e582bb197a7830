"""Valid values of HMR_KERNELS and HMR_NATIVE_ISA, also for programs that never import torch."""

CHOICES = ("auto", "torch", "native", "triton", "fla", "mamba_ssm")
"""Values of HMR_KERNELS, and of the argument of `registry.use`."""

INSTRUCTION_SETS = ("generic", "avx2", "avx512bf16", "amx")
"""Values of HMR_NATIVE_ISA, slowest first. Every processor supports the first one."""
