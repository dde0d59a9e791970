"""The process of one job: `python worker.py '<the job as JSON>'`, started by finetune.py."""

import signal
import sys

if __name__ == "__main__":
    # Ctrl-C reaches the whole process group; finetune.py speaks for both, this one just ends.
    # Set before the slow imports, which would otherwise answer with a traceback.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    from quiet import hush

    hush()
    from settings import Job
    from train import run

    run(Job.from_json(sys.argv[1]))
