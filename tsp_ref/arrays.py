"""The types that the maths is written in: arrays, and the namespace whose functions make them."""

from typing import Any, TypeAlias

import numpy.typing as npt

Array: TypeAlias = npt.NDArray[Any]
"""An array of the namespace at hand. Written as NumPy's type; other namespaces' arrays behave like it."""

Namespace: TypeAlias = Any
"""A module with NumPy's functions (`numpy` itself, or one that mirrors it). Every function that makes an array is
given one as `xp`, so that nothing depends on which."""
