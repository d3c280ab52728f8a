"""Text from a text LLM, after a long context: python scripts/generate.py model=MODEL context=book.txt prompt=Why?"""

from unique_asr.application.generate import main

if __name__ == "__main__":
    main()
