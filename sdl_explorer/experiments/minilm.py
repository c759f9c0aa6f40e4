"""Rows of all-MiniLM-L6-v2 on Python's own language reference, for experiments; needs the extra `models`."""

from pathlib import Path

import numpy as np

from sdl_explorer.data.capture import capture
from sdl_explorer.data.minilm import count_tokens, load_minilm, python_reference
from sdl_explorer.data.store import Stored

TOKENS_PER_COUNT = 0.73  # of `count_tokens`, on this text


def minilm_rows(folder: Path, hook_in="encoder.layer.3", hook_out=None, rows: int | None = None) -> Stored:
    """One row a token, labelled by topic, of the whole text or of paragraphs of about `rows` tokens drawn from it; read once."""
    texts, labels, names = python_reference()
    sizes = np.array([count_tokens(text) for text in texts])
    order = np.random.default_rng(0).permutation(len(texts))
    if rows is not None:
        order = order[: 1 + np.searchsorted(TOKENS_PER_COUNT * sizes[order].cumsum(), rows)]
    order = order[np.argsort(sizes[order], kind="stable")]  # paragraphs of like length go together: less padding
    model, tokenizer = load_minilm()
    texts, labels = [texts[i] for i in order], [labels[i] for i in order]
    return capture(model, texts, hook_in, hook_out, tokenizer=tokenizer, labels=labels, label_names=names, folder=folder)
