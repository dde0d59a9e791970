"""What runs an op: ``reference`` (PyTorch), and ``schedule`` over the ``passes`` of ``triton`` and
``cuda``."""
