"""Read every sentence of a verdict's evidence, and compare it with the truth: the witnesses, or a simulation.

``check_sentences(verdict, world)`` fails for a sentence that is not true in the world, and for a sentence without a
rule.
"""

from __future__ import annotations

import re
from collections.abc import Callable

from worlds import Words, World

from repro.verdict import Verdict
from repro.verdict.result import Wait


def ranks_in(text: str) -> list[int]:
    """ "0-2,5" -> [0, 1, 2, 5]."""
    ranks: list[int] = []
    for part in text.split(","):
        first, _, last = part.partition("-")
        ranks += range(int(first), int(last or first) + 1)
    return ranks


R, S = r"ranks? (?P<r>[\d,-]+)", r"ranks? (?P<s>[\d,-]+)"
X = r"(?P<g>\S+)(?: (?P<op>\S+))? #(?P<n>\d+)"
Y = r"\S+(?: \S+)? #\d+"
LINE = r"( \(\S*rank\d+\.wit:\d+ event \d+\))?"
E = r"(?P<e>\S+ \S+(?: of \S+)?)"
RULES: list[tuple[re.Pattern[str], Callable[..., bool]]] = []


def rule(pattern: str) -> Callable[[Callable[..., bool]], Callable[..., bool]]:
    """Register a function that checks sentences of this form.

    It gets the world, the verdict, the ranks r and s, and the match.
    """

    def add(function: Callable[..., bool]) -> Callable[..., bool]:
        RULES.append((re.compile(pattern, re.DOTALL), function))
        return function

    return add


def check_sentences(verdict: Verdict, world: World) -> None:
    """Fail if a sentence of the evidence, or a node or reason of the wait-for graph, is not true."""
    for wait in verdict.waits:
        for reason in wait.why.split("; "):
            assert _is_reason(reason, wait, world), f"not so: {reason!r} of {wait} in {verdict}"
    for text in verdict.evidence:
        for pattern, is_so in RULES:
            if match := pattern.fullmatch(text):
                named = match.groupdict()
                r = ranks_in(named["r"]) if named.get("r") else []
                s = ranks_in(named["s"]) if named.get("s") else []
                assert is_so(world, verdict, r, s, match), f"not so: {text!r} in {verdict}"
                if named.get("op") and pattern.pattern.startswith(R):
                    issued = {world.call(rank, *_at(match)) or named["op"] for rank in r}
                    assert {call.split()[0] for call in issued} == {named["op"]}, f"not so: {text!r} in {verdict}"
                break
        else:
            raise AssertionError(f"no rule of tests/support/simulation/sentences.py reads: {text!r}")


def _is_reason(reason: str, wait: Wait, world: World) -> bool:
    """Whether the ranks of a node wait there for this reason."""
    match = re.fullmatch(rf"({R} )?(?P<rest>.*)", reason)
    ranks = ranks_in(match["r"]) if match["r"] else []
    rest = re.sub(r"\b(has|holds)\b", lambda verb: PLURAL[verb[0]], match["rest"])
    if wait.waits_in.startswith("lock "):
        name = wait.waits_in.removeprefix("lock ")
        waits = all(world.awaits_lock(rank, name) for rank in wait.ranks)
        return waits and ("hold it" not in rest or all(world.holds(rank, name) for rank in ranks))
    group, seq = _at(re.fullmatch(X, wait.waits_in))
    issued = [world.has_issued(rank, group, seq) for rank in ranks]
    members = [world.has_issued(rank, group, seq) for rank in world.members(wait.ranks[0], group)]
    so = {
        "have not issued it": not any(issued),
        "have issued it and gave it up": all(issued),
        "have issued it and cannot go on": all(issued),
        "left no whole witness": bool(ranks),
        "every member have issued it": all(members),
        "every member that it needs have issued it": any(members) and not all(members),
    }
    different = re.fullmatch(r"(it|#(?P<k>\d+) before it) was issued with different (sizes|arguments)", rest)
    if different:
        callers = world.members(wait.ranks[0], group)
        calls = {world.call(rank, group, int(different["k"] or seq)) for rank in callers}
        so[rest] = len(calls - {""}) > 1 or ">" in group
    return all(world.is_in(rank, group, seq) for rank in wait.ranks) and so[rest]


PLURAL = {"has": "have", "holds": "hold"}


def _at(match: re.Match[str]) -> tuple[str, int]:
    return match["g"], int(match["n"])


