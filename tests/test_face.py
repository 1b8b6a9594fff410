"""`import diffusion_nb as dn`: each name is there, and importing costs nothing."""

import subprocess
import sys
from importlib import import_module

import pytest

import diffusion_nb as dn


@pytest.mark.parametrize("name", dn.HOME)
def test_each_name_is_that_of_its_module(name):
    assert getattr(dn, name) is getattr(import_module(f"diffusion_nb.{dn.HOME[name]}"), name) and name in dir(dn)


def test_a_name_that_is_not_there():
    with pytest.raises(AttributeError, match="has no 'ddpmm' at its top"):
        dn.ddpmm  # noqa: B018


def test_importing_loads_nothing():
    code = "import sys, diffusion_nb; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "False\n"
