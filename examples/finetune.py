"""``python -m secura_kernels finetune`` as a script, which ``make finetune`` runs.

Read ``secura_kernels/finetune/``: command.py prepares the texts and starts a process a method,
methods.py attaches, saves and loads each, train.py trains and measures.
"""

import sys

from secura_kernels.finetune.command import main

if __name__ == "__main__":
    sys.exit(main())
