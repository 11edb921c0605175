"""The page about strategies shows requests that the server takes, at least one for each strategy."""

import json
import re
from typing import get_args

import pytest

from server.config import Settings
from server.pipeline.strategies import SelectionOptions, Strategy
from server.schemas.options import OPTIONS_OF
from server.schemas.requests import ChatCompletionRequest
from tests.support.paths import ROOT

PAGE = (ROOT / "docs" / "selection.md").read_text()
SECTIONS = {section.partition("\n")[0]: section for section in PAGE.split("\n## ")[1:]}


@pytest.mark.parametrize("strategy", get_args(Strategy))
def test_the_examples_of_a_strategy_are_taken(strategy: Strategy) -> None:
    examples = re.findall(r"^```json\n(.*?)^```", SECTIONS[strategy], re.MULTILINE | re.DOTALL)
    assert examples
    for example in examples:
        planned = ChatCompletionRequest.model_validate(json.loads(example)).to_request(Settings())
        assert planned.strategy == strategy
        assert (planned.selection == SelectionOptions()) == (not OPTIONS_OF[strategy])


@pytest.mark.parametrize("text", ["17 · 23 = 391.\nThe answer is 391.", "The answer is 391", "The answer is 391.\n"])
def test_the_pattern_of_the_examples_finds_the_answer(text: str) -> None:
    (pattern,) = {json.loads(f'"{escaped}"') for escaped in re.findall(r'"answer_regex": "(.*?)"[,}]', PAGE)}
    assert SelectionOptions(answer_regex=pattern).extract()(text) == "391"
