"""Chat templates: programs that come with a tokenizer, so that they run with limits of time, memory and output."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

SECONDS, MEMORY, CHARACTERS = 3, 2**30, 2**26  # of one conversation


def write_conversation(messages: list[dict[str, Any]], tokenizer, where: str) -> str:
    """Return a conversation as the chat template of ``tokenizer`` writes it.

    Raises:
        ValueError: there is no template, no message, or the template raises, or takes too much time or memory.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise ValueError(
            f"{where} holds messages, but there is no tokenizer with a chat template to write them out; give text"
        )
    if not messages:
        raise ValueError(f"{where} holds a conversation without messages; leave it out")
    messages = [message | _join_parts(message, where) for message in messages]
    try:
        with _limits():
            text = tokenizer.apply_chat_template(messages, tokenize=False)
        if len(text) > CHARACTERS:
            raise ValueError(f"{len(text):,} characters")
        return text
    except Exception as reason:  # whatever a program can raise
        told = " ".join(f"{type(reason).__name__}: {reason}".split())[:200]
        name = getattr(tokenizer, "name_or_path", "") or "the tokenizer"
        raise ValueError(f"{where} holds messages that the chat template of {name} refuses ({told})") from None


def _join_parts(message: dict[str, Any], where: str) -> dict[str, str]:
    """Return the text of a content that is a list of parts, as OpenAI's clients write it, nothing for any other content."""
    if not isinstance(parts := message.get("content"), list):
        return {}
    texts = [text for part in parts if isinstance(text := part.get("text") if isinstance(part, dict) else part, str)]
    if len(texts) < len(parts):
        raise ValueError(f"{where} holds a message with a part that is no text; leave it out")
    return {"content": "".join(texts)}


@contextmanager
def _limits() -> Iterator[None]:
    """Stop what takes ``SECONDS`` of the processor or ``MEMORY`` more, where the system and the thread allow it."""
    if sys.platform != "linux" or threading.current_thread() is not threading.main_thread():
        yield
        return
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize() + MEMORY
    lowered = size if soft == resource.RLIM_INFINITY else min(size, soft)
    handler = signal.signal(signal.SIGVTALRM, _raise_late)
    signal.setitimer(signal.ITIMER_VIRTUAL, SECONDS)
    resource.setrlimit(resource.RLIMIT_AS, (lowered, hard))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, handler or signal.SIG_DFL)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def _raise_late(*_) -> None:
    raise TimeoutError(f"it takes more than {SECONDS} seconds")
