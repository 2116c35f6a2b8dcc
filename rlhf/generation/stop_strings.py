"""Strings that end a response, found in the text of its last tokens, so that a long one is not decoded again."""

from __future__ import annotations

from collections.abc import Callable, Sequence

Decode = Callable[[list[int]], str]
"""Converts token ids to text, special tokens included."""


class StopStrings:
    """Finds the first token at which a response contains one of some strings."""

    def __init__(self, stops: Sequence[str], decode: Decode) -> None:
        """Take the strings and the tokenizer's `decode`."""
        self.stops, self.decode = tuple(stops), decode
        # A character takes at most 4 byte tokens. One character more, because some tokenizers drop a leading space.
        self.tail = 4 * (max(map(len, self.stops)) + 1)

    def find(self, ids: Sequence[int], checked: int = 0) -> int | None:
        """Return the number of tokens up to the first stop string, it included; None if there is none.

        Args:
            ids: tokens of a response.
            checked: its first tokens that are known to contain no stop string.
        """
        start = max(0, checked - self.tail)
        if not self._in(ids[start:]):
            return None
        ends = range(checked + 1, len(ids) + 1)
        return next((end for end in ends if self._in(ids[max(0, end - 1 - self.tail) : end])), None)

    def _in(self, ids: Sequence[int]) -> bool:
        text = self.decode(list(ids))
        return any(stop in text for stop in self.stops)
