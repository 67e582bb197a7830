"""Valid values of the variables HMR_KERNELS and HMR_NATIVE_ISA. Programs can import this file without torch."""

CHOICES = ("auto", "torch", "native", "triton", "fla", "mamba_ssm")
"""Values of HMR_KERNELS, and of the argument of `registry.use`."""

INSTRUCTION_SETS = ("generic", "avx2", "avx512bf16", "amx")
"""Values of HMR_NATIVE_ISA, slowest first. Every processor supports the first one."""
