"""An observer that keeps what a server reports: its phases, its steps, and the collectives of each step."""

from __future__ import annotations

from hybrid_moe_ref.parallel.observer import NullObserver

PHASES = ["load", "page_setup", "prepare", "profile", "compile", "allocate", "capture", "serve"]
SMALL = {
    "layer_pattern": "GA",
    "num_experts": 8,
    "num_experts_per_tok": 2,
}  # a model of two layers, for servers that need no more


class Diary(NullObserver):
    """Keeps the events that a server reports, in order."""

    def __init__(self):
        self.phases, self.steps, self.issued = [], [], []

    def phase(self, name):
        self.phases.append(name)

    def begin_step(self, step, schedule, num_live):
        self.steps.append((step, tuple(schedule), num_live))
        self.issued.append([])

    def enter(self, collective):
        if self.issued:
            self.issued[-1].append((collective.group, collective.op, collective.layer))
