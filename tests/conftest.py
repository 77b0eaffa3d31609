"""What all folders of tests share."""

from tests.guardian import guard_this_process


def pytest_configure() -> None:
    guard_this_process()
