"""The complete RLHF pipeline in one command, from human ratings to a comparison of methods; README.md describes it.

    python -m examples.rlhf_pipeline [--out runs/rlhf] [--small] [--show]

Every stage is an `nbest` command, which is printed before it runs. A stage whose result exists is skipped, so after
Ctrl-C or an error the same command continues.
"""

import argparse
import importlib.util
import shlex
import sys
from pathlib import Path

from examples.rlhf_pipeline.size import FULL, SMALL
from examples.rlhf_pipeline.stages import run_missing, stages
from training.checkpoints import CheckpointError
from training.errors import TrainingError
from training.policy.subcommands import locked_commands


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/rlhf"), help="directory of all results")
    parser.add_argument("--small", action="store_true", help="run every stage with a few steps, as a trial")
    parser.add_argument("--show", action="store_true", help="print the commands without running them")
    parser.add_argument("--seed", type=int, default=0, help="seed of data, sampling and training order")
    parser.add_argument(
        "--dtype",
        choices=("float32", "auto"),
        default="float32",
        help="float32: the same seed gives the same result; auto: bfloat16 where that is faster",
    )
    arguments = parser.parse_args()
    out, dtype, seed = arguments.out, arguments.dtype, arguments.seed
    size = SMALL if arguments.small else FULL
    planned = stages(out, size, dtype=dtype, seed=seed)
    if arguments.show:
        print("\n".join(stage.command for stage in planned))
        return
    for library in ("trl", "matplotlib", "vaderSentiment"):  # checked here rather than after half an hour
        if importlib.util.find_spec(library) is None:
            sys.exit(f"Error: {library} is not installed; install it with: pip install 'nbest[train,dev]'")
    try:
        with locked_commands(out) as run:
            from examples.rlhf_pipeline.data import write_data  # heavy imports: --show and --help do not need them

            print("Data: demonstrations, preferences and prompts from ratings of film-review snippets", flush=True)
            write_data(out / "data", size, dtype=dtype, seed=seed)
            run_missing(planned, run, lambda line: print(f"\n{line}", flush=True))
            from examples.rlhf_pipeline.comparison import compare

            print("\nComparison: scores of every policy's samples for the held-out prompts", flush=True)
            print(f"\n{compare(out, size, dtype=dtype, seed=seed)}")
            print(f"Written to {out / 'comparison.md'}, .json and .png.")
    except CheckpointError as error:
        sys.exit(f"Error: {error}")
    except (TrainingError, RuntimeError, OSError) as error:
        sys.exit(f"\nError: {error}\nTo continue: {_same_command()}")
    except KeyboardInterrupt:
        sys.exit(f"\nStopped. To continue: {_same_command()}")


def _same_command() -> str:
    return shlex.join(["python", "-m", "examples.rlhf_pipeline", *sys.argv[1:]])


if __name__ == "__main__":
    main()
