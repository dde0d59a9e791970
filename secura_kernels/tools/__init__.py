"""For whoever works on the kernels: a self-check, tuning, the machine code, what a pass costs."""
