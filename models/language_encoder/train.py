"""Train the language detector: a small transformer encoder over the characters of three names.

    python -m models.language_encoder.train        # from the repository root; writes language_encoder.onnx and feeds/

Data: the names of languages, territories, currencies and scripts in 13 European languages, from the Unicode CLDR locale
    data that the package babel ships (Unicode License, see models/NOTICE.md). Names of more than one of these languages
    are left out. A sample is three names of one language, as in "finnish, new caledonia, turkish lira". The names, not
    only the triples, are divided between training and the parts of the feeds: no name of one occurs in another.
Input: `input_ids` [batch, length] int64, 0 is padding; `attention_mask` [batch, length] int64, 1 where there is a
    character. Length is at most 64; the feeds are padded to 58.
Network: character and position embeddings; a convolution over five characters, which finds the beginnings and endings
    that tell languages apart (without it accuracy ended at 0.86); three pre-norm layers of attention (written out as
    MatMul and Softmax, with the mask added to the scores) and Gelu feed-forward; LayerNorm; mean over the characters;
    Gemm.
Time: 255 s to train on one thread of a shared AMD EPYC.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from babel import Locale
from torch import nn
from torch.nn import functional

from models import training

HERE = Path(__file__).resolve().parent
SEED = 22
LANGUAGES = ("cs", "de", "en", "es", "fi", "fr", "hu", "it", "lt", "nl", "pl", "ro", "tr")
PUNCTUATION = " ,'-"
SIZES = {"fit": 600, "select": 600, "evaluate": 1500}  # names set aside, and as many samples made of them
MAX_NAME = 18  # three names, commas and spaces are at most 58 characters
FEED_LENGTH = 58
MAX_LENGTH = 64
EPOCHS = 20
BATCH_SIZE = 64
LEARNING_RATE = 2e-3


def load_names() -> tuple[list[str], training.Integers]:
    """Lower-case names that belong to one language only, sorted, and the class of each, [names]."""
    languages_of: dict[str, set[int]] = {}
    for label, language in enumerate(LANGUAGES):
        locale = Locale.parse(language)
        for table in (locale.languages, locale.territories, locale.currencies, locale.scripts):
            for name in table.values():
                languages_of.setdefault(name.lower(), set()).add(label)
    names = [
        name
        for name, labels in sorted(languages_of.items())
        if len(labels) == 1 and 3 <= len(name) <= MAX_NAME and all(c.isalpha() or c in PUNCTUATION for c in name)
    ]
    return names, np.array([min(languages_of[name]) for name in names], dtype=np.int64)


def encode(texts: Sequence[str], alphabet: str) -> dict[str, training.Array]:
    """The network's inputs for texts, padded to FEED_LENGTH."""
    ids = np.zeros((len(texts), FEED_LENGTH), dtype=np.int64)
    for row, text in enumerate(texts):
        ids[row, : len(text)] = [alphabet.index(character) + 1 for character in text]
    return {"input_ids": ids, "attention_mask": (ids > 0).astype(np.int64)}


def triples(names: Sequence[str], labels: training.Integers, generator: np.random.Generator) -> list[str]:
    """For each name, in order, a text of it and two other names of its class: every name stands in three texts."""
    texts = [""] * len(names)
    for label in np.unique(labels):
        cycle = generator.permutation(np.flatnonzero(labels == label))
        for first, second, third in zip(cycle, np.roll(cycle, 1), np.roll(cycle, 2), strict=True):
            texts[first] = f"{names[first]}, {names[second]}, {names[third]}"
    return texts


