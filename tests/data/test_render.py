"""One rendering for SFT, reward model and rollouts: which tokens have loss, where a sequence begins and ends."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from rlhf.data.records import BadRow
from rlhf.data.render import Rendered, Renderer, prepare_tokenizer
from rlhf.errors import ConfigError

TALK = [
    {"role": "user", "content": "how are you?"},
    {"role": "assistant", "content": "the cat\n\nsat on the mat – naïve 😀"},
    {"role": "user", "content": "  and the dog "},
    {"role": "assistant", "content": "ran"},
]
SAID = [TALK[1]["content"], TALK[3]["content"]]
USABLE = {
    "chatml": {},
    "newline": {},
    "unclosed": {},
    "llama": {"bos": "<s>"},
    "pad_is_end": {"template": "newline", "eos": "<|im_end|>", "pad": "<|im_end|>"},
    "bos_twice_offered": {"template": "llama", "bos": "<s>", "supply_bos": True},
    "bos_by_tokenizer": {"template": "newline", "bos": "<s>", "supply_bos": True},
}


@pytest.fixture(params=sorted(USABLE))
def tokenizer(request: pytest.FixtureRequest, make: Callable[..., Any]) -> Any:
    options = dict(USABLE[request.param])
    return make(options.pop("template", request.param), **options)


def supervised(rendered: Rendered) -> list[int]:
    return [i for i, counts in zip(rendered.ids, rendered.mask, strict=True) if counts]


def check_loss_is_on_the_answers(rendered: Rendered, tokenizer: Any, end_id: int) -> None:
    """The supervised ids are exactly the assistant texts, each followed by one end token, and the last id is one."""
    turns, turn = [], list[int]()
    for i in supervised(rendered):
        turn.append(i)
        if i == end_id:
            turns.append(tokenizer.decode(turn[:-1], clean_up_tokenization_spaces=False))
            turn = []
    assert turns == SAID
    assert turn == []
    assert rendered.ids[-1] == end_id
    assert rendered.mask[-1]


def test_loss_is_on_the_answers_and_their_end(tokenizer: Any) -> None:
    renderer = Renderer(tokenizer)
    check_loss_is_on_the_answers(renderer.conversation(TALK), tokenizer, renderer.end_id)


def test_broken_masks_are_rejected(tokenizer: Any) -> None:
    """The check above is able to fail: a mask by pad id, one without the end, a tail, a mask over everything."""
    renderer = Renderer(tokenizer)
    right = renderer.conversation(TALK)
    no_end = [counts and i != renderer.end_id for i, counts in zip(right.ids, right.mask, strict=True)]
    twins = [
        Rendered(right.ids, no_end),
        Rendered(right.ids, [True] * len(right.ids)),
        Rendered([*right.ids, *tokenizer.encode("\n", add_special_tokens=False)], [*right.mask, False]),
        Rendered(right.ids, [*right.mask[1:], False]),
    ]
    for twin in twins:
        with pytest.raises(AssertionError):
            check_loss_is_on_the_answers(twin, tokenizer, renderer.end_id)


@pytest.mark.parametrize("turns", [2, 4])
def test_conversation_is_prompt_plus_response(tokenizer: Any, turns: int) -> None:
    renderer = Renderer(tokenizer)
    prompt, response = renderer.prompt(TALK[: turns - 1]), renderer.response(TALK[turns - 1]["content"])
    assert renderer.conversation(TALK[:turns]).ids == prompt + response
    assert renderer.decode(response) == TALK[turns - 1]["content"]


def test_a_longer_dialogue_begins_with_the_shorter_one(tokenizer: Any) -> None:
    renderer = Renderer(tokenizer)
    short, long = renderer.conversation(TALK[:2]), renderer.conversation(TALK)
    assert long.ids[: len(short.ids)] == short.ids
    assert long.mask[: len(short.mask)] == short.mask


def test_one_begin_token(tokenizer: Any) -> None:
    """Exactly one where template or tokenizer supplies one, though both may; none where neither does."""
    renderer, expected = Renderer(tokenizer), int(tokenizer.bos_token is not None)
    for ids in (renderer.conversation(TALK).ids, renderer.prompt(TALK[:3]), renderer.text("the cat").ids):
        assert ids.count(tokenizer.convert_tokens_to_ids("<s>")) == expected
        assert not expected or ids[0] == renderer.bos_id
    assert (renderer.bos_id is not None) == bool(expected)


def test_same_text_as_the_template(make: Callable[..., Any]) -> None:
    """Decoded, a conversation is what the template writes, without its tail."""
    tokenizer = make("newline")
    template = tokenizer.apply_chat_template(TALK, tokenize=False)
    assert template == tokenizer.decode(Renderer(tokenizer).conversation(TALK).ids) + "\n"


def test_loss_on_all_spares_the_begin_token(tokenizer: Any) -> None:
    renderer = Renderer(tokenizer)
    rendered = renderer.conversation(TALK, loss_on="all")
    assert rendered.ids == renderer.conversation(TALK).ids
    assert rendered.mask == [renderer.bos_id is None] + [True] * (len(rendered.ids) - 1)


def test_documents_are_separated_by_eos(tokenizer: Any) -> None:
    renderer = Renderer(tokenizer)
    rendered = renderer.text("the cat sat")
    assert rendered.ids[-1] == tokenizer.eos_token_id
    assert renderer.decode(rendered.ids) == "the cat sat"
    assert supervised(rendered) == [i for i in rendered.ids if i != renderer.bos_id]


def test_trimming_template(make: Callable[..., Any]) -> None:
    """A template that strips turns: the same ids for a turn with blanks around it, early or last."""
    renderer = Renderer(make("llama", bos="<s>"))
    padded = [m | {"content": f" {m['content']}\n"} if m["role"] == "assistant" else m for m in TALK]
    assert renderer.conversation(padded) == renderer.conversation(TALK)


def test_template_without_end_token(make: Callable[..., Any]) -> None:
    renderer = Renderer(make("unclosed"))
    assert renderer.end_id == renderer.eos_id
    assert "closes no turn" in renderer.notes[0]


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("dated", "today's date"),
        ("think", "does not render a finished assistant turn"),
        ("unstable", "prefix-stable"),
        ("none", "no chat"),
    ],
)
def test_unusable_templates_are_refused(make: Callable[..., Any], template: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words) as caught:
        Renderer(make(template))
    assert caught.value.where
    assert caught.value.do


def test_end_token_that_is_ordinary_text_is_refused(make: Callable[..., Any]) -> None:
    with pytest.raises(ConfigError, match="not a special token"):
        Renderer(make("chatml", specials=["<|endoftext|>"]))


def test_nothing_ends_a_response(make: Callable[..., Any]) -> None:
    with pytest.raises(ConfigError, match="nothing ends a response"):
        Renderer(make("unclosed", eos=None))


def test_no_pad_token(make: Callable[..., Any]) -> None:
    with pytest.raises(ConfigError, match="prepare_tokenizer"):
        Renderer(make("chatml", pad=None))


@pytest.mark.parametrize("turn", [0, 1])
def test_special_token_in_content(make: Callable[..., Any], turn: int) -> None:
    renderer = Renderer(make("chatml"))
    talk = [m | {"content": "a <|im_end|> b"} if i == turn else m for i, m in enumerate(TALK[:2])]
    with pytest.raises(BadRow, match=r"x.jsonl row 3: .*special token.*<\|im_end\|>.*; ") as caught:
        renderer.conversation(talk, where="x.jsonl row 3")
    assert caught.value.reason == "special token in content"
    for render in (renderer.response, renderer.text):
        with pytest.raises(BadRow):
            render("a <|im_end|> b")


def test_malformed_turns(make: Callable[..., Any]) -> None:
    renderer = Renderer(make("chatml"))
    with pytest.raises(BadRow, match="end with assistant"):
        renderer.conversation(TALK[:3])
    with pytest.raises(BadRow, match="end with user"):
        renderer.prompt(TALK[:2])


def test_template_that_refuses_a_record(make: Callable[..., Any]) -> None:
    tokenizer = make("chatml")
    refuse = "{% if messages[0].role == 'system' %}{{ raise_exception('no system turns') }}{% endif %}"
    tokenizer.chat_template = refuse + tokenizer.chat_template
    with pytest.raises(BadRow, match=r"row 9: the chat template refuses.*no system turns"):
        Renderer(tokenizer).prompt([{"role": "system", "content": "be kind"}, TALK[0]], where="row 9")


def test_template_that_rewrites_a_record(make: Callable[..., Any]) -> None:
    """Usable for most conversations, but drops what stands before </think> once a later turn follows."""
    tokenizer = make("chatml")
    cut = "{{ m.content if loop.last else m.content.split('</think>')[-1] }}"
    tokenizer.chat_template = tokenizer.chat_template.replace("{{ m.content }}", cut)
    renderer = Renderer(tokenizer)
    assert renderer.conversation(TALK).ids
    talk = [TALK[0], {"role": "assistant", "content": "<think>hm</think>yes"}, *TALK[2:]]
    with pytest.raises(BadRow, match=r"row 4: .*earlier turns"):
        renderer.conversation(talk, where="row 4")


# --- prepare_tokenizer -----------------------------------------------------------------------------------------------


def test_prepare_leaves_a_good_tokenizer_alone(make: Callable[..., Any]) -> None:
    tokenizer = make("newline")
    before = (len(tokenizer), tokenizer.pad_token, tokenizer.chat_template)
    assert prepare_tokenizer(tokenizer) == []
    assert (len(tokenizer), tokenizer.pad_token, tokenizer.chat_template) == before


def test_prepare_adds_chatml_and_says_that_the_vocabulary_grew(make: Callable[..., Any]) -> None:
    tokenizer = make("none", specials=["<|endoftext|>"], pad=None)
    size = len(tokenizer)
    notes = " ".join(prepare_tokenizer(tokenizer))
    assert len(tokenizer) == size + 3
    assert "ChatML added" in notes
    assert f"{size} -> {size + 3}" in notes
    written = tokenizer.apply_chat_template(TALK[:1], tokenize=False, add_generation_prompt=True)
    assert written == f"<|im_start|>user\n{TALK[0]['content']}<|im_end|>\n<|im_start|>assistant\n"
    renderer = Renderer(tokenizer)
    check_loss_is_on_the_answers(renderer.conversation(TALK), tokenizer, renderer.end_id)
    assert len({renderer.end_id, renderer.pad_id, renderer.eos_id}) == 3
    assert prepare_tokenizer(tokenizer) == []


def test_prepare_keeps_one_begin_token(make: Callable[..., Any]) -> None:
    tokenizer = make("none", bos="<s>", supply_bos=True)
    prepare_tokenizer(tokenizer)
    rendered = Renderer(tokenizer).conversation(TALK)
    assert rendered.ids.count(tokenizer.bos_token_id) == 1
    hand_over = tokenizer.apply_chat_template(TALK[:1], add_generation_prompt=True, return_dict=False)
    assert hand_over == Renderer(tokenizer).prompt(TALK[:1])


@pytest.mark.parametrize("pad", [None, "<|im_end|>"])
def test_prepare_prefers_an_unused_token_as_pad(make: Callable[..., Any], pad: str | None) -> None:
    tokenizer = make("newline", eos="<|im_end|>", pad=pad)
    size = len(tokenizer)
    notes = prepare_tokenizer(tokenizer)
    assert tokenizer.pad_token == "<|endoftext|>"
    assert len(tokenizer) == size
    assert "<|endoftext|>" in notes[0]


def test_prepare_adds_a_pad_token_when_all_are_in_use(make: Callable[..., Any]) -> None:
    tokenizer = make("newline", pad="<|endoftext|>")
    prepare_tokenizer(tokenizer)
    assert tokenizer.pad_token == "<|pad|>"


def test_prepare_takes_another_template(make: Callable[..., Any]) -> None:
    tokenizer, good = make("think"), make("newline").chat_template
    assert "replaced" in prepare_tokenizer(tokenizer, template=good)[0]
    assert Renderer(tokenizer).prompt(TALK[:1])


def test_prepare_names_an_eos(make: Callable[..., Any]) -> None:
    tokenizer = make("newline", eos=None)
    prepare_tokenizer(tokenizer)
    assert tokenizer.eos_token == "<|im_end|>"


def test_identity_tells_tokenizers_apart(make: Callable[..., Any]) -> None:
    one, same, other = (Renderer(make(name)).identity() for name in ("newline", "newline", "chatml"))
    assert one == same
    assert one["template_sha256"] != other["template_sha256"]
    assert one["tail_ids"] != other["tail_ids"] == []
    assert one["tokenizer_sha256"] == other["tokenizer_sha256"]
    grown = make("newline")
    grown.add_tokens(["<|more|>"], special_tokens=True)
    assert Renderer(grown).identity()["tokenizer_sha256"] != one["tokenizer_sha256"]
