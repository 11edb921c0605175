"""Every error class: its HTTP status, and that it crosses processes with all that the client receives."""

import inspect
import pickle
import re

import pytest

from server import errors
from server.errors import STATUS, NbestError, OverloadedError, RateLimitError, http_status
from server.http.errors import error_reply


def subclasses(base: type[NbestError]) -> list[type[NbestError]]:
    return [base, *(descendant for child in base.__subclasses__() for descendant in subclasses(child))]


CLASSES = [error_class for error_class in subclasses(NbestError) if error_class.__module__ == errors.__name__]


def example(error_class: type[NbestError]) -> NbestError:
    """An error of this class, with every argument of its constructor set."""
    if issubclass(error_class, RateLimitError):
        return error_class("Try again.", retry_after_s=7.5, unit="tokens")
    if issubclass(error_class, OverloadedError):
        return error_class("Try again.", retry_after_s=7.5, reason="queue")
    return error_class("Shorten it.", param="messages")


def documented_statuses() -> dict[str, int]:
    """Class name -> status, from the tree in the docstring of the module."""
    assert errors.__doc__ is not None
    return {name: int(status) for name, status in re.findall(r"(\w+Error) +(\d{3}) ", errors.__doc__)}


def documented_bases() -> dict[str, str]:
    """Class name -> name of its base class, from the indentation of the tree in the docstring of the module."""
    assert errors.__doc__ is not None
    bases: dict[str, str] = {}
    path: list[tuple[int, str]] = []
    for match in re.finditer(r"^([ │├└─]*)(\w+Error) +\d{3} ", errors.__doc__, re.MULTILINE):
        depth, name = len(match[1]), match[2]
        while path and path[-1][0] >= depth:
            path.pop()
        if path:
            bases[name] = path[-1][1]
        path.append((depth, name))
    return bases


def test_the_docstring_lists_every_class_with_its_base() -> None:
    assert documented_statuses().keys() == {error_class.__name__ for error_class in CLASSES}
    assert documented_bases() == {
        error_class.__name__: error_class.__base__.__name__
        for error_class in CLASSES
        if error_class is not NbestError and error_class.__base__ is not None
    }


@pytest.mark.parametrize("error_class", CLASSES)
def test_the_status_is_the_documented_one(error_class: type[NbestError]) -> None:
    assert http_status(example(error_class)) == documented_statuses()[error_class.__name__]


def test_the_status_table_has_only_classes_of_the_module_and_each_status_once() -> None:
    assert STATUS.keys() <= set(CLASSES)
    assert len(set(STATUS.values())) == len(STATUS)


@pytest.mark.parametrize("error_class", CLASSES)
def test_an_error_is_the_same_after_it_crosses_processes(error_class: type[NbestError]) -> None:
    error = example(error_class)
    received = pickle.loads(pickle.dumps(error))
    assert type(received) is error_class
    assert vars(received) == vars(error)
    assert str(received) == str(error)
    assert http_status(received) == http_status(error)
    assert error_reply(received) == error_reply(error)


def test_the_examples_set_every_argument_of_the_constructors() -> None:
    for error_class in CLASSES:
        arguments = set(inspect.signature(error_class).parameters) - {"message", "unit"}
        assert all(vars(example(error_class))[argument] is not None for argument in arguments), error_class
