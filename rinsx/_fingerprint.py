"""Fingerprints: signatures of the same visits have the same, and others do not."""

import hashlib
from functools import reduce

from ._tree import Block, Node, Power, Sequence


# A visit is an affine map x -> a x + b modulo a prime, with one a for all blocks and
# one b for each; maps compose by fast powering. Several visits then make (a^length, the
# sum of a^position b): unlike visits, unlike polynomials in a and the b, of a degree at
# most one above the larger length. A polynomial vanishes at no more than degree /
# modulus of all points (Schwartz and Zippel), and hash values stand for random ones.
# Integers never wrap around: 256 terms, each in 16 groups, with exponents of 18 digits
# on all of these, make less than 256 * 10^(18 * 17) < 2^1025 visits, so the probability
# is below 2^-254. Names are numbers, drawn likewise. Those of nested names multiply and
# can wrap around: by chance that hurts no more than any other hash does, but collisions
# can be built.
_MODULUS = 2**1279 - 1  # a prime of Mersenne


def _point(what: str, bits: int) -> int:
    digest = hashlib.shake_256(f"rinsx signature: {what}".encode()).digest(bits // 8)
    return int.from_bytes(digest, "big")


# 65 bits more than the modulus, so that remainders are as good as uniform.
_letter = lambda what: _point(what, 1344) % _MODULUS
_BASE = _letter("base")


def fingerprint(node: Node) -> tuple[int, int]:
    match node:
        case Block(name):
            return _BASE, _letter(f"block {name}")
        case Power(body, exponent):
            if isinstance(exponent, str):
                # Above every integer that can be written, and 160 bits to choose from.
                exponent = 2**160 + _point(f"exponent {exponent}", 160)
            return _power(fingerprint(body), exponent)
        case Sequence(parts):
            return reduce(_compose, map(fingerprint, parts))


def _compose(f: tuple[int, int], g: tuple[int, int]) -> tuple[int, int]:
    return _reduce(f[0] * g[0]), _reduce(f[0] * g[1] + f[1])


def _reduce(x: int) -> int:
    # The remainder of a product without a division: modulo itself, 2^1279 is 1.
    x = (x & _MODULUS) + (x >> 1279)
    return x - _MODULUS if x >= _MODULUS else x


def _power(f: tuple[int, int], exponent: int) -> tuple[int, int]:
    power = (1, 0)
    while exponent:
        if exponent & 1:
            power = _compose(power, f)
        f = _compose(f, f)
        exponent >>= 1
    return power
