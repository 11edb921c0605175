"""Trains the policy on its own best-of-N winners (rejection sampling), so that one sample gets better.

    python -m examples.teach_best_of_n [--out runs/teach] [--rounds 1]

`nbest improve` does it by command: in every round it samples N candidates for each training prompt, fine-tunes the
policy on the winners, and measures the reward of single samples on held-out prompts. The same command continues an
interrupted run (docs/training.md). On two CPU cores a round takes minutes.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

from benchmarks import film_reviews, training_openings

NBEST = str(Path(sys.executable).with_name("nbest"))


def teach(out: Path, *options: str, prompts: int = 48, held_out: int = 30) -> list[float]:
    """Runs `nbest improve` with these options; returns the held-out reward before training and after each round."""
    out.mkdir(parents=True, exist_ok=True)
    files = {"train": training_openings.OPENINGS[:prompts], "held-out": film_reviews.OPENINGS[:held_out]}
    for name, openings in files.items():
        lines = [json.dumps({"prompt": opening}) + "\n" for opening in openings]
        (out / f"{name}.jsonl").write_text("".join(lines))
    data = ("--prompts", str(out / "train.jsonl"), "--held-out", str(out / "held-out.jsonl"))
    subprocess.run([NBEST, "improve", *data, "--out", str(out / "run"), *options], check=True)
    rounds = json.loads((out / "run" / "summary.json").read_text())
    return [row["held_out_reward"]["mean"] for row in rounds]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/teach"), help="directory of the run")
    parser.add_argument("--rounds", type=int, default=1, help="rounds of sampling and fine-tuning")
    arguments = parser.parse_args()
    options = ("--rounds", str(arguments.rounds), "--best-of", "8", "--max-tokens", "32", "--learning-rate", "5e-4")
    for number, reward in enumerate(teach(arguments.out, *options)):
        print(f"after round {number}: mean reward of single samples {reward:.2f}")


if __name__ == "__main__":
    main()
