"""The errors of the package: one tree, and each survives the way between two processes."""

import pickle

import pytest

from ip2p_ray import errors

ERRORS = [value for value in vars(errors).values() if isinstance(value, type)]


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: error.__name__)
def test_errors_survive_pickling(error):
    copy = pickle.loads(pickle.dumps(error("what, where, what to do")))
    assert type(copy) is error
    assert copy.args == ("what, where, what to do",)


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: error.__name__)
def test_every_error_is_ours_and_is_drawn_in_the_tree(error):
    assert issubclass(error, errors.Ip2pError)
    assert error.__name__ in errors.__doc__


def test_wrong_arguments_are_value_errors():
    assert issubclass(errors.ConfigError, ValueError)
    assert issubclass(errors.ImageError, ValueError)
    assert issubclass(errors.LargeImageError, errors.ImageError)
