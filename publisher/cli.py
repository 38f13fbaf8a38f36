"""The command line: options → one call → show. Only this file and `show.py` speak to people; only here is an exit code set.

Imports of what is heavy (MLX, the hub client, jinja2) stand inside the commands, so that `--help` and `plan` stay quick.
"""

from __future__ import annotations

import functools
import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from inference.errors import AuthError, CheckFailed, GateRefused, InputError, PublishError, RemoteChanged, ResourceError

from . import __version__
from .entry import INTERRUPTED, STOPPED

if TYPE_CHECKING:
    from .hub import Hub
    from .report import Report
    from .variants import Project

# ruff: noqa: PLC0415 - this is the one file that imports late, see above

EXIT_CODES: dict[type[PublishError], int] = {
    PublishError: 1,
    CheckFailed: 1,
    InputError: 2,
    ResourceError: 2,
    GateRefused: 3,
    RemoteChanged: 4,
    AuthError: 5,
}


def exit_code(error: PublishError) -> int:
    """Code of the nearest class that the table names."""
    return next(EXIT_CODES[c] for c in type(error).__mro__ if c in EXIT_CODES)


class Failure(click.ClickException):
    """One line on stderr and an exit code."""

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.exit_code = code  # type: ignore[misc] - click declares it on the class


