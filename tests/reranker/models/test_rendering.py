import pytest
import torch

from reranker.candidate import Message, Prompt
from reranker.models.rendering import Rendered, Renderer, RenderingError, RenderingStyle, pad, scored_index
from tests.support.tiny_models import CHATML, tiny_bert_tokenizer, tiny_tokenizer

CHAT = Prompt(messages=(Message("user", "What is the capital of France?"),))
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


def test_the_prompt_has_the_same_tokens_for_every_candidate() -> None:
    chat = renderer("chat")
    for prompt in (CHAT, TEXT):
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


def test_a_candidate_that_does_not_fit_is_an_error_with_the_remedy() -> None:
    with pytest.raises(RenderingError, match="the reward model reads 5; ask for shorter answers"):
        renderer("document", max_length=5).render(TEXT, " great great great great great great great")


def test_an_empty_candidate_is_scored_and_an_empty_prompt_too_is_an_error() -> None:
    chat = renderer("chat")
    assert chat.render(TEXT, "").token_ids == chat.render(Prompt(text=""), "The film was").token_ids
    with pytest.raises(RenderingError, match="no token to score"):
        chat.render(Prompt(text=""), "")


def test_a_conversation_without_a_chat_template_is_an_error() -> None:
    with pytest.raises(RenderingError, match="no chat template"):
        renderer("chat", chat_template=None).render(CHAT, "Paris.")


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
