"""The server: python -m unique_asr.server [port=8000] ..."""

from unique_asr.server.cli import main

if __name__ == "__main__":
    main()
