"""Build, before the ranks communicate, the kernels that the first execution of the model would build."""
