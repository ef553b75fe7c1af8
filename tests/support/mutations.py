"""Damage for the fuzz tests: bytes flipped, cut and spliced; values of JSON trees swapped for hostile ones.

All of it is drawn from a `random.Random`, so a seed says exactly which input failed.
"""

import copy
import json
import random
from typing import Any

TOKENS = (
    b"", b"\x00", b"\xff\xfe", b"\xef\xbb\xbf", b"\x1b[2J", b"\n", b"\r", b"\t", b"\xc3\x28", b"\xed\xa0\x80",
    b'"', b"'", b"{", b"}", b"[", b"]", b":", b",", b"\\", b"\\u0000", b"\\ud800", b"null", b"true", b"NaN", b"-1e999",
    b"1" * 5000, b"[" * 3000, b'{"a":' * 3000, b"- " * 500, b"&a ", b"*a", b"<<: ", b"!!binary ", b"!!timestamp ",
    b"!!python/object/apply:os.system ", b"? ", b"| ", b"0x_", b"2001-99-99", b"%",
    b"\xff\xff\xff\xff", b"\x7f\xff\xff\xff",
)  # fmt: skip
VALUES: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 2**31, 2**63, 10**30, 1.5, -0.0, 1e308, float("nan"), float("inf"),
    "", " ", "\x00", "\n", "\x1b[31m", "x" * 5000, "\ud800", "\u202e", "/etc/passwd", "../../etc/passwd", ".", "..",
    "a/..", "<image>", "<|image_pad|>", "{{ 7 * 7 }}", "nan", "1e400", [], {}, [[]], [None], {"": None}, [1, "a", {}],
    {"a": [{"b": 1}]},
)  # fmt: skip
DEPTHS = (3, 100, 500, 5000)


def mutate_bytes(data: bytes, rng: random.Random) -> bytes:
    """One to four changes, each at a random place."""
    for _ in range(rng.choice((1, 1, 2, 4))):
        at = rng.randrange(len(data) + 1)
        to = min(len(data), at + rng.choice((1, 1, 2, 4, 16, 256)))
        kind = rng.randrange(7)
        if kind == 0 and at < len(data):
            data = data[:at] + bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at + 1 :]
        elif kind == 1:
            data = data[:at] + rng.randbytes(to - at) + data[to:]
        elif kind == 2:
            data = data[:at] + rng.choice(TOKENS) + data[at:]
        elif kind == 3:
            data = data[:at] + rng.choice(TOKENS) + data[to:]
        elif kind == 4:
            data = data[:at] + data[to:]
        elif kind == 5:
            data = data[:at] + data[at:to] * rng.choice((2, 3, 50)) + data[to:]
        else:
            data = data[:at]
    return data


def mutate_tree(tree: Any, rng: random.Random) -> Any:
    """A copy with one or two values swapped, dropped, doubled, wrapped or renamed, anywhere in it."""
    tree = [copy.deepcopy(tree)]
    for _ in range(rng.choice((1, 1, 2))):
        container, key = rng.choice(list(_places(tree)))
        value = container[key]
        kind = rng.randrange(6)
        if kind <= 2:
            container[key] = copy.deepcopy(rng.choice(VALUES))
        elif kind == 3:
            container[key] = rng.choice(([value], {"a": value}, [value, value], str(value)))
        elif kind == 4 and container is not tree:
            del container[key]
        elif kind == 5 and isinstance(container, dict):
            container[rng.choice(("", "\x00", "a" * 300, "__class__", key.upper()))] = container.pop(key)
    return tree[0]


def mutate_json(tree: Any, rng: random.Random) -> bytes:
    """A JSON text of a mutated tree, of bytes mutated, with a key given twice, or nested deeper than a stack is."""
    kind = rng.randrange(8)
    if kind <= 3:
        return json.dumps(mutate_tree(tree, rng)).encode()
    text = json.dumps(tree, ensure_ascii=False)
    if kind <= 5:
        return mutate_bytes(text.encode(), rng)
    if kind == 6:
        return text.replace('{"', '{"a": 1, "a": [], "', 1).encode()
    depth = rng.choice(DEPTHS)
    opening, closing = rng.choice((("[", "]"), ('{"a":', "}")))
    at = text.find(":") + 1
    return f"{text[:at]}{opening * depth}1{closing * depth}{text[at + 1 :]}".encode()


def _places(tree: Any):
    """(container, key) of every value in the tree."""
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in items:
        yield tree, key
        yield from _places(value)
