"""What a bundle recognises, what it puts in the place of the rest, and that no verdict changes by it."""

from __future__ import annotations

import json
import re
import time
import zipfile
from collections.abc import Callable

import pytest
from drawn_case import Case
from faults import draw
from hypothesis import given
from hypothesis import strategies as st
from reported import write_hang
from simulator import Simulation
from test_simulated import WINDOW_S, rest, verdict_of

from repro import bundle
from repro.bundle import assemble
from repro.bundle.redact import documents, environment, lines, recognise, words
from repro.bundle.redact.recognise import Recogniser
from repro.bundle.redact.search import Search
from repro.bundle.redact.witnesses import redact_witness
from repro.commands.cli import main
from repro.lab import scenarios
from repro.lab.configurations import CONFIGURATIONS
from repro.lab.description import describe
from repro.lab.settings import RunSettings
from repro.trace.witness.file import Witness, parse, read
from repro.verdict import Facts, Verdict, judge


@pytest.mark.parametrize(
    "text",
    [
        "ranks 0-2,5 wait in dp all_reduce #41 (step 12, layers.0.linear_attn)",
        "rank 3 holds lock experts.lock and waits (rank003.wit:38912 event 118)",
        "Watchdog caught collective operation timeout: WorkNCCL(SeqNum=7, OpType=ALLREDUCE, Timeout(ms)=600000)",
        "Connection closed by peer [127.0.0.1]:11925.",
        "ran for 600029 milliseconds before timing out",
        "--allow-unsafe: started although 2 agreements are due, not 1",
        "25 tokens of 5 requests equal the single-process reference's",
        "torch.nn.modules.module, AllGatherReduceScatter.dispatch, Engine._build.<locals>.sum_up",
    ],
)
def test_technical_prose_is_recognised_as_it_stands(text):
    assert Recogniser().recognised(text) == text


@pytest.mark.parametrize(
    "text",
    [
        "password = 123456", "api key 123456", "pin=4711", "card 4111 1111 1111 1111",
        "rank 10 20 30 40", "10.20.30.40", "10-20-30-40", "peer 2001:db8::5", "zorblaxx",
        "on gpu-17", "node17", "alice@example.org", "12345678", "deadbeef", "0x7f001122", "a.b.c",
        "1.2.3.4", "layers.0.zorblaxx", "https://example.org/a", "~/notes", "x" * 200, "a_l_i_c_e", "AlIcE", "wait\x00",
        "pässword",
    ],
)  # fmt: skip
def test_what_is_not_of_known_words_and_small_numbers_is_not_recognised(text):
    assert Recogniser().recognised(text) is None


@pytest.mark.parametrize(
    ("path", "kept"),
    [
        ("/home/bob/venv/lib/python3.11/site-packages/torch/nn/modules/module.py", "torch/nn/modules/module.py"),
        ("/usr/lib/python3.12/threading.py", "threading.py"),
        ("/home/bob/clone/hybrid_moe_ref/engine/step/runner.py", "hybrid_moe_ref/engine/step/runner.py"),
        ("<frozen runpy>", "<frozen runpy>"),
        ("/home/bob/venv/lib/python3.11/site-packages/bobs/runner.py", "folder-001/runner.py"),
        ("/home/bob/torch/bob.py", "file-001.py"),
        ("/home/bob/clone/train.py", "folder-001/train.py"),
        ("/home/bob/clone/bob.py", "file-001.py"),
        ("bob", "file-001"),
    ],
)
def test_of_a_path_stays_what_is_below_a_known_package(path, kept):
    assert Recogniser().path(path) == kept


