"""Numbers as people read them."""

from __future__ import annotations

import math

from onnxopt.report.record import MetricFigures


def count(number: int) -> str:
    """1,468,055."""
    return f"{number:,}"


def samples(number: int) -> str:
    """1 sample, 1,200 samples."""
    return "1 sample" if number == 1 else f"{count(number)} samples"


def layers(number: int, kind: str = "") -> str:
    """1 layer, 57 layers, 57 quantized layers."""
    return f"{count(number)} {kind}{' ' if kind else ''}layer{'' if number == 1 else 's'}"


def size(number: int) -> str:
    """Bytes in decimal units, as file managers and data sheets count them: 1.47 MB."""
    value = float(number)
    for unit in ("B", "kB", "MB", "GB"):
        if value < 1000 or unit == "GB":
            break
        value /= 1000
    return f"{number} B" if unit == "B" else f"{value:.{2 if value < 100 else 1}f} {unit}"


def change(before: int, after: int) -> str:
    """The relative change in percent: -74.1 %; empty where there was nothing."""
    if before == after:
        return "same"
    return f"{(after - before) / before * 100:+.1f} %" if before else "new"


def milliseconds(value: float) -> str:
    """Three significant digits: 1.23 ms, 0.0456 ms."""
    digits = 3 - 1 - (math.floor(math.log10(value)) if value > 0 else 0)
    return f"{value:.{max(digits, 0)}f} ms"


def times(value: float) -> str:
    """The result's share of the original's figure: 0.53 x, 0.0042 x."""
    if not 0 < value < 0.1 or not math.isfinite(value):
        return f"{value:.2f} x"
    return f"{value:.{1 - math.floor(math.log10(value))}f} x"


def ratio(before: int, after: int) -> str:
    """The same of two numbers: 0.53 x; "new" where there was nothing."""
    if before == after:
        return "same"
    return times(after / before) if before else "new"


def metric(figures: MetricFigures, value: float) -> str:
    """A metric's value: shares in percent, others with four significant digits."""
    return f"{value * 100:.2f} %" if figures.share and math.isfinite(value) else f"{value:.4g}"


def drop(figures: MetricFigures) -> str:
    """The signed change of a metric from the original to the candidate: -0.14 pt."""
    difference = figures.candidate - figures.reference
    if difference == 0:
        return "same"
    return f"{difference * 100:+.2f} pt" if figures.share else f"{difference:+.3g}"


def decibels(value: float | None) -> str:
    """28.4 dB; "exact" for an infinite ratio, where not one bit differs."""
    if value is None:
        return ""
    return "exact" if value == math.inf else f"{value:.1f} dB"


def share(value: float | None) -> str:
    """A share in percent, never rounded up to 100 %."""
    if value is None:
        return ""
    return "100 %" if value == 1 else f"{math.floor(value * 10000) / 100:.2f} %"


def figure(value: float | None, form: str) -> str:
    """A number in the given format, zero as 0, nothing for None."""
    if value is None:
        return ""
    return "0" if value == 0 else f"{value:{form}}"


def shortened(text: str, width: int) -> str:
    """A name cut in the middle, where names differ least."""
    if len(text) <= width:
        return text
    head = (width - 3) // 2
    return f"{text[:head]}...{text[len(text) - (width - 3 - head) :]}"


def large(number: int) -> str:
    """A count to three digits: 999, 12.3 k, 4.10 G."""
    value, unit = float(number), ""
    for unit in ("", "k", "M", "G", "T", "P"):
        if value < 999.5 or unit == "P":
            break
        value /= 1000
    return str(number) if not unit else f"{value:.{max(0, 2 - len(str(int(value))) + 1)}f} {unit}"