def _words(text: str) -> Words:
    entry, _, layer = text.partition(" of ")
    group, _, op = entry.partition(" ")
    return group, op, layer


@rule(rf"{R} waits? in {X} for (?P<s>[\d,-]+){LINE}")
def _(world: World, verdict: Verdict, r: list[int], s: list[int], match: re.Match[str]) -> bool:
    at = _at(match)
    return all(world.is_in(rank, *at) for rank in r) and all(world.holds_up(rank, *at) for rank in s)


@rule(
    rf"{R} waits? in {X}; (it|\S+ #(?P<k>\d+) before it) was issued with different arguments"
    rf"(, and {S} completed it)?{LINE}"
)
def _(world: World, verdict: Verdict, r: list[int], s: list[int], match: re.Match[str]) -> bool:
    group, seq = _at(match)
    differing = int(match["k"] or seq)
    members = world.members(r[0], group)
    issued = {world.call(rank, group, differing) for rank in members if world.has_issued(rank, group, differing)}
    return (
        all(world.is_in(rank, group, seq) for rank in r)
        and all(world.has_left(rank, group, differing) for rank in s)
        and (len({words for words in issued if words}) > 1 or ">" in group)
    )


@rule(rf"{R} waits? for lock (?P<lock>.+?), which {S} holds?{LINE}")
def _(world: World, verdict: Verdict, r: list[int], s: list[int], match: re.Match[str]) -> bool:
    return all(world.awaits_lock(rank, match["lock"]) for rank in r) and all(
        world.holds(rank, match["lock"]) for rank in s
    )


@rule(rf"every member has issued {X} and none has left it: a device or network stall")
@rule(rf"every member has issued {X}, and (nothing has happened for .*|{R} keeps? up to .*)")
def _(world: World, verdict: Verdict, r: list[int], s: list[int], match: re.Match[str]) -> bool:
    group, seq = _at(match)
    inside = [position.rank for position in verdict.ranks if world.is_in(position.rank, group, seq)]
    sets = {world.members(rank, group) for rank in inside}
    return any(all(world.has_issued(m, group, seq) and not world.has_left(m, group, seq) for m in ms) for ms in sets)


@rule(rf"{R} (are|is) in {X}, which {S} (have|has) left")
def _(world: World, verdict: Verdict, r: list[int], s: list[int], match: re.Match[str]) -> bool:
    at = _at(match)
    return all(world.is_in(rank, *at) for rank in r) and all(world.has_left(rank, *at) for rank in s)


@rule(r"rank (?P<r>\d+) (?P<state>\w+) for [\d.]+ s: (in (?P<g>\S+)(?: (?P<op>\S+))? #(?P<n>\d+))?.*")
def _(world: World, verdict: Verdict, r: list[int], s: list[int], match: re.Match[str]) -> bool:
    if match["g"]:
        return world.is_in(r[0], *_at(match))
    alike = {"building": "running", "starting": "running", "spinning": "running"}
    state = world.state(r[0])
    return alike.get(state, state) == alike.get(match["state"], match["state"])


@rule(rf"{R} waits?")
def _(world: World, verdict: Verdict, r: list[int], s: list[int], match: re.Match[str]) -> bool:
    return all(world.state(rank) in ("blocked", "locked") for rank in r)


@rule(rf"{S} holds? lock (?P<lock>.+?), for which {R} waits?")
def _(world: World, verdict: Verdict, r: list[int], s: list[int], match: re.Match[str]) -> bool:
    return all(world.awaits_lock(rank, match["lock"]) for rank in r) and all(
        world.holds(rank, match["lock"]) for rank in s
    )


@rule(rf"no process holds lock (?P<lock>.+?) any more, for which {R} waits?")
@rule(rf"{R} holds? lock (?P<lock>.+?), but did not record that it acquired the lock")
def _(world: World, verdict: Verdict, r: list[int], s: list[int], match: re.Match[str]) -> bool:
    return all(world.awaits_lock(rank, match["lock"]) for rank in r)


@rule(rf"rank (?P<r>\d+) holds lock (?P<lock>.+?) and waits (in {X}|for lock (?P<other>.+?))( \(.*\))?")
def _(world: World, verdict: Verdict, r: list[int], s: list[int], match: re.Match[str]) -> bool:
    waits = world.awaits_lock(r[0], match["other"]) if match["other"] else world.is_in(r[0], *_at(match))
    return waits and world.holds(r[0], match["lock"])