def test_a_log_is_written_anew_from_what_is_recognised():
    log = """\
[rank 3] 2026-11-26 10:00:00,123 INFO waiting for rank 0
gpunode17:123:456 [0] NCCL WARN Timeout waiting for connection from gpunode18
[W1128 18:51:20.123456789 ProcessGroupNCCL.cpp:1234] Warning: our custom zorblaxx
zorblaxx and more
zorblaxx again
Traceback (most recent call last):
  File "/home/bob/clone/hybrid_moe_ref/engine/step/runner.py", line 9, in execute
    secret_source("x")
    ^^^^^^^^^^^^^^^^^^
torch.distributed.DistBackendError: no connection to gpunode17
RuntimeError: timed out waiting for rank 3
acme.ZorbError: x"""
    recogniser = Recogniser()
    assert lines.log(log, recogniser).splitlines() == [
        "[rank 3] 2026-11-26 10:00:00,123 INFO waiting for rank 0",
        "host:123:456 [0] NCCL WARN (left out)",
        "[W1128 18:51:20.123456789 ProcessGroupNCCL.cpp:1234] Warning: (left out)",
        "[2 lines left out]",
        "Traceback (most recent call last):",
        '  File "hybrid_moe_ref/engine/step/runner.py", line 9, in execute',
        "torch.distributed.DistBackendError: (left out)",
        "RuntimeError: timed out waiting for rank 3",
        "[1 line left out]",
    ]
    assert recogniser.left_out["text"] == 6


def test_a_stack_keeps_its_threads_apart_without_their_addresses():
    stack = 'Thread 0x00007fa3 [bob] (most recent call first):\n  File "/x/threading.py", line 1 in run\n\n'
    stack += 'Current thread 0x00007fa4 (most recent call first):\n  File "/x/zorblaxx.py", line 2 in zorblaxx\n'
    assert lines.stack(stack, Recogniser()).splitlines() == [
        "Thread 0x0000000000000001 (most recent call first):",
        '  File "folder-001/threading.py", line 1 in run',
        "",
        "Current thread 0x0000000000000002 (most recent call first):",
        '  File "file-001.py", line 2 in function-001',
    ]


@pytest.mark.parametrize(
    ("line", "kept"),
    [
        ("NCCL_DEBUG=INFO", "NCCL_DEBUG=INFO"),
        ("NCCL_SOCKET_IFNAME=^docker0,lo", "NCCL_SOCKET_IFNAME=^docker0,lo"),
        ("NCCL_IB_HCA=mlx5_0:1,mlx5_1:1", "NCCL_IB_HCA=mlx5_0:1,mlx5_1:1"),
        ("CUDA_VISIBLE_DEVICES=0,1,2,3", "CUDA_VISIBLE_DEVICES=0,1,2,3"),
        ("CUDA_VISIBLE_DEVICES=GPU-12345678", "CUDA_VISIBLE_DEVICES=(left out)"),
        ("VLLM_HOST_IP=10.1.2.3", None),
        ("VLLM_API_KEY=12345", None),
        ("HF_TOKEN=1", None),
        ("python: 3.12.1 on Linux-5.15.0-acme-x86_64", "python: 3.12.1 on Linux-5.15.0-x86_64"),
        ("torch: 2.13.0+acme (git cf30153c4c13, CUDA 13.0)", "torch: 2.13.0 (git cf30153c4c13, CUDA 13.0)"),
        ("GPU: NVIDIA H100 80GB HBM3", "GPU: NVIDIA H100 80GB HBM3"),
        ("module numpy: 2.4.6", "module numpy: 2.4.6"),
        ("module acme: 1.0", None),
        ("library: libnccl.so.2", "library: libnccl.so.2"),
        ("library: libacme.so", None),
    ],
)  # fmt: skip
def test_of_a_machine_stays_what_has_a_known_name_and_form(line, kept):
    assert environment.rank_line(line) == kept


def test_every_field_that_this_program_writes_is_known(tmp_path):
    recogniser = Recogniser()
    for name in (*scenarios.names(), *CONFIGURATIONS):
        for variant in ("control", "fault", "fix"):
            settings = scenarios.settings_of({"scenario": name, "variant": variant, "seed": -(2**62)})
            described = describe(settings).to_mapping()
            assert json.loads(json.dumps(documents.description(described, recogniser))) == json.loads(
                json.dumps({**described, "family": ""})
            ), name
            assert documents.config(settings.to_mapping(), recogniser) == settings.to_mapping(), name
            assert RunSettings.from_mapping(documents.config(settings.to_mapping(), recogniser)) == settings
    root, _ = write_hang(tmp_path)
    document = json.loads((root / "verdict.json").read_text())
    kept = documents.verdict(document, recogniser)
    assert set(document) - set(kept) == {"evidence", "sentences"} and not recogniser.left_out["fields"]


