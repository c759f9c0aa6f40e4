"""What the README shows is true: its example runs, and the names and paths in it exist."""

import re
from pathlib import Path

import pytest

import sdl_explorer

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
EXAMPLES = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


def test_the_main_example_runs(capsys):
    """At a smaller size: the numbers of steps are cut, nothing else."""
    [example] = [code for code in EXAMPLES if "Session(" in code]
    assert "train(" in example
    small = re.sub(r"train\([\d_]+\)", "train(8)", example).replace("n_steps=200", "n_steps=2")
    small = small.replace("n_features=200, d_in=64", "n_features=40, d_in=32").replace("n_latents=800", "n_latents=48")
    scope: dict = {}
    try:
        # no latent is dead after eight steps, so the first one stands in for it
        exec(small.replace("session.resample()", "session.resample(latents=[0])"), scope)
        assert scope["session"].head.id == scope["before"].id
        assert "recovered" in capsys.readouterr().out
    finally:
        if "session" in scope:
            scope["session"].close()


@pytest.mark.parametrize("path", sorted(set(re.findall(r"\]\((?!https?://)([^)#]+)\)", README))))
def test_links_lead_to_files(path):
    assert (ROOT / path).exists()


def test_the_tree_exists():
    tree = re.search(r"## The tree\n\n```\n(.*?)```", README, flags=re.DOTALL).group(1)
    package, rest = tree.split("notebooks/", 1)
    for name in re.findall(r"^  ([a-z]+/|[a-z]+\.py)", package, flags=re.MULTILINE):
        assert (ROOT / "sdl_explorer" / name).exists(), name
    for name in ["notebooks/", *re.findall(r"\b([a-z]+/)", rest)]:
        if name not in {"browser/", "oracle/"}:
            assert (ROOT / name).exists(), name


def test_members_in_the_table_exist():
    table = re.search(r"\| family \|.*?\n\n", README, flags=re.DOTALL).group(0)
    names = set(re.findall(r"`([A-Za-z]+)`", table)) - {"Source", "Method", "Intervention"}
    assert names <= set(sdl_explorer.__all__)


def test_make_targets_exist():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in set(re.findall(r"make ([a-z-]+)", README)):
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE), target
