"""What a model can be told about a recording: its language, by code or English name, and words to expect."""

from __future__ import annotations

from collections.abc import Collection

LANGUAGES = {
    "ar": "Arabic", "cs": "Czech", "da": "Danish", "de": "German", "el": "Greek", "en": "English", "es": "Spanish",
    "fa": "Persian", "fi": "Finnish", "fil": "Filipino", "fr": "French", "hi": "Hindi", "hu": "Hungarian",
    "id": "Indonesian", "it": "Italian", "ja": "Japanese", "ko": "Korean", "mk": "Macedonian", "ms": "Malay",
    "nl": "Dutch", "pl": "Polish", "pt": "Portuguese", "ro": "Romanian", "ru": "Russian", "sv": "Swedish",
    "th": "Thai", "tr": "Turkish", "vi": "Vietnamese", "yue": "Cantonese", "zh": "Chinese",
}  # fmt: skip
CODES = {name.lower(): code for code, name in LANGUAGES.items()}


def resolve_language(language: str | None, taken: Collection[str], model: str) -> str | None:
    """Find the code of a language.

    Args:
        language: a code or an English name, `fr` or `French`, in any case; None or an empty text for no language.
        taken: codes of the languages that the model can be told.
        model: its name, for the message.

    Returns:
        A code of `taken`, or None for no language.

    Raises:
        ValueError: the model cannot be told this language. The message is one line.
    """
    if not language:
        return None
    code = language.strip().lower()
    code = CODES.get(code, code)
    if code in taken:
        return code
    takes = f"takes {', '.join(sorted(taken))}" if taken else "cannot be told a language"
    raise ValueError(f"language={language}: model={model} {takes}; leave language out, or choose another model")


def resolve_hotwords(hotwords: str | None, taken: bool, model: str) -> str | None:
    """Tidy words or names to expect.

    Args:
        hotwords: separated by commas; None or an empty text for none.
        taken: whether the model can be told any.
        model: its name, for the message.

    Returns:
        The words separated by ", ", or None for none.

    Raises:
        ValueError: there are some and the model cannot be told any. The message is one line.
    """
    words = [" ".join(word.split()) for word in (hotwords or "").split(",")]
    if any(words) and not taken:
        raise ValueError(
            f"hotwords={hotwords}: model={model} cannot be told words to expect; leave them out or choose another model"
        )
    return ", ".join(filter(None, words)) or None


def resolve_prompt(prompt: str | None, taken: tuple[str, ...] | None, model: str) -> str | None:
    """Check an instruction.

    Args:
        prompt: None or an empty text for none.
        taken: all that the model knows; None if it may know any.
        model: its name, for the message.

    Returns:
        The instruction, or None for none.

    Raises:
        ValueError: the model does not know it: it would write parts of it into the transcript. The message is one line.
    """
    if not prompt:
        return None
    if taken is not None and prompt not in taken:
        known = " or ".join(f"'{each}'" for each in taken)
        shown = prompt if len(prompt) <= 60 else prompt[:57] + "..."
        raise ValueError(f"prompt={shown}: model={model} knows {known} alone; leave it out, or choose another model")
    return prompt
