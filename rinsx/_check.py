"""Checks of arguments that many functions share."""

from fractions import Fraction


def at_least(least: int, /, **numbers: int | None) -> None:
    """Refuses numbers below `least`, by their names; `None` stands for no number."""
    for name, number in numbers.items():
        if number is not None and number < least:
            raise ValueError(f"`{name}` must be at least {least}; got {number}.")


def rational(name: str, value: Fraction | int | float | str) -> Fraction:
    """A number as it is written: by its shortest text a float is what was typed, so that 0.8 is 4/5."""
    try:
        return Fraction(str(value))
    except (ValueError, ZeroDivisionError):
        raise ValueError(
            f"`{name}` must be a number, and finite: a Fraction, an int, a float, or a text such as '4/5' or '0.8'; "
            f"got {value!r}."
        ) from None
