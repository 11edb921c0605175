"""The price of a request: the machine's time and the tokens; both prices are command-line flags."""

import argparse
from dataclasses import dataclass
from typing import Self


@dataclass(frozen=True, slots=True)
class Prices:
    """Price of the machine for an hour, and of a million prompt, generated and scored tokens."""

    per_hour: float
    per_million: tuple[float, float, float]

    @staticmethod
    def add_flags(parser: argparse.ArgumentParser) -> None:
        parser.add_argument(
            "--price-per-hour", type=float, default=0.1, help="price of the machine; default 0.1, an assumption"
        )
        parser.add_argument(
            "--price-per-million",
            type=float,
            nargs=3,
            default=(0.0, 0.0, 0.0),
            metavar=("PROMPT", "GENERATED", "SCORED"),
            help="price of tokens, added to that of the machine; default 0",
        )

    @classmethod
    def from_flags(cls, flags: argparse.Namespace) -> Self:
        prompt, generated, scored = flags.price_per_million
        return cls(flags.price_per_hour, (prompt, generated, scored))

    def of(self, machine_s: float, prompt_tokens: float, generated_tokens: float, scored_tokens: float) -> float:
        """The price of a request that had the machine to itself for `machine_s`, or a share of it for longer."""
        tokens = zip(self.per_million, (prompt_tokens, generated_tokens, scored_tokens), strict=True)
        return machine_s * self.per_hour / 3600 + sum(price * count for price, count in tokens) / 1e6
