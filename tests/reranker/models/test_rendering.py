import logging

import pytest
import torch
from transformers import BartConfig, BertConfig, LlamaConfig, PretrainedConfig

from reranker.candidate import Message, Prompt
from reranker.models.rendering import (
    Rendered,
    Renderer,
    RenderingError,
    TooLongError,
    pad,
    pad_segments,
    scored_index,
    style_of,
)
from reranker.models.rendering_style import RenderingStyle
from tests.support.tiny_models import CHATML, tiny_bert_tokenizer, tiny_tokenizer

CHAT = Prompt(messages=(Message("user", "What is the capital of France?"),))
TURNS = Prompt(messages=(Message("system", "Be brief."), *CHAT.messages))
TEXT = Prompt(text="The film was")


def renderer(style: RenderingStyle, *, max_length: int = 128, **tokenizer: object) -> Renderer:
    return Renderer(tiny_tokenizer(**tokenizer), style, max_length)  # type: ignore[arg-type]


def decoded(rendered: Rendered, renderer: Renderer) -> str:
    return str(renderer.tokenizer.decode(rendered.token_ids))


def test_chat_style_writes_the_candidate_as_the_assistants_turn() -> None:
    chat = renderer("chat")
    assert decoded(chat.render(CHAT, "Paris."), chat) == (
        "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\nParis.<|im_end|>\n"
    )


def test_chat_style_concatenates_a_text_prompt_and_its_continuation() -> None:
    chat = renderer("chat")
    assert decoded(chat.render(TEXT, " great."), chat) == "The film was great."


def test_document_style_is_the_finished_text_followed_by_eos() -> None:
    document = renderer("document")
    assert decoded(document.render(TEXT, " great."), document) == "The film was great.<|im_end|>"
    assert decoded(document.render(CHAT, "Paris."), document) == "Paris.<|im_end|>"


def test_transcript_style_writes_all_turns_and_the_candidate_as_plain_text_followed_by_eos() -> None:
    transcript = renderer("transcript", chat_template=None)
    assert decoded(transcript.render(TURNS, "Paris."), transcript) == (
        "system: Be brief.\n\nuser: What is the capital of France?\n\nassistant: Paris.<|im_end|>"
    )
    assert decoded(transcript.render(TEXT, " great."), transcript) == "The film was great.<|im_end|>"


@pytest.mark.parametrize(
    ("prompt", "question"),
    [
        (CHAT, "What is the capital of France?"),
        (TURNS, "system: Be brief.\n\nuser: What is the capital of France?"),
        (TEXT, "The film was"),
    ],
)
def test_pair_style_is_the_tokenizers_own_pair_of_prompt_and_candidate(prompt: Prompt, question: str) -> None:
    pair = Renderer(tiny_bert_tokenizer(), "pair", 128, segments=True)
    own = pair.tokenizer(question, "The capital of France is Paris.")
    rendered = pair.render(prompt, "The capital of France is Paris.")
    assert rendered.token_ids == tuple(own["input_ids"])
    assert rendered.segment_ids == tuple(own["token_type_ids"])
    assert rendered.segment_ids[: rendered.prompt_length] == (0,) * rendered.prompt_length
    assert Renderer(pair.tokenizer, "pair", 128).render(prompt, "a").segment_ids == ()


def test_a_pair_that_is_too_long_loses_the_oldest_tokens_of_the_prompt() -> None:
    pair = Renderer(tiny_bert_tokenizer(), "pair", 128, segments=True)
    full = pair.render(CHAT, "Paris")
    short = Renderer(pair.tokenizer, "pair", len(full.token_ids) - 2, segments=True).render(CHAT, "Paris")
    assert short.token_ids == full.token_ids[:1] + full.token_ids[3:]
    assert (short.cut_tokens, short.segment_ids) == (2, full.segment_ids[:1] + full.segment_ids[3:])


def test_segments_are_padded_with_zeros() -> None:
    batch = [Rendered((2, 7, 3, 8), 3, segment_ids=(0, 0, 0, 1)), Rendered((2, 3), 1, segment_ids=(0, 1))]
    segments = pad_segments(batch)
    assert segments is not None
    assert segments.tolist() == [[0, 0, 0, 1], [0, 1, 0, 0]]
    assert pad_segments([Rendered((2, 3), 1)]) is None


class TestStyle:
    @pytest.mark.parametrize(
        ("config", "style"),
        [
            pytest.param(BertConfig(), "pair", id="an encoder"),
            pytest.param(LlamaConfig(), "transcript", id="a decoder"),
            pytest.param(BartConfig(), "transcript", id="an encoder-decoder"),
            pytest.param(PretrainedConfig(), "transcript", id="a model of its own code"),
        ],
    )
    def test_without_a_chat_template_the_style_is_guessed_with_a_warning(
        self, config: PretrainedConfig, style: RenderingStyle, caplog: pytest.LogCaptureFixture
    ) -> None:
        assert style_of(tiny_tokenizer(chat_template=None), config, "org/model") == style
        assert f"org/model has no chat template, so nbest guesses that it reads prompts in the style {style}" in (
            caplog.text
        )

    @pytest.mark.parametrize("config", [BertConfig(), LlamaConfig()])
    def test_a_chat_template_decides_without_a_warning(
        self, config: PretrainedConfig, caplog: pytest.LogCaptureFixture
    ) -> None:
        assert style_of(tiny_tokenizer(), config, "org/model") == "chat"
        assert not caplog.records

    def test_an_unknown_style_is_refused(self) -> None:
        with pytest.raises(ValueError, match="no rendering style 'pairs'; choose from chat, pair,"):
            renderer("pairs")  # type: ignore[arg-type]


