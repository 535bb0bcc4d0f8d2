"""Damaged inputs: bytes and JSON values, changed a little or replaced by what nobody expects there."""

from __future__ import annotations

import copy
import json
from random import Random
from typing import Any

STRANGE: list[Any] = [
    None, True, False, 0, -1, 1, 2, 0.5, 1e308, float("nan"), float("inf"), 2**31, 2**63, 2**70, "", "1", "x", "../../etc/passwd",
    "\ud83d", "\x1b[31m", "<b>|</b>", "ä" * 300, [], [[]], [0], ["x"], [None, 1], {}, {"": {}}, {"kind": "low_rank"}, {"a": [{}]},
]  # fmt: skip
PIECES = [
    b"", b"\0", b"\xff", b"\xef\xbb\xbf", b"\xed\xa0\xbd", b"{", b"}", b"[", b"]", b'"', b":", b",", b"\n", b"- ", b"&a ", b"*a",
    b"!!python/object:os.system ", b"!!binary ", b"<<: ", b"null", b"NaN", b"-1", b"1e999", b"9" * 400, b"\\ud83d", b"{{ x }}",
    b"? ", b"| ", b"\t", b"[" * 100, b"{a: " * 100, b"0x", b"2026-11-30", b"12:30:00", b"\x85", b"\xe2\x80\xa8",
]  # fmt: skip


def damage_bytes(raw: bytes, draw: Random) -> bytes:
    """Return ``raw`` after one to four changes: a byte, a piece put in, cut out, doubled or moved, or the end cut off."""
    out = bytearray(raw)
    for _ in range(draw.randint(1, 4)):
        begin = draw.randrange(len(out) + 1)
        end = min(len(out), begin + draw.choice((0, 1, 1, 2, 8, 64)))
        change = draw.randrange(6)
        if change == 0 and begin < len(out):
            out[begin] = draw.randrange(256)
        elif change == 1:
            out[begin:end] = draw.choice(PIECES)
        elif change == 2:
            del out[begin:end]
        elif change == 3:
            out[begin:begin] = out[begin:end] * draw.choice((1, 2, 30))
        elif change == 4:
            out[begin:begin] = out[(where := draw.randrange(len(out) + 1)) : where + 16]
        elif draw.random() < 0.3:
            del out[begin:]
    return bytes(out)


def damage_value(value: Any, draw: Random) -> Any:
    """Return a copy of a JSON value in which one to three nodes are replaced, removed, doubled, renamed or nested."""
    out = [copy.deepcopy(value)]
    for _ in range(draw.choice((1, 1, 1, 2, 3))):
        places = list(_places(out))
        holder, key = places[draw.randrange(len(places))]
        change = draw.randrange(8)
        if change == 0 and holder is not out:
            del holder[key]
        elif change == 1 and isinstance(holder, dict):
            holder[draw.choice((f"{key}s", "", "kind", "format_version"))] = holder.pop(key)
        elif change == 2 and isinstance(holder, list):
            holder.append(copy.deepcopy(holder[key]))
        elif change == 3:
            holder[key] = draw.choice(([holder[key]], {"x": holder[key]}, str(holder[key]), [holder[key]] * 3))
        elif change == 4:
            other, name = places[draw.randrange(len(places))]
            holder[key] = copy.deepcopy(other[name])
        elif change == 5 and isinstance(holder[key], int | float):
            holder[key] = draw.choice((-1, 2, 10**6, 0.5)) * holder[key]
        else:
            holder[key] = copy.deepcopy(draw.choice(STRANGE))
    return out[0] if out else None


def damage_json(raw: bytes, draw: Random) -> bytes:
    """Return a JSON text with a changed value, or with changed bytes."""
    if draw.random() < 0.25:
        return damage_bytes(raw, draw)
    return json.dumps(damage_value(json.loads(raw), draw)).encode()


def damage_safetensors(raw: bytes, draw: Random) -> bytes:
    """Return a file of safetensors whose header lies, or that is cut off; the numbers in it stay."""
    size = int.from_bytes(raw[:8], "little")
    header, data = raw[8 : 8 + size], raw[8 + size :]
    change = draw.randrange(4)
    if change == 0:
        return raw[: draw.randrange(len(raw))]
    if change == 1:
        return raw[:8] + damage_bytes(header, draw) + data
    header = damage_json(header, draw)
    length = len(header) if change == 2 else draw.choice((0, 7, len(header) - 1, 2**40, 2**64 - 1))
    return length.to_bytes(8, "little") + header + data


def _places(value: Any):
    """Yield ``(holder, key)`` of all nodes inside ``value``."""
    for key in list(value) if isinstance(value, dict) else range(len(value)):
        yield value, key
        if isinstance(value[key], dict | list):
            yield from _places(value[key])
