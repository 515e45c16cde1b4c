"""The run-time type checker of the tests: beartype, where an int is a float, as PEP 484 has it."""

from beartype import BeartypeConf, beartype

_check = beartype(conf=BeartypeConf(is_pep484_tower=True))


def check(function):
    """Checks calls of `function`, but not constructors: JAX rebuilds dataclass pytrees with placeholders as leaves."""
    return function if function.__name__ == "__init__" else _check(function)
