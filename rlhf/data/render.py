"""Rendering of conversations and texts to token ids. No other module does it, so that all stages see the same tokens.

A conversation is split at its assistant turns. The text between them is rendered by the chat template and tokenized
separately; a response is its text plus the end token. So a conversation equals prompt + response by construction:

    ids   <|im_start|>user \\n hi <|im_end|> \\n <|im_start|>assistant \\n   hello <|im_end|>
    mask  F                F  F  F          F  F                    F    T     T

What a template writes after the last end token (usually a newline) is left out: a rollout ends with the end token, and
the reward model must read its score there too.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from rlhf.data.records import BadRow, Messages, check_turns
from rlhf.errors import ConfigError

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_PAD_TOKENS = ("<pad>", "<|pad|>", "[PAD]", "<|padding|>", "<|finetune_right_pad_id|>", "<|fim_pad|>", "<|endoftext|>")
_RESERVED = re.compile(r"reserved|unused", re.IGNORECASE)
# Replaces the function that gives templates the current time, so that its use can be seen in the output.
_FAKE_CLOCK = "{%- macro strftime_now(format) -%}\x02clock\x03{%- endmacro -%}"
_FIX_TEMPLATE = "give the tokenizer another chat_template (a plain ChatML one works with any model that is fine-tuned)"


@dataclass(frozen=True)
class Rendered:
    """Token ids and a mask of the same length T; True = the token has loss."""

    ids: list[int]
    mask: list[bool]


@dataclass(frozen=True)
class TemplateLayout:
    """How a chat template writes an assistant turn, as `probe_template` finds out.

    Attributes:
        opening: blanks that the template writes between generation prompt and response; they are not tokenized.
        closing: text from the end of a response through its end token; "" if the template writes none.
        tail: text that the template writes after the last end token; it is not tokenized.
        trims: whether the template strips blanks around an assistant turn; they are then stripped here too.
        end_id: id of the token that ends every response.
        bos_id: id of the token that begins every sequence, or None.
        prepend_bos: whether that token comes from the tokenizer and not from the template.
        notes: lines for the log.
    """

    opening: str
    closing: str
    tail: str
    trims: bool
    end_id: int
    bos_id: int | None
    prepend_bos: bool
    notes: tuple[str, ...]


def prepare_tokenizer(tokenizer: Any, template: str | None = None) -> list[str]:
    """Make sure that the tokenizer has a chat template and a separate pad token; changes the tokenizer in place.

    The pad token must not be the end token: classifiers of `transformers` read the score at the last token that is not
    padding, which would be the one before the end token.

    Args:
        tokenizer: a `transformers` tokenizer.
        template: Jinja text that replaces the tokenizer's own; None keeps it, or adds ChatML if there is none.
    Returns: lines for the log that say what was changed. If len(tokenizer) has grown past the number of the model's
        embedding rows, the caller must resize the embeddings. The caller also sets pad_token_id of the model's config.
    Raises: ConfigError if the template cannot be used (see `Renderer`).
    """
    notes, size = [], len(tokenizer)
    if template is not None and template != tokenizer.chat_template:
        tokenizer.chat_template = template
        notes.append("chat template replaced by the one given")
    elif not tokenizer.chat_template:
        tokenizer.chat_template = ("{{ bos_token }}" if _supplies_bos(tokenizer) else "") + CHATML
        tokenizer.add_tokens(["<|im_start|>", "<|im_end|>"], special_tokens=True)
        notes.append("no chat template: ChatML added, with special tokens <|im_start|> and <|im_end|>")
    if tokenizer.eos_token_id is None:
        tokenizer.eos_token = tokenizer.convert_ids_to_tokens(probe_template(tokenizer).end_id)
        notes.append(f"no eos token: set to the end of turn {tokenizer.eos_token}")
    end_id, pad = probe_template(tokenizer).end_id, tokenizer.pad_token
    if tokenizer.pad_token_id in (None, end_id, tokenizer.eos_token_id):
        name = _pad_candidate(tokenizer, end_id)
        if name is None:
            name = "<|pad|>"
            tokenizer.add_tokens([name], special_tokens=True)
        tokenizer.pad_token = name
        why = "no pad token" if pad is None else f"pad token {pad} is also an end token"
        notes.append(f"{why}: pad is now {name} (id {tokenizer.pad_token_id})")
    if len(tokenizer) > size:
        notes.append(f"{len(tokenizer) - size} tokens added: {size} -> {len(tokenizer)}; embeddings need as many rows")
    return notes


def _pad_candidate(tokenizer: Any, end_id: int) -> str | None:
    """Return a special token that nothing else uses and that can serve as pad token, or None."""
    used = {end_id, tokenizer.eos_token_id, tokenizer.bos_token_id}
    specials = _specials(tokenizer)
    names = [*_PAD_TOKENS, *sorted(name for name in specials if _RESERVED.search(name)), tokenizer.unk_token]
    template = tokenizer.get_chat_template()
    return next((n for n in names if n in specials and specials[n] not in used and n not in template), None)


def _specials(tokenizer: Any) -> dict[str, int]:
    """Return the special tokens: literal -> id."""
    found = {str(token): i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    return found | {t: tokenizer.convert_tokens_to_ids(t) for t in tokenizer.all_special_tokens}


def _supplies_bos(tokenizer: Any) -> bool:
    bos, first = tokenizer.bos_token_id, tokenizer.encode("a")[:1]
    return bos is not None and first == [bos]


def _literals(names: Iterable[str]) -> re.Pattern[str]:
    return re.compile("|".join(re.escape(n) for n in sorted(names, key=len, reverse=True) if n) or r"(?!)")


def _render(tokenizer: Any, messages: Messages, *, prompt: bool, prefix: str = "") -> str:
    template = prefix + tokenizer.get_chat_template()
    return str(
        tokenizer.apply_chat_template(messages, chat_template=template, tokenize=False, add_generation_prompt=prompt)
    )


def probe_template(tokenizer: Any) -> TemplateLayout:
    """Find out how the chat template writes an assistant turn, by rendering a conversation with known contents.

    Raises: ConfigError if there is no template, if it inserts today's date, if a finished turn is not its prompt plus
        response plus end, if later turns change earlier ones, or if the text that closes a turn is not a special token.
    """
    if not tokenizer.chat_template:
        raise ConfigError("the tokenizer has no chat template", where="tokenizer", do="call prepare_tokenizer first")
    turns = [{"role": ("user", "assistant")[i % 2], "content": f"turn{i}said"} for i in range(5)]
    said = [turn["content"] for turn in turns]
    try:
        prompts = [_render(tokenizer, turns[: k + 1], prompt=True) for k in (0, 2, 4)]
        full = [_render(tokenizer, turns[: k + 1], prompt=False) for k in (1, 3)]
        trims = f" {said[1]} " not in _render(
            tokenizer, [turns[0], turns[1] | {"content": f" {said[1]} "}], prompt=False
        )
    except Exception as exc:  # Jinja's own errors, and whatever a template raises
        raise ConfigError(
            "the chat template fails on user/assistant turns", found=str(exc), where="chat template", do=_FIX_TEMPLATE
        ) from None
    _refuse_clock(tokenizer, turns)
    opening, found, tail = full[0][len(prompts[0]) :].partition(said[1])
    if not full[0].startswith(prompts[0]) or not found or opening.strip():
        raise ConfigError(
            "the chat template does not render a finished assistant turn as generation prompt + response",
            found=repr(full[0][-80:]),
            where="chat template",
            do=_FIX_TEMPLATE,
        )
    closing, end_id, notes = _closing(tokenizer, tail)
    for before, k, after in ((prompts[0], 1, prompts[1]), (prompts[1], 3, full[1]), (prompts[1], 3, prompts[2])):
        if not after.startswith(before + opening + said[k] + closing):
            raise ConfigError(
                "the chat template is not prefix-stable: a later turn changes how an earlier one is rendered",
                found=repr(after[:120]),
                where="chat template",
                do=_FIX_TEMPLATE,
            )
    written = bool(prompts[0]) and _encode(tokenizer, prompts[0])[:1] == [tokenizer.bos_token_id]
    supplied = _supplies_bos(tokenizer)
    if supplied and not written:
        notes.append(
            f"the chat template writes no {tokenizer.bos_token}; it is added at the start, as the tokenizer does"
        )
    return TemplateLayout(
        opening,
        closing,
        tail[len(closing) :],
        trims,
        end_id,
        bos_id=tokenizer.bos_token_id if written or supplied else None,
        prepend_bos=supplied and not written,
        notes=tuple(notes),
    )


def _refuse_clock(tokenizer: Any, turns: Messages) -> None:
    """Refuse a template that asks for the current time. Raises: ConfigError."""
    for messages in (turns[:1], [{"role": "system", "content": "be brief"}, turns[0]]):
        try:
            text = _render(tokenizer, messages, prompt=True, prefix=_FAKE_CLOCK)
        except Exception:  # a template without system turns; reported for the record that has one
            continue
        if "\x02clock\x03" in text:
            raise ConfigError(
                "the chat template inserts today's date, so the same record would give other tokens tomorrow",
                where="chat template",
                do="write a fixed date in place of strftime_now(...) in tokenizer.chat_template",
            )


def _closing(tokenizer: Any, tail: str) -> tuple[str, int, list[str]]:
    """Return the text that closes an assistant turn (through the end token), the end token's id, and notes."""
    specials, eos = _specials(tokenizer), tokenizer.eos_token_id
    blank = len(tail) - len(tail.lstrip())
    end = _literals(specials).match(tail, blank)
    if end:
        end_id, notes = specials[end.group()], []
        if eos is not None and eos != end_id:
            notes.append(
                f"a response ends with {end.group()} (id {end_id}), not with eos {tokenizer.eos_token}; generation "
                f"stops there"
            )
        return tail[: end.end()], end_id, notes
    if tail.strip():
        raise ConfigError(
            "the chat template closes an assistant turn with text that is not a special token",
            found=repr(tail[:40]),
            where="chat template",
            do=f"make it one with tokenizer.add_tokens([...], special_tokens=True), or {_FIX_TEMPLATE}",
        )
    if eos is None:
        raise ConfigError(
            "nothing ends a response: the chat template writes no end token and the tokenizer has no eos token",
            where="tokenizer",
            do="set tokenizer.eos_token",
        )
    return (
        "",
        eos,
        [f"the chat template closes no turn: {tokenizer.eos_token} (id {eos}) is added after every response"],
    )


