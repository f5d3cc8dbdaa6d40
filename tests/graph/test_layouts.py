import pytest

from onnxopt.graph.layouts import blocked, channels_first
from tests.helpers import model

W = "float[8, 8, 3, 3] w, float[8] s, float[8, 8] m"
PADS = "pads = [1, 1, 1, 1]"


def names(found: set[object]) -> str:
    return " ".join(sorted(str(getattr(variable, "name", "")) for variable in found))


def graph(nodes: str) -> tuple[str, str]:
    """(tensors with channels first, blocked tensors), by name."""
    body = model(f"g (float[n, 8, 8, 8] x, {W}) => (float[n, 8, 8, 8] y) {{ {nodes} }}").graph
    return names(set(channels_first(body))), names(set(blocked(body)))


@pytest.mark.parametrize(
    ("nodes", "first", "kept"),
    [
        ("y = Relu(x)", "", ""),
        (f"y = Conv<{PADS}>(x, w)", "x y", "y"),
        (f"a = Conv<{PADS}>(x, w)  b = Relu(a)  y = Add(b, x)", "a b x y", "a b y"),
        (f"a = Conv<{PADS}>(x, w)  b = Neg(a)  y = Relu(b)", "a b x y", "a"),
        (f"a = Conv<{PADS}>(x, w)  b = Flatten(a)  y = Relu(b)", "a x", "a"),
        (f"a = Conv<{PADS}>(x, w)  b, c = Split<axis = 1>(a)  y = Neg(c)", "a b c x y", "a"),
        ("y = MaxPool<kernel_shape = [1, 1]>(x)", "x y", ""),
        ("y = MatMul(x, m)", "", ""),
        ("a = Relu(x)  y = GlobalAveragePool(a)", "a y", ""),
        (f"a = Conv<{PADS}>(x, w)  b = ReduceMean(a)  y = Relu(b)", "a x", "a"),
        (f"y = custom.Conv<{PADS}>(x, w)", "", ""),
    ],
)
def test_layouts(nodes: str, first: str, kept: str) -> None:
    if "custom" in nodes:
        text = f"g (float[n, 8, 8, 8] x, {W}) => (float[n, 8, 8, 8] y) {{ {nodes} }}"
        body = model(text, imports='"custom" : 1').graph
        assert (names(set(channels_first(body))), names(set(blocked(body)))) == ("", "")
        return
    assert graph(nodes) == (first, kept)
