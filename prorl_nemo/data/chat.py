"""Chat messages to prompt tokens, through the model's own chat template.

A prompt that is too long is dropped, never cut: half a question has no right
answer. A question that spells out a control token is dropped too, because the
tokenizer would read it as the real one and end the turn in the middle.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from prorl_nemo.errors import ModelError, RecipeError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Message = dict[str, str]

FORMAT_INSTRUCTION = "Give the final answer between <answer> and </answer>."


class PromptDropped(Exception):
    """A prompt that cannot be used; the message is the reason, short enough to count by."""


def load_tokenizer(model_folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a model folder. Raises ModelError if it cannot render a chat."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(model_folder, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"{model_folder}: the tokenizer cannot be loaded ({error})") from None
    if not tokenizer.chat_template:
        raise ModelError(
            f"{model_folder}: the tokenizer has no chat template; use an instruction-tuned model, "
            "or put a chat_template.jinja into the folder"
        )
    if tokenizer.eos_token_id is None:
        raise ModelError(f"{model_folder}: the tokenizer names no end-of-turn token (eos_token)")
    return tokenizer


def chat_messages(
    question: str,
    worked_examples: Sequence[tuple[str, str]] = (),
    system_prompt: str | None = None,
) -> list[Message]:
    """The conversation that asks `question`.

    Args:
        worked_examples: (question, answer) pairs, shown as earlier turns. They show the answer
            format, so the question then carries no instruction about it: small models follow
            examples and ignore instructions.
        system_prompt: None leaves the system turn to the chat template, which may have a default;
            an empty string asks for an empty one.
    """
    messages: list[Message] = []
    if system_prompt is not None:
        messages.append({"role": "system", "content": system_prompt})
    for earlier, answer in worked_examples:
        messages.append({"role": "user", "content": earlier})
        messages.append({"role": "assistant", "content": in_answer_tags(answer)})
    if not worked_examples:
        question = f"{question}\n{FORMAT_INSTRUCTION}"
    messages.append({"role": "user", "content": question})
    return messages


def in_answer_tags(answer: str) -> str:
    """The answer as the grader wants it: it takes the last <answer> pair and strips it."""
    return f"<answer>{answer}</answer>"


class ChatRenderer:
    """Renders messages to token ids, up to a length."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, max_prompt_tokens: int) -> None:
        self._tokenizer = tokenizer
        self.max_prompt_tokens = max_prompt_tokens
        self._control_tokens = sorted(
            {
                token.content
                for token in tokenizer.added_tokens_decoder.values()
                if token.special and token.content.strip()
            }
            | set(tokenizer.all_special_tokens)
        )

    def render(self, messages: list[Message]) -> list[int]:
        """Token ids of the conversation with the start of the assistant's turn.

        Raises:
            PromptDropped: too long, or a message spells out a control token.
            RecipeError: the template refuses the messages (some allow no system turn).
        """
        # Checked before tokenizing; the template's own control tokens are the only ones allowed.
        for message in messages:
            if any(token in message["content"] for token in self._control_tokens):
                raise PromptDropped("spells out a control token")
        # jinja2 is what transformers renders templates with; it has no error type of its own.
        from jinja2 import TemplateError

        try:
            text = self._tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=True
            )
        except TemplateError as error:
            raise RecipeError(
                f"data.system_prompt, data.worked_examples: the model's chat template refuses "
                f"these turns ({error})"
            ) from None
        # The template wrote the special tokens already; adding them again would double the first.
        token_ids = self._tokenizer(text, add_special_tokens=False)["input_ids"]
        if len(token_ids) > self.max_prompt_tokens:
            raise PromptDropped("longer than data.max_prompt_tokens")
        return list(token_ids)
