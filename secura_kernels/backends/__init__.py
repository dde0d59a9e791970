"""What runs an op: ``reference`` (PyTorch), ``triton`` and ``cuda``, each with a module an op."""