@rule(rf"{R} (are|is) done and (will issue no further collective|still holds? lock .*)")
@rule(rf"{R} (are|is) done and never waited for {Y}")
@rule(rf"{R} ended before {Y} completed")
@rule(rf"{S} had live requests in a scheduled step that {R} never began")
def _(world: World, verdict: Verdict, r: list[int], s: list[int], match: re.Match[str]) -> bool:
    return all(world.state(rank) == "done" for rank in r) and not any(world.state(rank) == "done" for rank in s)


@rule(rf"{R} (runs? outside any collective|waits? in {Y}) with {X} pending")
def _(world: World, verdict: Verdict, r: list[int], s: list[int], match: re.Match[str]) -> bool:
    at = _at(match)
    return all(world.has_issued(rank, *at) and not world.is_in(rank, *at) for rank in r)


@rule(rf"{R} died")
@rule(rf"the evidence does not show which of {R} died first")
@rule(rf"the death of rank (?P<r>\d+) was noticed first, that of {S} later")
def _(world: World, verdict: Verdict, r: list[int], s: list[int], match: re.Match[str]) -> bool:
    return all(world.state(rank) == "dead" for rank in (*r, *s))


@rule(r"rank (?P<r>\d+) had waited in lock (?P<lock>\S+) for .* s when it died: .*")
def _(world: World, verdict: Verdict, r: list[int], s: list[int], match: re.Match[str]) -> bool:
    return world.state(r[0]) == "dead" and world.awaits_lock(r[0], match["lock"])


@rule(rf"rank (?P<r>\d+) had waited in {Y} for .* s when it died: .*")
def _(world: World, verdict: Verdict, r: list[int], s: list[int], match: re.Match[str]) -> bool:
    return world.state(r[0]) == "dead"


@rule(rf"{R} failed before the death of {S} was noticed")
def _(world: World, verdict: Verdict, r: list[int], s: list[int], match: re.Match[str]) -> bool:
    return all(world.state(rank) == "failed" for rank in r) and all(world.state(rank) == "dead" for rank in s)


@rule(rf"{R} failed too; the evidence does not show which came first")
@rule(rf"{R} (was|were) interrupted \(KeyboardInterrupt: .*")
@rule(rf"{R} failed with the same message. Read the message: .*")
@rule(r"rank (?P<r>\d+): .* \(\S*rank\d+\.wit:\d+ event \d+\)")
def _(world: World, verdict: Verdict, r: list[int], s: list[int], match: re.Match[str]) -> bool:
    return all(world.state(rank) == "failed" for rank in r)


@rule(rf"{R} waited in (lock (?P<lock>.+?)|{X}) for (no rank|(?P<s>[\d,-]+)) at the interrupt")
@rule(rf"{R} gave up in (lock (?P<lock>.+?)|{X}), waiting for (no rank|(?P<s>[\d,-]+))")
def _(world: World, verdict: Verdict, r: list[int], s: list[int], match: re.Match[str]) -> bool:
    if match["lock"]:
        return all(world.state(rank) == "failed" for rank in r)
    at = _at(match)
    return all(world.state(rank) == "failed" and world.is_in(rank, *at) for rank in r) and not any(
        world.has_left(rank, *at) for rank in s
    )


@rule(rf"{R} died or failed, perhaps before the hang: then the hang is a consequence")
def _(world: World, verdict: Verdict, r: list[int], s: list[int], match: re.Match[str]) -> bool:
    return all(world.state(rank) in ("dead", "failed") for rank in r)


@rule(rf"{R} ended step (?P<k>\d+) without {E}")
def _(world: World, verdict: Verdict, r: list[int], s: list[int], match: re.Match[str]) -> bool:
    steps = [world.issued_in(rank, int(match["k"])) or [] for rank in r]
    return all(issued.count(_words(match["e"])) <= 1 for issued in steps)


@rule(rf"{R} skipped {E} in step (?P<k>\d+) and issued (?P<f>\S+ \S+(?: of \S+)?)( at .*)?{LINE}")
@rule(rf"{R} issued (?P<f>\S+ \S+(?: of \S+)?) in step (?P<k>\d+)( at .*)? before {E}, which was due first{LINE}")
@rule(
    rf"{R} issued (?P<f>\S+ \S+(?: of \S+)?) in step (?P<k>\d+)( at .*)? where the schedule .* issued that later{LINE}"
)
@rule(rf"{R} issued (?P<f>\S+ \S+(?: of \S+)?) in step (?P<k>\d+)( at .*)? in place of {E}{LINE}")
@rule(rf"{R} issued (?P<f>\S+ \S+(?: of \S+)?) in step (?P<k>\d+)( at .*)? which is not in the schedule: .*{LINE}")
def _(world: World, verdict: Verdict, r: list[int], s: list[int], match: re.Match[str]) -> bool:
    return all(_words(match["f"]) in (world.issued_in(rank, int(match["k"])) or []) for rank in r)


