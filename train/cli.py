"""The `zoetrope` command: every room's commands under one name, every mistake in one line.

Rooms are imported when a command of theirs runs, so that `zoetrope --help` answers at once.
"""

from __future__ import annotations

import logging
import os
import re
import signal
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from data.cli import app as data_app
from eval.cli import evaluate
from sample.cli import sample
from sample.wan_cli import export_model, import_model
from train.data_cli import check, latents, show

# click's UsageError; newer versions of typer carry a click of their own, so it is not to be imported.
_USAGE_ERROR: Any = typer.BadParameter.__base__

ConfigPath = Annotated[Path, typer.Argument(help="A run's YAML file; see configs/.")]
Overrides = Annotated[list[str] | None, typer.Argument(help="section.key=value, values in YAML.")]

app = typer.Typer(
    name="zoetrope",
    help="Train a text-to-video generator, sample it, and measure it.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
for command in (check, show, latents):
    data_app.command()(command)
app.add_typer(data_app, name="data")
app.command("sample")(sample)
app.command("eval")(evaluate)
app.command("import")(import_model)
app.command("export")(export_model)


@app.command()
def train(
    config: ConfigPath,
    overrides: Overrides = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what the run would be and cost, and stop.")
    ] = False,
    profile: Annotated[
        str | None, typer.Option(metavar="FIRST:LAST", help="Record a trace of these steps.")
    ] = None,
    allow_change: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY", help="Of the config, changed on purpose since the checkpoint."),
    ] = None,
) -> None:
    """Train a VAE or a DiT; the same command again goes on where it stopped.

    Ends with 75 where a SIGTERM or SIGUSR1 stopped it, so that a scheduler starts it again.
    """
    from train.config_file import check_keys, load_config

    run = load_config(config, overrides or [])
    if dry_run:
        from train.plan import plan

        if _rank() == 0:
            typer.echo(plan(run))
        return
    from train.loop import train as run_training
    from train.profiling import parse_steps
    from train.stopping import ignore_preemptions, leave_on_preemptions

    steps = None if profile is None else parse_steps(profile)
    if threading.current_thread() is threading.main_thread():
        leave_on_preemptions()
    try:
        run_training(run, steps, check_keys(run, allow_change or []))
    except SystemExit:
        ignore_preemptions()  # there is a checkpoint, and how this ends is to be told
        raise


@app.command()
def plan(
    config: ConfigPath,
    overrides: Overrides = None,
    gpus: Annotated[int, typer.Option(help="How many GPUs there are in all.")] = 8,
    gpu: Annotated[str, typer.Option(help="Which: h100, h200, a100, ...; train/gpus.py.")] = "h100",
    nodes: Annotated[int | None, typer.Option(help="In how many; else in nodes of 8.")] = None,
    samples: Annotated[int | None, typer.Option(help="To train on; else the config's.")] = None,
    price: Annotated[float | None, typer.Option(help="Of a GPU, in dollars an hour.")] = None,
    network_gbps: Annotated[
        float | None, typer.Option(help="Of each GPU to other nodes, 1e9 bits a second one way.")
    ] = None,
    vae: Annotated[
        str, typer.Option(help="Where recipe.vae is not there yet: wan2.1 or wan2.2.")
    ] = "wan2.1",
) -> None:
    """Say what a run will cost on a cluster: FLOPs, memory, communication, days, dollars."""
    from train.config_file import load_config
    from train.plan_report import machines_of, plan_run

    run = load_config(config, overrides or [])
    machines = machines_of(gpu, gpus, nodes, network_gbps)
    about = {"name": str(config), "samples": samples, "price": price, "vae": vae}
    typer.echo(plan_run(run, machines, **about))


def _rank() -> int:
    return int(os.environ.get("RANK", 0))


def _exit_on(number: int, code: int) -> None:
    """Has a signal act as Ctrl-C does: files are closed and worker processes stopped. Training sets
    handlers of its own, once there is something to save."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(number, lambda *_: sys.exit(code))


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs a command and exits: 0, 2 after a mistake named in one line, 130 after Ctrl-C, 75 for a
    run that wants to be started again, 1 where another process of it has gone.

    ZOETROPE_TRACEBACK=1 shows where an error came from.
    """
    # Read by OpenMP when torch is imported, which no command has done yet. Threads that spin for long
    # make a step tens of times slower as soon as another process takes one of their cores; threads
    # that never spin cost a third of the speed of small models (docs/benchmarks.md).
    os.environ.setdefault("GOMP_SPINCOUNT", "50000")
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    if signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
        _exit_on(signal.SIGTERM, 128 + signal.SIGTERM)
    command = typer.main.get_command(app)
    try:
        code = command.main(args=arguments, prog_name="zoetrope", standalone_mode=False)
    except (typer.Abort, KeyboardInterrupt):
        sys.exit(128 + signal.SIGINT)
    except _USAGE_ERROR as error:
        message = " ".join(error.format_message().split()).rstrip(".").replace("Value error, ", "")
        if not message:  # no arguments at all: the help is the answer
            print(error.ctx.get_help())
            sys.exit(2)
        see = f"; {error.ctx.command_path} --help shows what there is" if error.ctx else ""
        _complain(ValueError(f"{message}{see}"))
        sys.exit(2)
    except (ValueError, OSError, MemoryError, RuntimeError) as error:
        lost = isinstance(error, RuntimeError) and _is_lost_contact(error)
        known = lost or not isinstance(error, RuntimeError) or _is_resource_error(error)
        if not known or os.environ.get("ZOETROPE_TRACEBACK") == "1":
            raise
        if lost:
            said = "lost contact with another process of this run; see what that one says"
            reason = str(error).strip().splitlines()[0].partition(". ")[0]
            reason = re.sub(r"^\[\S+\] ", "", reason)  # a line of gloo's source
            error = ValueError(f"{said} ({reason})")
        _complain(error)
        sys.exit(1 if lost else 2)
    sys.exit(code if isinstance(code, int) else 0)


def _is_resource_error(error: RuntimeError) -> bool:
    """Whether the machine, not the program, is at fault."""
    signs = ("out of memory", "can't allocate memory", "DataLoader worker", "PytorchStreamWriter")
    return any(sign in str(error) for sign in signs)


def _is_lost_contact(error: RuntimeError) -> bool:
    """Whether an exchange with other ranks failed, as when one of them has ended."""
    kinds = ("DistBackendError", "DistNetworkError", "DistStoreError")
    return type(error).__name__ in kinds or "/gloo/" in str(error)


def _complain(error: Exception) -> None:
    """One line per problem. Under torchrun every rank says what it met, ranks other than 0 with
    their number, so that a mistake in the config appears once per process."""
    where = "" if _rank() == 0 else f" [rank {_rank()}]"
    if isinstance(error, OSError) and error.filename is not None:
        missing = isinstance(error, FileNotFoundError)
        text = f"{error.filename}{' does not exist' if missing else f': {error.strerror}'}"
    else:
        text = str(error) or type(error).__name__
    if isinstance(
        error, (MemoryError, RuntimeError)
    ):  # their texts are long and of torch's insides
        text = f"{text.splitlines()[0]}; use smaller sizes, smaller batches or fewer workers"
    if text.startswith("Caught "):  # in a data loading worker: its traceback, the message last
        text = text.strip().splitlines()[-1].removeprefix(f"{type(error).__name__}: ")
    for line in text.splitlines():
        print(f"zoetrope: error:{where} {line}", file=sys.stderr, flush=True)
