"""The `keel` command: reads arguments, calls one function, prints one clear message when the user has to change
something.

Everything heavier than typer is imported inside the command that needs it, so that `keel --help` answers at once.
"""

from __future__ import annotations

import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from grpo.config import TrainConfig

USER_ERROR = 2
"""Exit code when the run file, the arguments or the installation have to change."""
RUN_FAILED = 1
"""Exit code when a run stopped itself: an engine without the learner's weights, an actor that did not answer."""

STOPS = (
    "ParityError",
    "ClusterError",
    "ModelCheckError",
    "DropRateError",
    "JudgeServerError",
    "JudgeError",
    "SubmitError",
)
"""Errors whose message says all of why a run stopped."""

app = typer.Typer(
    name="keel",
    help="RL post-training for language models in which training sees exactly what generation saw.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

RunFile = Annotated[Path, typer.Argument(help="The run file, for example examples/quickstart/train.toml.")]
Overrides = Annotated[
    list[str] | None,
    typer.Option("-o", "--override", metavar="TABLE.KEY=VALUE", help="Replaces one value of the run file; repeatable."),
]
Resume = Annotated[bool, typer.Option("--resume", help="Continue from the last complete checkpoint.")]
Fresh = Annotated[bool, typer.Option("--fresh", help="Delete an earlier run of the same name first.")]
Address = Annotated[
    str,
    typer.Option("--address", envvar="RAY_API_SERVER_ADDRESS", help="The cluster's dashboard, as in http://head:8265."),
]
Job = Annotated[str, typer.Argument(metavar="JOB", help="As `keel submit` printed it.")]


@app.command()
def train(
    run_file: RunFile,
    override: Overrides = None,
    resume: Resume = False,
    fresh: Fresh = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check everything and print the plan; start nothing.")
    ] = False,
) -> None:
    """Trains a model with RL."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # what a shell starts in the background ignores it
    config = _load(run_file, override)
    if dry_run:
        _print_plan(config, run_file)
        return
    _refuse_both(resume, fresh)
    from grpo.train import train as run_training

    run_dir = run_training(config, run_file=run_file, resume=resume, fresh=fresh)
    typer.echo(f"\nrun folder: {run_dir}\nsee it with: keel report {run_dir}")


@app.command()
def submit(
    run_file: RunFile,
    address: Address,
    override: Overrides = None,
    resume: Resume = False,
    fresh: Fresh = False,
    detach: Annotated[bool, typer.Option("--detach", help="Do not follow what it prints.")] = False,
) -> None:
    """Trains as a job of a Ray cluster, and follows it; Ctrl-C leaves it running.

    The current folder travels along, without what its .gitignore names; the run file must lie in it. run.output_dir
    must be an absolute path that every node sees.
    """
    config = _load(run_file, override)
    _refuse_both(resume, fresh)
    options = ("--resume",) * resume + ("--fresh",) * fresh
    from grpo.commands.submit import submit_run

    job = submit_run(config, run_file, address=address, overrides=tuple(override or ()), options=options)
    typer.echo(f"submitted {job}; its run folder will be {config.run_dir}")
    if not detach:
        _follow(job, address)


@app.command()
def follow(job: Job, address: Address) -> None:
    """Prints what a submitted run prints, until it ends; Ctrl-C leaves it running."""
    _follow(job, address)


@app.command()
def stop(job: Job, address: Address) -> None:
    """Ends a submitted run as Ctrl-C would, with a checkpoint to resume from."""
    from grpo.commands.submit import stop_job

    if stop_job(job, address=address, write=typer.echo):
        typer.echo(f"{job} has ended; submit its run file again with --resume to go on")
    else:
        typer.echo(f"{job} had ended before")


@app.command("eval")
def evaluate(
    target: Annotated[
        Path,
        typer.Argument(metavar="RUN", help="A run folder (its newest checkpoint), or a run file (its base model)."),
    ],
    override: Overrides = None,
    checkpoint: Annotated[Path | None, typer.Option(help="A checkpoint of the run other than its newest.")] = None,
) -> None:
    """Measures accuracy on the held-out tasks."""
    target = target.resolve()
    if target.is_dir():
        from grpo.checkpoint import list_checkpoints
        from grpo.records.run_folder import load_run

        config, run_file = load_run(target, tuple(override or ()))
        checkpoint = checkpoint or next(reversed(list_checkpoints(target)), None)
    else:
        config, run_file = _load(target, override), target
    from grpo.evaluate import evaluate_run

    _print_result(evaluate_run(config, run_file=run_file, checkpoint=checkpoint))


@app.command()
def report(
    run_dir: Annotated[Path, typer.Argument(help="A run folder, for example runs/quickstart.")],
    output: Annotated[
        Path | None, typer.Option("-O", "--output", help="The HTML file; default RUN_DIR/report.html.")
    ] = None,
) -> None:
    """Writes one self-contained HTML page about a run."""
    from grpo.commands.report import write_report

    typer.echo(write_report(run_dir, output))


@app.command()
def doctor(
    run_file: Annotated[Path | None, typer.Argument(help="Also check this run file.")] = None,
    override: Overrides = None,
) -> None:
    """Checks versions, features, hardware and, if given, a run file."""
    from grpo.commands.doctor import run_doctor

    if not run_doctor(run_file, tuple(override or ())):
        raise typer.Exit(1)


@app.command()
def replay(
    file: Annotated[Path, typer.Argument(help="A batch that a run with debug.dump_batches = true wrote.")],
) -> None:
    """Recomputes loss and gradient norm of a recorded batch."""
    from grpo.replay import replay_file

    _print_result(replay_file(file))


@app.command("check-reward")
def check_reward(
    fn: Annotated[str, typer.Argument(metavar="SPEC", help="package.module:function or ./file.py:function.")],
    tasks: Annotated[Path, typer.Option("--tasks", help="The tasks, as .jsonl.")],
    completions: Annotated[
        Path | None,
        typer.Option("--completions", help="Rows with the task's id or prompt and a completion; default: made up."),
    ] = None,
    kwargs: Annotated[
        list[str] | None, typer.Option("--kwargs", metavar="KEY=VALUE", help="An argument; repeatable.")
    ] = None,
    num_tasks: Annotated[int, typer.Option("--num-tasks", min=1, help="Tasks to make completions up for.")] = 20,
    timeout_s: Annotated[float, typer.Option("--timeout", min=0.001, help="Seconds for one call.")] = 30.0,
    may_vary: Annotated[bool, typer.Option("--may-vary", help="The function does not claim to be repeatable.")] = False,
) -> None:
    """Runs a reward function on a few completions and prints every breach of the contract."""
    from grpo.commands.check_reward import check_reward as check

    if not check(
        fn,
        tasks=tasks,
        completions=completions,
        kwargs=tuple(kwargs or ()),
        num_tasks=num_tasks,
        timeout_s=timeout_s,
        may_vary=may_vary,
    ):
        raise typer.Exit(1)


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def judge(
    context: typer.Context,
    model: Annotated[str, typer.Argument(help="A Hugging Face folder or id; requests name it the same way.")],
    port: Annotated[int, typer.Option("--port", min=0, max=65535, help="0 takes a free one.")] = 8199,
    host: Annotated[
        str, typer.Option("--host", help="Anything but loopback is open to whoever reaches it.")
    ] = "127.0.0.1",
    devices: Annotated[str, typer.Option("--devices", help="GPUs, as in CUDA_VISIBLE_DEVICES; default: all.")] = "",
    cpu_threads: Annotated[int, typer.Option("--cpu-threads", min=1, help="Without GPUs.")] = 1,
) -> None:
    """Serves a judge model until Ctrl-C; further options go to vLLM, such as --max-model-len 8192."""
    from grpo.judge import ServerOptions, serve

    options = ServerOptions(devices=devices, cpu_threads=cpu_threads, vllm_args=tuple(context.args))
    serve(model, port=port, host=host, options=options)


@app.command("judge-report")
def judge_report(
    file: Annotated[Path, typer.Argument(help="Rows of prompt, rubric, completion and, where known, label or labels.")],
    endpoint: Annotated[str, typer.Option("--endpoint", help="With its /v1.")],
    model: Annotated[str, typer.Option("--model", help="As the endpoint calls it.")],
    repeats: Annotated[int, typer.Option("--repeats", min=1, help="Judgements of every completion.")] = 3,
    output: Annotated[Path | None, typer.Option("-O", "--output", help="Write the JSON there.")] = None,
) -> None:
    """Measures how far a judge agrees with itself and with given labels."""
    from grpo.judge import report as judge_agreement

    judge_agreement(file, endpoint=endpoint, model=model, repeats=repeats, output=output)


def main() -> None:
    """Runs the command line; a mistake of the user is one message, not a traceback; Ctrl-C exits with 130."""
    try:
        app()
    except (ValueError, RuntimeError) as error:
        code = _exit_code(error)
        if code is None:
            raise
        typer.secho(f"error: {error}", fg="red", err=True)
        sys.exit(code)


def _exit_code(error: ValueError | RuntimeError) -> int | None:
    """What to exit with when the message says all; None for an error whose traceback is needed."""
    from grpo.config import ConfigError
    from rewards.judge.schema import RubricError
    from rewards.load import RewardError
    from rollout.tasks import TaskError
    from rollout.tokenizer import TokenizerError

    if isinstance(error, ConfigError | RewardError | TaskError | TokenizerError | RubricError):
        return USER_ERROR
    # Matched by name: importing these classes would load torch and Ray to report a mistake in `keel report`.
    return RUN_FAILED if type(error).__name__ in STOPS else None


def _load(run_file: Path, override: list[str] | None) -> TrainConfig:
    from grpo.config import load_config

    return load_config(run_file, tuple(override or ()))


def _refuse_both(resume: bool, fresh: bool) -> None:
    if fresh and resume:
        raise typer.BadParameter("--fresh deletes what --resume continues: give one of them")


def _follow(job: str, address: str) -> None:
    from grpo.commands.submit import follow_job

    try:
        exit_code = follow_job(job, address=address, write=lambda text: typer.echo(text, nl=False))
    except KeyboardInterrupt:
        typer.echo(
            f"\n{job} goes on: see it again with `keel follow {job} --address {address}`, end it with `keel stop {job} "
            f"--address {address}`",
            err=True,
        )
        raise
    if exit_code:
        raise typer.Exit(exit_code)


def _print_plan(config: TrainConfig, run_file: Path) -> None:
    from rich.console import Console

    from grpo.commands.plan import make_plan, render
    from grpo.preflight import check

    Console().print(render(make_plan(config, check(config, run_file))))


def _print_result(result: dict[str, object]) -> None:
    width = max((len(key) for key in result), default=0)
    for key, value in result.items():
        typer.echo(f"{key:<{width}}  {value:.6g}" if isinstance(value, float) else f"{key:<{width}}  {value}")
