"""Step 2 of the default model's recipe: read texts aloud with a Piper voice, much faster than real time on a GPU.

    python scripts/recipes/synthesize.py phonemise --texts librispeech.txt ljspeech.txt --output phonemes.jsonl.gz
    python scripts/recipes/synthesize.py convert --onnx en_US-joe-medium.onnx --output joe.safetensors
    python scripts/recipes/synthesize.py speak --phonemes phonemes.jsonl.gz --weights joe.safetensors \
        --voice en_US-joe-medium.onnx.json --output speech/

`phonemise` needs piper-tts (espeak), `convert` needs onnx. `speak` needs PyTorch, numpy, safetensors and piper-tts's
folder `piper/train/vits` (in the installed package, or below PYTHONPATH), so it also runs without piper and espeak.
A voice is Piper's "medium" VITS of one speaker.

One voice becomes many: texts are read in groups of consecutive lines, and a group has its own pitch and formants (the
waveform is played faster or slower), tempo, liveliness and spectral tilt, and so its own `speaker`. Lines of a speaker
stay in order and can be joined to long recordings. Written are shards of 16-kHz int16 samples (shard-0000.npy ...) and
index.jsonl: text, source, speaker, shard, offset, samples.
"""

import argparse
import gzip
import importlib
import importlib.util
import json
import random
import re
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

SAMPLE_RATE = 16000
HOP = 256  # samples of the voice's own rate per VITS frame
SYMBOL_SECONDS = 0.025  # speech of one symbol, padding symbols counted, at length_scale 1 (0.0215 on average)
PAUSE_WORDS = {
    "and",
    "but",
    "that",
    "which",
    "when",
    "who",
    "for",
    "as",
    "if",
    "or",
    "then",
    "while",
    "because",
    "though",
}
PAUSE_GAP = 4  # words between invented pauses, at least
PAUSE_PROBABILITY = 0.5


@dataclass
class Manner:
    """How a group of lines is read."""

    pitch: float  # factor on pitch and formants, 0.85 (deeper, larger) .. 1.18
    tempo: float  # factor on the voice's normal tempo, 0.65 .. 1.1: `joe` is a third faster than LibriSpeech's readers
    noise: float  # VITS noise_scale: variation of the sound, 0.4 .. 0.9
    rhythm: float  # VITS noise_w: variation of the durations, 0.5 .. 1.0
    tilt: tuple[float, float, float]  # amplitudes (nepers) of three slow cosines over the square root of frequency

    @classmethod
    def draw(cls, rng: random.Random) -> "Manner":
        return cls(
            pitch=rng.uniform(0.85, 1.18),
            tempo=rng.uniform(0.65, 1.1),
            noise=rng.uniform(0.4, 0.9),
            rhythm=rng.uniform(0.5, 1.0),
            tilt=(rng.gauss(0, 0.35), rng.gauss(0, 0.25), rng.gauss(0, 0.2)),
        )

    @property
    def length_scale(self) -> float:
        return self.pitch / self.tempo  # playing faster raises the pitch and shortens; the durations make up for it


# ---- phonemise


def add_pauses(text: str, rng: random.Random) -> str:
    """Put commas before some conjunctions of an unpunctuated text: nobody reads 35 words in one breath."""
    words, since = [], 0
    for word in text.split():
        if word in PAUSE_WORDS and since >= PAUSE_GAP and rng.random() < PAUSE_PROBABILITY:
            words[-1] += ","
            since = 0
        words.append(word)
        since += 1
    return " ".join(words) + "."


def phonemise(texts: Sequence[Path], output: Path, voice: str, seed: int) -> None:
    """Write the phonemes of every line of the texts."""
    from piper.phonemize_espeak import EspeakPhonemizer

    espeak, rng = EspeakPhonemizer(), random.Random(seed)
    with gzip.open(output, "wt") as file:
        for path in texts:
            for text in filter(None, map(str.strip, path.open())):
                spoken = text if re.search(r"[A-Z.,?!]", text) else add_pauses(text, rng)
                sentences = espeak.phonemize(voice, spoken)
                row = {"text": text, "source": path.stem, "phonemes": " ".join("".join(s).strip() for s in sentences)}
                file.write(json.dumps(row, ensure_ascii=False) + "\n")


# ---- convert


