"""server.py: the environment in which vLLM finds the plug-ins of the tests."""

from __future__ import annotations

import subprocess
import sys

import server

LIST = "from importlib.metadata import entry_points; print(*[at.name for at in entry_points(group='{}')])"


def test_the_plug_in_that_changes_vllm_is_loaded_before_the_recorder_that_hooks_it(tmp_path, monkeypatch):
    checkout = tmp_path / "checkout"
    metadata = checkout / "hybrid_moe_ref.egg-info"  # an installation in place leaves this
    metadata.mkdir(parents=True)
    (checkout / "pyproject.toml").write_bytes((server.ROOT / "pyproject.toml").read_bytes())
    (metadata / "PKG-INFO").write_text("Metadata-Version: 2.1\nName: hybrid-moe-ref\nVersion: 0\n")
    (metadata / "entry_points.txt").write_text(f"[{server.GROUP}]\nhmr_record = repro.attach.vllm.plugin:register\n")
    monkeypatch.setattr(server, "ROOT", checkout)
    env = server.environment(tmp_path / "folder")
    done = subprocess.run(
        [sys.executable, "-S", "-c", LIST.format(server.GROUP)], env=env, capture_output=True, text=True, cwd="/"
    )
    names = done.stdout.split()
    assert "hmr_record" in names and names[0] == "hmr_question", (names, done.stderr)
