"""The whole road of RLHF in one command; README.md beside this file tells what it shows.

    python -m examples.rlhf_pipeline [--out runs/rlhf] [--small] [--show]

Every stage is an `nbest` command, shown as it is run. A stage whose result is there is not run again, so after Ctrl-C
or an error the same command goes on.
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
from training.policy.subcommands import commands_in


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/rlhf"), help="where everything is kept")
    parser.add_argument("--small", action="store_true", help="a few steps of everything, to see it work")
    parser.add_argument("--show", action="store_true", help="print the commands and run none")
    parser.add_argument("--seed", type=int, default=0, help="decides data, samples and the order of learning")
    parser.add_argument(
        "--dtype",
        choices=("float32", "auto"),
        default="float32",
        help="float32: the same seed gives the same result; auto: bfloat16 where that is faster",
    )
    given = parser.parse_args()
    size = SMALL if given.small else FULL
    planned = stages(given.out, size, dtype=given.dtype, seed=given.seed)
    if given.show:
        print("\n".join(stage.command for stage in planned))
        return
    for library in ("trl", "matplotlib", "vaderSentiment"):  # told now, not after half an hour
        if importlib.util.find_spec(library) is None:
            sys.exit(f"Error: {library} is not installed; it comes with: pip install 'nbest[train,dev]'")
    try:
        with commands_in(given.out) as run:
            from examples.rlhf_pipeline.data import write_data  # here and below: --show and --help answer at once

            print("Data: ratings of film-review snippets become demonstrations, preferences and prompts", flush=True)
            write_data(given.out / "data", size, dtype=given.dtype, seed=given.seed)
            run_missing(planned, run, lambda line: print(f"\n{line}", flush=True))
            from examples.rlhf_pipeline.comparison import compare

            print("\nComparison: what each says to the held-out prompts is read and judged", flush=True)
            print(f"\n{compare(given.out, size, dtype=given.dtype, seed=given.seed)}")
            print(f"Written to {given.out / 'comparison.md'}, .json and .png.")
    except CheckpointError as error:
        sys.exit(f"Error: {error}")
    except (TrainingError, RuntimeError, OSError) as error:
        sys.exit(f"\nError: {error}\nTo go on: {_same_command()}")
    except KeyboardInterrupt:
        sys.exit(f"\nStopped. To go on: {_same_command()}")


def _same_command() -> str:
    return shlex.join(["python", "-m", "examples.rlhf_pipeline", *sys.argv[1:]])


if __name__ == "__main__":
    main()
