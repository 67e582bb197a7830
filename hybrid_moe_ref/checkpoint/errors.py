"""The error for a checkpoint that cannot be used."""

from collections.abc import Sequence

from hybrid_moe_ref.config import InputError


class CheckpointError(InputError):
    """A checkpoint that cannot be loaded or saved. The text lists all problems, one per line."""

    def __init__(self, problems: str | Sequence[str]) -> None:
        self.problems = [problems] if isinstance(problems, str) else list(problems)
        count = f"{len(self.problems)} problems:\n" if len(self.problems) > 1 else ""
        super().__init__(count + "\n".join(self.problems))
