"""Make or complete .venv for one use: ``setup_venv.py repro | test | test-all | bench | lint``. The Makefile calls it.

If this Python has torch 2.11 or newer, .venv uses it. Otherwise pip installs torch; without a GPU, its CPU build, which
lacks the gigabytes of CUDA libraries. While packages are being installed, .venv contains the file ``.unfinished``. If
set-up is interrupted, this file stays, and the next set-up starts from nothing. The stamp file that make checks is
written last. This script uses only the standard library.
"""

import fcntl
import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
VENV_PYTHON = VENV / "bin" / "python"
UNFINISHED = VENV / ".unfinished"
INPUTS = [ROOT / "pyproject.toml", ROOT / "setup.py", Path(__file__).resolve()]

EXTRAS = {
    "repro": "[model,native]",
    "test": "[model,native,test]",
    "test-all": "[model,native,test]",
    "bench": "[model,native,test,bench]",
    "lint": "[model,native,dev]",
}
# Packages from which tests load single files of plain torch. They are in a folder that no import searches, for two
# reasons: transformers would use fla's kernels, which fail without a GPU, and mamba-ssm cannot be imported as a whole
# without a GPU. The versions are exact because tests use internals. Their dependencies (gigabytes) are not installed.
APART = VENV / "oracles"
APART_PACKAGES = {"fla-core==0.6.0": ["einops"], "mamba-ssm==2.3.2.post1": ["einops"]}
APART_ENVIRONMENT = {"MAMBA_SKIP_CUDA_BUILD": "TRUE", "MAMBA_FORCE_BUILD": "TRUE"}  # its Python files and no more
CPU_TORCH = "torch==2.13.0+cpu"
PROBE = """
import importlib.metadata, torch, torch.distributed
version = importlib.metadata.version("torch")
if tuple(map(int, version.split(".")[:2])) < (2, 11): raise ImportError(f"torch {version} is older than 2.11")
if not torch.distributed.is_available(): raise ImportError(f"torch {version} has no torch.distributed")
torch.ones(2).sum()
print(version)
"""
SITE_PACKAGES = "import sysconfig; print(sysconfig.get_path('purelib'))"


def say(text: str) -> None:
    print(f"setup: {text}", flush=True)


def stamp(use: str) -> Path:
    return VENV / f".ready-{use}"


def is_ready(use: str) -> bool:
    if UNFINISHED.exists() or not VENV_PYTHON.exists() or not stamp(use).exists():
        return False
    return stamp(use).stat().st_mtime >= max(path.stat().st_mtime for path in INPUTS)


def working_torch(python: str | Path) -> tuple[str, str]:
    """Return (version, "") of the torch that this interpreter can use, or ("", the reason why it can use none)."""
    probe = subprocess.run([python, "-c", PROBE], capture_output=True, text=True)
    if probe.returncode == 0:
        return probe.stdout.split()[-1], ""
    return "", (probe.stderr.strip().splitlines() or [f"exit status {probe.returncode}"])[-1]


def has_gpu() -> bool:
    smi = shutil.which("nvidia-smi")
    return Path("/dev/nvidia0").exists() or (
        smi is not None and subprocess.run([smi], capture_output=True).returncode == 0
    )


def torch_to_install() -> str:
    if has_gpu():
        return "torch>=2.11"
    return CPU_TORCH


def make_venv() -> None:
    torch, why_not = working_torch(sys.executable)
    say(f"making .venv {f'with the torch {torch} of {sys.executable}' if torch else f'({why_not})'}")
    shutil.rmtree(VENV, ignore_errors=True)
    VENV.mkdir()
    UNFINISHED.touch()
    command = [sys.executable, "-m", "venv", *(["--system-site-packages"] if torch else []), str(VENV)]
    if subprocess.run(command).returncode:
        sys.exit(f"setup: {sys.executable} cannot make a virtual environment (on Debian: python3-venv)")
    if torch and sys.prefix != sys.base_prefix:
        # This interpreter is itself in a virtual environment, so "--system-site-packages" gives only the packages
        # below that one.
        outer, inner = (
            subprocess.check_output([python, "-c", SITE_PACKAGES], text=True).strip()
            for python in (sys.executable, VENV_PYTHON)
        )
        Path(inner, "outer_environment.pth").write_text(outer + "\n")


