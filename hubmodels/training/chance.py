"""Chance that can be had again: numbers that depend on a seed, an epoch and an index, and on nothing else.

So a sample is the same whoever makes it, and whenever: another process, another number of machines, a run that goes on.
Philox is a counter that is enciphered (Salmon 2011, Parallel random numbers: as easy as 1, 2, 3): starting anywhere
costs nothing.
"""

import numpy as np


def generator(seed: int, epoch: int, index: int = 0, purpose: int = 0) -> np.random.Generator:
    """The numbers of one sample. purpose: another stream for the same sample."""
    return np.random.Generator(np.random.Philox(key=[seed % 2**64, purpose], counter=[0, 0, epoch, index]))


def permutation(count: int, seed: int, epoch: int) -> np.ndarray:
    """[count] int64, the order of an epoch: 8 bytes a sample, made anew in a second for 10 million."""
    return generator(seed, epoch, purpose=1).permutation(count)
