"""What reading a source found: files, documents, and what was passed over, each with file and line."""

from __future__ import annotations

import dataclasses
from typing import Any

from elastic_jax.errors import UserError

SHOWN = 20


@dataclasses.dataclass
class Report:
    """Counts of one reading. `bad` holds the first of the damaged lines, as 'FILE:LINE what is wrong'."""

    limit: int = 0
    files: int = 0
    empty_files: int = 0
    recoded_files: int = 0
    documents: int = 0
    empty_documents: int = 0
    bad_lines: int = 0
    bad: list[str] = dataclasses.field(default_factory=list)

    def damaged(self, where: str, problem: str) -> None:
        """Counts one damaged line. Raises UserError when there are more than `limit`."""
        self.bad_lines += 1
        if len(self.bad) < SHOWN:
            self.bad.append(f'{where} {problem}')
        if self.bad_lines > self.limit:
            raise UserError(
                f'{where} {problem}; {self.bad_lines} damaged line(s) where data.max_bad_lines={self.limit}: '
                'mend them, or allow more'
            )

    def summary(self) -> str:
        """One line; empty when there is nothing to say."""
        parts = []
        if self.bad_lines:
            parts.append(f'{self.bad_lines} damaged line(s) passed over, the first: {self.bad[0]}')
        if self.empty_files:
            parts.append(f'{self.empty_files} empty file(s)')
        if self.empty_documents:
            parts.append(f'{self.empty_documents} empty document(s)')
        return '; '.join(parts)

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Report:
        return cls(**values)