@rule(rf"{R} issued (?P<g>\S+) #(?P<n>\d+) as (?P<call>.*)")
def _(world: World, verdict: Verdict, r: list[int], s: list[int], match: re.Match[str]) -> bool:
    issued = {world.call(rank, *_at(match)) for rank in r}
    whole = {re.sub(r" sizes \[.*?\]", "", call) for call in issued}  # without the sizes that a rank's ring has lost
    return match["call"] in issued if len(issued) == 1 and "sizes" in match["call"] else whole == {match["call"]}


@rule(r"(?P<g>\S+) #(?P<n>\d+) completed on ranks? (?P<r>[\d,-]+) although the ranks issued different collectives")
def _(world: World, verdict: Verdict, r: list[int], s: list[int], match: re.Match[str]) -> bool:
    return all(world.has_left(rank, *_at(match)) for rank in r)


@rule(rf"{R} changed (arguments|a schedule) that had been the same on all .*")
@rule(rf"{R} (declared another schedule than|differs? from) most members; the witnesses do not show which .*")
def _(world: World, verdict: Verdict, r: list[int], s: list[int], match: re.Match[str]) -> bool:
    return set(r) <= {*verdict.suspects, *verdict.culprits}


@rule(rf"the sizes that {R} passed for other ranks are contradicted by those ranks and by all remaining members")
def _(world: World, verdict: Verdict, r: list[int], s: list[int], match: re.Match[str]) -> bool:
    return set(r) <= {*verdict.culprits, *verdict.suspects}


@rule(rf"{R} left no usable witness.*")
@rule(rf"{R} left no complete witness, so arguments may have differed where {S} died")
@rule(rf"{R} never began, and no other rank is left: .*")
@rule(rf"no rank with a complete witness holds lock .*, but {R} (have|has) none")
@rule(rf"{R} lacked a processor: .*")
@rule(rf"{R} used no processor and sent no heartbeat: .*")
@rule(rf"no evidence shows that {R} works?: processor use was not measured")
@rule(rf"{R} may be working or waiting for work queued on the device. Take .*")
@rule(rf"{R} (have|has) not returned from it yet, or the witness is out of date. Take .*")
@rule(rf"{R} (have|has) queued {X} and did not wait for it: .*")
@rule(rf"every member has issued {X}, but {R} (have|has) no complete witness to compare with")
@rule(rf"{R} moved less than [\d.e-]+ s ago, too recently to name a culprit")
@rule(rf"{R} left no .*")
@rule(r"rank (?P<r>\d+): .*, which contradicts its witness")
@rule(rf"{R} issued as #\d+ what others issued as #\d+")
@rule(rf"in earlier steps {R} issued both collectives in that order")
def _(world: World, verdict: Verdict, r: list[int], s: list[int], match: re.Match[str]) -> bool:
    return set(r) <= {position.rank for position in verdict.ranks}


@rule(r"the last event is .*|a stall is reported only after \d+ quiet windows|ranks lacked a processor for .*")
@rule(r"process \d+, which is not a rank, holds lock .*|the holder of lock .* is unknown: .*")
@rule(r"when they began to wait, .*|not enough evidence to name a culprit: .*|no schedule was declared: .*")
@rule(r"this collective may be late or skipped altogether: .*|\d+ further lines are not shown|rank \d+: token .*")
@rule(r"\S+ #\d+ was issued with different arguments and may be the cause")
@rule(r"(the members did not issue .*|the ranks did not issue it) for the same layer and step")
@rule(r"the schedules that members of .* differ \(.*\)")
@rule(r"ranks of .* before #\d+, as their rolling hashes differ: .*|\S+ #\d+ is queued with different arguments, .*")
@rule(r"times of \d+ ranks on other hosts are converted .*|\S+\.wit:\d+: .*|\S+\.wit: \d+ further problems")
@rule(r"the witness(es)? of ranks? .* (is|are) damaged: .*|the waits lead to ranks? .*, which left no usable .*")
def _(world: World, verdict: Verdict, r: list[int], s: list[int], match: re.Match[str]) -> bool:
    return True