def test_all_that_the_judge_says_of_simulated_runs_is_recognised():
    for seed in range(40):
        case = draw(seed)
        verdict = verdict_of(case, rest(case))
        for line in (*verdict.evidence, *verdict.sentences(), *(wait.why for wait in verdict.waits)):
            assert Recogniser().recognised(line) is not None, f"seed {seed}: {line}"


def redacted(files: list[bytearray], recogniser: Recogniser) -> dict[int, Witness]:
    names = [f"rank{rank:03d}.wit" for rank in range(len(files))]
    return {
        rank: parse(redact_witness(bytes(data), names[rank], recogniser), names[rank])
        for rank, data in enumerate(files)
    }


def judged(case: Case, sim: Simulation, witnesses: dict[int, Witness], rename: Callable[[str], str]) -> Verdict:
    facts = Facts(
        alive={rank: each.state != "dead" for rank, each in enumerate(sim.ranks)},
        lock_holders={rank: (rename(lock), pid) for rank, (lock, pid) in case.lock_holders(sim).items()},
    )
    now_ns = sim.clocks(2 * 10**9)
    return judge(witnesses, facts, num_ranks=case.num_ranks, now_ns=now_ns, quiet_window_s=WINDOW_S)


@pytest.mark.parametrize("known", [True, False])
def test_a_verdict_on_redacted_witnesses_is_that_on_the_run(monkeypatch, known):
    """Also where no name at all is known, and each has a stand-in."""
    if not known:
        operations = {"send", "recv"}  # which count in a channel of their own
        monkeypatch.setattr(recognise, "is_token", operations.__contains__)
        monkeypatch.setattr(recognise, "is_name", operations.__contains__)
    for seed in range(1000 * known, 1000 * known + 60):
        case = draw(seed)
        sim = rest(case)
        recogniser = Recogniser()
        witnesses = redacted(sim.files, recogniser)
        before = judged(case, sim, sim.witnesses(), str)
        after = judged(case, sim, witnesses, recogniser.string)
        for name in ("verdict", "cause", "culprits", "suspects", "confidence"):
            assert getattr(before, name) == getattr(after, name), f"seed {seed}: {name}"
        assert all(witness.writer.hostname.startswith("host-") for witness in witnesses.values())


@given(
    st.lists(st.text(max_size=30) | st.sampled_from(["layers.0.moe", "a.lock", "/a/b.lock", "/c/b.lock", "dp", "x y"]))
)
def test_different_strings_stay_different_and_equal_ones_equal(texts):
    recogniser = Recogniser()
    stand_ins = {text: recogniser.string(text) for text in texts}
    sites = [text for text in texts if re.fullmatch(r".+:\d+ \S+", text)]
    assert len(set(stand_ins.values())) == len(stand_ins) or sites
    assert all(recogniser.string(text) == stand_in for text, stand_in in stand_ins.items())


def test_two_locks_of_one_name_stay_two():
    recogniser = Recogniser()
    one, two = recogniser.string("/a/kernels/experts.lock"), recogniser.string("/b/kernels/experts.lock")
    assert one == "kernels/experts.lock" != two and "b" not in two.split("/")


def test_two_hosts_stay_two_and_a_short_name_is_the_same_host():
    recogniser = Recogniser()
    assert recogniser.host("alpha.example.org") == recogniser.host("alpha") == "host-1"
    assert recogniser.host("beta.example.org") == "host-2"
    assert [recogniser.boot(boot) for boot in ("x", "y", "x", "")] == ["boot-1", "boot-2", "boot-1", ""]
    assert [recogniser.namespace(number) for number in (0, 4026531836, 4026532836)] == [0, 1, 2]


def test_a_redacted_witness_holds_the_same_events(tmp_path):
    root, _ = write_hang(tmp_path)
    path = root / "events" / "rank000.wit"
    data = redact_witness(path.read_bytes(), path.name, Recogniser())
    before, again = read(path), parse(data, path.name)
    assert again.writer.hostname == "host-1" and before.writer.hostname == "host0" and len(data) < path.stat().st_size
    assert again.problems == before.problems == ()
    assert again.ring == before.ring and again.groups == before.groups
    assert [again.sizes(event.vector, event.num_sizes) for event in again.events()] == [
        before.sizes(event.vector, event.num_sizes) for event in before.events()
    ]
    assert again.strings[1:] == [Recogniser().string(text) for text in before.strings[1:]]


