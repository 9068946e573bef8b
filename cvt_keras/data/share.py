"""Which images of each batch a process reads, if several train together."""

from typing import NamedTuple

import numpy as np


class Share(NamedTuple):
    """The part of each batch that this process reads, and by how many devices the whole batch must divide.

    Args:
        process: the index of this process.
        processes: the number of processes, which read equal and consecutive parts of each batch.
        devices: the number of devices of all processes.
    """

    process: int = 0
    processes: int = 1
    devices: int = 1

    def rows(self, batch_size, neighbour=False):
        """The positions of this process's images in a batch.

        Args:
            batch_size: images in the whole batch.
            neighbour: whether to put the position before the first of them in front.
        """
        size = batch_size // self.processes
        first = self.process * size
        return np.arange(first - neighbour, first + size) % batch_size


ALL = Share()
