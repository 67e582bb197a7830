"""Serve the real vLLM with the guard: equal outputs without a fault, and one sentence on all ranks with one.

    python tests/vllm/guard_faults.py --vllm VENV --out DIR [TRIAL…]

Prints a table: the exit code, the seconds from the end of the first worker to that of the last engine or worker, and
the sentence. Exit code 0 if every trial ended as expected.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

from server import HERE, environment

AGREE = {"HMR_GUARD": "agree"}
WAVES = ("5:8,5:12", "3:40,4:1", "9:2,6:20")
FAULTY = ("5:8,5:30",)
LIMIT_S = 2.0
"""How long after a worker was killed any engine or worker may live, on a machine with a load below QUIET_LOAD."""

QUIET_LOAD = 3.0


@dataclass(frozen=True)
class Trial:
    """One server.

    variables, ranks  environment variables of all ranks, and of each
    sentence  the refusal that both ranks must print, as a regular expression; "" if the outputs must be those without
    silent    ranks that print no refusal, because they have no guard
    lines     what must stand in the logs besides
    """

    variables: dict[str, str] = field(default_factory=dict)
    ranks: dict[str, dict[str, str]] = field(default_factory=dict)
    sentence: str = ""
    silent: tuple[int, ...] = ()
    lines: tuple[str, ...] = ()

    def task(self, out: Path) -> dict[str, object]:
        """What serve_many.py reads."""
        variables = {
            "HMR_GUARD_DIR": str(out / "evidence"), "TORCH_EXTENSIONS_DIR": str(out / "extensions"),
            **{name: text.replace("OUT", str(out)) for name, text in self.variables.items()},
        }  # fmt: skip
        waves = FAULTY if self.sentence else WAVES
        return {"out": str(out), "variables": variables, "ranks": self.ranks, "waves": waves, "deadline": 300}


TRIALS = {
    "off": Trial(),
    "agree": Trial(AGREE, lines=("agree: all 2 ranks are guarded", "prepare: all ranks are ready")),
    "observe": Trial({"HMR_GUARD": "observe"}, lines=("observe: all 2 ranks are guarded",)),
    "recorded": Trial({**AGREE, "HMR_RECORD": "OUT/record"}),
    "straggler": Trial({**AGREE, "HMR_FAULT": "straggler"}, lines=("HMR_FAULT: sleeps",)),
    "building": Trial(
        {**AGREE, "HMR_FAULT": "building", "HMR_GUARD_BUILDERS": "faults:build"},
        lines=("waits for the build lock of faults:build, held by rank", "prepare: faults:build is ready after"),
    ),
    "extra_collective": Trial(
        {**AGREE, "HMR_FAULT": "extra_collective"},
        sentence=r"rank 1 would issue dp all_reduce of the step agreement in model\.layers\.0\.linear_attn \(refused "
        r"before it was issued\); the agreed schedule has dp all_gather_v of model\.layers\.0\.mlp\.experts, which "
        r"rank 0 issued",
    ),
    "skipped_dummy": Trial(
        {**AGREE, "HMR_FAULT": "skipped_dummy"},
        sentence=r"rank 0 left out execution \d+: its engine counted \d+ executions and requested \d+ of its worker",
    ),
    "killed_worker": Trial(
        {**AGREE, "HMR_FAULT": "killed_worker"},
        sentence=r"rank 1 is gone: its worker \(pid \d+\) was ended by SIGKILL",
    ),
    "build_fails": Trial(
        {**AGREE, "HMR_GUARD_BUILDERS": "faults:build_on_rank_0"},
        sentence=r"rank 1 could not prepare: RuntimeError: nvcc fatal",
    ),
    "read_only": Trial(
        {**AGREE, "HMR_GUARD_BUILDERS": "faults:build", "TORCH_EXTENSIONS_DIR": "/proc/extensions"},
        sentence=r"rank \d could not prepare: \w+: .*/proc/extensions",
    ),
    "without_plug_in": Trial(
        ranks={"0": {**AGREE, "HMR_GUARD_DEADLINE": "5"}}, silent=(1,),
        sentence=r"rank 1 did not answer within 5 s: it may lack the plug-in",
    ),
    "another_setting": Trial(
        AGREE, {"1": {"VLLM_USE_DEEP_GEMM": "0"}},
        sentence=r"the ranks are configured differently: VLLM_USE_DEEP_GEMM is not set on rank 0, 0 on rank 1",
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Outcome:
    """What a trial left in its folder."""

    out: Path

    @property
    def code(self) -> int:
        return int(self._trial()["code"])  # type: ignore[call-overload]

    def _trial(self) -> dict[str, object]:
        path = self.out / "trial.json"
        return json.loads(path.read_text()) if path.exists() else {"code": -1, "lives": {}}

    def outputs(self) -> list[object]:
        paths = [self.out / f"outputs{rank}.json" for rank in (0, 1)]
        return [json.loads(path.read_text()) if path.exists() else None for path in paths]

    def log(self, rank: int) -> str:
        path = self.out / f"rank{rank}.log"
        return path.read_text(errors="replace") if path.exists() else ""

    def sentences(self, rank: int) -> set[str]:
        return set(re.findall(r"repro guard: refused: (.+)", self.log(rank)))

    def ends_s(self) -> float:
        """Seconds from the end of the first worker to that of the last engine or worker."""
        lives = self._trial()["lives"].values()  # type: ignore[attr-defined]
        workers = [last for name, _, last in lives if name.startswith("VLLM::Worker")]
        servers = [last for name, _, last in lives if name.startswith("VLLM::")]
        return max(servers) - min(workers) if workers else 0.0


def problems(trial: Trial, outcome: Outcome, plain: list[object]) -> list[str]:
    found = [f"no line {line!r}" for line in trial.lines if line not in outcome.log(0) + outcome.log(1)]
    if not trial.sentence:
        if outcome.code or outcome.outputs() != plain or None in plain:
            found.append("the outputs are not those without the guard")
        if outcome.sentences(0) | outcome.sentences(1):
            found.append("a false alarm")
        if not trial.variables and "repro guard" in outcome.log(0) + outcome.log(1):
            found.append("the guard is not off")
        return found
    for rank in {0, 1} - set(trial.silent):
        sentences = outcome.sentences(rank)
        if len(sentences) != 1 or not re.match(trial.sentence, next(iter(sentences))):
            found.append(f"rank {rank} says {sorted(sentences)}")
    quiet = os.getloadavg()[0] < QUIET_LOAD
    if trial.variables.get("HMR_FAULT") == "killed_worker" and quiet and outcome.ends_s() > LIMIT_S:
        found.append(f"all gone after {outcome.ends_s():.1f} s, more than {LIMIT_S:g} s")
    if not outcome.code:
        found.append("exit code 0")
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--vllm", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("trials", nargs="*", default=list(TRIALS))
    args = parser.parse_args()
    out, names = args.out.absolute(), list(dict.fromkeys(["off", *args.trials]))
    for name in names:
        (out / name).mkdir(parents=True)
    (out / "trials.json").write_text(json.dumps([TRIALS[name].task(out / name) for name in names]))
    command = [str(args.vllm.absolute() / "bin" / "python"), str(HERE / "serve_many.py"), str(out / "trials.json")]
    subprocess.run(command, env=environment(out / "entry_points"), stdout=sys.stderr)
    plain, bad = Outcome(out / "off").outputs(), 0
    print("| trial | exit code | all gone after | sentence |\n|---|---|---|---|")
    for name in names:
        outcome = Outcome(out / name)
        wrong = problems(TRIALS[name], outcome, plain)
        bad += bool(wrong)
        said = "; ".join(sorted(outcome.sentences(0) | outcome.sentences(1))) or "-"
        print(f"| {name} | {outcome.code} | {outcome.ends_s():.1f} s | {'; '.join(wrong) or said} |", flush=True)
    print(f"load {os.getloadavg()[0]:.1f} on {os.cpu_count()} processors")
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main())
