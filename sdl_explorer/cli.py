"""The command `sdl-explorer`: `open` and `serve` the explorer, `run` a training without it, `survey` what it
learned, `doctor` the machine.

Modules load inside the commands, so that `--help` answers at once and `doctor` works where torch does not.
"""

import ast
import os
import sys
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sdl_explorer import __version__

if TYPE_CHECKING:
    import param

    from sdl_explorer.session import Session

PORT = 5006
ADDRESS = "127.0.0.1"

app = typer.Typer(
    name="sdl-explorer",
    help="Train, diagnose and repair sparse dictionaries: SAEs, transcoders, crosscoders.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

PortOption = Annotated[int, typer.Option(envvar="PORT", min=0, max=65535, help="Port to listen on; 0 takes a free one.")]
AddressOption = Annotated[
    str, typer.Option(help="Address to listen on. Other machines reach the app only on an address of this one's network.")
]
ShowOption = Annotated[bool | None, typer.Option("--show/--no-show", help="Open a browser. Default: where there is a display.")]
DeviceOption = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, ...")]


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"sdl-explorer {__version__}")
        raise typer.Exit


@app.callback()
def main(version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Say the version.")] = False) -> None:
    pass


@app.command()
def serve(
    port: PortOption = PORT,
    address: AddressOption = ADDRESS,
    show: ShowOption = None,
    device: DeviceOption = "auto",
) -> None:
    """Serve the explorer, with the bundled trained run open."""
    with _plain_errors():
        _serve(None, port, address, show, device)


@app.command("open")
def open_(
    what: Annotated[
        Path | None, typer.Argument(help="A run folder, a checkpoint, or a file of activations. Nothing: the bundled run.")
    ] = None,
    activations: Annotated[
        Path | None,
        typer.Option(help="Activations for a checkpoint: a file or folder of rows from the place it was trained on."),
    ] = None,
    port: PortOption = PORT,
    address: AddressOption = ADDRESS,
    show: ShowOption = None,
    device: DeviceOption = "auto",
) -> None:
    """Serve the explorer on a run, a checkpoint or activations."""
    with _plain_errors():
        for path in filter(None, (what, activations)):
            if not path.expanduser().exists():
                raise FileNotFoundError(f"open: there is nothing at {path}. Give a run folder, a checkpoint or a file of activations.")
        _serve(what and what.expanduser(), port, address, show, device, activations and activations.expanduser())


@app.command()
def run(
    folder: Annotated[Path, typer.Option(help="The run folder. One that exists is resumed.")],
    steps: Annotated[int, typer.Option(min=0, help="Train up to this step.")] = 2_000,
    source: Annotated[
        str | None, typer.Option(help="A kind of data (LinearBench, ...) or a file of activations. Default: LinearBench.")
    ] = None,
    set_: Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="A setting of the source; repeatable.")] = None,
    method: Annotated[str | None, typer.Option(help="TopK, BatchTopK, ReLU, JumpReLU, ... Default: TopK.")] = None,
    method_set: Annotated[list[str] | None, typer.Option(metavar="KEY=VALUE", help="A setting of the method; repeatable.")] = None,
    n_latents: Annotated[int | None, typer.Option(min=1, help="Size of the dictionary. Default: four times the width of the data.")] = None,
    batch_size: Annotated[int | None, typer.Option(min=1, help="Rows of one step.")] = None,
    lr: Annotated[float | None, typer.Option(min=0, help="Learning rate.")] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Seed of the weights.")] = None,
    device: DeviceOption = "auto",
) -> None:
    """Train without the app, resume what was interrupted, and print the scoreboard."""
    with _plain_errors():
        folder = folder.expanduser()
        fixed = {"n_latents": n_latents, "seed": seed}
        settings = {k: v for k, v in {"batch_size": batch_size, "lr": lr}.items() if v is not None}
        if (folder / "run.json").exists():
            session = _resume(folder, source, set_, method, method_set, fixed, device)
            session.param.update(**settings)
        elif folder.is_dir() and any(folder.iterdir()):
            raise FileExistsError(f"run: {folder} holds files and no run. Name an empty or a new folder.")
        else:
            data, recipe = _source(source, set_), _method(method, method_set)
            from sdl_explorer.session import Session

            settings |= {k: v for k, v in fixed.items() if v is not None}
            session = Session(data, method=recipe, device=device, **settings)
            session.save(folder)
        with session:
            _train(session, steps)
            typer.echo(_scoreboard(session))


