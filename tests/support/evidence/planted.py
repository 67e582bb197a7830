"""Made-up secrets, names and addresses in the notations that occur in logs, drawn from a seed."""

from __future__ import annotations

import base64
import html
import json
import random
import string
import urllib.parse
from collections.abc import Callable
from dataclasses import dataclass

UPPER, LOWER, DIGITS = string.ascii_uppercase, string.ascii_lowercase, string.digits
ALNUM, HEX = UPPER + LOWER + DIGITS, "0123456789abcdef"


@dataclass(frozen=True)
class Plant:
    """A text that is put into a file, and the strings that must be nowhere in a bundle made from the file."""

    kind: str
    text: str
    nowhere: tuple[str, ...]


Draw = Callable[[random.Random], str]


def chars(alphabet: str, count: int) -> Draw:
    return lambda rng: "".join(rng.choices(alphabet, k=count))


def prefixed(prefix: str, alphabet: str, count: int) -> Draw:
    return lambda rng: prefix + chars(alphabet, count)(rng)


TOKENS: dict[str, Draw] = {  # provider -> (prefix, alphabet, length)
    "aws id": prefixed("AKIA", UPPER + DIGITS, 16),
    "aws session id": prefixed("ASIA", UPPER + DIGITS, 16),
    "aws secret": chars(ALNUM + "/+", 40),
    "google api": prefixed("AIza", ALNUM + "_-", 35),
    "google oauth": prefixed("ya29.", ALNUM + "_-", 60),
    "github classic": lambda rng: rng.choice(["ghp_", "gho_", "ghs_", "ghu_", "ghr_"]) + chars(ALNUM, 36)(rng),
    "github fine": prefixed("github_pat_", ALNUM + "_", 60),
    "gitlab": lambda rng: rng.choice(["glpat-", "glrt-", "gldt-"]) + chars(ALNUM + "_-", 20)(rng),
    "hugging face": prefixed("hf_", UPPER + LOWER, 34),
    "openai": lambda rng: rng.choice(["sk-", "sk-proj-"]) + chars(ALNUM, 48)(rng),
    "anthropic": prefixed("sk-ant-", ALNUM + "_-", 60),
    "slack": lambda rng: f"{rng.choice(['xoxb', 'xoxp', 'xapp-1'])}-{chars(DIGITS, 11)(rng)}-{chars(ALNUM, 24)(rng)}",
    "slack hook": lambda rng: f"https://hooks.slack.com/services/T{chars(DIGITS, 8)(rng)}/B1/{chars(ALNUM, 24)(rng)}",
    "stripe": lambda rng: rng.choice(["sk_live_", "rk_live_"]) + chars(ALNUM, 24)(rng),
    "npm": prefixed("npm_", ALNUM, 36),
    "pypi": prefixed("pypi-AgEIcHlwaS5vcmc", ALNUM + "_-", 60),
    "sendgrid": lambda rng: f"SG.{chars(ALNUM, 22)(rng)}.{chars(ALNUM, 43)(rng)}",
    "vault": prefixed("hvs.", ALNUM, 24),
    "digitalocean": prefixed("dop_v1_", HEX, 64),
    "twilio": prefixed("SK", HEX, 32),
    "wandb": chars(HEX, 40),
    "jwt": lambda rng: f"eyJ{chars(ALNUM, 20)(rng)}.eyJ{chars(ALNUM, 30)(rng)}.{chars(ALNUM + '_-', 43)(rng)}",
    "azure": lambda rng: base64.b64encode(rng.randbytes(64)).decode(),
    "hex": chars(HEX, 32),
    "password": lambda rng: chars(LOWER, 4)(rng) + chars(DIGITS, 3)(rng) + chars(UPPER, 3)(rng) + chars(ALNUM, 4)(rng),
    "password of letters": chars(LOWER, 11),
    "password of digits": chars(DIGITS, 10),
}  # fmt: skip

SECRET_NAMES = [
    "password", "passwd", "PASSWORD", "DB_PASS", "pass", "pwd", "MYSQL_PWD", "api_key", "apiKey", "x-api-key", "secret",
    "client_secret", "auth", "auth_token", "token_value", "access_token", "HF_TOKEN", "private_key", "signing_key_pem",
    "passphrase", "credentials", "session_key",
]  # fmt: skip

