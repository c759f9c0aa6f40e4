"""Absorption in a real hierarchy: MiniLM's embeddings of WordNet's noun glosses, and the hypernym tree as the truth.

    make wordnet                            fetches Debian's wordnet-base into real/wordnet, then runs this
    python benchmarks/wordnet.py            some fifteen minutes of one core: 3 to embed, the rest to train and score 15 dictionaries
    python benchmarks/wordnet.py --report   the tables again, from the runs.csv that is there
    python benchmarks/wordnet.py --look animal    which latents of the first run took a concept's children, with their glosses

Where /usr/share/wordnet/data.noun is (apt-get install wordnet-base), it is read there; --nouns names another place. Glosses, embeddings
and runs stay in real/wordnet, which git ignores: `sdl-explorer open real/wordnet/TopK-512-seed-0` shows one (page Absorption).

12,000 glosses from below 17 categories; 9,600 train, and the other 2,400 are scored by `score_absorption`: probes and main latents are
fitted on four fifths of them and judged on the fifth, five times. 700 steps of 256 rows, k=8, learning rate 1e-3, seeds 0 to 2. Writes
runs.csv (a row per dictionary) and README.md to benchmarks/results/wordnet; no text and no vector of either source.
"""

import argparse
import platform
from pathlib import Path

import pandas as pd
import torch

from sdl_explorer import Activations, BatchTopK, Matryoshka, Session, SparseDictionary, Stored, TopK, check_health, score_absorption
from sdl_explorer.data.sources import stream
from sdl_explorer.data.wordnet import draw_glosses, embed_glosses, read_nouns
from sdl_explorer.diagnosis.observe import observe

OUT = Path("benchmarks/results/wordnet")
NOUNS = (Path("real/wordnet/usr/share/wordnet/data.noun"), Path("/usr/share/wordnet/data.noun"))
GLOSSES, STEPS, BATCH, LR, K = 12_000, 700, 256, 1e-3, 8
SEEDS = (0, 1, 2)
NESTED = [16, 64]  # and all 512
KINDS = {
    "TopK, m=128": ("TopK-128", 128, lambda: TopK(k=K), STEPS),
    "TopK, m=512": ("TopK-512", 512, lambda: TopK(k=K), STEPS),
    "BatchTopK, m=512": ("BatchTopK-512", 512, lambda: BatchTopK(k=K), STEPS),
    "Matryoshka [16, 64, 512]": ("Matryoshka-512", 512, lambda: Matryoshka(k=K, prefixes=NESTED), STEPS),
    "untrained, m=512": ("untrained-512", 512, lambda: TopK(k=K), 0),
}
SCORES = ("full", "fraction", "recall")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nouns", type=Path, help="WordNet's data.noun")
    parser.add_argument("--folder", type=Path, default=Path("real/wordnet"))
    parser.add_argument("--report", action="store_true", help="only write the tables again")
    parser.add_argument("--look", metavar="CONCEPT", help="print the latents that took its children, of TopK and Matryoshka, seed 0")
    options = parser.parse_args()
    if not options.report:
        nouns = options.nouns or next((path for path in NOUNS if path.exists()), NOUNS[0])
        source = embed_glosses(draw_glosses(read_nouns(nouns), GLOSSES), options.folder / f"glosses-{GLOSSES}")
        if options.look:
            look(source, options.folder, options.look)
            return
        rows = held_out(source)
        found = [run(source, rows, kind, seed, options.folder) for kind in KINDS for seed in SEEDS]
        OUT.mkdir(parents=True, exist_ok=True)
        pd.DataFrame(found).to_csv(OUT / "runs.csv", index=False, float_format="%.4f", lineterminator="\n")
    (OUT / "README.md").write_text(report(pd.read_csv(OUT / "runs.csv")))
    print((OUT / "README.md").read_text())


def held_out(source: Stored) -> Activations:
    """The rows that no training saw: parts choose and judge."""
    parts = [source.sample(source.n, stream("wordnet", part), part) for part in ("choose", "judge")]
    inputs = torch.cat([part.inputs for part in parts])
    labels = torch.cat([part.labels for part in parts])
    rows = [*source.part("choose"), *source.part("judge")]
    return Activations(inputs, inputs, labels=labels, label_names=source.label_names, examples=source.examples.take(rows))


def trained(source: Stored, kind: str, seed: int, folder: Path) -> SparseDictionary:
    """From its run folder, or trained into it."""
    name, n_latents, method, steps = KINDS[kind]
    home = folder / f"{name}-seed-{seed}"
    if (home / "run.json").exists():
        with Session.open(home) as session:
            return session.dictionary
    with Session(source, method(), n_latents=n_latents, batch_size=BATCH, lr=LR, seed=seed) as session:
        if steps:
            session.train(steps)
        session.save(home)
        return session.dictionary


