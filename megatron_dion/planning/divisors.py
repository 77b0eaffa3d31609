"""Sizes that must divide others, and what to take where they do not."""


def divisors(number: int) -> list[int]:
    """All divisors of a number, from 1 on."""
    return [n for n in range(1, number + 1) if number % n == 0]


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
    better = " or ".join(map(str, below + above)) or "1"
    raise ValueError(f"{flag} {size} does not divide {what}: take {better}")
