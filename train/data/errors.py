"""The one exception of this room."""

from __future__ import annotations

import re


class DataError(Exception):
    """What is wrong with the user's data, in one sentence that says how to mend it."""

    @property
    def sentence(self) -> str:
        """The sentence alone.

        A DataLoader re-raises a worker's exception as the same class with the whole traceback as its message; the
        sentence is what stands behind the traceback's last `DataError: `.
        """
        text = str(self)
        if not text.startswith("Caught DataError in "):
            return text
        return re.split(r"^(?:\w+\.)*DataError: ", text, flags=re.MULTILINE)[-1].strip()
