"""Test an expert-parallel backend of your own for hangs; see docs/TESTING.md. The room is `repro.attach`."""

from repro.attach.harness import DeadlockError, Rank, Ranks, assert_no_deadlock

__all__ = ["DeadlockError", "Rank", "Ranks", "assert_no_deadlock"]
