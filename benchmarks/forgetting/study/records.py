"""The runs' records of one study: a JSON file that is whole after every run."""

import json
import os
from pathlib import Path

from secura_kernels.checks import fail


class Records:
    """Records by a run's key, in ``path``; a study that was stopped goes on from there.

    Attributes:
        by_key: {key: record}, in the order they were made, those of earlier calls included.
    """

    def __init__(self, path: Path, study: dict, about: dict):
        """
        Args:
            study: JSON values that all records share: data, sizes. about: what else the file says.

        Raises ValueError where ``path`` holds another study, and leaves it as it is.
        """
        self.path, self.head = path, dict(study=study) | about
        self.by_key: dict[str, dict] = {}
        if path.exists():
            content = json.loads(path.read_text())
            if content["study"] != study:
                raise fail(
                    "path",
                    str(path),
                    f"the file of a study of {study}: it is one of {content['study']}",
                )
            self.by_key = content["records"]

    def add(self, key: str, record: dict) -> None:
        self.by_key[key] = record
        self.path.parent.mkdir(parents=True, exist_ok=True)
        lines = ",\n".join(f"  {json.dumps(k)}: {json.dumps(r)}" for k, r in self.by_key.items())
        head = json.dumps(self.head, indent=1).removesuffix("\n}")
        unfinished = self.path.with_suffix(".tmp")
        unfinished.write_text(f'{head},\n "records": {{\n{lines}\n }}\n}}\n')
        os.replace(unfinished, self.path)
