"""Journal: predictions of a task's examples, each on disk as soon as it is made, so that no kill costs more than one."""

from __future__ import annotations

from pathlib import Path

from hf_pqcache.eval.session.results import append_line, read_lines


class Journal:
    """index of an example -> its prediction, in one folder for all processes of a run; each writes its own file there.

    Args:
        folder: None keeps predictions in memory only.
        rank, processes: this process, and how many share the folder. A later run may have another number of them: all
            files of the folder are read.
        fresh: forget what the folder holds.
    """

    def __init__(self, folder: Path | None, rank: int = 0, processes: int = 1, fresh: bool = False) -> None:
        self.path = None if folder is None else folder / f"{rank}.jsonl"
        self.predictions: dict[int, str] = {}
        self._valid_bytes = 0
        if folder is None or self.path is None:
            return
        for path in sorted(folder.glob("*.jsonl")):
            if fresh:
                if int(path.stem) % processes == rank:
                    path.unlink()
                continue
            for values, end in read_lines(path):
                self.predictions[int(values["index"])] = str(values["prediction"])
                self._valid_bytes = end if path == self.path else self._valid_bytes

    def add(self, index: int, prediction: str) -> None:
        """Keep a prediction; on disk when this returns."""
        if self.path is not None:
            self._valid_bytes = append_line(self.path, {"index": index, "prediction": prediction}, self._valid_bytes)
        self.predictions[index] = prediction
