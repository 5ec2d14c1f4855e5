"""Inner products without rounding, and how far those of float32 may be from them."""

from __future__ import annotations

import numpy as np

_UNIT = 2.0**-24  # of float32: half the distance from 1 to the next number
_BLOCK = 1 << 13  # rows at a time
_WHOLE = 2.0**11
_LONGEST = 1.1  # the length that rounding to float16 may give a unit vector, squared and then some


def dots(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Inner products of the rows of two float16 arrays `[m, dim]`, float64 `[m]`.

    They are exact: entries are multiples of 2^-24, so products are of 2^-48, and every partial sum of vectors of about
    unit length has less than 53 bits.
    """
    found = np.empty(len(a))
    for start in range(0, len(a), _BLOCK):
        some = slice(start, start + _BLOCK)
        found[some] = np.einsum("ij,ij->i", widen(a[some]).astype(np.float64), widen(b[some]).astype(np.float64))
    return found


def pair_dots(a: np.ndarray, b: np.ndarray, first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Inner products of rows of `a` and rows of `b`, without gathering all of them at once; float64 `[pairs]`."""
    found = np.empty(len(first))
    for start in range(0, len(first), _BLOCK):
        some = slice(start, start + _BLOCK)
        found[some] = dots(a[first[some]], b[second[some]])
    return found


def is_zero(vectors: np.ndarray) -> np.ndarray:
    """Which rows of a float16 array are zero, as those of images with nothing on them may be: they are like nothing."""
    there: np.ndarray = np.ascontiguousarray(vectors).view(np.uint16) & 0x7FFF  # without the sign of zero
    return np.logical_not(there.any(axis=1))


def round_to_float16(vectors: np.ndarray) -> np.ndarray:
    """Float16 `[n, dim]`, scaled and rounded to whole numbers in float32 whose squared distances float32 holds exactly.

    No row is longer than 2^11 then, so no distance is longer than 2^12, its square and all partial sums no more than
    2^24.
    """
    wide = widen(vectors)
    longest = np.sqrt(np.einsum("ij,ij->i", wide, wide).max(initial=0.0))
    wide *= np.float32(np.floor(_WHOLE - np.sqrt(vectors.shape[1])) / max(np.ceil(longest * 1024) / 1024, 1e-3))
    return np.rint(wide, out=wide)


def rounding_error(dim: int) -> float:
    """How far a sum of `dim` products in float32, in any order, may be from the exact one.

    The bound of dot products (Higham, Accuracy and Stability of Numerical Algorithms, section 3.1), doubled for devices
    that cut off instead of rounding.
    """
    return 2 * _LONGEST * dim * _UNIT / (1 - dim * _UNIT)


def widen(vectors: np.ndarray) -> np.ndarray:
    """Float16 `[n, dim]` as float32, exactly; five times as fast as numpy's own conversion, which is not vectorized."""
    wide = np.empty(vectors.shape, dtype=np.float32)
    bits = wide.view(np.int32)
    np.copyto(bits, np.ascontiguousarray(vectors).view(np.int16))  # the sign fills the upper half
    bits <<= 13
    bits &= -0x70002000  # of the sign's copies one stays
    wide *= np.float32(2.0**112)  # between the biases of the two exponents
    return wide