def pip_install(*arguments: str) -> str:
    """Run pip; return its error, or ""."""
    command = [str(VENV_PYTHON), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *arguments]
    environment = os.environ | APART_ENVIRONMENT
    pip = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, close_fds=False, env=environment)
    return (pip.stderr.strip() or "pip failed") if pip.returncode else ""


def install_oracles(torch: str) -> None:
    """Install other implementations ("oracles") for tests to compare with. Tests without their oracle are skipped."""
    say("installing the models and kernels of others that tests compare with")
    error = pip_install(torch, "--editable", ".[oracles]")
    if error:
        say(f"no oracles, tests that compare with them will skip: {error.splitlines()[-1]}")
        return
    for package, needed in APART_PACKAGES.items():
        if not list(APART.glob(package.replace("-", "_", 1).replace("==", "-") + ".dist-info")):
            error = pip_install(
                "--no-deps", "--no-build-isolation", "--upgrade", "--target", str(APART), package, *needed
            )
            if error:
                say(f"no {package}, the tests that compare with it will skip: {error.splitlines()[-1]}")


def install_interpreter(torch: str) -> None:
    """Install Triton: its interpreter runs the GPU kernels on a CPU, and its compiler needs no GPU."""
    say("installing triton, whose interpreter runs the GPU kernels on a CPU")
    error = pip_install(torch, "--editable", ".[interpreter]")
    if error:
        say(f"no triton, the tests of the GPU kernels will skip: {error.splitlines()[-1]}")


def install_checks() -> None:
    """Install what `make test-all` checks with: a driver for the browser, the Perfetto UI, axe, and schemas."""
    say("installing playwright, the Perfetto UI, axe and the schemas of Kubernetes")
    packages = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]["checks"]
    missing = [] if not pip_install(*packages) else [package for package in packages if pip_install(package)]
    if not any(map(shutil.which, ("chromium", "google-chrome"))):
        missing.append("chromium (Debian: apt-get install chromium)")
    if missing:
        say(f"no {', no '.join(missing)}: the tests that need it will skip")


def install(use: str) -> None:
    version, _ = working_torch(VENV_PYTHON)
    torch = f"torch=={version}" if version else torch_to_install()
    say(f"installing what `make {use}` needs, with {torch}")
    requirement = "." + EXTRAS[use]
    error = pip_install(torch, "--editable", requirement)  # naming torch keeps pip from replacing it
    if torch == CPU_TORCH and CPU_TORCH in error:
        sys.exit(
            f"setup: the package index in use has no CPU build of torch ({torch}); set PIP_EXTRA_INDEX_URL "
            f"to PyTorch's index of CPU builds, or install torch >= 2.11 for {sys.executable} first"
        )
    if error:
        sys.exit(f"{error}\nsetup: pip could not install {requirement}; the lines above say why")
    if not version:
        version, why_not = working_torch(VENV_PYTHON)
        if not version:
            sys.exit(f"setup: torch was installed but does not work: {why_not}")
    if use in ("test", "test-all", "bench"):
        install_oracles(f"torch=={version}")
        install_interpreter(f"torch=={version}")
    if use == "test-all":
        install_checks()


def main(use: str) -> None:
    lock = os.open(ROOT, os.O_RDONLY)  # a lock on the folder itself: no lock file is left behind
    os.set_inheritable(lock, True)  # if set-up is killed but its pip still runs, pip holds the lock
    fcntl.flock(lock, fcntl.LOCK_EX)
    if is_ready(use):  # another process made .venv while this one waited
        return
    if UNFINISHED.exists() or not VENV_PYTHON.exists():
        make_venv()
    UNFINISHED.touch()
    install(use)
    UNFINISHED.unlink()
    stamp("repro").touch()  # every use includes what repro needs
    if use == "test-all":
        stamp("test").touch()
    stamp(use).touch()
    say(".venv is ready")


if __name__ == "__main__":
    try:
        main(sys.argv[1])
    except KeyboardInterrupt:
        sys.exit("\nsetup: interrupted; the next make starts it again")
