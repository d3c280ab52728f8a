"""The web page around unique_asr: `python -m app`."""
