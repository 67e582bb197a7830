"""What `diagnose` prints and writes: 25 lines, JSON, a page, the text of an issue, and exit codes."""

from __future__ import annotations

import json

import pytest
from foreign import call, dump, py_spy, watchdog, write

from repro.commands.cli import main
from repro.commands.diagnose import MAX_LINES, lines
from repro.ingest.read import read
from repro.verdict.partial import diagnose

EP = {"1": ("ep", range(4))}


WORKER = "worker_busy_loop (vllm/v1/executor/multiproc_executor.py:1041)"


def diagnosed(folder):
    evidence = read([folder])
    diagnosis = diagnose(evidence.records)
    return diagnosis, "\n".join((*diagnosis.summary, *diagnosis.evidence, *diagnosis.collect, *diagnosis.notes))


def recorders(folder, calls, *, as_json=False, groups=None, status=None):
    files = {
        f"trace_rank_{rank}": dump(entries, groups or EP, (status or {}).get(rank), as_json=as_json)
        for rank, entries in calls.items()
    }
    return write(folder, files)


def test_the_terminal_gets_25_lines_and_json_gets_everything(tmp_path, capsys):
    files = {f"rank_{r}.log": watchdog(r, 7, "ALLREDUCE") for r in range(64)}
    folder = write(tmp_path, files)
    evidence = read([folder])
    assert len(lines(diagnose(evidence.records), evidence)) <= MAX_LINES
    assert main(["diagnose", "--json", str(folder)]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["verdict"] == "stall" and len(document["files"]) == 64


def test_exit_codes_say_verdict_undecided_and_nothing_usable(tmp_path, capsys):
    beat = "x No available shared memory broadcast block found in 60 seconds.\n"
    assert main(["diagnose", str(write(tmp_path / "a", {"vllm.log": beat}))]) == 125
    assert main(["diagnose", str(write(tmp_path / "b", {"x.bin": b"\0\1\2"}))]) == 2
    assert "not understood: x.bin" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="2"):
        main(["diagnose", str(tmp_path / "none")])


def test_a_page_is_written_with_the_stacks_of_all_ranks_as_one_tree(tmp_path):
    frames = ["acquire (filelock/_api.py:344)", "<script>alert(1)</script> (x.py:1)", WORKER]
    folder = write(tmp_path / "in", {f"r{r}.txt": py_spy(f"VLLM::Worker_TP{r}", frames, r + 1) for r in range(3)})
    main(["diagnose", "--out", str(tmp_path / "out"), str(folder)])
    page = (tmp_path / "out" / "report.html").read_text()
    assert "ranks 0-2" in page and "&lt;script&gt;" in page and "<script>alert" not in page


def test_a_command_to_collect_holds_the_process_ids_that_the_files_name(tmp_path):
    ninja = ["_wait (subprocess.py:2053)", "run_ninja (flashinfer/jit/cpp_ext.py:310)", WORKER]
    lock = ["acquire (filelock/_api.py:344)", WORKER]
    files = {f"s{r}.txt": py_spy(f"VLLM::Worker_TP{r}", ninja if r == 1 else lock, 4711 + r) for r in range(3)}
    diagnosis, _ = diagnosed(write(tmp_path, files))
    assert "--ppid 4712" in diagnosis.collect[0]
    assert not any("PID" in text for text in diagnosis.collect)


def test_the_text_of_an_issue_has_one_tree_the_counters_of_two_looks_and_each_path_alone(tmp_path, capsys):
    groups = {"": ("", [])}
    first = recorders(tmp_path / "a", {r: [call(1, "all_gather", backend="gloo")] for r in range(2)}, groups=groups)
    entries = [call(n, "all_gather", backend="gloo", done=n < 3) for n in range(1, 4)]
    second = recorders(tmp_path / "b", dict.fromkeys(range(2), entries), groups=groups)
    stacks = write(tmp_path / "c", {f"r{r}.txt": py_spy(f"VLLM::Worker_TP{r}", [WORKER], r + 1) for r in range(2)})
    main(["diagnose", "--out", str(tmp_path / "out"), *map(str, (first, second, stacks))])
    text = (tmp_path / "out" / "ISSUE.md").read_text()
    assert "| 0 | ep | 1 / 1 | 3 / 2 |" in text
    assert "[ranks 0,1] worker_busy_loop" in text
    assert f"| `{first}` | clean" in text


def test_a_process_without_a_role_is_counted_once_among_those_that_were_looked_at_twice(tmp_path):
    looks = {
        f"{look}/rank{rank}.txt": py_spy(
            f"python train.py --rank {rank}", ["all_reduce (torch/distributed/x.py:1)"], rank + 1
        )
        for look in ("first", "second")
        for rank in range(3)
    }
    main(["diagnose", "--out", str(tmp_path / "out"), str(write(tmp_path / "in", looks))])
    assert "Of 3 processes observed twice" in (tmp_path / "out" / "ISSUE.md").read_text()


@pytest.mark.parametrize(
    ("num", "words"), [(1, "The stacks show 1 process, but not its rank."), (2, "2 processes, but not their ranks.")]
)
def test_processes_without_a_rank_are_counted(tmp_path, num, words):
    stacks = {f"{at}.txt": py_spy("python train.py", ["step (train.py:1)"], at + 1) for at in range(num)}
    main(["diagnose", "--out", str(tmp_path / "out"), str(write(tmp_path / "in", stacks))])
    assert words in (tmp_path / "out" / "ISSUE.md").read_text()


def test_nothing_makes_the_terminal_longer_than_25_lines_and_the_first_line_says_who(tmp_path):
    pairs = {r: [call(1, "all_reduce", group=(r, str(r), "pair"), done=False)] for r in range(40)}
    groups = {str(r): ("pair", [r, (r + 1) % 40]) for r in range(40)}
    files = {
        f"trace_rank_{r}": dump(pairs[r], {n: g for n, g in groups.items() if r in g[1]}) for r in range(40)
    }  # a cycle of forty
    files["rubbish.bin"] = b"\0\1"
    evidence = read([write(tmp_path, files)])
    rows = lines(diagnose(evidence.records), evidence)
    assert len(rows) <= MAX_LINES
    assert rows[0].startswith("deadlock (order)")
    assert any(row.startswith("collect next") for row in rows)
