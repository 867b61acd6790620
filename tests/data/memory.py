"""A corpus held in memory, with the interface of a store: for tests that need no file."""

import numpy as np

from ds_pretrain.core.vocabulary import Vocabulary

VOCAB = Vocabulary.synthetic()


class MemoryStore:
    """Documents of random words and a last end-of-document id; `lengths` counts it."""

    def __init__(self, lengths, seed: int = 0) -> None:
        random = np.random.default_rng(seed)
        self.lengths = np.asarray(lengths, dtype=np.int64)
        self.tokens = random.choice(VOCAB.words, size=int(self.lengths.sum()))
        self.starts = np.cumsum(self.lengths) - self.lengths
        self.tokens[self.starts + self.lengths - 1] = VOCAB.eod
        self.text = np.stack([self.lengths * 5, self.lengths], axis=1)
        self.digest = f"memory-{seed}-{len(self.lengths)}-{len(self.tokens)}"

    def __len__(self) -> int:
        return len(self.lengths)

    def slice(self, i: int, start: int, stop: int) -> np.ndarray:
        return self.tokens[self.starts[i] + start : self.starts[i] + stop]


def corpus(documents: int = 300, seed: int = 0, mean: float = 40) -> MemoryStore:
    """Lengths as text has them: many short, a few much longer than a row; some hold only their end."""
    random = np.random.default_rng(seed)
    return MemoryStore(1 + random.lognormal(np.log(mean), 1, documents).astype(int) * (np.arange(documents) % 17 > 0), seed)
