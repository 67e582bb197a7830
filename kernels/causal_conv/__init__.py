"""Short depthwise causal convolution with SiLU."""