class Attention(nn.Module):
    """Multi-head attention, [batch, length, width] -> the same, from separate query, key and value layers."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(width, width)
        self.value = nn.Linear(width, width)
        self.output = nn.Linear(width, width)

    def split(self, x: torch.Tensor) -> torch.Tensor:
        """[batch, length, width] -> [batch, heads, length, width / heads]."""
        batch, length, width = x.shape
        return x.reshape(batch, length, self.heads, width // self.heads).transpose(1, 2)

    def forward(self, x: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        """bias is added to the scores: [batch, 1, 1, length], 0 or very negative."""
        query, key, value = self.split(self.query(x)), self.split(self.key(x)), self.split(self.value(x))
        scores = query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5
        mixed = torch.softmax(scores + bias, dim=-1) @ value
        output: torch.Tensor = self.output(mixed.transpose(1, 2).reshape(x.shape))
        return output


class Layer(nn.Module):
    """Pre-norm transformer layer."""

    def __init__(self, width: int, heads: int, inner: int, dropout: float) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(width)
        self.attention = Attention(width, heads)
        self.feed_forward_norm = nn.LayerNorm(width)
        self.feed_forward = nn.Sequential(nn.Linear(width, inner), nn.GELU(), nn.Linear(inner, width))
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        """[batch, length, width] -> the same; bias as in Attention."""
        x = x + self.dropout(self.attention(self.attention_norm(x), bias))
        y: torch.Tensor = x + self.dropout(self.feed_forward(self.feed_forward_norm(x)))
        return y


class LanguageEncoder(nn.Module):
    """input_ids, attention_mask [batch, length] -> logits [batch, 13]."""

    def __init__(self, characters: int, width: int = 96, heads: int = 4, layers: int = 3) -> None:
        super().__init__()
        self.characters = nn.Embedding(characters + 1, width)
        self.positions = nn.Embedding(MAX_LENGTH, width)
        nn.init.normal_(self.characters.weight, std=0.3)
        nn.init.normal_(self.positions.weight, std=0.1)
        self.neighbours = nn.Conv1d(width, width, 5, padding=2)
        self.layers = nn.ModuleList(Layer(width, heads, 4 * width, dropout=0.1) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.classify = nn.Linear(width, len(LANGUAGES))

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """Padding, where attention_mask is 0, changes nothing."""
        mask = attention_mask.to(torch.float32)
        # Large and finite: a row of only padding then stays finite too.
        bias = (1.0 - mask)[:, None, None, :] * -1e4
        x = self.characters(input_ids) + self.positions(torch.arange(input_ids.shape[1]))
        x = x * mask[:, :, None]  # the convolution must find the same zeros in padding as beyond the end
        x = x + functional.gelu(self.neighbours(x.transpose(1, 2))).transpose(1, 2)
        for layer in self.layers:
            x = layer(x, bias)
        weights = mask[:, :, None]
        mean = (self.norm(x) * weights).sum(1) / weights.sum(1).clamp(min=1.0)
        logits: torch.Tensor = self.classify(mean)
        return logits


def train(network: LanguageEncoder, names: list[str], labels: training.Integers, alphabet: str) -> float:
    """Train in place on triples drawn anew in every epoch; return the seconds it took."""
    optimizer = torch.optim.AdamW(network.parameters(), lr=LEARNING_RATE, weight_decay=0.02)
    steps = EPOCHS * (len(names) // BATCH_SIZE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps, pct_start=0.15)
    order = np.random.default_rng(SEED)
    progress = training.Progress()
    for epoch in range(EPOCHS):
        network.train()
        total = 0.0
        part = training.Part(encode(triples(names, labels, order), alphabet), labels)
        for rows in training.batches(len(part), BATCH_SIZE, order):
            ids, mask = part.tensors(rows)
            longest = int(mask.sum(1).max())  # columns that are padding in the whole batch only cost time
            logits = network(ids[:, :longest], mask[:, :longest])
            loss = functional.cross_entropy(logits, torch.from_numpy(labels[rows]), label_smoothing=0.05)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(network.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            total += float(loss.detach())
        progress.epoch(epoch + 1, total / (len(part) // BATCH_SIZE))
    return progress.seconds()


def main() -> None:
    """Train, write the feeds, export, and check the export."""
    training.seed_everything(SEED)
    names, labels = load_names()
    alphabet = "".join(sorted(set("".join(names)) | set(PUNCTUATION)))
    rows = training.stratified_rows(labels, SIZES, SEED)
    parts = {}
    for part_name in SIZES:
        chosen = rows[part_name]
        texts = triples([names[row] for row in chosen], labels[chosen], np.random.default_rng(SEED))
        parts[part_name] = training.Part(encode(texts, alphabet), labels[chosen])

    network = LanguageEncoder(len(alphabet))
    seconds = train(network, [names[row] for row in rows["train"]], labels[rows["train"]], alphabet)
    print(f"trained in {seconds:.0f} s on {len(rows['train'])} names")
    training.report_accuracy(network, parts)

    training.write_feeds(HERE, parts)
    path = HERE / "language_encoder.onnx"
    training.export(
        network,
        parts["fit"].tensors(slice(0, 3)),
        path,
        dynamic_axes={
            "input_ids": {0: "batch", 1: "length"},
            "attention_mask": {0: "batch", 1: "length"},
            "logits": {0: "batch"},
        },
        metadata={
            "task": "language of three names of languages, territories, currencies or scripts",
            "classes": ",".join(LANGUAGES),
            "alphabet": alphabet,
            "preprocessing": "lower case, joined by comma, space; ids are positions in the alphabet plus 1, 0 pads",
            "data": "Unicode CLDR locale data (Unicode License), package babel",
        },
    )
    evaluated = training.check_export(network, path, parts["evaluate"])
    print(training.describe(path))
    if evaluated < 0.95:
        raise RuntimeError(f"accuracy {evaluated:.4f} is below what was promised")


if __name__ == "__main__":
    main()
