"""Fixtures that several folders share."""

import os
import shutil
import signal
import subprocess

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # kernels run as NumPy; read when Triton is imported, which follows

from command_line import DATA, FakeTranscriber
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, WhisperConfig, WhisperFeatureExtractor


def pytest_configure():
    """A shell's background job is born with Ctrl-C ignored, and so are its children, which some tests interrupt."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture
def llama():
    """A tiny random Llama with SmolLM2's heads: nine query heads over three KV heads; nothing ends its answers."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=97,
        hidden_size=90,
        intermediate_size=128,
        num_hidden_layers=3,
        num_attention_heads=9,
        num_key_value_heads=3,
        head_dim=16,
        max_position_embeddings=4096,
        initializer_range=0.4,  # large enough for answers that depend on the whole context
        eos_token_id=None,
        bos_token_id=None,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="session")
def byte_tokenizer():
    """Makes tokenizers of bytes that know "the", " the" and " a" as well; they write the space of a word as Ġ."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    merges = [("Ġ", "a"), ("t", "h"), ("th", "e"), ("Ġ", "the")]
    special = ["<|im_start|>", "<|im_end|>", "<|audio|>"]
    pieces = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *("".join(merge) for merge in merges), *special]
    vocabulary = {piece: index for index, piece in enumerate(pieces)}

    def make() -> PreTrainedTokenizerFast:
        tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        return PreTrainedTokenizerFast(
            tokenizer_object=tokenizer,
            eos_token="<|im_end|>",
            additional_special_tokens=["<|im_start|>", "<|im_end|>", "<|audio|>"],
        )

    return make


@pytest.fixture(scope="session")
def speech_llm(byte_tokenizer):
    """Makes a tiny speech LLM of random weights, encoder included, and its processor; Whisper-like, windows of 6 s."""
    from unique_asr.models import SpeechLLMConfig, SpeechLLMForConditionalGeneration, SpeechLLMProcessor
    from unique_asr.models.speech_llm.ctc import choose_ctc_vocabulary

    def make(encoder=None, feature_extractor=None, **options):
        torch.manual_seed(0)
        tokenizer = byte_tokenizer()
        ctc_tokens = choose_ctc_vocabulary(tokenizer)
        text = LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=True, initializer_range=0.2,
            bos_token_id=None, eos_token_id=tokenizer.eos_token_id,
        )  # fmt: skip
        encoder = encoder or WhisperConfig(
            d_model=32, encoder_layers=1, encoder_attention_heads=2, encoder_ffn_dim=64, decoder_layers=1,
            decoder_attention_heads=2, decoder_ffn_dim=64, vocab_size=60, pad_token_id=0, bos_token_id=1,
            eos_token_id=2, decoder_start_token_id=1, max_source_positions=300, init_std=0.2,
        )  # fmt: skip
        options = {"projector_size": 32, "window_seconds": 6.0, **options}
        audio = tokenizer.convert_tokens_to_ids("<|audio|>")
        config = SpeechLLMConfig(encoder, text, ctc_vocabulary_size=len(ctc_tokens), audio_token_id=audio, **options)
        feature_extractor = feature_extractor or WhisperFeatureExtractor(chunk_length=6)
        processor = SpeechLLMProcessor.from_config(config, feature_extractor, tokenizer, ctc_tokens)
        model = SpeechLLMForConditionalGeneration(config).eval()
        model.ctc_tokens = torch.tensor(ctc_tokens)
        return model, processor

    return make


@pytest.fixture(scope="session")
def marked_tokenizer(byte_tokenizer):
    """Makes byte tokenizers that have the marks of a ListeningLLM's prompt."""

    def make():
        from unique_asr.models.listening_llm.prompts import MARKS

        tokenizer = byte_tokenizer()
        tokenizer.add_tokens(
            [mark for mark in MARKS.values() if mark not in tokenizer.get_vocab()], special_tokens=True
        )
        return tokenizer

    return make


@pytest.fixture(scope="session")
def listening_llm(marked_tokenizer):
    """Makes a tiny ListeningLLM of random weights and its processor; windows of 6 s."""

    def make(**options):
        from transformers import WhisperProcessor

        from unique_asr.models.listening_llm import ListeningLLMConfig
        from unique_asr.models.listening_llm.modeling import ListeningLLM, ListeningProcessor

        torch.manual_seed(0)
        names = ["<|endoftext|>", "<|startoftranscript|>", "<|notimestamps|>"]
        whisper_tokenizer = marked_tokenizer()
        whisper_tokenizer.add_tokens(names, special_tokens=True)
        end, start, _ = whisper_tokenizer.convert_tokens_to_ids(names)
        audio = WhisperConfig(
            d_model=32, encoder_layers=1, encoder_attention_heads=2, encoder_ffn_dim=64, decoder_layers=2,
            decoder_attention_heads=2, decoder_ffn_dim=64, vocab_size=len(whisper_tokenizer), pad_token_id=end,
            bos_token_id=end, eos_token_id=end, decoder_start_token_id=start, max_source_positions=300,
            max_target_positions=300, init_std=0.2,
        )  # fmt: skip
        tokenizer = marked_tokenizer()
        text = LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=True, initializer_range=0.2,
            bos_token_id=None, eos_token_id=tokenizer.eos_token_id,
        )  # fmt: skip
        options = {"window_seconds": 6.0, "search_seconds": 2.0, **options}
        model = ListeningLLM(ListeningLLMConfig(audio, text, **options)).eval()
        model.listener.generation_config.update(decoder_start_token_id=start, eos_token_id=end)
        whisper = WhisperProcessor(WhisperFeatureExtractor(chunk_length=6), whisper_tokenizer)
        return model, ListeningProcessor(whisper, tokenizer)

    return make


@pytest.fixture(scope="module")
def tiny(speech_llm):
    """A tiny speech LLM of random weights and its processor."""
    return speech_llm()


@pytest.fixture
def talk(tmp_path, monkeypatch):
    """A recording in an otherwise empty current folder."""
    monkeypatch.chdir(tmp_path)
    shutil.copy(DATA / "nomads.opus", tmp_path / "talk.opus")
    return tmp_path / "talk.opus"


@pytest.fixture
def command(capsys, monkeypatch):
    """Runs the command with a FakeTranscriber; gives its exit code, standard output and standard error."""
    from unique_asr.application import cli

    monkeypatch.setattr(FakeTranscriber, "loaded", 0)
    monkeypatch.setattr(FakeTranscriber, "decoded", [])

    def run(*arguments, kind=FakeTranscriber, **behaviour):
        with pytest.raises(SystemExit) as exit_:
            cli.main(arguments, lambda **settings: kind(**behaviour, **settings))
        return exit_.value.code, *capsys.readouterr()

    return run


@pytest.fixture
def mount(tmp_path):
    """Makes small or read-only file systems; needs root, as CI's containers have it."""
    mounted = []

    def make(name, options):
        folder = tmp_path / name
        folder.mkdir()
        done = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder], capture_output=True, check=False
        )
        if done.returncode:
            pytest.skip("mounting a tmpfs needs root")
        mounted.append(folder)
        return folder

    try:
        yield make
    except FileNotFoundError:
        pytest.skip("there is no mount here")
    finally:
        for folder in mounted:
            subprocess.run(["umount", folder], check=True)
