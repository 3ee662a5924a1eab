"""A source for tests, in a module of its own: worker processes import it, and should import little."""

import numpy as np

from dalle_jax.data.sources.source import Record, Source, UnreadableExample

SIZE = 8
CAPTIONS = [f"a {('red', 'blue')[i % 2]} picture number {i % 7}" for i in range(37)]


class MemorySource(Source):
    """`count` pictures, each filled with its own index, with two captions; `broken` ones cannot be read."""

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
        image[..., 2] = np.arange(self.side)  # a flip or a crop shows
        return Record(image, (CAPTIONS[index % 37], f"{CAPTIONS[index % 37]} again"), name, {})