def run(source: Stored, rows: Activations, kind: str, seed: int, folder: Path) -> dict:
    """One dictionary: how well it reconstructs, and both scores with up to ten main latents a concept and with one."""
    dictionary = trained(source, kind, seed, folder)
    requests = [check_health, score_absorption, (score_absorption, {"most_main": 1})]
    health, many, one = observe(dictionary, rows, requests)
    row = {"dictionary": kind, "seed": seed, "explained": 1 - health.unexplained_variance, "l0": health.l0, "concepts": many.n_concepts}
    for found, suffix in ((many, ""), (one, ", one")):
        row |= {f"{name}{suffix}": getattr(found, f"mean_{name}") for name in SCORES}
        row |= {f"animal {name}{suffix}": getattr(found.of("animal"), name) for name in SCORES}
    print(f"{kind}, seed {seed}: explained {row['explained']:.3f}; {many}", flush=True)
    return row


def look(source: Stored, folder: Path, concept: str) -> None:
    rows = held_out(source)
    for kind in ("TopK, m=512", "Matryoshka [16, 64, 512]"):
        found = score_absorption(trained(source, kind, 0, folder), rows)
        one = found.of(concept)
        print(f"\n{kind}: {one.path}; main latents {one.main}, recall {one.recall:.2f}, full {one.full:.2f}, fraction {one.fraction:.2f}")
        with pd.option_context("display.width", 200, "display.float_format", "{:.2f}".format):
            print(found.children(concept).drop(columns="examples").to_string(index=False))
        for taken in one.below:
            print(f"\n{taken.name}: latent {taken.latent}", *taken.texts, sep="\n  ")


def report(runs: pd.DataFrame) -> str:
    lines = ["# Absorption in a real hierarchy", ""]
    lines += [
        f"`python benchmarks/wordnet.py` on an {platform.machine()} CPU, torch {torch.__version__}. {GLOSSES:,} noun glosses of WordNet",
        "3.0 from below 17 categories, as all-MiniLM-L6-v2 embeds them; concepts are the nodes of the hypernym tree. Judged on 2,400",
        f"rows that training never saw, over the {int(runs['concepts'].max())} concepts whose probe has F1 above 0.6. {STEPS} steps of",
        f"{BATCH} rows, k={K}, learning rate {LR:g}. Values of seeds {', '.join(map(str, SEEDS))}.",
        "",
        "## SAEBench's scores (main latents by an F1 jump of 0.03, at most 10)",
        "",
        *table(runs, ""),
        "",
        "## One main latent a concept: splitting is counted with absorption",
        "",
        *table(runs, ", one"),
        "",
        "## `animal`",
        "",
        *table(runs, "", "animal "),
        "",
        "With one main latent:",
        "",
        *table(runs, ", one", "animal "),
        "",
        "## Expected, and what came out",
        "",
        "| expected, over three seeds | met in |",
        "|---|---:|",
        *(f"| {words} | {met} of {len(SEEDS)} |" for words, met in expectations(runs)),
        "",
        "A low score is no merit by itself: the untrained dictionary absorbs nothing because it has no latents to be absorbed, as its",
        "recall says. Matryoshka here is BatchTopK with nested prefixes, so that BatchTopK is its control. Concepts nest, so that one",
        "latent counts for several. Main latents and probes are fitted on few rows of a small concept. The thresholds are SAEBench's,",
        "tuned on first letters in language models.",
    ]
    return "\n".join(lines) + "\n"


def table(runs: pd.DataFrame, suffix: str, prefix: str = "") -> list[str]:
    rows = ["| dictionary | fraction | full | recall of main latents | explained variance | L0 |", "|---|---|---|---|---|---|"]
    for kind in KINDS:
        mine = runs[runs["dictionary"] == kind].sort_values("seed")
        names = [f"{prefix}{name}{suffix}" for name in ("fraction", "full", "recall")]
        cells = [" / ".join(f"{value:.2f}" for value in mine[name]) for name in names]
        rows.append(f"| {kind} | {' | '.join(cells)} | {mine['explained'].mean():.3f} | {mine['l0'].mean():.1f} |")
    return rows


def expectations(runs: pd.DataFrame) -> list[tuple[str, int]]:
    of = lambda kind, name: runs[runs["dictionary"] == kind].sort_values("seed")[name].to_numpy()
    narrow, wide, batch, nested, untrained = KINDS
    met = []
    for suffix, words in (("", ""), (", one", ", with one main latent")):
        name = f"fraction{suffix}"
        met += [
            (f"the fraction rises with width{words}", of(wide, name) > of(narrow, name)),
            (f"it falls with Matryoshka at equal width, against TopK{words}", of(nested, name) < of(wide, name)),
            (f"and against BatchTopK{words}", of(nested, name) < of(batch, name)),
            (
                f"untrained: fraction 0, and a recall below every trained one{words}",
                (of(untrained, name) == 0)
                & (of(untrained, f"recall{suffix}") < runs[runs["dictionary"] != untrained][f"recall{suffix}"].min()),
            ),
            (
                f"`animal` has a lower fraction with Matryoshka than with TopK{words}",
                of(nested, f"animal {name}") < of(wide, f"animal {name}"),
            ),
        ]
    return [(words, int(which.sum())) for words, which in met]


if __name__ == "__main__":
    main()
