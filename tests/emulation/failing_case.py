"""A case that fails, to show that the runner says so."""


def case_fails() -> None:
    raise AssertionError("planted")
