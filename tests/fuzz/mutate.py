"""Seeded mutations of JSON values, of bytes, and of values in a file."""

import json
import random
import struct
import tomllib
from collections.abc import Callable
from typing import Any

DEEP: Any = []
for _ in range(900):
    DEEP = [DEEP]

VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 2, 7, 0.5, -0.0, 3.7, 255, 256, 2**31 - 1, 2**31, 2**53, 2**62),
    *(2**63 - 1, 2**63, 2**64, -(2**63), 10**30, 10**400, 1e300, -1e300, 1e-320),
    *(float("nan"), float("inf"), float("-inf")),
    *("", "0", "x", "a b", "\0", "\ud800", "\x1b[2J\x07", "\u202e", "../../etc/passwd", "/"),
    *("é", "💩", "gpt2", "char", "byte", "train", "cpu", "null", "1e999", "{}"),
    *([], {}, [None], [[]], {"": None}, [0, "x"], {"a": {"b": []}}, ["a b", "a b"], [["a", "b"]]),
)
LONG: tuple[Any, ...] = ("x" * 100_000, [0] * 10_000, {str(i): i for i in range(5_000)}, DEEP)
RAW = (
    *(b"", b"\0", b"\xff", b"\xff\xfe", b"\xef\xbb\xbf", b"\r\n", b"{", b"}", b"[", b'"', b"\\"),
    *(b"NaN", b"1e999", b"9" * 5000, b"-1", b"[" * 3000, b'{"a":' * 2000, b"\\ud800", b"0x"),
    *(b"\x1b[2J", b"\xed\xa0\x80", b"\xf0\x9f", b"\xff" * 8, b"\0" * 8, b"\x7f" * 4, b"\n" * 50),
)
Mutate = Callable[[bytes, random.Random], bytes]


def tree(value: Any, rng: random.Random) -> Any:
    """Replace, drop, add or duplicate one to three values of a tree."""
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        value = _mutate_once(value, rng)
    return value


def _mutate_once(value: Any, rng: random.Random) -> Any:
    # A long list, such as merges, must not get all the mutations.
    is_container = isinstance(value, dict | list) and len(value) > 0
    if not is_container or rng.random() < 0.12:
        return rng.choice(LONG if rng.random() < 0.04 else VALUES)
    copy = dict(value) if isinstance(value, dict) else list(value)
    keys = list(copy) if isinstance(copy, dict) else range(len(copy))
    key, action = rng.choice(keys), rng.random()
    if action < 0.12:
        del copy[key]
    elif action < 0.2 and isinstance(copy, list):
        copy.insert(key, copy[rng.randrange(len(copy))])
    elif action < 0.2:
        copy[rng.choice(("", "x", "step", "\x1b]0;x\x07", "a" * 300))] = rng.choice(VALUES)
    elif action < 0.28:
        copy[key] = copy[rng.choice(keys)]
    elif action < 0.36 and isinstance(copy[key], int | float) and not isinstance(copy[key], bool):
        copy[key] = copy[key] + rng.choice((-1, 1, 10**6))
    else:
        copy[key] = _mutate_once(copy[key], rng)
    return copy


def raw(data: bytes, rng: random.Random) -> bytes:
    """Change, truncate, remove, insert or duplicate bytes."""
    for _ in range(rng.choice((1, 1, 1, 2, 5))):
        at = rng.randrange(len(data) + 1)
        end = min(len(data), at + rng.choice((1, 1, 2, 4, 16, 300)))
        action = rng.randrange(6)
        if action == 0:
            data = data[:at]
        elif action == 1:
            data = data[:at] + data[end:]
        elif action == 2:
            data = data[:at] + rng.choice(RAW) + data[at:]
        elif action == 3:
            data = data[:end] + data[at:]
        elif data:
            at = min(at, len(data) - 1)
            data = data[:at] + bytes([rng.randrange(256)]) + data[at + 1 :]
    return data


def json_file(data: bytes, rng: random.Random) -> bytes:
    """Mutate the values of a JSON file in three cases of four, otherwise the bytes."""
    if rng.random() < 0.25:
        return raw(data, rng)
    return _dump(tree(json.loads(data), rng))


def json_lines(data: bytes, rng: random.Random) -> bytes:
    """Mutate one of the JSON lines, or bytes."""
    if rng.random() < 0.25:
        return raw(data, rng)
    lines = data.splitlines()
    at = rng.randrange(len(lines))
    lines[at] = _dump(tree(json.loads(lines[at]), rng))
    return b"\n".join(lines) + b"\n"


def toml_file(data: bytes, rng: random.Random) -> bytes:
    """Mutate one value of a flat TOML file, or bytes."""
    if rng.random() < 0.25:
        return raw(data, rng)
    lines = data.decode().splitlines()
    at = rng.choice([i for i, line in enumerate(lines) if "=" in line])
    name, _, text = lines[at].partition(" = ")
    value = tree(tomllib.loads(f"v = {text}")["v"], rng)
    literal = {True: "true", False: "false"}.get(value) if isinstance(value, bool) else None
    odd = ("0x" + "f" * 5000, "nan", "-inf", "1979-05-27", "{a = 1}", "[[1], [2]]", '"\\u0000"')
    text = (
        rng.choice(odd)
        if rng.random() < 0.15
        else literal or _dump(value).decode("utf-8", "surrogatepass")
    )
    lines[at] = rng.choice((f"{name} = {text}", f"{name} = {text}", f"[{name}]\nx = {text}"))
    return "\n".join(lines).encode("utf-8", "surrogatepass")


def safetensors_file(data: bytes, rng: random.Random) -> bytes:
    """Mutate the header of a safetensors file, the header's length, or bytes."""
    size = int.from_bytes(data[:8], "little")
    action = rng.random()
    if action < 0.2:
        return raw(data[: 8 + size], rng) + data[8 + size :]
    if action < 0.3:
        odd = (0, 1, size - 1, size + 1, 2**31, 2**62, 2**64 - 1, 10**8)
        return struct.pack("<Q", rng.choice(odd)) + data[8:]
    if action < 0.4:
        return raw(data, rng)
    header = _dump(tree(json.loads(data[8 : 8 + size]), rng))
    return struct.pack("<Q", len(header)) + header + data[8 + size :]


def numbers(data: bytes, rng: random.Random) -> bytes:
    """Replace one of the first int32 of a file, or mutate bytes."""
    if rng.random() < 0.4:
        return raw(data, rng)
    at = 4 * rng.randrange(4)
    value = rng.choice((0, 1, -1, 7, 2**31 - 1, -(2**31), 20240520, 20240801, 65535))
    return data[:at] + struct.pack("<i", value) + data[at + 4 :]


def _dump(value: Any) -> bytes:
    try:
        text = json.dumps(value, ensure_ascii=False)
        return text.encode("utf-8", "surrogatepass" if "\ud800" in text else "strict")
    except (ValueError, RecursionError):
        return b"[" * 900 + b"]" * 900
