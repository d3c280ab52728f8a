"""Train a speech LLM, or a language model on texts: python scripts/finetune.py experiment=NAME [OPTION=VALUE ...]"""

from unique_asr.training.cli import main

if __name__ == "__main__":
    main()
