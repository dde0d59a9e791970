"""The Triton kernels, one file a pass, and the functions that several of them share."""
