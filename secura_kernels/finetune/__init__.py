"""``python -m secura_kernels finetune``: one model and one text, by several methods, compared.

It needs the packages of the extra ``demo``. ``import secura_kernels`` reads nothing of it.
"""
