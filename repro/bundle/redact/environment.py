"""Redact descriptions of a machine (versions, hardware, variables): keep a line if its name and its value are known.

There are two such descriptions: the files env/rank000.txt, … that repro.lab.rank.software writes, and the report of
torch.utils.collect_env.
"""

from __future__ import annotations

import re

from repro.bundle.redact.recognise import GONE
from repro.bundle.redact.words import KNOWN, is_name

_VERSION = (
    r"\d{1,4}(?:\.\d{1,8}){1,2}(?:\.?(?:a|b|rc|dev|post)\d{1,9})*"
    r"(?:\+(?:cpu|xpu|cu\d{2,3}|rocm\d[\d.]{0,5}|git[0-9a-f]{7,12}))?"
)
# A version suffix is dropped, because whoever built the package may have put a name there.
_SYSTEM = r"(?:Linux|macOS|Darwin)-\d{1,3}\.\d{1,3}(?:\.\d{1,5})?"
_MACHINES = r"x86_64|aarch64|arm64|ppc64le|riscv64"
_GPU = (
    r"(?:NVIDIA|AMD|Intel)(?: (?:GeForce|RTX|GTX|Tesla|Quadro|Instinct|Radeon|Data|Center|GPU|Max|Graphics|Generation"
    r"|Ada|Super|Ti|PCIe|SXM\d?|NVL|HBM\w?|OAM|[AHLBPTV]\d{2,4}[SX]?|G[BH]\d{3}|MI\d{3}[AX]?|\d{3,4}|\d{2,3}GB)(?!\w))+"
)
_CPU = (
    r"(?:AMD|Intel\(R\)|ARM|Neoverse|Apple|Grace)(?:[ -](?:EPYC|Ryzen|Xeon\(R\)|Core\(TM\)|Platinum|Gold|Silver"
    r"|Processor|CPU|Threadripper|Neoverse|Cortex|[NVE]\d|M\d|\d{4}[A-Z]{0,3}\+?|\d{1,3}-Core|@|\d\.\d{2}GHz)(?!\w))*"
)
_NONE = r"N/A|Could not collect|None|True|False"
_COUNTS = r"\d{1,4}(?:-\d{1,4})?(?:,\d{1,4}(?:-\d{1,4})?)*"

_FORMS = (
    (
        "PyTorch version|CUDA used to build PyTorch|ROCM used to build PyTorch|GCC version|Clang version|CMake version"
        "|Libc version|Python version|CUDA runtime version|Nvidia driver version|cuDNN version|HIP runtime version"
        "|MIOpen runtime version",
        f"{_NONE}|{_VERSION}",
    ),
    (
        "Is debug build|Is CUDA available|Is XPU available|Is XNNPACK available|CUDA_MODULE_LOADING set to",
        f"{_NONE}|LAZY|EAGER",
    ),
    (
        "OS",
        r"(?:Debian GNU/Linux|Ubuntu|Red Hat Enterprise Linux|Rocky Linux|AlmaLinux|Amazon Linux|SUSE Linux|macOS)"
        r"(?: release)? \d{1,4}(?:\.\d{1,3}){0,2}",
    ),
    ("Python platform", _SYSTEM),
    (r"GPU models and configuration|GPU \d{1,2}", f"{_NONE}|{_GPU}"),
    ("Architecture", _MACHINES),
    ("Byte Order", "Little Endian|Big Endian"),
    ("Model name", _CPU),
    (r"CPU\(s\)|Thread\(s\) per core|Core\(s\) per socket|Socket\(s\)|NUMA node\(s\)|Stepping|CPU family", r"\d{1,6}"),
    (r"On-line CPU\(s\) list|NUMA node\d{1,3} CPU\(s\)", _COUNTS),
    ("L1d cache|L1i cache|L2 cache|L3 cache", r"\d{1,6}(?:\.\d{1,3})? ?[KMG]iB(?: \(\d{1,4} instances?\))?"),
    (
        "Flags",
        r"\b(?:avx\w{0,12}|amx\w{0,8}|sse\w{0,6}|ssse3|fma|f16c|bmi\d|neon|asimd\w{0,4}|sve\w{0,8}|bf16|i8mm)\b",
    ),
)
COLLECTED = tuple((re.compile(names), re.compile(form)) for names, form in _FORMS)
"""(patterns of name and value) of the lines of collect_env to keep. Only the part of a value that fits is kept."""

