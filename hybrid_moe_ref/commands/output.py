"""Print a command's answer, and generated tokens as soon as they are generated."""

import json
from typing import Any, Protocol

_NOTES = {"active": "without the embedding table"}


def show(answer: dict[str, Any], as_json: bool) -> None:
    """Print a command's answer: as JSON, or one line "name value" for each key, with large numbers made readable."""
    if as_json:
        print(json.dumps(answer, indent=2))
        return
    for name, value in answer.items():
        if isinstance(value, float):
            value = f"{value:.4g}"
        elif isinstance(value, int) and value >= 1_000_000:
            note = f", {_NOTES[name]}" if name in _NOTES else ""
            value = f"{value:,} ({value / 1e9:.2f} B{note})"
        print(f"{name:24} {value}")


class Printer(Protocol):
    """Prints each token when it arrives. `end` prints what is not printed yet, such as an incomplete character."""

    def show(self, token: int) -> None: ...
    def end(self) -> None: ...


class IdPrinter:
    """Prints token ids on one line."""

    def show(self, token: int) -> None:
        print(token, end=" ", flush=True)

    def end(self) -> None:
        print()


class TextPrinter:
    """Prints text.

    Some characters consist of several tokens, and an incomplete character decodes to U+FFFD. So text that ends with
    U+FFFD is held back until the next token completes the character, or the text ends.

    tokenizer: a `tokenizers.Tokenizer`
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._tokens: list[int] = []
        self._num_printed = 0

    def show(self, token: int) -> None:
        self._tokens.append(token)
        text = self._tokenizer.decode(self._tokens)
        if not text.endswith("\ufffd"):
            self._print(text)

    def end(self) -> None:
        self._print(self._tokenizer.decode(self._tokens))
        print()

    def _print(self, text: str) -> None:
        print(text[self._num_printed :], end="", flush=True)
        self._num_printed = len(text)
