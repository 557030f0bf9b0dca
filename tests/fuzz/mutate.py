"""Seeded mutations: of a tree of values, of bytes, and of a tree inside bytes."""

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


def tree(value: Any, dice: random.Random) -> Any:
    """A copy of a tree with one to three values replaced, dropped, added or doubled."""
    for _ in range(dice.choice((1, 1, 1, 2, 3))):
        value = _once(value, dice)
    return value


def _once(value: Any, dice: random.Random) -> Any:
    # Long lists, such as merges, would otherwise take all the mutations.
    is_branch = isinstance(value, dict | list) and len(value) > 0
    if not is_branch or dice.random() < 0.12:
        return dice.choice(LONG if dice.random() < 0.04 else VALUES)
    copy = dict(value) if isinstance(value, dict) else list(value)
    keys = list(copy) if isinstance(copy, dict) else range(len(copy))
    key, what = dice.choice(keys), dice.random()
    if what < 0.12:
        del copy[key]
    elif what < 0.2 and isinstance(copy, list):
        copy.insert(key, copy[dice.randrange(len(copy))])
    elif what < 0.2:
        copy[dice.choice(("", "x", "step", "\x1b]0;x\x07", "a" * 300))] = dice.choice(VALUES)
    elif what < 0.28:
        copy[key] = copy[dice.choice(keys)]
    elif what < 0.36 and isinstance(copy[key], int | float) and not isinstance(copy[key], bool):
        copy[key] = copy[key] + dice.choice((-1, 1, 10**6))
    else:
        copy[key] = _once(copy[key], dice)
    return copy


def raw(data: bytes, dice: random.Random) -> bytes:
    """Bytes flipped, cut off, taken out, put in or doubled."""
    for _ in range(dice.choice((1, 1, 1, 2, 5))):
        at = dice.randrange(len(data) + 1)
        end = min(len(data), at + dice.choice((1, 1, 2, 4, 16, 300)))
        what = dice.randrange(6)
        if what == 0:
            data = data[:at]
        elif what == 1:
            data = data[:at] + data[end:]
        elif what == 2:
            data = data[:at] + dice.choice(RAW) + data[at:]
        elif what == 3:
            data = data[:end] + data[at:]
        elif data:
            at = min(at, len(data) - 1)
            data = data[:at] + bytes([dice.randrange(256)]) + data[at + 1 :]
    return data


def json_file(data: bytes, dice: random.Random) -> bytes:
    """A JSON file: three times in four its values, else its bytes."""
    if dice.random() < 0.25:
        return raw(data, dice)
    return _dump(tree(json.loads(data), dice))


def json_lines(data: bytes, dice: random.Random) -> bytes:
    """One line of JSON lines, or bytes."""
    if dice.random() < 0.25:
        return raw(data, dice)
    lines = data.splitlines()
    at = dice.randrange(len(lines))
    lines[at] = _dump(tree(json.loads(lines[at]), dice))
    return b"\n".join(lines) + b"\n"


def toml_file(data: bytes, dice: random.Random) -> bytes:
    """One value of a flat TOML file, or bytes."""
    if dice.random() < 0.25:
        return raw(data, dice)
    lines = data.decode().splitlines()
    at = dice.choice([i for i, line in enumerate(lines) if "=" in line])
    name, _, text = lines[at].partition(" = ")
    value = tree(tomllib.loads(f"v = {text}")["v"], dice)
    spelled = {True: "true", False: "false"}.get(value) if isinstance(value, bool) else None
    odd = ("0x" + "f" * 5000, "nan", "-inf", "1979-05-27", "{a = 1}", "[[1], [2]]", '"\\u0000"')
    text = (
        dice.choice(odd)
        if dice.random() < 0.15
        else spelled or _dump(value).decode("utf-8", "surrogatepass")
    )
    lines[at] = dice.choice((f"{name} = {text}", f"{name} = {text}", f"[{name}]\nx = {text}"))
    return "\n".join(lines).encode("utf-8", "surrogatepass")


def safetensors_file(data: bytes, dice: random.Random) -> bytes:
    """The header of a safetensors file, its length, or bytes."""
    size = int.from_bytes(data[:8], "little")
    what = dice.random()
    if what < 0.2:
        return raw(data[: 8 + size], dice) + data[8 + size :]
    if what < 0.3:
        odd = (0, 1, size - 1, size + 1, 2**31, 2**62, 2**64 - 1, 10**8)
        return struct.pack("<Q", dice.choice(odd)) + data[8:]
    if what < 0.4:
        return raw(data, dice)
    header = _dump(tree(json.loads(data[8 : 8 + size]), dice))
    return struct.pack("<Q", len(header)) + header + data[8 + size :]


def numbers(data: bytes, dice: random.Random) -> bytes:
    """One of the int32 at the beginning of a file, or bytes."""
    if dice.random() < 0.4:
        return raw(data, dice)
    at = 4 * dice.randrange(4)
    value = dice.choice((0, 1, -1, 7, 2**31 - 1, -(2**31), 20240520, 20240801, 65535))
    return data[:at] + struct.pack("<i", value) + data[at + 4 :]


def _dump(value: Any) -> bytes:
    try:
        text = json.dumps(value, ensure_ascii=False)
        return text.encode("utf-8", "surrogatepass" if "\ud800" in text else "strict")
    except (ValueError, RecursionError):
        return b"[" * 900 + b"]" * 900