def test_the_prompt_has_the_same_tokens_for_every_candidate() -> None:
    for chat, prompt in ((renderer("chat"), CHAT), (renderer("chat"), TEXT), (renderer("transcript"), TURNS)):
        # "The film was" + " a" and "wash" would merge with the prompt's last token if they were tokenised together.
        rendered = [chat.render(prompt, text) for text in (" great", "h", "\n\n", "", "s")]
        assert len({sequence.token_ids[: sequence.prompt_length] for sequence in rendered}) == 1
        assert rendered[0].prompt_length > 0


@pytest.mark.parametrize("template", [CHATML, "<s>" + CHATML])
def test_there_is_one_bos_whether_the_template_or_the_tokenizer_writes_it(template: str) -> None:
    chat = renderer("chat", adds_bos=True, chat_template=template)
    ids = chat.render(CHAT, "Paris.").token_ids
    bos = chat.tokenizer.bos_token_id
    assert ids[0] == bos
    assert ids.count(bos) == 1


def test_an_encoder_gets_cls_and_sep_once() -> None:
    document = Renderer(tiny_bert_tokenizer(), "document", 128)
    assert decoded(document.render(TEXT, " great"), document).startswith("[CLS]")
    names = document.tokenizer.convert_ids_to_tokens(document.render(TEXT, " great").token_ids)
    assert (names[0], names[-1], names.count("[SEP]")) == ("[CLS]", "[SEP]", 1)


def test_a_prompt_that_is_too_long_loses_its_oldest_tokens_and_keeps_bos() -> None:
    full = renderer("document", adds_bos=True).render(TEXT, " great")
    short = renderer("document", adds_bos=True, max_length=len(full.token_ids) - 1).render(TEXT, " great")
    assert short.token_ids == full.token_ids[:1] + full.token_ids[2:]
    assert short.prompt_length == full.prompt_length - 1


def test_a_candidate_that_does_not_fit_is_an_error_of_its_own() -> None:
    with pytest.raises(TooLongError, match="the candidate alone is 7 tokens and the reward model reads 5"):
        renderer("document", max_length=5).render(TEXT, " great great great great great great great")


def test_an_empty_candidate_is_scored_and_an_empty_prompt_too_is_an_error() -> None:
    chat = renderer("chat")
    assert chat.render(TEXT, "").token_ids == chat.render(Prompt(text=""), "The film was").token_ids
    with pytest.raises(RenderingError, match="no token to score"):
        chat.render(Prompt(text=""), "")


def test_a_conversation_without_a_chat_template_is_an_error() -> None:
    chat = renderer("chat", chat_template=None)
    with pytest.raises(RenderingError, match="no chat template"):
        chat.render(CHAT, "Paris.")
    with pytest.raises(RenderingError, match="no chat template"):
        chat.check(CHAT)
    chat.check(TEXT)


@pytest.mark.parametrize(("prompt", "candidate"), [(TEXT, "\ud800"), (Prompt(text="\ud800"), "great")])
def test_a_lone_surrogate_is_an_error(prompt: Prompt, candidate: str) -> None:
    with pytest.raises(RenderingError, match="not valid Unicode: it contains a lone surrogate"):
        renderer("chat").render(prompt, candidate)


def test_a_text_over_the_tokenizers_length_causes_no_warning(caplog: pytest.LogCaptureFixture) -> None:
    chat = renderer("chat")
    logging.getLogger("transformers").addHandler(caplog.handler)
    try:
        chat.render(Prompt(text="The film was " * 200), "great")
    finally:
        logging.getLogger("transformers").removeHandler(caplog.handler)
    assert not caplog.records


def test_the_reason_of_a_template_that_refuses_the_conversation_is_reported() -> None:
    template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(RenderingError, match="roles must alternate"):
        renderer("chat", chat_template=template).render(CHAT, "Paris.")


def test_a_reply_that_the_template_opens_differently_shares_no_prompt() -> None:
    template = (
        "{% for m in messages %}{% if '</think>' in m['content'] %}THOUGHT:{% else %}SAID:{% endif %}"
        "{{ m['content'] }}{% endfor %}"
    )
    chat = renderer("chat", chat_template=template)
    plain, thought = chat.render(CHAT, "Paris."), chat.render(CHAT, "Hm</think>Paris.")
    assert decoded(thought, chat) == "SAID:What is the capital of France?THOUGHT:Hm</think>Paris."
    assert plain.prompt_length > 0
    assert thought.prompt_length == 0


@pytest.mark.parametrize("mask", [[[1, 1, 1, 0], [1, 0, 0, 0]], [[0, 1, 1, 1], [0, 0, 0, 1]]])
def test_the_scored_token_is_the_last_under_the_mask_for_either_padding_side(mask: list[list[int]]) -> None:
    expected = [max(i for i, bit in enumerate(row) if bit) for row in mask]
    assert scored_index(torch.tensor(mask)).tolist() == expected


def test_the_mask_separates_eos_from_padding_of_the_same_token() -> None:
    ids, mask = pad([Rendered((7, 8, 2), 0), Rendered((2,), 0), Rendered((7, 2, 2, 9), 0)], pad_id=2)
    assert ids.tolist() == [[7, 8, 2, 2], [2, 2, 2, 2], [7, 2, 2, 9]]
    assert scored_index(mask).tolist() == [2, 0, 3]
