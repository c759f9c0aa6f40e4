"""Dictionaries on real activations: `make real`, or `python benchmarks/real.py [--rows N] [--steps N] [--only KIND] [--folder real]`.

all-MiniLM-L6-v2 reads the language reference inside Python itself, paragraph by paragraph. Three runs, each a folder that
`sdl-explorer open real/sae` shows, and each resumed where it stopped:

    sae          the residual stream after layer 4
    transcoder   from what the MLP of layer 4 reads to what it writes
    crosscoder   the residual stream after layers 2, 4 and 6, side by side

Rows are kept as they are; the weights hold their mean.
"""

import argparse
import time
from collections import Counter
from pathlib import Path

import numpy as np

from sdl_explorer import Session, Stored, TopK, check_health, find_examples
from sdl_explorer.data.sources import stream
from sdl_explorer.experiments.minilm import minilm_rows

PLACES = {
    "sae": ("encoder.layer.3", None),
    "transcoder": ("encoder.layer.3.intermediate:in", "encoder.layer.3.output.dense"),
    "crosscoder": ([f"encoder.layer.{i}" for i in (1, 3, 5)], None),
}
JUDGE_ROWS = 10_000
TOP = 8
SHOWN = 6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, help="tokens to read (default: all, about 100,000)")
    parser.add_argument("--steps", type=int, default=800, help="train each up to this step")
    parser.add_argument("--batch", type=int, default=1_024, help="rows of one step")
    parser.add_argument("--latents", type=int, default=2_048)
    parser.add_argument("--k", type=int, default=16, help="latents that are kept per row")
    parser.add_argument("--only", choices=PLACES, nargs="+", default=list(PLACES))
    parser.add_argument("--folder", type=Path, default=Path("real"))
    options = parser.parse_args()
    for kind in options.only:
        print(f"\n{kind}")
        with open_run(kind, options) as session:
            started, first = time.perf_counter(), session.step
            if first < options.steps:
                session.train(options.steps - first)
                session.save(session.folder)
            print(f"  trained from step {first} to {session.step} in {time.perf_counter() - started:.0f} s")
            report(session)
    print(f"\nLook at them: sdl-explorer open {options.folder / options.only[0]}")


def open_run(kind: str, options: argparse.Namespace) -> Session:
    """The run of a kind: the one in its folder, or a new one on captured activations."""
    folder = options.folder / kind
    if (folder / "run.json").exists():
        return Session.open(folder)
    source = read_activations(options.folder / "activations" / kind, *PLACES[kind], options.rows)
    session = Session(source, TopK(k=options.k), n_latents=options.latents, batch_size=options.batch)
    session.save(folder)
    return session


def read_activations(folder: Path, hook_in, hook_out=None, rows: int | None = None) -> Stored:
    """MiniLM's activations on the language reference, or on paragraphs of about `rows` tokens drawn from it."""
    started = time.perf_counter()
    source = minilm_rows(folder, hook_in, hook_out, rows)
    removed = source.removed
    print(f"  {source.n:,} rows of {source.width_in} -> {source.width_out} in {time.perf_counter() - started:.0f} s;", end=" ")
    print(f"left out: {removed.rows:,} rows with {removed.variance:.0%} of the variance ({removed.reasons})")
    return source


def report(session: Session) -> None:
    """How well it reconstructs, and what some latents fire on."""
    started = time.perf_counter()
    health = session.find(check_health)
    print(
        f"  unexplained variance {health.unexplained_variance:.3f}, L0 {health.l0:.1f}, dead {health.n_dead}, unseen {health.n_unseen} "
        f"of {health.n_latents} latents, on {health.n_samples:,} rows that training never saw"
    )
    for block in session.source.blocks:
        print(f"    {block.name}: unexplained variance {block_error(session, block):.3f}")
    tokens = top_tokens(session)
    pure = sorted((words for words in tokens.values() if len(set(words)) == 1 and words[0].isalpha()), key=lambda words: words[0])
    names = list(dict.fromkeys(words[0] for words in pure))
    print(f"  {len(pure):,} latents with one word among their {TOP} top tokens, for example", ", ".join(names[:: max(1, len(names) // 12)]))
    for latent, words in two_words(tokens)[:SHOWN]:
        print(f"  latent {latent} fires for", " and ".join(f"{word!r}" for word in Counter(words)))
    print(f"  read in {time.perf_counter() - started:.0f} s")


def top_tokens(session: Session) -> dict[int, list[str]]:
    """The tokens of the TOP largest activations of each latent that fired so often, on judge rows."""
    rows = session.source.sample(JUDGE_ROWS, stream(session.seed, "judge"), "judge")
    found = find_examples(session.dictionary, rows, n_each=TOP)
    often = np.flatnonzero(found.n_fires >= TOP)
    return {int(i): [rows.examples.piece(e.row).strip() for e in found.of(i, "top")] for i in often}


def two_words(tokens: dict[int, list[str]]) -> list[tuple[int, list[str]]]:
    """Latents for two whole words that do not share their beginning, each at least three times among the top tokens."""
    fair = lambda counts: len(counts) == 2 and min(counts.values()) >= 3
    unlike = lambda a, b: a.isalpha() and b.isalpha() and min(len(a), len(b)) > 3 and a[:3] != b[:3]
    return [(latent, words) for latent, words in tokens.items() if fair(Counter(words)) and unlike(*Counter(words))]


def block_error(session: Session, block) -> float:
    """The unexplained variance of one block of a crosscoder."""
    rows = session.source.sample(JUDGE_ROWS, stream(session.seed, "judge"), "judge")
    targets, guess = rows.targets[:, block.targets], session.dictionary(rows.inputs).reconstruction[:, block.targets]
    return float((targets - guess).square().sum() / (targets - targets.mean(dim=0)).square().sum())


if __name__ == "__main__":
    main()