def test_the_copy_is_judged_and_what_differs_is_said(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(assemble, "_environment", lambda recogniser: "")
    root, _ = write_hang(tmp_path)
    path = root / "verdict.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"culprits": [3]}))
    main(["bundle", str(root), "--to", str(tmp_path / "b.zip")])
    assert "culprits is [0, 1, 2] by the bundle's files, but [3] by verdict.json" in capsys.readouterr().out


def test_a_private_name_that_is_left_stops_the_bundle(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(assemble, "_environment", lambda recogniser: "on zorblaxx17")
    monkeypatch.setattr("socket.gethostname", lambda: "zorblaxx17")
    root, _ = write_hang(tmp_path)
    assert main(["bundle", str(root), "--to", str(tmp_path / "b.zip")]) == 125
    printed = capsys.readouterr().err
    assert (
        "env.txt still contains a name" in printed and "zorblaxx17" not in printed and not (tmp_path / "b.zip").exists()
    )


def test_a_private_name_of_known_words_is_not_recognised(tmp_path, monkeypatch):
    monkeypatch.setattr(assemble, "_environment", lambda recogniser: "")
    monkeypatch.setattr("socket.gethostname", lambda: "gpu-layer")
    monkeypatch.setenv("WIFI_PASSPHRASE", "tensor parallel rank")
    monkeypatch.setenv("HOME", "/home/worker")
    root, _ = write_hang(tmp_path, layer="gpu-layer")
    (root / "logs" / "rank000.log").write_text("waiting on gpu-layer\na tensor parallel rank waits\nrank 0 waits\n")
    (root / "stacks" / "rank000.txt").write_text('  File "/home/worker/vllm/worker.py", line 1 in run\n')
    with zipfile.ZipFile(bundle.make(root, tmp_path / "b.zip").path) as made:
        assert made.read("logs/rank000.log").decode() == "[2 lines left out]\nrank 0 waits\n"
        assert made.read("stacks/rank000.txt").decode() == '  File "vllm/worker.py", line 1 in run\n'
        assert b"gpu-layer" not in b"".join(made.read(name) for name in made.namelist())


@pytest.mark.parametrize("name", ["worker", "canvas", "zq", "17", "function", "aa"])
def test_a_name_that_is_a_common_word_or_short_stops_no_bundle(tmp_path, monkeypatch, name):
    monkeypatch.setattr(assemble, "_environment", lambda recogniser: "")
    monkeypatch.setattr("socket.gethostname", lambda: name)
    monkeypatch.setattr("socket.getfqdn", lambda: name)
    monkeypatch.setenv("USER", name)
    root, _ = write_hang(tmp_path)
    assert bundle.make(root, tmp_path / "b.zip").path.exists()


@pytest.mark.parametrize(
    ("text", "free"),
    [
        ("Loading our custom weights took 12 s", True),
        ("Loading for user bob", False),
        ("custom weights from gpunode17", False),
        ("the passphrase of it is swordfish", False),
        ("Zq7Xk9Lm2Vb7", False),
        ("bob: began", True),
        ("card 4111 1111 1111 1111", False),
    ],
)
def test_free_text_stays_where_nothing_is_suspicious(text, free):
    pytest.importorskip("detect_secrets")
    assert Search(["somebody"])(text) == free


def test_no_text_takes_more_than_linear_time():
    pytest.importorskip("detect_secrets")
    recogniser = Recogniser(search=Search(["somebody"]))
    for piece in ("a", "Aa", "a_", "a.", "token=,", "/a", "'/a/", "1.", "1,", "a:", "eyJ-", "--key ", "(a", "[/a]"):
        text = piece * (40_000 // len(piece))
        for work in (recogniser.string, recogniser.recognised, lambda text: lines.log(text, recogniser)):
            began = time.process_time()
            work(text)
            assert time.process_time() - began < 2, piece


def test_the_list_of_words_holds_no_word_that_introduces_a_secret_a_person_or_a_machine():
    assert not words.WORDS & {
        "password", "passwd", "pwd", "pass", "secret", "token", "key", "credential", "auth", "cookie", "session",
        "bearer", "login", "user", "username", "hostname", "email", "alice", "bob",
    }  # fmt: skip
    assert {word.lower() for word in words.WORDS} == words.WORDS