def convert(onnx_file: Path, output: Path) -> None:
    """Write Piper's ONNX initialisers under the names of its PyTorch classes, in float16.

    The exporter kept most names, but it folded weight norm and named the results after nothing: those are found by the
    node that reads them, whose name is the module's path.
    """
    import onnx
    from safetensors.torch import save_file

    graph = onnx.load(onnx_file).graph
    values = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in graph.initializer}
    state = {name: value for name, value in values.items() if re.match(r"(enc_p|dec|flow|dp)\.", name)}
    for node in graph.node:
        if node.op_type in ("Conv", "ConvTranspose") and node.input[1] not in state:
            state[node.name.strip("/").rsplit("/", 1)[0].replace("/", ".") + ".weight"] = values[node.input[1]]
        elif node.op_type == "Gather" and node.name == "/enc_p/emb/Gather":
            state["enc_p.emb.weight"] = values[node.input[0]]
    state["dp.flows.0.logs"] = -np.log(values["/dp/flows.0/Exp_output_0"])  # the exporter folded exp(-logs)
    save_file({name: torch.from_numpy(value.copy()).half() for name, value in state.items()}, output)


# ---- speak


class Voice:
    """A Piper voice in PyTorch: phonemes of several lines to waveforms, on any device."""

    def __init__(self, weights: Path, configuration: Path, device: str = "cuda"):
        from safetensors.torch import load_file

        config = json.loads(configuration.read_text())
        self.rate: int = config["audio"]["sample_rate"]
        self.ids: dict[str, list[int]] = config["phoneme_id_map"]
        self.device = torch.device(device)
        vits = import_vits()
        audio = vits["config"].ModelAudioConfig.low_quality()  # what Piper trains "medium" voices with
        sizes = vits["config"].ModelConfig(num_symbols=config["num_symbols"], n_speakers=1, audio=audio)
        self.model = (
            vits["models"]
            .SynthesizerTrn(
                n_vocab=sizes.num_symbols,
                spec_channels=sizes.mel.filter_length // 2 + 1,
                segment_size=sizes.segment_size // HOP,
                inter_channels=sizes.inter_channels,
                hidden_channels=sizes.hidden_channels,
                filter_channels=sizes.filter_channels,
                n_heads=sizes.n_heads,
                n_layers=sizes.n_layers,
                kernel_size=sizes.kernel_size,
                p_dropout=0.0,
                resblock=audio.resblock,
                resblock_kernel_sizes=audio.resblock_kernel_sizes,
                resblock_dilation_sizes=audio.resblock_dilation_sizes,
                upsample_rates=audio.upsample_rates,
                upsample_initial_channel=audio.upsample_initial_channel,
                upsample_kernel_sizes=audio.upsample_kernel_sizes,
            )
            .eval()
        )
        self.model.dec.remove_weight_norm()
        for flow in self.model.flow.flows[::2]:
            flow.enc.remove_weight_norm()
        del self.model.enc_q  # training only
        state = {name: value.float() for name, value in load_file(weights).items()}
        missing, unexpected = self.model.load_state_dict(state, strict=False)
        missing = [name for name in missing if not re.match(r"dp\.(post_|flows\.1\.)", name)]  # training only
        if missing or unexpected:
            raise SystemExit(
                f"{weights}: missing {missing}, unexpected {unexpected}; is it a one-speaker medium voice?"
            )
        self.model.to(self.device)
        if self.device.type == "cuda":
            self.model.dec.half()

    def encode(self, phonemes: str) -> list[int]:
        """Ids of the phonemes with the padding symbol between all, as the voice was trained."""
        pad = self.ids["_"]
        ids = [*self.ids["^"], *pad]
        for phoneme in phonemes:
            if phoneme in self.ids:
                ids += [*self.ids[phoneme], *pad]
        return ids + self.ids["$"]

    @torch.inference_mode()
    def generate(
        self, ids: list[list[int]], length_scale: float = 1.0, noise: float = 0.667, rhythm: float = 0.8
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Generate waveforms [B, samples] at the voice's rate, zero after each line's end, and their lengths [B]."""
        lengths = torch.tensor([len(line) for line in ids], device=self.device)
        symbols = torch.nn.utils.rnn.pad_sequence([torch.tensor(line) for line in ids], batch_first=True)
        x, mean, log_std, x_mask = self.model.enc_p(symbols.to(self.device), lengths)
        log_durations = self.model.dp(x, x_mask, reverse=True, noise_scale=rhythm)
        durations = torch.ceil(torch.exp(log_durations) * x_mask * length_scale)[:, 0]  # [B, symbols], in frames
        ends = durations.cumsum(1)
        frames = ends[:, -1].clamp_min(1).long()
        total = -(-int(frames.max()) // 64) * 64  # few distinct shapes keep the allocator calm
        times = torch.arange(total, device=self.device)
        y_mask = (times < frames[:, None])[:, None].to(x.dtype)  # [B, 1, frames]
        symbol = torch.searchsorted(ends, times.to(ends.dtype).expand(len(ids), -1).contiguous(), right=True)
        symbol = symbol.clamp_max(mean.shape[2] - 1)[:, None].expand(-1, mean.shape[1], -1)
        mean, log_std = mean.gather(2, symbol) * y_mask, log_std.gather(2, symbol) * y_mask
        z = self.model.flow(mean + torch.randn_like(mean) * torch.exp(log_std) * noise, y_mask, reverse=True)
        decoder_dtype = self.model.dec.conv_pre.weight.dtype
        waveform = self.model.dec((z * y_mask).to(decoder_dtype))[:, 0].float()
        samples = frames * HOP
        return waveform * (torch.arange(total * HOP, device=self.device) < samples[:, None]), samples

    @torch.inference_mode()
    def read_aloud(self, lines: list[list[int]], manner: Manner) -> list[torch.Tensor]:
        """Read lines in one manner: int16 waveforms at 16 kHz, on the CPU."""
        waveform, samples = self.generate(lines, manner.length_scale, manner.noise, manner.rhythm)
        size = waveform.shape[1]
        target = round(size * SAMPLE_RATE / (self.rate * manner.pitch) / HOP) * HOP  # a size that FFTs like
        bins = target // 2 + 1
        spectrum = torch.fft.rfft(waveform)[:, :bins] * (target / size)
        if spectrum.shape[1] < bins:
            spectrum = torch.nn.functional.pad(spectrum, (0, bins - spectrum.shape[1]))
        place = torch.linspace(0, 1, bins, device=self.device).sqrt() * torch.pi
        spectrum *= torch.exp(sum(a * torch.cos((k + 1) * place) for k, a in enumerate(manner.tilt)))
        waveform = torch.fft.irfft(spectrum, target)
        level = torch.empty(len(lines), 1, device=self.device).uniform_(0.3, 0.95)
        waveform *= level / waveform.abs().amax(1, keepdim=True).clamp_min(1e-4)
        ends = (samples * target // size).tolist()
        waveform = (waveform * 32767).round().short().cpu()
        return [row[:end].clone() for row, end in zip(waveform, ends, strict=True)]


def import_vits() -> dict:
    """Import piper-tts's own model classes: its folder `vits` alone, without the imports of the package around it."""
    spec = importlib.util.find_spec("piper")
    folders = [Path(place) / "train" for place in (spec.submodule_search_locations if spec else [])]
    folder = next((folder for folder in folders if (folder / "vits" / "models.py").exists()), None)
    if folder is None:
        raise SystemExit("piper/train/vits: not found; `pip install piper-tts`, or put that folder below PYTHONPATH")
    sys.path.insert(0, str(folder))
    return {name: importlib.import_module(f"vits.{name}") for name in ("config", "models")}


def speak(
    voice: Voice, rows: Sequence[dict], group: int = 128, batch_seconds: float = 600.0, seed: int = 0
) -> Iterator[tuple[dict, np.ndarray]]:
    """Yield (row with `speaker`, int16 samples at 16 kHz) of every row in order; `group` of them are a speaker."""
    rng = random.Random(seed)
    torch.manual_seed(seed)
    for first in range(0, len(rows), group):
        chunk = rows[first : first + group]
        manner = Manner.draw(rng)
        lines = [voice.encode(row["phonemes"]) for row in chunk]
        spoken: dict[int, torch.Tensor] = {}
        batch: list[int] = []
        for index in sorted(range(len(lines)), key=lambda i: -len(lines[i])):
            seconds = SYMBOL_SECONDS * manner.length_scale * len(lines[batch[0]]) if batch else 0.0
            if batch and seconds * (len(batch) + 1) > batch_seconds:
                spoken.update(zip(batch, voice.read_aloud([lines[i] for i in batch], manner), strict=True))
                batch = []
            batch.append(index)
        spoken.update(zip(batch, voice.read_aloud([lines[i] for i in batch], manner), strict=True))
        speaker = f"piper-{seed}-{first // group}"
        for index, row in enumerate(chunk):
            yield {**row, "speaker": speaker, "pitch": round(manner.pitch, 3)}, spoken[index].numpy()


def read_rows(phonemes: Path, limit: int | None, seed: int, group: int) -> list[dict]:
    """Read the rows in file order but with the groups shuffled, so that a part of them is a sample of all sources."""
    with gzip.open(phonemes, "rt") as file:
        rows = [json.loads(line) for line in file]
    groups = [rows[first : first + group] for first in range(0, len(rows), group)]
    random.Random(seed).shuffle(groups)
    return [row for rows in groups for row in rows][:limit]


def write_shards(speech: Iterator[tuple[dict, np.ndarray]], output: Path, shard_seconds: float) -> float:
    """Write shards and their index as the speech comes; returns the seconds written."""
    output.mkdir(parents=True, exist_ok=True)
    shard, pieces, rows, size, seconds = 0, [], [], 0, 0.0

    def flush() -> None:
        nonlocal shard, size
        np.save(output / f"shard-{shard:04d}.npy", np.concatenate(pieces))
        index.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        index.flush()
        pieces.clear(), rows.clear()
        shard, size = shard + 1, 0

    with (output / "index.jsonl").open("w") as index:
        for row, samples in speech:
            row = {key: value for key, value in row.items() if key != "phonemes"}
            rows.append({**row, "shard": f"shard-{shard:04d}.npy", "offset": size, "samples": len(samples)})
            pieces.append(samples)
            size += len(samples)
            seconds += len(samples) / SAMPLE_RATE
            if size >= shard_seconds * SAMPLE_RATE:
                flush()
        if pieces:
            flush()
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("phonemise", help="texts to phonemes, with espeak")
    command.add_argument("--texts", type=Path, nargs="+", required=True, help="text files, one utterance a line")
    command.add_argument("--output", type=Path, required=True, help="the .jsonl.gz to write")
    command.add_argument("--espeak-voice", default="en-us")
    command.add_argument("--seed", type=int, default=0)
    command = commands.add_parser("convert", help="a Piper voice's ONNX file to safetensors")
    command.add_argument("--onnx", type=Path, required=True)
    command.add_argument("--output", type=Path, required=True, help="the .safetensors to write")
    command = commands.add_parser("speak", help="phonemes to speech")
    command.add_argument("--phonemes", type=Path, required=True)
    command.add_argument("--weights", type=Path, required=True, help="from `convert`")
    command.add_argument("--voice", type=Path, required=True, help="the voice's .onnx.json")
    command.add_argument("--output", type=Path, required=True, help="folder for the shards and the index")
    command.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    command.add_argument("--limit", type=int, help="read only this many lines")
    command.add_argument("--group", type=int, default=128, help="consecutive lines read by one speaker")
    command.add_argument("--batch-seconds", type=float, default=600.0, help="speech made at a time; bounds the memory")
    command.add_argument("--shard-seconds", type=float, default=3600.0)
    command.add_argument("--seed", type=int, default=0, help="another seed gives other speakers and another order")
    arguments = parser.parse_args()

    if arguments.command == "phonemise":
        phonemise(arguments.texts, arguments.output, arguments.espeak_voice, arguments.seed)
    elif arguments.command == "convert":
        convert(arguments.onnx, arguments.output)
    else:
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
        rows = read_rows(arguments.phonemes, arguments.limit, arguments.seed, arguments.group)
        voice = Voice(arguments.weights, arguments.voice, arguments.device)
        start = time.perf_counter()
        speech = speak(voice, rows, arguments.group, arguments.batch_seconds, arguments.seed)
        seconds = write_shards(speech, arguments.output, arguments.shard_seconds)
        wall = time.perf_counter() - start
        print(f"{seconds / 3600:.1f} h of speech in {wall:.0f} s, {seconds / wall:.0f} times real time")


if __name__ == "__main__":
    main()