ASSIGNMENTS: dict[str, Callable[[str, str], str]] = {
    "equals": lambda name, value: f"{name}={value}",
    "spaces": lambda name, value: f"{name} = {value}",
    "colon": lambda name, value: f"{name}: {value}",
    "quoted": lambda name, value: f"{name}='{value}'",
    "bytes": lambda name, value: f"connect({name}=b'{value}')",
    "raw": lambda name, value: f"connect({name}=r'{value}')",
    "walrus": lambda name, value: f"{name} := {value}",
    "arrow": lambda name, value: f'"{name}" => "{value}"',
    "comparison": lambda name, value: f"if {name} == {value}",
    "json": lambda name, value: json.dumps({"x": 1, name: value}),
    "json in a string": lambda name, value: "payload " + json.dumps(json.dumps({name: value})),
    "json twice": lambda name, value: "payload " + json.dumps(json.dumps(json.dumps({name: value}))),
    "repr of a tuple": lambda name, value: repr((name, value)),
    "repr of bytes": lambda name, value: repr((name.encode(), value.encode())),
    "list of options": lambda name, value: repr(["serve", f"--{name}", value]),
    "option": lambda name, value: f"serve --{name} {value}",
    "option equals": lambda name, value: f"serve --{name}={value} --ranks 8",
    "one hyphen": lambda name, value: f"serve -{name} {value}",
    "dict in a dict": lambda name, value: f"{name}s={{'key': '{value}'}}",
    "list": lambda name, value: f'{name}s=["{value}"]',
    "xml": lambda name, value: f"<{name}>{value}</{name}>",
    "html": lambda name, value: html.escape(f'{name}="{value}"'),
    "url": lambda name, value: f"https://x.example/a?b=1&{name}={urllib.parse.quote(value)}&c=2",
    "percent": lambda name, value: urllib.parse.quote(f"{name}={value}"),
    "quote inside": lambda name, value: f'{name}=ab"{value}',
    "colour": lambda name, value: f"\x1b[1m{name}\x1b[0m=\x1b[32m{value}\x1b[0m",
    "zero width": lambda name, value: f"{name[:2]}\u200b{name[2:]}={value}",
    "yaml block": lambda name, value: f"{name}: |\n  {value}",
    "next line": lambda name, value: f"{name}:\n{value}",
    "log prefix": lambda name, value: f"[rank 0] 2026-11-26 10:00:00,123 INFO {name}={value}",
    "vllm prefix": lambda name, value: f"INFO 11-26 10:00:00 [runner.py:12] {name} {value}",
    "exception": lambda name, value: f"ValueError: wrong {name} {value!r}",
    "environment": lambda name, value: f"NCCL_DEBUG=INFO {name}={value}",
    "known variable": lambda name, value: f"VLLM_{name}={value}",
}

HOLDERS: dict[str, Callable[[str], str]] = {  # notations of a secret that has no name
    "basic": lambda value: f"Authorization: Basic {base64.b64encode(f'bob:{value}'.encode()).decode()} {value}",
    "bearer": lambda value: f"Authorization: Bearer {value}",
    "digest": lambda value: f'Authorization: Digest username="bob", nonce="x", response="{value}"',
    "aws4": lambda value: f"Authorization: AWS4-HMAC-SHA256 Credential=x/y, Signature={value}",
    "proxy": lambda value: f"Proxy-Authorization: Basic {value}",
    "cookie": lambda value: f"Cookie: sessionid={value}; other=1",
    "set-cookie": lambda value: f"Set-Cookie: sid={value}; HttpOnly",
    "url user": lambda value: f"pulling https://bob:{urllib.parse.quote(value, safe='')}@registry.example/x {value}",
    "url without user": lambda value: f"redis://:{value}@cache.example:6379/0",
    "url with a quote": lambda value: f"postgres://svc:a'{value}@db.example/x",
    "jdbc": lambda value: f"jdbc:postgresql://db/x?user=svc&password={value}",
    "odbc": lambda value: f"Driver=x;Server=db;Uid=svc;Pwd={value};",
    "dsn": lambda value: f"host=db user=svc password={value} dbname=x",
    "curl": lambda value: f"curl -u bob:{value} https://x.example",
    "sshpass": lambda value: f"sshpass -p {value} ssh h",
    "mysql": lambda value: f"mysql -p{value} -u root",
    "redis": lambda value: f"redis-cli -a {value} ping",
    "netrc": lambda value: f"machine x.example login bob password {value}",
    "wandb": lambda value: f"wandb login {value}",
}


def _pem(body: str) -> tuple[str, ...]:
    return "-----BEGIN PRIVATE KEY-----", body, "-----END PRIVATE KEY-----"