def _encode(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer.encode(text, add_special_tokens=False)) if text else []


class Renderer:
    """Renders messages to token ids with one tokenizer.

    Attributes:
        tokenizer: the `transformers` tokenizer.
        layout: how its chat template writes an assistant turn.
        end_id, pad_id, eos_id: ids of the end, pad and eos tokens.
        bos_id: id of the token that begins every sequence, or None.
        notes: lines for the log.
    """

    def __init__(self, tokenizer: Any) -> None:
        """Probe the chat template of a tokenizer that `prepare_tokenizer` has prepared.

        Raises: ConfigError if the template cannot be used (see `probe_template`) or there is no pad token.
        """
        self.tokenizer = tokenizer
        self.layout = probe_template(tokenizer)
        if tokenizer.pad_token_id is None:
            raise ConfigError("the tokenizer has no pad token", where="tokenizer", do="call prepare_tokenizer first")
        self.end_id, self.pad_id = self.layout.end_id, int(tokenizer.pad_token_id)
        self.bos_id = self.layout.bos_id
        self.eos_id = self.end_id if tokenizer.eos_token_id is None else int(tokenizer.eos_token_id)
        self.notes = self.layout.notes
        self._special = _literals(_specials(tokenizer))

    def conversation(
        self, messages: Messages, *, loss_on: Literal["assistant", "all"] = "assistant", where: str = ""
    ) -> Rendered:
        """Render a conversation that ends with the assistant; the ids end with the last end token.

        Args:
            messages: the turns.
            loss_on: tokens on which the mask is True: "assistant" = the text of assistant turns and their end tokens;
                "all" = all tokens except the begin token.
            where: place of the record, for the message.
        Raises: BadRow if the turns are malformed or do not end with the assistant, if a turn holds the literal of a
            special token, or if the template refuses the conversation or renders earlier turns differently later.
        """
        check_turns(messages, where, last="assistant")
        rendered = self._walk(messages, where)
        if loss_on == "all":
            first = rendered.ids[:1] != [self.bos_id]
            return Rendered(rendered.ids, [first] + [True] * (len(rendered.ids) - 1))
        return rendered

    def prompt(self, messages: Messages, *, where: str = "") -> list[int]:
        """Return the ids of messages that end with a user turn, through the generation prompt.

        Raises: BadRow as `conversation`.
        """
        check_turns(messages, where, last="user")
        return self._walk(messages, where).ids

    def response(self, text: str, *, where: str = "") -> list[int]:
        """Return the ids of a response and its end token. Raises: BadRow if the text contains a special token."""
        self._check(text, where)
        return [*_encode(self.tokenizer, self._said(text)), self.end_id]

    def text(self, text: str, *, where: str = "") -> Rendered:
        """Render a plain document: begin token if there is one, text, eos; the mask is True on all but the begin token.

        Raises: BadRow if the text contains the literal of a special token.
        """
        self._check(text, where)
        start = [] if self.bos_id is None else [self.bos_id]
        body = [*_encode(self.tokenizer, text), self.eos_id]
        return Rendered(start + body, [False] * len(start) + [True] * len(body))

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of a response without special tokens."""
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False))

    def identity(self) -> dict[str, Any]:
        """Return what must agree between stages that pass models to each other, as JSON-compatible values."""
        tokenizer = self.tokenizer
        return {
            "template_sha256": _sha256(tokenizer.get_chat_template()),
            "end_id": self.end_id,
            "pad_id": self.pad_id,
            "eos_id": self.eos_id,
            "bos_id": self.bos_id,
            "tail_ids": _encode(tokenizer, self.layout.tail),
            "tokenizer_sha256": tokenizer_fingerprint(tokenizer),
            "vocab_size": len(tokenizer),
        }

    def _walk(self, messages: Messages, where: str) -> Rendered:
        """Tokenize the text before each assistant turn, and up to the end if a user speaks last, and the responses."""
        for message in messages:
            self._check(message["content"], where)
        # A template that strips blanks of earlier turns finds them already stripped, here and in `done` below.
        turns = [m | {"content": self._said(m["content"])} if m["role"] == "assistant" else m for m in messages]
        cuts = [k for k, turn in enumerate(turns) if turn["role"] == "assistant"]
        if turns[-1]["role"] != "assistant":
            cuts.append(len(turns))
        ids: list[int] = [self.bos_id] if self.layout.prepend_bos and self.bos_id is not None else []
        mask, done = [False] * len(ids), ""
        for k in cuts:
            text = self._prompt_text(turns[:k], where)
            if not text.startswith(done):
                raise BadRow(
                    "template changes earlier turns",
                    "the chat template changes how it renders earlier turns",
                    found=repr(text[:80]),
                    where=where,
                    do=f"remove the row, or {_FIX_TEMPLATE}",
                )
            before = _encode(self.tokenizer, text[len(done) :])
            said = turns[k]["content"] if k < len(turns) else None
            after = [] if said is None else [*_encode(self.tokenizer, said), self.end_id]
            ids += before + after
            mask += [False] * len(before) + [True] * len(after)
            done = text + self.layout.opening + (said or "") + self.layout.closing
        return Rendered(ids, mask)

    def _prompt_text(self, messages: Messages, where: str) -> str:
        try:
            return _render(self.tokenizer, messages, prompt=True)
        except Exception as exc:  # Jinja's own errors, and whatever a template raises
            what = "the chat template refuses the conversation"
            raise BadRow("template refuses", what, found=str(exc), where=where) from None

    def _said(self, text: str) -> str:
        return text.strip() if self.layout.trims else text

    def _check(self, text: str, where: str) -> None:
        found = self._special.search(text)
        if found:
            what = "the text contains the literal of a special token"
            raise BadRow("special token in content", what, found=found.group(), where=where)


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """Return the SHA-256 of the vocabulary, the added tokens and the encoding of a few strings."""
    added = sorted((i, str(token), bool(token.special)) for i, token in tokenizer.added_tokens_decoder.items())
    strings = ("Hello, world!", "  two  blanks\n\n\ttab 1234567", "naïve café – 数学 😀", "it's I'LL <b>x</b>")
    probes = [_encode(tokenizer, string) for string in strings]
    return _sha256(json.dumps([sorted(tokenizer.get_vocab().items()), added, probes]))


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
