"""Redact the records of a job's evidence: numbers stay, and unrecognised strings are replaced by stand-ins.

The redacted records must lead to the same verdict. The judge compares strings of the evidence with each other, and uses
the order of file names. So equal strings get equal stand-ins, different strings get different stand-ins, and the
stand-ins of file names have the same order as the names.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import cache
from typing import Any, TypeVar, assert_never

from repro.bundle.redact.recognise import Recogniser
from repro.bundle.redact.words import MAX_NAME, is_name, is_word
from repro.ingest.read import Evidence
from repro.trace.foreign.operations import Calls, Form
from repro.trace.foreign.records import (
    Call,
    Connections,
    Failure,
    Group,
    GroupRecord,
    Launches,
    Left,
    LockLook,
    Member,
    Mismatch,
    Note,
    Observation,
    Process,
    ProcessLook,
    Progress,
    RasAnswer,
    RasCommunicator,
    RecorderDump,
    Source,
    Stack,
    TimedOut,
)
from repro.verdict.partial.logs.failures import SURVIVED

_Form = TypeVar("_Form", Form, Call)

_WITH_HOST = (Member, Launches, Failure, ProcessLook, LockLook, Connections)

_PLACE = re.compile(r"(?:line|entry) \d{1,12}")
_NUMBERS = re.compile(r"[\d, /.-]{1,200}")
_VERSION = re.compile(r"\d{1,3}(?:\.\d{1,3}){1,3}")
_FRAME = re.compile(r"(?P<function>.*) \((?P<path>[^()]*?)(?P<line>(?::\d{1,9})?)\)")
_FILE_NUMBER = re.compile(r"(?:rank|dp|tp|ep|pp|worker|engine|look|proc|pid|t|v)?\d{1,6}s?", re.IGNORECASE)
_HOST = re.compile(r"[A-Za-z0-9](?:[\w.-]{0,253}[A-Za-z0-9])?")
_ROLE = re.compile(r"(?:VLLM::|sglang::|ray::)?(?P<name>[A-Za-z]+)(?P<parts>(?:_(?:DP|PP|TP|EP|PCP|DCP)\d{1,5})*)")


def hosts_of(records: Iterable[Observation]) -> list[str]:
    """Return the host names in the records."""
    names = {record.host for record in records if isinstance(record, _WITH_HOST)}
    return sorted(name for name in names if _HOST.fullmatch(name))


def redact_evidence(evidence: Evidence, recogniser: Recogniser) -> Evidence:
    """Return the evidence with every string redacted by ``recogniser``, for a bundle."""
    redactor = _Redactor(evidence, recogniser)
    return Evidence(
        [redactor.record(record) for record in evidence.records],
        [redactor.files[name] for name in evidence.files],
        [redactor.refusal(text) for text in evidence.not_understood],
    )


class _Redactor:
    def __init__(self, evidence: Evidence, recogniser: Recogniser) -> None:
        self._of = recogniser
        refused = (text.partition(":")[0] for text in evidence.not_understood)
        self.files = _stand_ins_of_files({*_files_of(evidence.records), *evidence.files, *refused}, recogniser)
        orders = sorted({record.order for record in evidence.records if isinstance(record, RasAnswer)})
        self._orders = {order: f"{number:06d}" for number, order in enumerate(orders)}
        self._frame = cache(self._frame_of)
        self._group = cache(self._group_of)

    def record(self, record: Observation) -> Observation:
        changed: dict[str, Any] = {"source": self._source(record.source)}
        match record:
            case RecorderDump():
                changed |= {
                    "groups": tuple(self._group_record(row) for row in record.groups),
                    "configured": tuple(map(self._group, record.configured)),
                    "backend": self._of.string(record.backend), "library": self._version(record.library),
                }  # fmt: skip
            case TimedOut():
                group = self._group(record.group) if record.group else None
                changed |= {"group": group, "call": self._call(record.call)}
            case Progress():
                changed |= {"group": self._group(record.group)}
            case Member():
                changed |= {
                    "process": self._process(record.process), "host": self._of.host(record.host),
                    "name": self._communicator(record.name), "pointer": self._communicator(record.pointer),
                }  # fmt: skip
            case Launches():
                changed |= {
                    "process": self._process(record.process), "host": self._of.host(record.host),
                    "pointer": self._communicator(record.pointer), "group": self._group(record.group),
                    "calls": tuple(map(self._call, record.calls)),
                }  # fmt: skip
            case Stack():
                changed |= {
                    "process": self._process(record.process), "frames": tuple(map(self._frame, record.frames)),
                    "detail": self.text(record.detail), "thread": self._of.string(record.thread),
                }  # fmt: skip
            case Failure():
                text = self.text(record.text)
                survived = SURVIVED.search(record.text)
                if survived and not SURVIVED.search(text):
                    text = f"{text} {survived[0].lower()}"  # the rules of `diagnose` search for these words
                changed |= {"process": self._process(record.process), "host": self._of.host(record.host), "text": text}
            case Left():
                changed |= {"seen_by": self._process(record.seen_by), "text": self.text(record.text)}
            case Mismatch():
                other = self._call(record.other_call) if record.other_call else None
                aspects = self.text(record.aspects)
                changed |= {"call": self._call(record.call), "other_call": other, "aspects": aspects}
            case RasAnswer():
                changed |= {
                    "communicators": tuple(map(self._ras, record.communicators)),
                    "version": self._version(record.version), "order": self._orders[record.order],
                }  # fmt: skip
            case Note():
                changed |= {
                    "process": self._process(record.process), "text": self.text(record.text),
                    "value": record.value if _NUMBERS.fullmatch(record.value) else self._of.string(record.value),
                }  # fmt: skip
            case ProcessLook():
                children = tuple(
                    replace(child, name=self._of.string(child.name), command=self.text(child.command))
                    for child in record.children
                )
                changed |= {
                    "process": self._process(record.process), "host": self._of.host(record.host),
                    "place": self._of.string(record.place), "children": children,
                }  # fmt: skip
            case LockLook():
                names = tuple(map(self._title, record.names))
                changed |= {"path": self._of.string(record.path), "host": self._of.host(record.host), "names": names}
            case Connections():
                changed |= {"host": self._of.host(record.host)}
            case _:
                assert_never(record)  # the type checker names a kind of record that has no case
        return replace(record, **changed)

    def refusal(self, text: str) -> str:
        """Redact a remark about a file that no reader understood. The remark has the form "file:offset: reason"."""
        name, _, rest = text.partition(":")
        offset, _, what = rest.partition(": ")
        return f"{self.files[name]}:{offset if offset.isdecimal() else 0}: {self.text(what)}"

    def text(self, text: str) -> str:
        """Redact a message. If it is not recognised as a whole, keep the recognised parts at its start.

        A part ends at ": ". What follows the recognised parts is redacted as a string, and usually becomes a stand-in.
        """
        kept = self._of.recognised(text)
        if kept is not None or not text:
            return kept or ""
        head, colon, tail = text.partition(": ")
        if colon and (kept := self._of.recognised(head)) is not None:
            return f"{kept}: {self.text(tail)}"
        return self._of.string(text)

    def _source(self, source: Source) -> Source:
        return source._replace(
            file=self.files[source.file] if source.file else "",
            line=source.line if _PLACE.fullmatch(source.line) else "",
        )

    def _process(self, process: Process) -> Process:
        return replace(process, title=self._title(process.title))

    def _title(self, title: str) -> str:
        role = _ROLE.fullmatch(title)
        return title if role and is_name(role["name"]) else self._of.string(title)

    def _group_of(self, group: Group) -> Group:
        return replace(group, name=self._of.string(group.name), description=self._of.string(group.description))

    def _group_record(self, row: GroupRecord) -> GroupRecord:
        calls, forms = row.calls, tuple(map(self._form, row.calls.forms))
        file = self.files[calls.file] if calls.file else ""
        redacted = Calls(forms, calls.form, calls.seqs, calls.done, calls.times_s, calls.entries, file)
        return replace(row, group=self._group(row.group), calls=redacted, number=self._of.string(row.number))

    def _form(self, form: _Form) -> _Form:
        return form._replace(
            op=self._of.string(form.op), dtypes=tuple(map(self._of.string, form.dtypes)),
            frames=tuple(map(self._frame, form.frames)),
        )  # fmt: skip

    def _call(self, call: Call) -> Call:
        return self._form(call)._replace(source=self._source(call.source))

    def _frame_of(self, frame: str) -> str:
        """Redact "function (file:line)". A native frame names a library instead of a file."""
        match = _FRAME.fullmatch(frame)
        if match is None:
            return self._of.function(frame)
        path = self._of.path(match["path"]) if match["path"] else ""
        return f"{self._of.function(match['function'])} ({path}{match['line']})"

    def _communicator(self, name: str) -> str:
        return self._of.stand_in("communicator", name) if name else ""

    def _ras(self, row: RasCommunicator) -> RasCommunicator:
        def named(counts: Mapping[str, Any]) -> dict[str, Any]:
            return {self._operation(key): value for key, value in counts.items()}

        return replace(
            row, name=self._communicator(row.name),
            status=self._of.string(row.status), errors=self._of.string(row.errors),
            launched=named(row.launched), others=named(row.others),
        )  # fmt: skip

    def _operation(self, key: str) -> str:
        """Redact an operation that NCCL RAS counts, alone ("AllGather") or with its count ("AllGather 640")."""
        op, blank, count = key.partition(" ")
        return f"{self._of.string(op)}{blank}{count if count.isdecimal() else ''}"

    def _version(self, text: str) -> str:
        return text if _VERSION.fullmatch(text) else ""


def _files_of(records: Iterable[Observation]) -> set[str]:
    names = {record.source.file for record in records}
    for record in records:
        match record:
            case RecorderDump():
                names |= {row.calls.file for row in record.groups}
            case Launches():
                names |= {call.source.file for call in record.calls}
            case TimedOut():
                names.add(record.call.source.file)
            case Mismatch():
                names |= {call.source.file for call in (record.call, record.other_call) if call}
    return names - {""}


def _stand_ins_of_files(names: Iterable[str], recogniser: Recogniser) -> Mapping[str, str]:
    """Return, for each file name, its redacted name.

    If all names are known to be harmless, they stay. Otherwise each name is replaced by its position in the sorted list
    and the harmless parts of its last component, so that the names keep their order.
    """
    ordered = sorted(names)
    reduced = {name: _reduced(name, recogniser) for name in ordered}
    changed = sum(name != kept for name, kept in reduced.items())
    if not changed:
        return reduced
    recogniser.left_out["names"] += changed
    return {name: f"{place:04d}-{reduced[name].rpartition('/')[2]}" for place, name in enumerate(ordered, 1)}


def _reduced(name: str, recogniser: Recogniser) -> str:
    """Replace the unknown words of a file name by "x": "gpu17/worker_dp0_joe.log" -> "x/worker_dp0_x.log"."""

    def part(match: re.Match[str]) -> str:
        return match[0] if is_word(match[0]) or _FILE_NUMBER.fullmatch(match[0]) else "x"

    kept = re.sub(r"[^\w./-]", "x", re.sub(r"[^\W_]+", part, name[:MAX_NAME]))
    return "x" if recogniser.is_private(kept) else kept