BLOCKS: dict[str, Callable[[str], str]] = {
    "pem": lambda body: f"-----BEGIN RSA PRIVATE KEY-----\n{body}\nBBBB\n-----END RSA PRIVATE KEY-----",
    "encrypted pem": lambda body: (
        "-----BEGIN RSA PRIVATE KEY-----\nProc-Type: 4,ENCRYPTED\nDEK-Info: AES-128-CBC,0123456789ABCDEF\n\n"
        f"{body}\n-----END RSA PRIVATE KEY-----"
    ),
    "pem with prefixes": lambda body: "\n".join(f"[rank 0] 2026-11-26 10:00:00 {line}" for line in _pem(body)),
    "pem in json": lambda body: json.dumps({"private_key": "\n".join(_pem(body))}),
    "openssh": lambda body: f"-----BEGIN OPENSSH PRIVATE KEY-----\n{body}\n-----END OPENSSH PRIVATE KEY-----",
    "pgp": lambda body: f"-----BEGIN PGP PRIVATE KEY BLOCK-----\n\n{body}\n=abcd\n-----END PGP PRIVATE KEY BLOCK-----",
}  # fmt: skip


def name_of_letters(rng: random.Random) -> str:
    """A name that looks like a word: "quzobafi"."""
    return "".join(rng.choice("bdfgklmnprstvz") + rng.choice("aeiou") for _ in range(4))


def host(rng: random.Random) -> str:
    return rng.choice(
        [f"{name_of_letters(rng)}{rng.randrange(100, 999)}", f"{name_of_letters(rng)}-{rng.randrange(10, 99)}"]
    )


USERS: dict[str, Callable[[str], str]] = {
    "posix path": lambda name: f"cc -I/home/{name}/inc /home/{name} x",
    "other folder": lambda name: f"/scratch/{name}/proj/x.py",
    "frame": lambda name: f'  File "/data/{name}/project/train.py", line 3, in {name}',
    "frame of a package": lambda name: (
        f'  File "/opt/venv/lib/python3.11/site-packages/{name}/runner.py", line 3 in run'
    ),
    "last folder": lambda name: f"cd /data/{name}",
    "lone folder": lambda name: f"cd /{name}",
    "relative": lambda name: f"../../{name}/x.py",
    "brackets": lambda name: f"[/data/{name}/x.py]",
    "blank": lambda name: f"`/data/my stuff/{name}/x.py`",
    "signs": lambda name: f"/data/a&b/(c)/$X=1:{name}/x.py",
    "windows": lambda name: f"C:\\Users\\{name}\\x.py",
    "unc": lambda name: f"\\\\filer\\{name}\\work",
    "escaped": lambda name: f'"\\/data\\/{name}\\/x.py"',
    "percent": lambda name: f"file:%2F%2Fdata%2F{name}%2Fx.py",
    "file url": lambda name: f"file:///data/{name}/x.py",
    "tilde": lambda name: f"~{name} and ~{name}/x",
    "mail": lambda name: f"Author: {name.title()} <{name}@corp.example>",
    "uid": lambda name: f"uid=1234({name}) gid=1234",
    "variable": lambda name: f"SLURM_JOB_USER={name} SUDO_USER={name}",
    "user": lambda name: f"logged in as user {name}",
    "remote": lambda name: f"origin git@git.example:{name}/proj.git",
    "remote by https": lambda name: f"origin https://gitlab.example/{name}/proj.git",
    "bucket": lambda name: f"reading s3://{name}/checkpoints gs://{name}/x",
    "capitals": lambda name: f"/DATA/{name.upper()}/x.py",
}

HOSTS: dict[str, Callable[[str], str]] = {
    "variable": lambda name: f"MASTER_ADDR={name}.corp.example",
    "known variable": lambda name: f"NCCL_HOSTID={name}",
    "option": lambda name: f"--rdzv-endpoint={name}:29400",
    "nodelist": lambda name: f"SLURM_NODELIST={name}[01-16]",
    "nccl": lambda name: f"{name}:123:456 [0] NCCL INFO Bootstrap : Using eth0:10.1.2.3<0>",
    "nccl warning": lambda name: f"{name}:123:456 [0] NCCL WARN Timeout waiting for connection from {name}",
    "url": lambda name: f"http://{name}:8000/v1",
    "domain": lambda name: f"peer {name}.corp.example closed the connection",
    "words": lambda name: f"on host {name} and {name}-ib0",
    "rank": lambda name: f"rank 3 on {name} is late",
    "ssh": lambda name: f"ssh root@{name} nvidia-smi",
    "torchrun": lambda name: f"  host      : {name}.corp.example",
}

ADDRESSES: dict[str, Callable[[random.Random], tuple[str, ...]]] = {}


def _address(kind: str) -> Callable[[Callable[..., tuple[str, ...]]], None]:
    def add(make: Callable[..., tuple[str, ...]]) -> None:
        ADDRESSES[kind] = lambda rng: make(*(rng.randrange(100, 250) for _ in range(6)))

    return add


