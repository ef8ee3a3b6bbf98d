"""Signatures: reading, meaning, normal form, equality, enumeration."""

import copy
import itertools
import pickle
import random
from collections import Counter, defaultdict

import pytest
from hypothesis import given, strategies as st

from rinsx import _fingerprint
from rinsx._enumerate import enumerate_signatures
from rinsx._signature import Signature
from rinsx._tree import Block, Power, Sequence

from .helpers import examples


LONGEST = 10**18 - 1  # the largest exponent


#
# An independent reference: a name, a pair (body, exponent), or a list, and its words.
#


def word(tree, env):
    """The visits, spelled out by a naive loop."""
    if isinstance(tree, str):
        return (tree,)
    if isinstance(tree, list):
        return sum((word(part, env) for part in tree), ())
    body, exponent = tree
    return word(body, env) * env.get(exponent, exponent)


def write(tree, rng):
    """One of the many ways to write a tree down."""
    gap = lambda: rng.choice(["", "", " ", "\t", " \n"])
    if isinstance(tree, str):
        return gap() + tree + gap()
    if isinstance(tree, list):
        text = "".join(write(part, rng) for part in tree)
        return f"({text})" if rng.random() < 0.3 else text
    body, exponent = tree
    bare = isinstance(body, str) and rng.random() < 0.7
    base = write(body, rng) if bare else f"({write(body, rng)})"
    if isinstance(exponent, int) and rng.random() < 0.5:
        return base + str(exponent).translate(str.maketrans("0123456789", "⁰¹²³⁴⁵⁶⁷⁸⁹"))
    return f"{base}{gap()}^{gap()}{exponent}{gap()}"


NAMES = {"r": 2, "s": 3}
ENVS = [dict(r=r, s=s) for r in range(1, 6) for s in range(1, 6)]

trees = st.recursive(
    st.sampled_from(["A", "B", "C12"]),
    lambda inner: st.lists(inner, min_size=1, max_size=4) | st.tuples(inner, st.sampled_from([1, 2, 3, "r", "s"])),
    max_leaves=8,
)


@st.composite
def written(draw):
    """A tree and a text for it."""
    tree = draw(trees)
    return tree, write(tree, random.Random(draw(st.integers(0, 99))))


#
# Reading
#


@pytest.mark.parametrize(
    "text, tree",
    [
        ("A", Block("A")),
        ("((A))", Block("A")),
        ("A^1", Block("A")),
        ("AAB", Sequence((Block("A"), Block("A"), Block("B")))),
        ("(A12 B)C", Sequence((Block("A12"), Block("B"), Block("C")))),
        ("(A)^3", Power(Block("A"), 3)),
        ("A ^ r", Power(Block("A"), "r")),
        ("A¹⁰", Power(Block("A"), 10)),
        ("A^003", Power(Block("A"), 3)),
        ("(A^2)^3", Power(Power(Block("A"), 2), 3)),
        ("((A B))^2", Power(Sequence((Block("A"), Block("B"))), 2)),
        ("(A B)^1 C", Sequence((Block("A"), Block("B"), Block("C")))),
        ("A³B", Sequence((Power(Block("A"), 3), Block("B")))),
    ],
)
def test_tree_is_as_written(text, tree):
    assert Signature(text).tree == tree
    assert Signature(Signature(text)).tree == tree


