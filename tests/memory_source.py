"""A source for tests. It has its own module because worker processes import it and should import little else."""

import numpy as np

from dalle_jax.data.sources.source import Record, Source, UnreadableExample

SIZE = 8
CAPTIONS = [f"a {('red', 'blue')[i % 2]} image number {i % 7}" for i in range(37)]


class MemorySource(Source):
    """`count` images, each filled with its index, with two captions; those in `broken` cannot be read."""

    description = "memory"

    def __init__(self, count=37, broken=(), side=SIZE):
        self.count, self.broken, self.side, self.reads = count, set(broken), side, 0

    def __len__(self):
        return self.count

    def record(self, index):
        self.reads += 1
        name = f"#{index}"
        if index in self.broken:
            raise UnreadableExample("missing file", name)
        image = np.full((self.side, self.side, 3), index, np.uint8)
        image[..., 2] = np.arange(self.side)  # makes a flip or a crop visible
        return Record(image, (CAPTIONS[index % 37], f"{CAPTIONS[index % 37]} again"), name, {})