class Commands(click.Group):
    """Turns the project's errors into one line and an exit code; anything else is a bug and keeps its traceback."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except PublishError as e:
            raise Failure(str(e), exit_code(e)) from e
        except KeyboardInterrupt:
            click.echo(STOPPED, err=True)
            ctx.exit(INTERRUPTED)
        except BrokenPipeError:
            # the reader of our output is gone (`publish plan | head`): no traceback, and none at interpreter exit
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            ctx.exit(0)
        except MemoryError as e:
            raise Failure(
                "out of memory: what was asked does not fit into this machine's", EXIT_CODES[ResourceError]
            ) from e
        except OSError as e:  # the machine's: a full disk, a folder without permission
            raise Failure(f"{e.filename or 'output'}: {e.strerror or e}", EXIT_CODES[InputError]) from e


class Options:
    """What every command is given: the file, how to talk, and the project and hub once they are asked for."""

    def __init__(self, file: Path, as_json: bool, quiet: bool) -> None:
        self.file, self.as_json, self.quiet = file, as_json, quiet

    @functools.cached_property
    def project(self) -> Project:
        from .variants import load_project

        return load_project(self.file)

    @functools.cached_property
    def report(self) -> Report:
        from .report import Report

        return Report(self.quiet)

    def hub(self) -> Hub:
        from .hub import Hub

        return Hub(tell=self.report.line)

    def show(self, value: Any, text: Callable[[], str]) -> None:
        """The result: JSON on stdout with --json, else text on stdout."""
        if self.as_json:
            click.echo(json.dumps(value, indent=1, ensure_ascii=False))
        else:
            click.echo(text().rstrip("\n"))


def common(f: Callable[..., Any]) -> Callable[..., Any]:
    """--file, --json and --quiet, given to the command as one `Options`. Where there are IDS and --all, one of them is given."""

    @click.option(
        "--file",
        type=click.Path(path_type=Path, dir_okay=False),
        default=Path("variants.yaml"),
        show_default=True,
        help="The ladder.",
    )
    @click.option("--json", "as_json", is_flag=True, help="Machine-readable result on stdout.")
    @click.option("-q", "--quiet", is_flag=True, help="No progress.")
    @functools.wraps(f)
    def wrapped(file: Path, as_json: bool, quiet: bool, **kwargs: Any) -> Any:
        if kwargs.get("ids") and kwargs.get("all_variants"):
            raise InputError("found variants and --all: name some, or give --all")
        return f(Options(file, as_json, quiet), **kwargs)

    return wrapped


def _complete_ids(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[str]:
    """Variant ids for shell completion; nothing if the file cannot be read."""
    from .variants import load_project

    try:
        return [
            i
            for i in load_project(ctx.params.get("file") or Path("variants.yaml")).ladder.variants
            if i.startswith(incomplete)
        ]
    except PublishError:
        return []


some_ids = click.argument("ids", nargs=-1, metavar="[IDS]...", shell_complete=_complete_ids)
sign_option = click.option(
    "--sign-key",
    type=click.Path(path_type=Path),
    help="Sign with this private EC key; its password: PUBLISH_SIGN_PASSWORD.",
)
_file = click.Path(path_type=Path, dir_okay=False, exists=True)
_folder = click.Path(path_type=Path, file_okay=False, exists=True)
all_flag = click.option("--all", "all_variants", is_flag=True, help="Every variant of the ladder.")


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="publish")
def main() -> None:
    """Build, check, document and publish a ladder of quantized MLX models.

    \b
    publish init BASE          write a variants.yaml
    publish build --all        quantize, smoke-test, benchmark, render cards
    publish push --all         one atomic commit a repo
    """


@main.command()
@some_ids
@common
def plan(options: Options, ids: tuple[str, ...]) -> None:
    """Formats, bytes, bits per weight, memory and disk of every variant, before a weight is read."""
    from . import show
    from .survey import survey

    project = options.project
    chosen = project.select(ids)
    seen = survey(project, options.hub, cards=False, ids=chosen, read=False)
    options.show(show.plan_json(seen), lambda: show.plan_text(seen))


@main.command()
@some_ids
@all_flag
@click.option("--freeze", is_flag=True, help="Write them beside variants.yaml; builds then use them as they are.")
@common
def allocate(options: Options, ids: tuple[str, ...], all_variants: bool, freeze: bool) -> None:
    """Formats that the allocator chooses for `size:` variants, class by class, and why."""
    from . import show
    from .survey import allocate as run

    project = options.project
    seen, frozen = run(project, project.select(ids, all_variants), bool(ids), options.hub, freeze)
    options.show(show.allocations_json(seen, frozen), lambda: show.allocations_text(seen, frozen))


@main.command()
@click.option("--force", is_flag=True, help="Collect again what is there already.")
@common
def calibrate(options: Options, force: bool) -> None:
    """Collect statistics of the base over a calibration text, for solvers and the allocator. A killed run resumes."""
    project = options.project
    from . import show
    from .calibrate import calibrate as run

    done = run(project, options.hub, options.report, force)
    options.show(show.calibrated_json(done), lambda: show.calibrated_text(done))


@main.command()
@some_ids
@all_flag
@click.option("--force", is_flag=True, help="Do every step again, current or not.")
@click.option("--skip", multiple=True, type=click.Choice(["smoke", "bench", "card"]), help="Leave a step out.")
@click.option("--eval", "evaluate", is_flag=True, help="Measure the quality too, as publish eval does.")
@click.option("--shard", metavar="I/N", help="Build the I-th of N shares only; publish merge joins them.")
@click.option(
    "--jobs",
    type=click.IntRange(1, 256),
    metavar="N",
    help="Pieces quantized at once; fewer take less memory. Default: one a core, at most 8.",
)
@click.option("--push", "pushing", is_flag=True, help="Push what passes, without asking; upload while others are made.")
@click.option("--private", is_flag=True, help="With --push: new repos stay private.")
@click.option("--public", is_flag=True, help="With --push: new repos are public from the start.")
@click.option("--prune", is_flag=True, help="With --push: delete weights here once the hub is proven to hold them.")
@sign_option
@common
def build(
    options: Options,
    ids: tuple[str, ...],
    all_variants: bool,
    force: bool,
    skip: tuple[str, ...],
    evaluate: bool,
    shard: str | None,
    jobs: int | None,
    pushing: bool,
    private: bool,
    public: bool,
    prune: bool,
    sign_key: Path | None,
) -> None:
    """Quantize, smoke-test, benchmark and document what is not current. A killed build resumes."""
    from . import show
    from .build import build as run
    from .build import refuse_faults

    project = options.project
    chosen = project.select(ids, all_variants)
    shares = _shares(options, chosen, shard, pushing) if shard else {}
    chosen = shares["takes"] if shares else chosen
    if pushing:
        from .release import Choices, build_and_push
        from .signing import with_key

        project = with_key(project, sign_key)
        choices = Choices(private=private, at_once=public, prune=prune)
        outcomes, done = build_and_push(
            project, chosen, options.hub, options.report, choices, force, skip, evaluate, jobs
        )
        options.show(
            {**show.outcomes_json(outcomes), **show.released_json(done)},
            lambda: f"{show.outcomes_text(project, outcomes)}\n{show.released_text(done, options.hub().endpoint)}",
        )
        _raise_failed(done.failed, options.as_json)
        return
    if private or public or prune or sign_key:
        raise InputError("--private, --public, --prune and --sign-key: only with --push")
    outcomes = run(project, chosen, options.hub, options.report, force, skip, evaluate and bool(chosen), jobs=jobs)
    value = show.outcomes_json(outcomes) | ({"shard": shares} if shares else {})
    options.show(value, lambda: show.outcomes_text(project, outcomes))
    failed = [o for o in outcomes if o.failed]
    if failed:
        raise CheckFailed("; ".join(f"{o.id}: smoke test failed: {o.failed}" for o in failed))
    refuse_faults({o.id: o.card_fault for o in outcomes if o.card_fault})


def _shares(options: Options, chosen: Sequence[str], text: str, pushing: bool) -> dict[str, Any]:
    """The variants that this host takes, and those that are left to others, told as lines, too."""
    from .shard import parse_shard, partition_of

    shard = parse_shard(text)
    if pushing:
        raise InputError("--shard: not with --push, which releases a whole ladder: merge the parts, then push")
    parts = partition_of(options.project, chosen, shard.count, options.hub)
    for line in parts.lines(shard):
        options.report.line(line)
    taken = list(parts.of(shard))
    return {"share": str(shard), "takes": taken, "left": [id for id in chosen if id not in taken]}


@main.command()
@click.argument("folders", nargs=-1, required=True, metavar="FOLDERS...", type=_folder)
@click.option("--move", is_flag=True, help="Delete each variant there once it is proven to be here.")
@common
def merge(options: Options, folders: tuple[Path, ...], move: bool) -> None:
    """Take over what other hosts built (build --shard), from their output folders. A killed merge resumes."""
    from . import show
    from .build import refuse_faults
    from .merge import merge as run

    done = run(options.project, folders, options.hub, options.report, move)
    options.show(show.merged_json(done), lambda: show.merged_text(done))
    if done.wrong:
        raise CheckFailed(show.not_taken(done.wrong))
    if done.stale:
        raise GateRefused(show.not_taken(done.stale))
    refuse_faults(done.card_faults)


@main.command()
@some_ids
@all_flag
@common
def smoke(options: Options, ids: tuple[str, ...], all_variants: bool) -> None:
    """Run the smoke test again on built variants."""
    _again(options, ids, all_variants, "smoke")


@main.command()
@some_ids
@all_flag
@common
def bench(options: Options, ids: tuple[str, ...], all_variants: bool) -> None:
    """Run the benchmark again on built variants, with the BF16 row in the same run."""
    _again(options, ids, all_variants, "bench")


@main.command("eval")
@some_ids
@all_flag
@click.option("--baselines", is_flag=True, help="Measure mlx-lm's uniform and the published recipe in the same way.")
@click.option("--compare", nargs=2, metavar="A B", help="Also the paired difference of two variants, A minus B.")
@click.option("--force", is_flag=True, help="Measure again what is current.")
@common
def evaluate(
    options: Options,
    ids: tuple[str, ...],
    all_variants: bool,
    baselines: bool,
    compare: tuple[str, str] | None,
    force: bool,
) -> None:
    """Measure how far built variants are from BF16: KL divergence, agreement, perplexity, greedy text."""
    project = options.project  # a file that is refused costs no import of MLX
    from . import show
    from .evaluate import compare_variants, evaluate

    asked = () if all_variants else {*ids, *(compare or ())}
    chosen = project.select(asked, all_variants) if asked or all_variants or not baselines else []
    evaluate(project, chosen, options.hub, options.report, force, baselines)
    pairs = compare_variants(project, *compare) if compare else []
    options.show(
        show.qualities_json(project, chosen, compare, pairs),
        lambda: show.qualities_text(project, chosen, compare, pairs),
    )


def _again(options: Options, ids: tuple[str, ...], all_variants: bool, step: str) -> None:
    from . import show
    from .build import refuse_faults, remeasure

    project = options.project
    outcomes = remeasure(project, project.select(ids, all_variants), step, options.hub, options.report)
    options.show(
        show.results_json(project, [o.id for o in outcomes]),
        lambda: show.results_text(project, [o.id for o in outcomes], step),
    )
    failed = [o for o in outcomes if o.failed]
    if failed and step == "smoke":
        raise CheckFailed("; ".join(f"{o.id}: smoke test failed: {o.failed}" for o in failed))
    refuse_faults({o.id: o.card_fault for o in outcomes if o.card_fault})


@main.command()
@some_ids
@all_flag
@click.option("--check", is_flag=True, help="Write nothing; exit 1 and show the difference if a card is not current.")
@common
def card(options: Options, ids: tuple[str, ...], all_variants: bool, check: bool) -> None:
    """Render model cards again from recorded results. Weights are not touched."""
    from . import show
    from .base import resolve_base
    from .build import card_figures, card_texts, refuse_faults, render_cards, require_built
    from .card import gather

    project = options.project
    chosen = project.select(ids, all_variants or check)
    for id in ids:
        require_built(project, id)
    base = resolve_base(project, options.hub, weights=False)
    if not check:
        with project.store.lock("card"):
            done = render_cards(project, base, chosen)
        options.show(show.cards_json(chosen, done), lambda: show.cards_text(project, chosen, done))
        refuse_faults(done.faults)
        return
    facts = gather(project, base.folder)
    texts, faults = card_texts(project, facts, chosen)
    stale = show.card_diffs(project, texts, card_figures(project, facts, chosen))
    options.show({"stale": stale, "faults": faults}, lambda: show.card_check_text(len(texts), stale))
    refuse_faults(faults)
    if stale:
        raise CheckFailed(f"cards not current: {', '.join(stale)}; run: publish card --all")


@main.command()
@some_ids
@click.option("--remote", is_flag=True, help="Compare with the hub too.")
@common
def status(options: Options, ids: tuple[str, ...], remote: bool) -> None:
    """A row a variant: built, stale and why, pushed, drifted."""
    from . import show
    from .survey import survey

    project = options.project
    seen = survey(project, options.hub, ids=project.select(ids))
    remotes, base = {}, None
    if remote:
        from .drift import base_drift
        from .push import remote_state

        hub = options.hub()
        remotes = {id: remote_state(hub, project, id) for id in seen.rungs}
        base = base_drift(hub, project)
    options.show(show.status_json(seen, remotes, base), lambda: show.status_text(seen, remotes, base))


@main.command()
@some_ids
@all_flag
@click.option("--remote", is_flag=True, help="Prove by hash that the hub holds exactly the manifest.")
@click.option("--download", is_flag=True, help="Fetch the repo into a clean folder, hash every file, load the model.")
@click.option("--rebuild", is_flag=True, help="Build the weights again from the provenance, and compare every byte.")
@click.option("--inputs", type=_folder, help="With --rebuild: folder of the local base, imatrix and texts.")
@click.option("--public-key", type=_file, help="Public EC key of who must have signed.")
@click.option("--certificate", "certificates", type=_file, multiple=True, help="Trusted certificate of who signed.")
@common
def verify(
    options: Options, ids: tuple[str, ...], all_variants: bool, certificates: tuple[Path, ...], **asked: Any
) -> None:
    """Files against the manifest; packed weights against config and index; the signature, where there is one.

    Besides variants, folders are taken that hold one, such as a repo that was downloaded. Without either, all that is
    built is meant.
    """
    from . import show
    from .verification import Asked
    from .verification import verify as run

    wanted = Asked(certificates=certificates, **asked)
    if all_variants:
        ids = tuple(options.project.ladder.variants)
    checks = run(lambda: options.project, ids, wanted, options.hub, options.report)
    options.show(show.checks_json(checks), lambda: show.checks_text(checks, brief=True))
    failed = [f"{id}: {c.name}: {c.detail}" for id, found in checks.items() for c in found if c.passed is False]
    if failed:
        raise CheckFailed("; ".join(failed))


@main.command()
@some_ids
@all_flag
@click.option("--dry-run", is_flag=True, help="Show the plan and stop.")
@click.option("--create-pr", is_flag=True, help="Open a pull request instead of committing to main.")
@click.option("--private", is_flag=True, help="Create new repos as private.")
@click.option("--public", is_flag=True, help="Create new repos as public; else they become so once all are good.")
@click.option("--overwrite", is_flag=True, help="Replace files that people changed on the hub.")
@click.option("--prune", is_flag=True, help="Delete weights here once the hub is proven to hold them.")
@sign_option
@click.option("-y", "--yes", is_flag=True, help="Do not ask.")
@common
def push(
    options: Options,
    ids: tuple[str, ...],
    all_variants: bool,
    dry_run: bool,
    create_pr: bool,
    private: bool,
    public: bool,
    overwrite: bool,
    prune: bool,
    sign_key: Path | None,
    yes: bool,
) -> None:
    """Show what would change on the hub, ask, then make one atomic commit a repo."""
    from . import show
    from .release import Choices, prepare, release
    from .signing import with_key

    project = with_key(options.project, sign_key)
    chosen = project.select(ids, all_variants)
    hub = options.hub()
    choices = Choices(create_pr, private, public, overwrite, prune)
    plans = prepare(project, chosen, hub, choices)
    text = show.push_text(plans, hub.endpoint, prune)
    if dry_run:
        options.show(show.push_json(plans, prune), lambda: text)
        if refused := [p.refusal for p in plans if p.refusal]:
            raise RemoteChanged("; ".join(refused))
        return
    if not options.as_json:
        click.echo(text)
    if not yes and any(not p.up_to_date and not p.refusal for p in plans):
        _ask(text if options.as_json else "")
    done = release(project, hub, plans, options.report, choices)
    options.show(show.released_json(done), lambda: show.released_text(done, hub.endpoint))
    _raise_failed(done.failed, options.as_json)


def _raise_failed(failed: Mapping[str, PublishError], as_json: bool) -> None:
    """A line for each variant that was not pushed; the last one gives the exit code."""
    if not failed:
        return
    # what follows the first line is a difference, which was shown with the plan or when it was met
    told = {id: str(e) if as_json else str(e).splitlines()[0] for id, e in failed.items()}
    for id in list(failed)[:-1]:
        click.echo(f"Error: {id}: {told[id].removeprefix(f'{id}: ')}", err=True)
    id, error = list(failed.items())[-1]
    raise type(error)(f"{id}: {told[id].removeprefix(f'{id}: ')}") from error


def _ask(plan: str) -> None:
    """Whether to push, of a person who has seen the plan: given where stdout holds JSON instead."""
    if not _on_terminal():
        raise InputError("not a terminal, so nobody can be asked: give --yes to push")
    if plan:
        click.echo(plan, err=True)
    if not click.confirm("Push?", err=True):
        raise click.exceptions.Exit(1)


def _on_terminal() -> bool:
    return sys.stdin.isatty()


@main.command()
@click.argument("id", metavar="ID", shell_complete=_complete_ids)
@click.option("--prompt", help="One question; print the answer and leave.")
@click.option("--max-tokens", type=click.IntRange(1), default=512, show_default=True)
@click.option("--temperature", type=click.FloatRange(0), help="Default: the model's generation_config.json.")
@click.option("--top-k", type=click.IntRange(0))
@click.option("--top-p", type=click.FloatRange(0, 1, min_open=True))
@click.option("--min-p", type=click.FloatRange(0, 1))
@click.option("--repetition-penalty", type=click.FloatRange(0, min_open=True))
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True)
@click.option("--think/--no-think", default=None, help="What the chat template makes of enable_thinking.")
@common
def chat(options: Options, id: str, prompt: str | None, think: bool | None, **given: Any) -> None:
    """Talk to a built variant (ID), or to any folder that holds one, in the terminal."""
    from .talk import find_folder, talk

    echo = _silent if options.as_json else click.echo
    turns = talk(find_folder(options.file, id), prompt, think, given, echo, options.report)
    if options.as_json:
        options.show({"turns": turns}, str)


def _silent(text: str, nl: bool = True) -> None:
    """In place of click.echo, where the answers are shown at the end."""


@main.command()
@click.argument("base")
@click.option("--revision", default="main", show_default=True, help="Branch, tag or commit of a Hub base.")
@click.option("--owner", help="Hub user or organization for the repos.")
@click.option("--imatrix", help="Importance matrix: a local file, or OWNER/REPO/FILE on the Hub.")
@click.option("--force", is_flag=True, help="Replace an existing file.")
@common
def init(options: Options, base: str, revision: str, owner: str | None, imatrix: str | None, force: bool) -> None:
    """Write a commented variants.yaml for BASE, a Hub id or a local folder."""
    from .starter import starter
    from .store import write_text

    if options.file.exists() and not force:
        raise InputError(f"{options.file}: exists already; give --force to replace it")
    text = starter(base, options.file.absolute().parent, revision, owner, imatrix)
    write_text(options.file, text)
    steps = "publish plan" if imatrix else "publish plan and publish calibrate"
    options.show(
        {"written": str(options.file)}, lambda: f"{options.file} written; next: {steps}, then publish build --all"
    )


@main.command()
def schema() -> None:
    """Print the JSON Schema of variants.yaml, for editors."""
    from .starter import json_schema

    click.echo(json_schema(), nl=False)


@main.command()
@click.option(
    "--dir", "folder", type=click.Path(path_type=Path, file_okay=False), default=Path("hub"), show_default=True
)
@click.option("--port", type=click.IntRange(0, 65535), default=7860, show_default=True, help="0 takes a free one.")
@click.option("--user", default="demo", show_default=True, help="Name that may write, and owns its namespace.")
@click.option(
    "--fault", "faults", multiple=True, metavar="ROUTE:KIND[:KEY=VALUE]...", help="Misbehave, see docs/reliability.md."
)
@click.option("--xet/--no-xet", default=True, show_default=True, help="Offer Xet to clients that have it.")
def hub(folder: Path, port: int, user: str, faults: tuple[str, ...], xet: bool) -> None:
    """Run the built-in hub on loopback, to rehearse a release. It is not the Hugging Face Hub.

    Writing takes the token of the environment variable PUBLISH_HUB_TOKEN, `rehearsal` if it is not set.
    """
    from .rehearsal import serve

    serve(folder, port, user, faults, xet)
