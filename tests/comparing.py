"""What tests of the converter compare with."""

import numpy as np


def names_in(folder):
    """Names of what a folder holds, sorted."""
    return sorted(path.name for path in folder.iterdir())


def assert_same(one, other):
    """The same names, and under each the same array of the same dtype, bit for bit."""
    assert one.keys() == other.keys()
    for name, array in one.items():
        assert array.dtype == other[name].dtype
        np.testing.assert_array_equal(np.asarray(array), np.asarray(other[name]), err_msg=name)
