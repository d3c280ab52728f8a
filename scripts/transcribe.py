"""Transcribe audio or video files: python scripts/transcribe.py audio=talk.m4a"""

from unique_asr.distributed.cli import main

if __name__ == "__main__":
    main()