ERRORS = [
    ("", "there is no block in it", 0),
    (" \n", "there is no block in it", 2),
    ("(A B", "this group is never closed", 0),
    ("A ((B)", "this group is never closed", 2),
    ("A)", "no group is open here", 1),
    ("A ( ) B", "this group is empty", 2),
    ("A^0 B", "exponent must be at least 1, got 0", 2),
    ("A⁰", "exponent must be at least 1, got 0", 1),
    ("A^-12", "exponent must be at least 1, got -12", 2),
    ("A^", "^ takes a positive integer or a small letter, got nothing", 2),
    ("(A^ )", "^ takes a positive integer or a small letter, got ')'", 4),
    ("A^²", "^ takes a positive integer or a small letter, got '²'", 2),
    ("A^-", "^ takes a positive integer or a small letter, got '-'", 2),
    ("^2", "an exponent follows a block or a group", 0),
    ("A (²)", "an exponent follows a block or a group", 3),
    ("A^2^3", "a second exponent; write (A^2)^3", 3),
    ("A^1 ^r", "a second exponent; write (A^1)^r", 4),
    ("(A B)³²³ ²", "a second exponent; write ((A B)³²³)^2", 9),
    ("2A", "a digit belongs to a block, as in A1, or to an exponent, as in A^2", 0),
    ("A 1", "a digit belongs to a block, as in A1, or to an exponent, as in A^2", 2),
    ("A^r1", "a digit belongs to a block, as in A1, or to an exponent, as in A^2", 3),
    ("Ar", "a small letter is an exponent, write ^r", 1),
    ("A^rs", "a small letter is an exponent, write ^s", 3),
    ("A*B", "unexpected character '*'", 1),
    ("A É", "unexpected character 'É'", 2),
    ("A\ud800", "unexpected character '\\ud800'", 1),
    ("A1234567890", "the name of a block has at most 8 digits", 0),
    ("A^1234567890123456789", "an exponent has at most 18 digits, got 19", 2),
    ("(" * 17 + "A", "parentheses nest at most 16 deep", 16),
]


@pytest.mark.parametrize("text, why, place", ERRORS)
def test_error_points_at_the_place(text, why, place):
    with pytest.raises(ValueError) as info:
        Signature(text)
    first, quote, pointer = str(info.value).split("\n")
    assert first.startswith(f"malformed signature: {why}")
    assert quote.startswith("    ") and pointer == " " * (4 + place) + "^"


def test_error_message_in_full():
    with pytest.raises(ValueError) as info:
        Signature("A^0 B")
    assert str(info.value) == ("malformed signature: exponent must be at least 1, got 0\n    A^0 B\n      ^")


@pytest.mark.parametrize("place", [0, 39, 40, 41, 100, 200])
def test_error_quotes_a_long_text_around_the_place(place):
    with pytest.raises(ValueError) as info:
        Signature("A" * place + "?" + "B" * 200)
    _, quote, pointer = str(info.value).split("\n")
    assert quote[pointer.index("^")] == "?" and len(quote) < 90


@pytest.mark.parametrize(
    "legal, illegal",
    [
        ("A" + " " * 32_767, "A" + " " * 32_768),
        ("A" * 256, "A" * 257),
        ("(A)" * 128, "(A)" * 128 + "A"),
        ("(" * 16 + "A" + ")" * 16, "(" * 17 + "A" + ")" * 17),
        (f"A^{LONGEST}", f"A^{LONGEST + 1}"),
        ("A" + "9" * 8, "A" + "9" * 9),
    ],
)
def test_caps(legal, illegal):
    Signature(legal)
    with pytest.raises(ValueError, match="malformed signature"):
        Signature(illegal)


