"""A file of JSON lines that grows as results come, so that a run that was cut off goes on where it stopped."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any


class JsonLog:
    """Records in a file, one JSON object a line, under the conditions in its first line.

    A last line that was torn is dropped. Use it as a context manager: the file is open for appending in between.

    Attributes:
        records: all that is in the file, in order.
    """

    def __init__(self, path: Path, conditions: Mapping[str, Any]) -> None:
        """Open a log, new or begun before.

        Args:
            path: the file; its directory is made if need be.
            conditions: what the records depend on.

        Raises:
            ValueError: the file was written under other conditions, or is no such file.
        """
        self._path = path
        self.records: list[dict[str, Any]] = []
        first = {"conditions": json.loads(json.dumps(conditions))}
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = list(self._whole_lines()) if path.exists() else []
        if not lines:
            path.write_text(json.dumps(first) + "\n", encoding="utf-8")
        elif lines[0] != first:
            there = lines[0].get("conditions")
            known = there if isinstance(there, dict) else {}
            wanted = first["conditions"]
            changed = [key for key in {**known, **wanted} if known.get(key) != wanted.get(key)]
            raise ValueError(
                f"{path}: expected results of the same {', '.join(changed) or 'kind'}, got others; "
                "move the file away to draw them again, or choose another directory"
            )
        self.records.extend(lines[1:])

    def _whole_lines(self) -> Iterator[dict[str, Any]]:
        data = self._path.read_bytes()
        whole = data[: data.rfind(b"\n") + 1]
        if len(whole) < len(data):
            self._path.write_bytes(whole)
        for number, line in enumerate(whole.decode("utf-8").split("\n")[:-1], 1):
            try:
                entry = json.loads(line)
            except ValueError:
                entry = None
            if not isinstance(entry, dict):
                raise ValueError(f"{self._path}: line {number}: expected a JSON object, got {line[:60]!r}")
            yield entry

    def __enter__(self) -> JsonLog:
        self._file = self._path.open("a", encoding="utf-8")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def append(self, record: Mapping[str, Any]) -> None:
        """Add a record; it is in the file when this returns."""
        self._file.write(json.dumps(record, ensure_ascii=False) + "\n")
        self._file.flush()
        self.records.append(dict(record))
