"""Make the bundled run that the app opens first: `python benchmarks/first_look.py [FOLDER]`.

64 features of a two-level hierarchy in 32 dimensions, 3 % of them active; a TopK dictionary of 96 latents trained for
500 steps of 512 at a learning rate that kills some latents, then for 1,500 at a third of it.
"""

import shutil
import sys
from pathlib import Path

from sdl_explorer import HierarchyBench, Session, TopK, align, check_health

FOLDER = Path(__file__).parents[1] / "sdl_explorer" / "assets" / "first_look"


def main(folder: Path = FOLDER) -> None:
    source = HierarchyBench(parents=8, children=3, independent=32, d_in=32, parent_probability=0.08, independent_probability=0.03)
    shutil.rmtree(folder, ignore_errors=True)
    with Session(source, TopK(k=3), n_latents=96, lr=3e-3, device="cpu") as session:
        session.train(500)
        session.lr = 1e-3
        session.train(1_500)
        session.save(folder)
        found, health = session.find([align, check_health])
    for path in (".lock", "lock.json"):
        (folder / path).unlink(missing_ok=True)
    size = sum(f.stat().st_size for f in folder.rglob("*") if f.is_file())
    print(f"{folder}: {size / 1e3:.0f} kB; {health.n_dead} of {health.n_latents} dead, {health.n_unseen} unseen;", end=" ")
    print(", ".join(f"{side} {found.recovery(side=side):.0%}" for side in ("encoder", "decoder", "response")), "of the features recovered")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