@pytest.mark.parametrize(
    "junk",
    ["(", "A", "^", "^ ", "A^", "²", "A^2", "()", "A1", "9", " ", "\n", "\0", "漢"],
)
@pytest.mark.parametrize("characters", [32_768, 10_000_000])
def test_junk_of_any_size_is_refused_in_few_words(junk, characters):
    with pytest.raises(ValueError) as info:
        Signature((junk * (characters // len(junk) + 1))[:characters])
    assert len(str(info.value)) < 400


@given(st.text(alphabet="AB1 ()^r2³0-") | st.text())
@examples(500)
def test_any_text_is_read_or_refused(text):
    try:
        signature = Signature(text)
    except ValueError as error:
        _, quote, pointer = str(error).split("\n")
        assert pointer.strip() == "^" and len(pointer) <= len(quote) + 1
    else:
        assert Signature(str(signature)) == signature


@pytest.mark.parametrize("wrong", [3, None, b"A", ["A"]])
def test_only_text_is_read(wrong):
    with pytest.raises(TypeError, match=type(wrong).__name__):
        Signature(wrong)


#
# What a signature denotes
#


@given(written())
def test_names_visits_and_counts(case):
    tree, text = case
    signature = Signature(text)
    visits = word(tree, NAMES)
    assert signature.blocks == tuple(dict.fromkeys(visits))
    assert set(signature.exponents) == {name for name in NAMES if name in text}
    bound = signature.bind(**{name: NAMES[name] for name in signature.exponents})
    assert bound.visits == visits
    assert bound.counts == Counter(visits)
    assert list(bound.counts) == list(bound.blocks)


def test_exponents_are_in_the_order_of_the_text():
    assert Signature("((A^z B)^s C^a A^z)^r").exponents == ("z", "s", "a", "r")


def test_bind_keeps_what_is_written():
    signature = Signature("A A (A^r B)^s")
    assert signature.bind(r=2).tree == Signature("A A (A^2 B)^s").tree
    assert signature.bind(s=1).tree == Signature("A A A^r B").tree
    assert signature.bind().tree == signature.tree
    assert signature.bind(r=2).bind(s=3) == signature.bind(s=3, r=2)
    assert signature.exponents == ("r", "s")


@pytest.mark.parametrize(
    "values, error, message",
    [
        (dict(t=2), ValueError, r"t=2 binds nothing: .* has the named exponents r, s"),
        (dict(r=2, rr=3), ValueError, "rr=3 binds nothing"),
        (dict(r=True), TypeError, "r=True is not an int but a bool; .* r, s"),
        (dict(r=0), ValueError, "r=0 is out of range: .* at least 1 .* r, s"),
        (dict(r=-3), ValueError, "r=-3 is out of range"),
        (dict(r=LONGEST + 1), ValueError, f"r={LONGEST + 1} is out of range"),
        (dict(r=10**9999), ValueError, "r=<an integer of 33216 bits> is out of range"),
    ],
)
def test_bind_refuses(values, error, message):
    with pytest.raises(error, match=message):
        Signature("A^r B^s").bind(**values)
    with pytest.raises(ValueError, match="'A B' has no named exponents"):
        Signature("A B").bind(r=2)


@pytest.mark.parametrize("wrong", [2.0, "2", None])
def test_bind_takes_only_integers(wrong):
    with pytest.raises(TypeError):
        Signature("A^r").bind(r=wrong)


@pytest.mark.parametrize("what", ["visits", "counts"])
def test_unbound_names_are_refused(what):
    with pytest.raises(ValueError, match=r"bind r first: Signature\('A\^r B'\)\.bind\(r="):
        getattr(Signature("A^r B"), what)
    with pytest.raises(ValueError, match="bind r, s first"):
        getattr(Signature("A^r B^s"), what)


def test_counts_are_exact_and_visits_are_capped():
    many = Signature("A^999999999 B")
    assert many.counts == {"A": 999_999_999, "B": 1}
    with pytest.raises(ValueError, match="makes 1000000000 visits.* at most 1000000"):
        _ = many.visits
    assert len(Signature("(A^1000)^1000").visits) == 1_000_000
    with pytest.raises(ValueError, match="1000001 visits"):
        _ = Signature("(A^1000)^1000 A").visits

    huge = "(" * 16 + f"A^{LONGEST}" + f" B)^{LONGEST}" * 16
    powers = [LONGEST**i for i in range(1, 18)]
    assert Signature(huge).counts == {"A": powers[-1], "B": sum(powers[:-1])}
    with pytest.raises(ValueError, match="an integer of 1017 bits"):
        _ = Signature(huge).visits


#
# The normal form
#


@pytest.mark.parametrize(
    "text, normal, degree",
    [
        ("A B", "A B", 0),
        ("A (B C)", "A B C", 0),
        ("(A12)", "A12", 0),
        ("A^3B", "A^3 B", 1),
        ("AAB", "A^2 B", 1),
        ("A^2 A^3", "A^5", 1),
        ("(A^2)^3", "A^6", 1),
        ("((A B)^2)^3", "(A B)^6", 1),
        ("A B A B", "(A B)^2", 1),
        ("(A B)^2 A B", "(A B)^3", 1),
        ("A B (A B)^2", "(A B)^3", 1),
        ("(A B)^2 (A B)^3 A B A", "(A B)^6 A", 1),
        ("(A B A B)^2", "(A B)^4", 1),
        ("A^2 B A A B", "(A^2 B)^2", 2),
        ("(A^2 B)^2 C", "(A^2 B)^2 C", 2),
        ("ABABCABABC", "((A B)^2 C)^2", 2),
        # Fewest parts first.
        ("A B A A B A", "A B A^2 B A", 1),
        # Leftmost first.
        ("A B A B A", "(A B)^2 A", 1),
        # Names stay where they are, and are never multiplied.
        ("(A^r)(A^r)", "(A^r)^2", 2),
        ("A^r (A^r)^2", "(A^r)^3", 2),
        ("A^r A", "A^r A", 1),
        ("A A^r", "A A^r", 1),
        ("A^r A^s", "A^r A^s", 1),
        ("(A^r)^s", "(A^r)^s", 2),
        ("(A^s)^r", "(A^s)^r", 2),
        ("(A^2)^r", "(A^2)^r", 2),
        ("(A^r)^2", "(A^r)^2", 2),
        ("(A^r B)^s A^r B", "(A^r B)^s A^r B", 2),
        ("(A^r B)^2 A^r B", "(A^r B)^3", 2),
        # Exponents that would not fit stay apart.
        (f"A^{LONGEST - 1} A A", f"A^{LONGEST} A", 1),
        (f"(A^{LONGEST})^2", f"(A^{LONGEST})^2", 2),
        # So do repeats whose parentheses would nest too deep.
        ("(" * 15 + "A B A B" + ")^r" * 15, "(" * 16 + "A B)^2" + ")^r" * 15, 16),
        ("(" * 16 + "A B A B" + ")^r" * 16, "(" * 16 + "A B A B" + ")^r" * 16, 16),
    ],
)
def test_normal_form(text, normal, degree):
    signature = Signature(text)
    assert str(signature) == normal
    assert repr(signature) == f"Signature({normal!r})"
    assert signature.degree == degree
    assert Signature(normal) == signature


def check_normal_form(signature):
    text = str(signature)
    again = Signature(text)
    assert str(again) == text
    assert again.tree == signature._normal
    assert again == signature and hash(again) == hash(signature)
    assert again.degree == signature.degree
    assert again.blocks == signature.blocks


@given(written())
@examples(200)
def test_normal_form_is_idempotent_and_has_the_same_visits(case):
    tree, text = case
    signature = Signature(text)
    check_normal_form(signature)
    for env in (dict(r=1, s=1), NAMES, dict(r=4, s=1)):
        bind = {name: env[name] for name in signature.exponents}
        assert Signature(str(signature)).bind(**bind).visits == word(tree, env)


@given(st.text(alphabet="AB", min_size=1, max_size=60), st.integers(1, 4))
def test_repeats_are_found_whatever_they_are(body, times):
    signature = Signature(body * times)
    check_normal_form(signature)
    assert "".join(signature.visits) == body * times
    assert Signature(f"({body})^{times}") == signature


def thue_morse(n):
    return "".join("AB"[i.bit_count() % 2] for i in range(n))


def square_free(n):
    """Where no word stands twice side by side, nothing folds."""
    text = "A"
    while len(text) < n:
        text = "".join({"A": "ABC", "B": "AC", "C": "B"}[c] for c in text)
    return text[:n]


def zimin(letters):
    return zimin(letters[1:]) + letters[0] + zimin(letters[1:]) if letters else ""


def fibonacci(n):
    a, b = "A", "AB"
    while len(b) < n:
        a, b = b, b + a
    return b[:n]


HARD = {
    "distinct": "".join(f"A{i}" for i in range(256)),
    "long": " ".join(f"A{10**7 + i}^{LONGEST - i}" for i in range(256)),
    "named": "".join(f"A{i}^{chr(97 + i % 26)}" for i in range(256)),
    "same": "A" * 256,
    "period 2": "AB" * 128,
    "period 16": "ABCDEFGHIJKLMNOP" * 16,
    "thue-morse": thue_morse(256),
    "square-free": square_free(256),
    "zimin": zimin("HGFEDCBA"),
    "fibonacci": fibonacci(256),
    "twice": square_free(128) * 2,
    "groups": "(A B)^2 A" * 64,
    "named groups": "(A B)^r" * 85,
    "deep": "(" * 16 + square_free(120) * 2 + ")^r" * 16,
    "deep names": "(" * 16 + "A" + "".join(f"^{c})" for c in "abcdefghijklmnop"),
    "deep and long": "(" * 16 + f"A^{LONGEST}" + f" B)^{LONGEST}" * 16,
}


@pytest.mark.parametrize("text", HARD.values(), ids=HARD.keys())
def test_normal_form_of_hard_texts(text):
    check_normal_form(Signature(text))
    if text.isalpha():
        assert "".join(Signature(text).visits) == text


#
# Equality
#


@pytest.mark.parametrize(
    "left, right, equal",
    [
        ("(A B)^r A", "A (B A)^r", True),
        ("(A^r)^s", "(A^s)^r", True),
        ("A^r A^s", "A^s A^r", True),
        ("(A^2)^r", "(A^r)^2", True),
        ("A^999999999 A", "A^1000000000", True),
        ("(A^r B)^s A^r", "A^r (B A^r)^s", True),
        ("(A A)^r A", "A A^r A^r", True),
        ("(A B A)^2", "A B A^2 B A", True),
        ("(A^r B)^s", "A^r (B A^r)^s", False),
        ("A^r", "A^s", False),
        ("A^r", "B^r", False),
        ("A^r", "A", False),
        ("A1", "A01", False),
        ("(A B)^r", "A^r B^r", False),
        ("A B", "B A", False),
        ("A^2", "A^3", False),
        ("A^r B", "A^r B A", False),
    ],
)
def test_equality(left, right, equal):
    assert (Signature(left) == Signature(right)) == equal
    assert (hash(Signature(left)) == hash(Signature(right))) == equal
    assert (Signature(left) != Signature(right)) != equal


def test_equality_agrees_with_spelling_out():
    rng = random.Random(0)

    def draw(depth):
        if depth == 0:
            return rng.choice("AB")
        if rng.random() < 0.5:
            return [draw(depth - 1), draw(depth - 1)]
        return draw(depth - 1), rng.choice([1, 2, 3, "r", "s"])

    by_meaning, by_word = defaultdict(set), defaultdict(set)
    drawn = [draw(rng.choice([1, 2, 3])) for _ in range(1500)]
    for i, tree in enumerate(drawn):
        by_meaning[Signature(write(tree, rng))].add(i)
        by_word[tuple(word(tree, env) for env in ENVS)].add(i)
    assert len(by_word) > 300 and len(by_word) < 1500
    assert sorted(map(sorted, by_meaning.values())) == sorted(map(sorted, by_word.values()))


@given(written(), written())
def test_equality_of_pairs_agrees_with_spelling_out(left, right):
    same = all(word(left[0], env) == word(right[0], env) for env in ENVS)
    assert (Signature(left[1]) == Signature(right[1])) == same


@given(written(), written())
def test_a_loop_can_be_rotated(first, second):
    a, b = first[1], second[1]
    assert Signature(f"({a} {b})^z {a}") == Signature(f"{a} ({b} {a})^z")


def test_equality_of_huge_exponents():
    nest = lambda e: Signature("(" * 16 + f"A^{LONGEST} B" + f")^{e} A" * 16)
    assert nest(LONGEST) == nest(LONGEST)
    assert nest(LONGEST) != nest(LONGEST - 1)
    left = f"(A^{LONGEST} B)^{LONGEST} A^{LONGEST}"
    right = f"A^{LONGEST} (B A^{LONGEST})^{LONGEST}"
    assert Signature(left) == Signature(right)
    assert Signature(left) != Signature(right + " A")
    split = [f"A^{10**17 * i}" for i in range(1, 5)]
    assert Signature("".join(split)) == Signature("".join(reversed(split)))
    assert Signature("".join(split)) == Signature(f"A^{10**18 - 1} A")


def test_arithmetic_modulo_the_prime():
    p = _fingerprint._MODULUS
    rng = random.Random(0)
    for x in [
        0,
        1,
        p - 1,
        p,
        p + 1,
        p * p,
        (p - 1) ** 2,
        *(rng.randrange(p * p) for _ in range(99)),
    ]:
        assert _fingerprint._reduce(x) == x % p
    for i in (1, 2, 3, 17, LONGEST):
        a, b = rng.randrange(2, p), rng.randrange(p)
        total = b * (pow(a, i, p) - 1) * pow(a - 1, -1, p) % p
        assert _fingerprint._power((a, b), i) == (pow(a, i, p), total)


def test_other_kinds_are_never_equal():
    assert Signature("A") != "A"
    assert Signature("A").__eq__("A") is NotImplemented


def test_signatures_are_values():
    signature = Signature("(A^r B)^2")
    for change in (
        lambda s: setattr(s, "tree", Block("A")),
        lambda s: delattr(s, "tree"),
    ):
        with pytest.raises(AttributeError):
            change(signature)
    signature.bind(r=2).counts["A"] = 0
    assert signature.bind(r=2).counts == {"A": 4, "B": 2}
    for twin in (copy.deepcopy(signature), pickle.loads(pickle.dumps(signature))):
        assert twin == signature and twin.tree == signature.tree


#
# Enumeration
#


def words(blocks, visits):
    """All words up to the names of their letters, by brute force."""
    letters = "ABCDEFGH"[:blocks]
    found = set()
    for length in range(1, visits + 1):
        for each in itertools.product(letters, repeat=length):
            names = dict(zip(dict.fromkeys(each), letters))
            if len(names) == blocks:
                found.add("".join(names[letter] for letter in each))
    return sorted(found, key=lambda each: (len(each), each))


@pytest.mark.parametrize("blocks, visits", [(1, 5), (2, 2), (2, 8), (3, 3), (3, 6), (4, 6)])
@pytest.mark.parametrize("degree", [0, 1, 2, 9])
def test_enumeration_is_complete_and_in_order(blocks, visits, degree):
    made = list(enumerate_signatures(blocks, visits, degree))
    spelled = ["".join(signature.visits) for signature in made]
    kept = [w for w in words(blocks, visits) if Signature(w).degree <= degree]
    assert spelled == kept
    assert len(set(made)) == len(made)
    assert made == list(enumerate_signatures(blocks, visits, degree))
    for signature in made:
        assert str(signature) == str(Signature(str(signature)))
        assert signature.tree == signature._normal


def test_enumeration_has_the_variants_that_a_comparison_needs():
    made = list(map(str, enumerate_signatures(blocks=2, visits=6)))
    assert len(made) == 57
    assert made[:5] == ["A B", "A^2 B", "A B A", "A B^2", "A^3 B"]
    assert {"(A B)^3", "A B^5", "(A^2 B)^2"} <= set(made)
    assert len(list(enumerate_signatures(2, 6, degree=1))) == 55


def test_enumeration_is_lazy():
    first = next(enumerate_signatures(26, 256))
    assert first.visits == tuple("ABCDEFGHIJKLMNOPQRSTUVWXYZ")
    # No word over two letters is longer than this without a repeat.
    assert list(map(str, enumerate_signatures(2, 256, degree=0))) == ["A B", "A B A"]


@pytest.mark.parametrize(
    "bounds, message",
    [
        ((0, 5), "blocks must be from 1 to 26; got 0"),
        ((27, 30), "blocks must be from 1 to 26; got 27"),
        ((3, 2), "visits must be from 3 to 256; got 2"),
        ((3, 257), "visits must be from 3 to 256; got 257"),
        ((2, 6, -1), "degree must be at least 0; got -1"),
    ],
)
def test_enumeration_refuses_bad_bounds_at_once(bounds, message):
    with pytest.raises(ValueError, match=message):
        enumerate_signatures(*bounds)
