"""A real tokenizer and real documents, for laws that random ids cannot test."""

import pydoc_data.topics

import numpy as np

from ds_pretrain.core import rng
from ds_pretrain.core.batch import Document
from ds_pretrain.data.tokenizer import TextTokenizer

TEXTS = [text for _, text in sorted(pydoc_data.topics.topics.items())]
TOKENIZER = TextTokenizer.train(iter(TEXTS), vocab_size=1000)
VOCAB = TOKENIZER.vocabulary
ENCODED = TOKENIZER.encode_batch(TEXTS)


def real_document(objective, max_len, number):
    """Document `number`: a piece as the dataset would cut it, of one of the texts, from a random place of it."""
    draw = rng.generator("document", number)
    return tuple(_piece(objective, max_len, draw) for _ in range(objective.documents))


def _piece(objective, max_len, draw):
    tokens = ENCODED[draw.integers(len(ENCODED))]
    tokens = np.append(tokens, VOCAB.eod).astype(np.int32) if objective.eod else tokens
    most = min(objective.piece(max_len), len(tokens))
    length = int(draw.integers(objective.shortest, most + 1))
    start = int(draw.integers(len(tokens) - length + 1))
    return Document(tokens[start : start + length], int(tokens[start - 1]) if start else None)
