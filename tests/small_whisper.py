"""A Whisper model of random weights that is small."""

from transformers import WhisperConfig

STOP, PROMPT, HEADS = 50, [51, 52], [[0, 1], [1, 0]]  # ids from 51 on are no text
SETTINGS = {"prompt": PROMPT, "stop": STOP, "heads": HEADS, "suppressed": [3, STOP]}  # of a listener


def whisper_config(target_positions: int = 40) -> WhisperConfig:
    return WhisperConfig(
        d_model=32, encoder_layers=1, encoder_attention_heads=2, encoder_ffn_dim=64, decoder_layers=2,
        decoder_attention_heads=2, decoder_ffn_dim=64, vocab_size=60, pad_token_id=STOP, bos_token_id=STOP,
        eos_token_id=STOP, decoder_start_token_id=PROMPT[0], max_source_positions=300,
        max_target_positions=target_positions, init_std=0.4,
    )  # fmt: skip