@app.command()
def survey(
    folder: Annotated[Path, typer.Argument(help="A run folder.")],
    rows: Annotated[int, typer.Option(min=1, help="Judge rows to read.")] = 10_000,
    device: DeviceOption = "auto",
) -> None:
    """Read rows once and print what every streaming finding says. A survey that was ended goes on where it was."""
    with _plain_errors():
        from sdl_explorer.session import Session

        with Session.open(folder.expanduser(), device=device) as session:
            typer.echo(_survey(session, rows))


@app.command()
def reproduce(
    name: Annotated[str, typer.Argument(help="table1, table-v2, table4 to table7, fig4, fig6, fig7 or anchoring.")],
    size: Annotated[str, typer.Option(help="small (minutes), laptop (an hour) or paper.")] = "small",
    folder: Annotated[Path | None, typer.Option(help="Where results and runs go. Default: reproduced/NAME-SIZE.")] = None,
    images: Annotated[
        Path | None, typer.Option(help="anchoring: a folder of images, a subfolder a class. Default: MiniLM's tokens.")
    ] = None,
    model: Annotated[str | None, typer.Option(help="anchoring: the vision transformer that reads the images, a name or a folder.")] = None,
    device: DeviceOption = "auto",
) -> None:
    """Run a table or figure of arXiv 2512.05534 again, resumably, with a verdict beside each published number."""
    with _plain_errors():
        from sdl_explorer.experiments.reproduce import reproduce as run_again

        folder = folder or Path("reproduced") / f"{name}-{size}"
        outcome = run_again(name, size, folder, device, lambda text: typer.echo(text, err=True), images=images, model=model)
        typer.echo(outcome.page)
        typer.echo(f"Written to {folder}", err=True)


@app.command()
def sweep(
    file: Annotated[Path, typer.Argument(help="A TOML file: steps, seeds, [source], [method], [grid].")],
    folder: Annotated[Path | None, typer.Option(help="Where the runs go. Default: beside the file, under its name.")] = None,
    device: DeviceOption = "auto",
) -> None:
    """Train a grid of settings over seeds, resumably, and print means with 95 % intervals."""
    with _plain_errors():
        from sdl_explorer.experiments.cells import readable
        from sdl_explorer.experiments.sweep import sweep_file

        table, summary = sweep_file(file, folder, device, say=lambda text: typer.echo(text, err=True))
        typer.echo(readable(summary).to_string(index=False))
        failed = table[table["failed"] != ""]
        if len(failed):
            raise RuntimeError(f"sweep: {len(failed)} of {len(table)} cells failed; the first: {failed['failed'].iloc[0]}")


@app.command()
def doctor(port: PortOption = PORT) -> None:
    """Check versions, device, threads, port and folders, and say the next step for each failure."""
    from sdl_explorer import doctor as examination

    checks = examination.examine(port)
    typer.echo(examination.report(checks))
    if any(check.required and not check.ok for check in checks):
        raise typer.Exit(1)


@contextmanager
def _plain_errors():
    """Errors that the user can mend are one message on stderr; SDL_EXPLORER_TRACEBACK=1 shows where they arose."""
    try:
        yield
    except KeyboardInterrupt:
        raise typer.Exit(130) from None
    except (ArithmeticError, ImportError, OSError, RuntimeError, TypeError, ValueError) as error:
        if os.environ.get("SDL_EXPLORER_TRACEBACK"):
            raise
        typer.echo(f"sdl-explorer: {error}", err=True)
        raise typer.Exit(1) from error


def _serve(what: Path | None, port: int, address: str, show: bool | None, device: str, activations: Path | None = None) -> None:
    from sdl_explorer.app.serve import serve as serve_app
    from sdl_explorer.doctor import check_port

    check = check_port(port, address)
    if not check.ok:
        raise OSError(f"{check.found}; {check.next_step}.")
    serve_app(what, port=port, address=address, show=_has_display() if show is None else show, device=device, activations=activations)


