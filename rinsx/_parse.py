"""Reads the text of a signature, and points at what is wrong with it."""

import re

from ._tree import (
    Block,
    MAX_BLOCK_DIGITS,
    MAX_CHARACTERS,
    MAX_EXPONENT_DIGITS,
    MAX_NESTING,
    MAX_TERMS,
    Node,
    Power,
    sequence,
)


RAISED = "⁰¹²³⁴⁵⁶⁷⁸⁹"
_TOKEN = re.compile(
    r"(?P<block>[A-Z](?P<digits>[0-9]*))"
    rf"|(?P<power>\^\s*(?:(?P<number>-?[0-9]+)|(?P<name>[a-z]))|(?P<raised>[{RAISED}]+))"
    r"|(?P<open>\()|(?P<close>\))|\s+"
)
_HAT = re.compile(r"\^\s*")


def parse(text: str) -> Node:
    if len(text) > MAX_CHARACTERS:
        why = f"at most {MAX_CHARACTERS} characters are allowed, got {len(text)}"
        raise _malformed(why, text, MAX_CHARACTERS)
    groups: list[list[Node]] = [[]]  # the parts so far of each group that is open
    opened: list[int] = []  # where these groups begin, but for the outermost
    begin, raised = 0, False  # where the last term begins; whether it has an exponent
    terms = at = 0
    while at < len(text):
        token = _TOKEN.match(text, at)
        if token is None:
            raise _unreadable(text, at)
        parts = groups[-1]
        if token["block"] or token["open"]:
            terms += 1
            if terms > MAX_TERMS:
                why = f"at most {MAX_TERMS} blocks and groups are allowed"
                raise _malformed(why, text, at)
        if token["block"]:
            if len(token["digits"]) > MAX_BLOCK_DIGITS:
                why = f"the name of a block has at most {MAX_BLOCK_DIGITS} digits"
                raise _malformed(why, text, at)
            parts.append(Block(token["block"]))
            begin, raised = at, False
        elif token["open"]:
            if len(opened) == MAX_NESTING:
                why = f"parentheses nest at most {MAX_NESTING} deep"
                raise _malformed(why, text, at)
            groups.append([])
            opened.append(at)
        elif token["close"]:
            if not opened:
                raise _malformed("no group is open here", text, at)
            begin, raised = opened.pop(), False
            if not groups.pop():
                raise _malformed("this group is empty", text, begin)
            groups[-1].append(sequence(parts))
        elif token["power"]:
            exponent = _exponent(token)
            if not parts:
                raise _malformed("an exponent follows a block or a group", text, at)
            if raised:
                term = shorten(" ".join(text[begin:at].split()))
                why = f"a second exponent; write ({term})^{exponent}"
                raise _malformed(why, text, at)
            if exponent != 1:
                parts[-1] = Power(parts[-1], exponent)
            raised = True
        at = token.end()
    if opened:
        raise _malformed("this group is never closed", text, opened[-1])
    if not groups[0]:
        why = "there is no block in it; write one such as A^3 B"
        raise _malformed(why, text, len(text))
    return sequence(groups[0])


def _exponent(token: re.Match[str]) -> int | str:
    if token["name"]:
        return token["name"]
    which = "number" if token["number"] else "raised"
    digits = token[which].translate(str.maketrans(RAISED, "0123456789"))
    number = len(digits.lstrip("-"))
    if number > MAX_EXPONENT_DIGITS:
        why = f"an exponent has at most {MAX_EXPONENT_DIGITS} digits, got {number}"
        raise _malformed(why, token.string, token.start(which))
    if int(digits) < 1:
        why = f"exponent must be at least 1, got {int(digits)}"
        raise _malformed(why, token.string, token.start(which))
    return int(digits)


def _unreadable(text: str, at: int) -> ValueError:
    """The error for a place where no token begins."""
    if hat := _HAT.match(text, at):
        at = hat.end()
        got = repr(text[at]) if at < len(text) else "nothing"
        why = f"^ takes a positive integer or a small letter, got {got}"
    elif text[at] in "0123456789":
        why = "a digit belongs to a block, as in A1, or to an exponent, as in A^2"
    elif "a" <= text[at] <= "z":
        why = f"a small letter is an exponent, write ^{text[at]}"
    else:
        why = f"unexpected character {text[at]!r}"
    return _malformed(why, text, at)


def _malformed(why: str, text: str, at: int) -> ValueError:
    """An error that quotes the text around a place and points at it."""
    low, high = max(0, at - 40), at + 30
    clean = lambda c: c if c.isprintable() else " " if c.isspace() else "\ufffd"
    before = ("..." if low else "") + "".join(map(clean, text[low:at]))
    after = "".join(map(clean, text[at:high])) + ("..." if high < len(text) else "")
    pointer = " " * len(before) + "^"
    return ValueError(f"malformed signature: {why}\n    {before}{after}\n    {pointer}")


def shorten(text: str) -> str:
    return text if len(text) <= 60 else text[:57] + "..."


def show(value: object) -> str:
    # Python refuses to print integers of many thousand digits.
    if isinstance(value, int) and value.bit_length() > 190:
        return f"<an integer of {value.bit_length()} bits>"
    return shorten(repr(value))