_address("ipv4")(lambda a, b, c, d, *_: (f"{a}.{b}.{c}.{d}", f"peer {a}.{b}.{c}.{d}:80 [{a}.{b}.{c}.{d}]:1."))
_address("ipv4 in a url")(lambda a, b, c, d, *_: (f"{a}.{b}.{c}.{d}", f"http://{a}.{b}.{c}.{d}:8000/v1"))
_address("ipv4 after ==")(lambda a, b, c, d, *_: (f"{a}.{b}.{c}.{d}", f"addr=={a}.{b}.{c}.{d}"))
_address("dashes")(lambda a, b, c, d, *_: (f"{a}-{b}-{c}-{d}", f"node ip-{a}-{b}-{c}-{d} up"))
_address("underscores")(lambda a, b, c, d, *_: (f"{a}_{b}_{c}_{d}", f"ep_{a}_{b}_{c}_{d}"))
_address("hex")(lambda a, b, c, d, *_: (f"{d:02X}{c:02X}{b:02X}{a:02X}", f"0: {d:02X}{c:02X}{b:02X}{a:02X}:7530"))
_address("decimal")(lambda a, b, c, d, *_: (str(((a * 256 + b) * 256 + c) * 256 + d),) * 2)
_address("ipv6")(lambda a, b, c, d, *_: (f"2001:db8:{a:x}::{b:x}:{c:x}", f"[2001:db8:{a:x}::{b:x}:{c:x}]:80 up"))
_address("ipv6 zone")(lambda a, b, c, d, *_: (f"fe80::{a:x}{b:x}:{c:x}", f"peer fe80::{a:x}{b:x}:{c:x}%eth0"))
_address("mac")(lambda *x: (":".join(f"{n:02x}" for n in x), f"mac {':'.join(f'{n:02x}' for n in x)}"))
_address("mac by hyphens")(lambda *x: ("-".join(f"{n:02x}" for n in x), f"mac {'-'.join(f'{n:02x}' for n in x)}"))
_address("mac of cisco")(lambda a, b, c, d, e, f: (f"{a:02x}{b:02x}.{c:02x}{d:02x}.{e:02x}{f:02x}",) * 2)
_address("gpu")(
    lambda a, b, c, d, *_: (
        f"GPU-{a:02x}{b:02x}{c:02x}{d:02x}-1111-2222",
        f"UUID: GPU-{a:02x}{b:02x}{c:02x}{d:02x}-1111-2222-3",
    )
)


def plants(rng: random.Random, count: int) -> list[Plant]:
    """Return ``count`` plants. If there are enough, every kind and every notation occurs."""
    kinds = [*secrets(rng), *names(rng)]
    rng.shuffle(kinds)
    found: list[Plant] = []
    while len(found) < count:
        found += kinds[: count - len(found)]
        kinds = [*secrets(rng), *names(rng)]
    return found


def secrets(rng: random.Random) -> list[Plant]:
    """Return each token in some notation, and each notation with some token."""
    drawn = list(TOKENS.items())
    found = []
    for kind, draw in drawn:
        value = draw(rng)
        if not kind.startswith("password"):
            found.append(Plant(kind, f"using {value}", (value,)))
        notation = rng.choice(list(ASSIGNMENTS))
        found.append(Plant(f"{kind}, {notation}", ASSIGNMENTS[notation](rng.choice(SECRET_NAMES), value), (value,)))
    for notation, write in ASSIGNMENTS.items():
        kind, draw = rng.choice(drawn)
        value = draw(rng)
        found.append(Plant(f"{kind}, {notation}", write(rng.choice(SECRET_NAMES), value), (value,)))
    for notation, hold in HOLDERS.items():
        kind, draw = rng.choice(drawn)
        value = draw(rng)
        found.append(Plant(f"{kind}, {notation}", hold(value), (value,)))
    for notation, block in BLOCKS.items():
        body = base64.b64encode(rng.randbytes(36)).decode()
        found.append(Plant(notation, block(body), (body,)))
    return found


def names(rng: random.Random) -> list[Plant]:
    """Return each notation of a user, a host and an address."""
    found = []
    for notation, write in USERS.items():
        user = name_of_letters(rng)
        found.append(Plant(f"user, {notation}", write(user), (user,)))
    for notation, write in HOSTS.items():
        name = host(rng)
        found.append(Plant(f"host, {notation}", write(name), (name,)))
    for notation, draw in ADDRESSES.items():
        address, text = draw(rng)
        found.append(Plant(f"address, {notation}", text, (address,)))
    return found