def _has_display() -> bool:
    """Whether a browser window could open here; over SSH it would open on another desk."""
    if "SSH_CONNECTION" in os.environ:
        return False
    return sys.platform in {"win32", "darwin"} or bool(os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY"))


def _source(name: str | None, pairs: list[str] | None):
    """A source by its name, or rows from a file."""
    from sdl_explorer.data.sources import Source
    from sdl_explorer.data.store import Stored
    from sdl_explorer.registry import member

    if name is not None and Path(name).expanduser().exists():
        if pairs:
            raise ValueError(f"--set {pairs[0]}: rows from a file have no settings. Leave --set out.")
        return Stored(Path(name).expanduser())
    if name is not None and not name.isidentifier():
        raise FileNotFoundError(
            f"--source {name}: there is no such file. Give a file of activations, or a kind of data such as LinearBench."
        )
    cls = member(Source, name or "LinearBench")
    return cls(**parse_settings(cls, pairs, "--set"))


def _method(name: str | None, pairs: list[str] | None):
    from sdl_explorer.models.methods import Method
    from sdl_explorer.registry import member

    cls = member(Method, name or "TopK")
    return cls(**parse_settings(cls, pairs, "--method-set"))


def parse_settings(cls: "type[param.Parameterized]", pairs: list[str] | None, option: str) -> dict[str, Any]:
    """{"k": 8} from ["k=8"]; a value is a Python literal, or else the text itself."""
    settings = {}
    for pair in pairs or []:
        name, sign, text = pair.partition("=")
        if not sign:
            raise ValueError(f"{option} {pair}: a setting is written key=value.")
        if name not in cls.param or name == "name":
            known = ", ".join(key for key in cls.param if key != "name")
            raise ValueError(f"{option} {pair}: {cls.__name__} has no setting {name!r}. It has: {known}.")
        try:
            settings[name] = ast.literal_eval(text)
        except (SyntaxError, ValueError):
            settings[name] = text
    return settings


def _resume(folder: Path, source, source_pairs, method, method_pairs, fixed: dict[str, int | None], device: str) -> "Session":
    """The run in `folder`; what the command line says about it has to be what the run is."""
    from sdl_explorer.session import Session

    session = Session.open(folder, device=device)
    try:
        if not session.writable:
            raise PermissionError(f"run: {folder} is being written by {session.writer}. Wait for it, or name another folder.")
        differing = [f"--{name.replace('_', '-')} {value}" for name, value in fixed.items() if value not in (None, getattr(session, name))]
        if (source or source_pairs) and _source(source, source_pairs).fingerprint() != session.source.fingerprint():
            differing.append("--source/--set")
        if (method or method_pairs) and repr(_method(method, method_pairs)) != repr(session.method):
            differing.append("--method/--method-set")
        if differing:
            raise ValueError(
                f"run: {folder} holds {session!r}, and {', '.join(differing)} says otherwise. Leave that out, or name another folder."
            )
    except Exception:
        session.close()
        raise
    return session


def _train(session: "Session", steps: int) -> None:
    """Up to `steps`, with a progress bar; an interrupt keeps the last whole step."""
    from tqdm import tqdm

    first = session.step
    if first:
        typer.echo(f"Resumed at step {first}.", err=True)
    with tqdm(total=max(steps, first), initial=first, unit="step", file=sys.stderr) as bar:

        def advance() -> None:
            bar.update(session.snapshot.step - bar.n)

        session.pulses.append(advance)
        try:
            if steps > first:
                session.train(steps - first)
        except KeyboardInterrupt:
            session.commit("interrupted")
            typer.echo(f"Interrupted at step {session.step} and saved; the same command goes on from there.", err=True)
            raise
        finally:
            session.pulses.remove(advance)
            advance()
    session.save(session.folder)


def _survey(session: "Session", rows: int) -> str:
    from tqdm import tqdm

    with tqdm(total=rows, unit="row", file=sys.stderr) as bar:
        return repr(session.survey(rows, progress=lambda done: bar.update(round(done * rows) - bar.n)))


def _scoreboard(session: "Session") -> str:
    from sdl_explorer.data.sources import stream
    from sdl_explorer.diagnosis.alignment import align
    from sdl_explorer.diagnosis.compare import MEASURES, scoreboard
    from sdl_explorer.diagnosis.health import check_health

    compared = session.anchors is not None or session.source.sample(1, stream("scoreboard")).truth is not None
    numbers = scoreboard(*session.find([check_health, align] if compared else [check_health]))
    width = max(len(MEASURES[name].label) for name in numbers)
    lines = [f"{session!r} in {session.folder}"]
    lines += [f"  {MEASURES[name].label:<{width}}  {MEASURES[name].show(value)}" for name, value in numbers.items()]
    return "\n".join(lines)


if __name__ == "__main__":
    app()
