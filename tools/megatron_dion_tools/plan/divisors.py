"""Sizes that must divide others, and what to take where they do not."""

from collections.abc import Sequence


def divisors(number: int) -> list[int]:
    """All divisors of a number, from 1 on."""
    return [n for n in range(1, number + 1) if number % n == 0]


def one_of(sizes: Sequence[int]) -> str:
    """Sizes among which there is a choice, in words."""
    *others, last = map(str, sizes)
    return f"{', '.join(others)} or {last}" if others else last


def check_divides(flag: str, size: int, number: int, what: str) -> None:
    """Refuses a size with the nearest ones that would do.

    Args:
        flag: what gives the size.
        size: its value.
        number: what it has to divide.
        what: the number in words, with its value.

    Raises:
        ValueError: it does not divide it.
    """
    if size >= 1 and number % size == 0:
        return
    below = [n for n in divisors(number) if n < size][-1:]
    above = [n for n in divisors(number) if n > size][:1]
    raise ValueError(f"{flag} {size} does not divide {what}: take {one_of(below + above or [1])}")
