"""Test your own expert-parallel backend for hangs; see docs/TESTING.md. The code is in `repro.attach`."""

from repro.attach.harness import DeadlockError, Rank, Ranks, assert_no_deadlock

__all__ = ["DeadlockError", "Rank", "Ranks", "assert_no_deadlock"]
