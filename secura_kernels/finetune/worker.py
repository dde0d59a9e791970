"""The process of one job: `python worker.py '<the job as JSON>'`, started by command.py."""

import signal
import sys

if __name__ == "__main__":
    # Ctrl-C reaches the whole process group; command.py speaks for both, this one just ends.
    # Set before the slow imports, which would otherwise answer with a traceback.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    from secura_kernels.finetune.quiet import hush

    hush()
    from secura_kernels.finetune.settings import Job
    from secura_kernels.finetune.train import run

    run(Job.from_json(sys.argv[1]))
