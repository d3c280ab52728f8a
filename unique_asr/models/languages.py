"""What a model can be told of a recording: its language, by code or by English name, and words to expect."""

from __future__ import annotations

from collections.abc import Collection

LANGUAGES = {
    "ar": "Arabic", "cs": "Czech", "da": "Danish", "de": "German", "el": "Greek", "en": "English", "es": "Spanish",
    "fa": "Persian", "fi": "Finnish", "fil": "Filipino", "fr": "French", "hi": "Hindi", "hu": "Hungarian",
    "id": "Indonesian", "it": "Italian", "ja": "Japanese", "ko": "Korean", "mk": "Macedonian", "ms": "Malay",
    "nl": "Dutch", "pl": "Polish", "pt": "Portuguese", "ro": "Romanian", "ru": "Russian", "sv": "Swedish",
    "th": "Thai", "tr": "Turkish", "vi": "Vietnamese", "yue": "Cantonese", "zh": "Chinese",
}  # fmt: skip
SHIPPED = {"default": ("en",)}  # of the models in unique_asr/pretrained/
CODES = {name.lower(): code for code, name in LANGUAGES.items()}


def chosen_language(language: str | None, taken: Collection[str], model: str) -> str | None:
    """The code of a language, or None for none.

    Args:
        language: a code or an English name, `fr` or `French`, in any case.
        taken: codes of the languages that the model can be told; any other raises a ValueError of one line.
        model: its name, for the message.
    """
    if not language:
        return None
    code = language.strip().lower()
    code = CODES.get(code, code)
    if code in taken:
        return code
    takes = f"takes {', '.join(sorted(taken))}" if taken else "cannot be told a language"
    raise ValueError(f"language={language}: model={model} {takes}; leave language out, or choose another model")


def chosen_hotwords(hotwords: str | None, taken: bool, model: str) -> str | None:
    """Words or names to expect, separated by ", ", or None for none.

    Args:
        hotwords: separated by commas.
        taken: whether the model can be told any; if not, they raise a ValueError of one line.
        model: its name, for the message.
    """
    words = [" ".join(word.split()) for word in (hotwords or "").split(",")]
    if any(words) and not taken:
        raise ValueError(
            f"hotwords={hotwords}: model={model} cannot be told words to expect; leave them out or choose another model"
        )
    return ", ".join(filter(None, words)) or None
