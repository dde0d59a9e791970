"""What a run of the forgetting benchmark is made of: models, tasks, measures, and the protocol.

Models and texts are taken from PyPI packages the way ``python -m secura_kernels finetune`` takes
its own, by ``secura_kernels/finetune/downloads.py``.
"""
