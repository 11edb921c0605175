import pytest
import torch

from reranker.candidate import Message, Prompt
from reranker.models.rendering import Rendered, Renderer, RenderingError, RenderingStyle, pad, scored_index
from tests.support.tiny_models import CHATML, tiny_bert_tokenizer, tiny_tokenizer

CHAT = Prompt(messages=(Message("user", "What is the capital of France?"),))
TEXT = Prompt(text="The film was")


def renderer(style: RenderingStyle, *, max_length: int = 128, **tokenizer: object) -> Renderer:
    return Renderer(tiny_tokenizer(**tokenizer), style, max_length)  # type: ignore[arg-type]


def read(rendered: Rendered, by: Renderer) -> str:
    return str(by.tokenizer.decode(rendered.token_ids))


def test_chat_style_writes_the_candidate_as_the_assistants_turn() -> None:
    chat = renderer("chat")
    assert read(chat.render(CHAT, "Paris."), chat) == (
        "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\nParis.<|im_end|>\n"
    )


def test_chat_style_concatenates_a_text_prompt_and_its_continuation() -> None:
    chat = renderer("chat")
    assert read(chat.render(TEXT, " great."), chat) == "The film was great."


def test_document_style_is_the_text_a_reader_sees_closed_by_eos() -> None:
    document = renderer("document")
    assert read(document.render(TEXT, " great."), document) == "The film was great.<|im_end|>"
    assert read(document.render(CHAT, "Paris."), document) == "Paris.<|im_end|>"


def test_the_prompt_is_the_same_tokens_before_every_candidate() -> None:
    chat = renderer("chat")
    for prompt in (CHAT, TEXT):
        # "The film was" + " a" and "wash" would merge with the prompt's last token if they were tokenised together.
        rendered = [chat.render(prompt, text) for text in (" great", "h", "\n\n", "", "s")]
        assert len({r.token_ids[: r.prompt_length] for r in rendered}) == 1
        assert rendered[0].prompt_length > 0


@pytest.mark.parametrize("template", [CHATML, "<s>" + CHATML])
def test_exactly_one_bos_whether_the_template_writes_it_or_the_tokenizer(template: str) -> None:
    chat = renderer("chat", adds_bos=True, chat_template=template)
    ids = chat.render(CHAT, "Paris.").token_ids
    bos = chat.tokenizer.bos_token_id
    assert ids[0] == bos
    assert ids.count(bos) == 1


def test_an_encoder_gets_cls_and_sep_once() -> None:
    document = Renderer(tiny_bert_tokenizer(), "document", 128)
    assert read(document.render(TEXT, " great"), document).startswith("[CLS]")
    names = document.tokenizer.convert_ids_to_tokens(document.render(TEXT, " great").token_ids)
    assert (names[0], names[-1], names.count("[SEP]")) == ("[CLS]", "[SEP]", 1)


def test_too_long_a_prompt_loses_its_oldest_tokens_and_keeps_bos_and_the_whole_candidate() -> None:
    full = renderer("document", adds_bos=True).render(TEXT, " great")
    short = renderer("document", adds_bos=True, max_length=len(full.token_ids) - 1).render(TEXT, " great")
    assert short.token_ids == full.token_ids[:1] + full.token_ids[2:]
    assert short.prompt_length == full.prompt_length - 1


def test_a_candidate_that_does_not_fit_is_an_error_that_says_what_to_do() -> None:
    with pytest.raises(RenderingError, match="the reward model reads 5; ask for shorter answers"):
        renderer("document", max_length=5).render(TEXT, " great great great great great great great")


def test_an_empty_candidate_is_scored_after_the_prompt_and_nothing_at_all_is_an_error() -> None:
    chat = renderer("chat")
    assert chat.render(TEXT, "").token_ids == chat.render(Prompt(text=""), "The film was").token_ids
    with pytest.raises(RenderingError, match="no token to score"):
        chat.render(Prompt(text=""), "")


def test_a_conversation_without_a_chat_template_is_refused_by_name() -> None:
    with pytest.raises(RenderingError, match="no chat template"):
        renderer("chat", chat_template=None).render(CHAT, "Paris.")


def test_a_template_that_refuses_the_conversation_gives_its_own_reason() -> None:
    template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(RenderingError, match="roles must alternate"):
        renderer("chat", chat_template=template).render(CHAT, "Paris.")


def test_a_reply_that_the_template_opens_in_its_own_way_shares_nothing() -> None:
    template = (
        "{% for m in messages %}{% if '</think>' in m['content'] %}THOUGHT:{% else %}SAID:{% endif %}"
        "{{ m['content'] }}{% endfor %}"
    )
    chat = renderer("chat", chat_template=template)
    plain, thought = chat.render(CHAT, "Paris."), chat.render(CHAT, "Hm</think>Paris.")
    assert read(thought, chat) == "SAID:What is the capital of France?THOUGHT:Hm</think>Paris."
    assert plain.prompt_length > 0
    assert thought.prompt_length == 0


@pytest.mark.parametrize("mask", [[[1, 1, 1, 0], [1, 0, 0, 0]], [[0, 1, 1, 1], [0, 0, 0, 1]]])
def test_the_scored_token_is_the_last_under_the_mask_for_either_padding_side(mask: list[list[int]]) -> None:
    expected = [max(i for i, bit in enumerate(row) if bit) for row in mask]
    assert scored_index(torch.tensor(mask)).tolist() == expected


def test_padding_that_equals_eos_is_told_from_eos_by_the_mask() -> None:
    ids, mask = pad([Rendered((7, 8, 2), 0), Rendered((2,), 0), Rendered((7, 2, 2, 9), 0)], pad_id=2)
    assert ids.tolist() == [[7, 8, 2, 2], [2, 2, 2, 2], [7, 2, 2, 9]]
    assert scored_index(mask).tolist() == [2, 0, 3]