HEADINGS = frozenset(["Collecting environment information...", "CPU:", "Versions of relevant libraries:"])

MODULES = frozenset(KNOWN["modules"])
"""Packages whose versions are kept."""

_LIBRARY = re.compile(
    r"lib(?:nccl|rccl|cudart|cublas|cublasLt|cudnn|cudnn_[a-z_]{1,40}|nvshmem|nvshmem_host|gloo|mpi|torch_cpu|torch_cuda"
    r"|torch_cuda_linalg|triton)\.so[\d.]{0,12}"
)

PREFIXES = tuple(KNOWN["variable_prefixes"])
NAMES = frozenset(KNOWN["variables"])
"""Names of variables that are kept. A variable with a name that begins with one of PREFIXES is also kept, if the rest
of its name consists of known words."""

_INTERFACE = (
    r"(?:eth|ib|ens|eno|enp\d{1,3}s|bond|lo|docker|mlx4_|mlx5_|hsn|rdma|roce|bnxt_re|efa|wlan)"
    r"\d{0,3}(?:f\d{1,2})?(?:np\d{1,2})?(?::\d)?"
)
_VALUE = re.compile(
    rf"-?\d{{1,7}}(?:\.\d{{1,4}})?|\d{{1,3}}(?:,\d{{1,3}})*|[=^]{{0,2}}{_INTERFACE}(?:,[=^]?{_INTERFACE})*|"
)
_LIST = re.compile(r"[,;|+ ]")


def rank_line(line: str) -> str | None:
    """Redact a line of env/rank000.txt, the software of a rank. Returns None if the line has no known form: drop it."""
    if match := re.fullmatch(rf"python: ({_VERSION}) on (.+)", line):
        return f"python: {match[1]} on {_platform(match[2])}"
    if match := re.fullmatch(
        rf"torch: ({_VERSION})\S* \(git ([0-9a-f]{{7,12}}|unknown), CUDA (None|[\d.]{{1,8}})\)", line
    ):
        return f"torch: {match[1]} (git {match[2]}, CUDA {match[3]})"
    if re.fullmatch(r"NCCL, as the library itself says: \d{1,3}(?:\.\d{1,3}){1,3}", line):
        return line
    if match := re.match(rf"GPU: ({_GPU})", line):
        return match[0]
    if (match := re.match(rf"module ([A-Za-z]\w*): ({_VERSION})", line)) and match[1] in MODULES:
        return match[0]
    if (match := re.fullmatch(r"library: (\S+)", line)) and _LIBRARY.fullmatch(match[1]):
        return line
    return variable(line)


def _platform(text: str) -> str:
    """Redact platform.platform(): keep system, kernel version, machine and libc."""
    parts = (re.search(form, text) for form in (_SYSTEM, rf"(?:{_MACHINES})", r"with-glibc\d{1,2}\.\d{1,3}"))
    return "-".join(match[0] for match in parts if match) or GONE


def variable(line: str) -> str | None:
    """Redact an environment variable, "NAME=value".

    Returns the line unchanged if the value is harmless (see `is_value`), else "NAME=(left out)"; None if NAME is not a
    known variable.
    """
    name, equals, value = line.partition("=")
    if not equals or not (name in NAMES or (name.startswith(PREFIXES) and is_name(name))):
        return None
    return f"{name}={value if is_value(value) else GONE}"


def is_value(value: str) -> bool:
    """Whether a variable's value is harmless: a number, a list of small numbers, known words, or network interfaces."""
    if _VALUE.fullmatch(value):
        return True
    parts = [part.lstrip("^") for part in _LIST.split(value)]
    return len(value) <= 120 and all(
        all(is_name(word) or _VALUE.fullmatch(word) for word in part.split(":")) for part in parts
    )


def collected_line(line: str) -> str | None:
    """Redact a line of the report of torch.utils.collect_env.

    Returns the line without the parts that are not known to be harmless; None if its name or its value is not known.
    """
    if line in HEADINGS:
        return line
    if (match := re.match(rf"\[(?:pip3|conda)\] ([\w-]+)(?:==|\s+)({_VERSION})", line)) is not None:
        return match[0] if match[1].replace("-", "_") in MODULES else None
    name, _, value = line.partition(":")
    form = next((form for names, form in COLLECTED if names.fullmatch(name.strip())), None)
    parts = [match[0] for match in form.finditer(value)] if form else []
    return f"{name}: {' '.join(parts if name == 'Flags' else parts[:1])}" if parts else None
