"""Train the digits classifier: a residual CNN whose BatchNormalization scales were driven to exact zeros.

    python -m models.digits_cnn.train        # from the repository root; writes digits_cnn.onnx and feeds/

Data: the 1797 handwritten digits that scikit-learn ships (sklearn.datasets.load_digits): the test part of "Optical
    Recognition of Handwritten Digits" of the UCI repository (E. Alpaydin, C. Kaynak; CC BY 4.0). 8x8 pixels, 0 to 16.
Preprocessing: divide by 16, enlarge bilinearly to 32x32 (half-pixel centres, edges repeated), so that a run takes long
    enough to be timed. The feeds hold the enlarged images.
Network: stem and a strided convolution; bottleneck with residual Add; expand, depthwise, squeeze-excite, project with
    residual Add; two strided branches joined by Concat; basic block with residual Add; 1x1 head; pooling; Gemm.
Sparsity: "Network slimming" (Liu et al. 2017, arXiv:1708.06519) puts an L1 penalty on the BatchNormalization scales.
    A subgradient step only comes near zero, so the penalty is applied as its proximal step, the soft threshold: zeros
    are exact. They are learned in the first part of training and kept in the second, which recovers accuracy.
Time: 123 s to train on one thread of a shared AMD EPYC.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional

from models import training

HERE = Path(__file__).resolve().parent
SEED = 20
SIZES = {"fit": 150, "select": 100, "evaluate": 650}  # of 1797; the other 897 train
EPOCHS = 56
SPARSE_EPOCHS = 42  # epochs with the L1 penalty; the scales that are zero then stay zero
BATCH_SIZE = 32
LEARNING_RATE = 0.05
WEIGHT_DECAY = 5e-4
L1_STRENGTH = 0.018
INITIAL_SCALE = 0.5


def enlarge(images: npt.NDArray[np.float64]) -> npt.NDArray[np.float32]:
    """[samples, 8, 8] with values 0..16 -> [samples, 1, 32, 32] with values 0..1; exact in float32."""
    positions = (np.arange(32) + 0.5) / 4 - 0.5
    weights = np.maximum(0.0, 1.0 - np.abs(np.clip(positions, 0, 7)[:, None] - np.arange(8)[None, :]))
    return (weights @ (images / 16.0) @ weights.T).astype(np.float32)[:, None]


def convolution(inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1) -> nn.Sequential:
    """Conv without bias, BatchNormalization."""
    conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)
    norm = nn.BatchNorm2d(outputs)
    nn.init.constant_(norm.weight, INITIAL_SCALE)
    return nn.Sequential(conv, norm)


class Bottleneck(nn.Module):
    """x + project(conv3x3(reduce(x)))."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.reduce = convolution(width, inner, 1)
        self.middle = convolution(inner, inner, 3)
        self.expand = convolution(inner, width, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Channels first; the shape is kept."""
        y = functional.relu(self.reduce(x))
        y = functional.relu(self.middle(y))
        return functional.relu(x + self.expand(y))


class SqueezeExcite(nn.Module):
    """x * sigmoid(excite(relu(squeeze(mean of x over the image))))."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.squeeze = nn.Conv2d(width, inner, 1)
        self.excite = nn.Conv2d(inner, width, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Channels first; the shape is kept."""
        gate = self.excite(functional.relu(self.squeeze(self.pool(x))))
        return x * torch.sigmoid(gate)


class InvertedResidual(nn.Module):
    """x + project(gate(depthwise(expand(x)))), the project step without activation."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.expand = convolution(width, inner, 1)
        self.depthwise = convolution(inner, inner, 3, groups=inner)
        self.gate = SqueezeExcite(inner, 32)
        self.project = convolution(inner, width, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Channels first; the shape is kept."""
        y = functional.relu(self.expand(x))
        y = self.gate(functional.relu(self.depthwise(y)))
        total: torch.Tensor = x + self.project(y)
        return total


class Branches(nn.Module):
    """Halve the image in two ways and join the channels."""

    def __init__(self, width: int, pooled: int, strided: int) -> None:
        super().__init__()
        self.pool = nn.MaxPool2d(2)
        self.pooled = convolution(width, pooled, 1)
        self.strided = convolution(width, strided, 3, stride=2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Channels first; height and width are halved."""
        left = functional.relu(self.pooled(self.pool(x)))
        right = functional.relu(self.strided(x))
        return torch.cat([left, right], dim=1)


class BasicBlock(nn.Module):
    """x + conv3x3(conv3x3(x))."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.first = convolution(width, inner, 3)
        self.second = convolution(inner, width, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Channels first; the shape is kept."""
        return functional.relu(x + self.second(functional.relu(self.first(x))))


class DigitsCnn(nn.Module):
    """[batch, 1, 32, 32] -> logits [batch, 10]."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = convolution(1, 32, 3)
        self.down = convolution(32, 64, 3, stride=2)
        self.bottleneck = Bottleneck(64, 48)
        self.inverted = InvertedResidual(64, 128)
        self.branches = Branches(64, 48, 80)
        self.basic = BasicBlock(128, 96)
        self.head = convolution(128, 128, 1)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.classify = nn.Linear(128, 10)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """Images with values 0..1 in, unnormalised scores of the ten digits out."""
        x = functional.relu(self.stem(image))
        x = functional.relu(self.down(x))
        x = self.inverted(self.bottleneck(x))
        x = self.basic(self.branches(x))
        x = functional.relu(self.head(x))
        logits: torch.Tensor = self.classify(torch.flatten(self.pool(x), 1))
        return logits


def scales(network: nn.Module) -> dict[str, nn.Parameter]:
    """The scale vectors of all BatchNormalization layers by layer name, without the trailing ".1"."""
    layers = network.named_modules()
    return {name.removesuffix(".1"): layer.weight for name, layer in layers if isinstance(layer, nn.BatchNorm2d)}


def soft_threshold(values: torch.Tensor, amount: float) -> torch.Tensor:
    """The proximal step of amount * |values|: towards zero by amount, and exactly zero within it."""
    return torch.sign(values) * torch.clamp(values.abs() - amount, min=0.0)


def augment(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Turn, scale, shear and shift every image a little, at random."""
    count = len(images)

    def uniform(limit: float) -> torch.Tensor:
        return (torch.rand(count, generator=generator) * 2 - 1) * limit

    angle, zoom = uniform(0.17), torch.exp(uniform(0.12))
    cosine, sine = torch.cos(angle) * zoom, torch.sin(angle) * zoom
    rows = [cosine, uniform(0.1) - sine, uniform(0.12), sine, cosine, uniform(0.12)]
    grid = functional.affine_grid(torch.stack(rows, 1).view(-1, 2, 3), list(images.shape), align_corners=False)
    return functional.grid_sample(images, grid, align_corners=False)


def train(network: DigitsCnn, part: training.Part) -> float:
    """Train in place with the proximal L1 penalty on the scales; return the seconds it took."""
    all_scales = scales(network)
    scale_ids = {id(scale) for scale in all_scales.values()}
    # The penalty is the only decay of the scales: weight decay on top would blur its strength.
    decayed = [p for p in network.parameters() if p.dim() > 1]
    plain = [p for p in network.parameters() if p.dim() == 1 and id(p) not in scale_ids]
    groups = [
        {"params": decayed, "weight_decay": WEIGHT_DECAY},
        {"params": plain + list(all_scales.values()), "weight_decay": 0.0},
    ]
    optimizer = torch.optim.SGD(groups, lr=LEARNING_RATE, momentum=0.9, nesterov=True)
    steps = EPOCHS * (len(part) // BATCH_SIZE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps, pct_start=0.1)
    order = np.random.default_rng(SEED)
    noise = torch.Generator().manual_seed(SEED)
    labels = torch.from_numpy(part.labels)
    progress = training.Progress()
    for epoch in range(EPOCHS):
        network.train()
        total = 0.0
        zero = {name: scale == 0 for name, scale in all_scales.items()}
        for rows in training.batches(len(part), BATCH_SIZE, order):
            (images,) = part.tensors(rows)
            logits = network(augment(images, noise))
            loss = functional.cross_entropy(logits, labels[rows], label_smoothing=0.05)
            optimizer.zero_grad()
            loss.backward()
            rate = float(optimizer.param_groups[0]["lr"])
            optimizer.step()
            schedule.step()
            with torch.no_grad():
                for name, scale in all_scales.items():
                    if epoch < SPARSE_EPOCHS:
                        scale.copy_(soft_threshold(scale, rate * L1_STRENGTH))
                    else:
                        scale[zero[name]] = 0.0
            total += float(loss.detach())
        dead = sum(int((scale == 0).sum()) for scale in all_scales.values())
        progress.epoch(epoch + 1, total / (len(part) // BATCH_SIZE), f"zero scales {dead}")
    return progress.seconds()


def report_zero_scales(network: DigitsCnn) -> float:
    """Print the exact zeros of every layer; return their share of all scales."""
    zeros = channels = 0
    for name, scale in scales(network).items():
        count = int((scale == 0).sum())
        print(f"  {name:22s} {count:3d} of {len(scale):3d} scales are zero")
        zeros, channels = zeros + count, channels + len(scale)
    print(f"  {'all':22s} {zeros:3d} of {channels:3d} = {zeros / channels:.4f}")
    return zeros / channels


def main() -> None:
    """Train, write the feeds, export, and check the export."""
    training.seed_everything(SEED)
    digits = load_digits()
    images, labels = enlarge(digits.images), digits.target.astype(np.int64)
    rows = training.stratified_rows(labels, SIZES, SEED)
    parts = {name: training.Part({"image": images[chosen]}, labels[chosen]) for name, chosen in rows.items()}

    network = DigitsCnn()
    seconds = train(network, parts["train"])
    print(f"trained in {seconds:.0f} s")
    training.report_accuracy(network, parts)
    share = report_zero_scales(network)

    training.write_feeds(HERE, parts)
    path = HERE / "digits_cnn.onnx"
    training.export(
        network,
        parts["fit"].tensors(slice(0, 2)),
        path,
        dynamic_axes={"image": {0: "batch"}, "logits": {0: "batch"}},
        metadata={
            "task": "class of a handwritten digit",
            "classes": "0,1,2,3,4,5,6,7,8,9",
            "preprocessing": "8x8 grey levels 0..16 divided by 16, enlarged bilinearly to 32x32",
            "data": "scikit-learn digits (UCI Optical Recognition of Handwritten Digits, CC BY 4.0)",
        },
        keep_batch_normalization=True,
    )
    evaluated = training.check_export(network, path, parts["evaluate"])
    print(training.describe(path))
    if evaluated < 0.98 or share < 0.10:
        raise RuntimeError(f"accuracy {evaluated:.4f} or share of zero scales {share:.4f} is below what was promised")


if __name__ == "__main__":
    main()
