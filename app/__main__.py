"""The web page: python -m unique_asr.app [port=7860] [folders=[~/talks]] ..."""

from unique_asr.app.cli import main

if __name__ == "__main__":
    main()
