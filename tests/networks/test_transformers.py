"""The transformers against an independent implementation, published counts, and the laws of their parts."""

from pathlib import Path

import pytest
import torch
import yaml
from torch import Tensor, nn
from torch.nn.functional import pad

from diffusion_cli.networks import BLOCKS, DiT, SetTransformer
from diffusion_cli.networks.dit import position_embedding
from diffusion_cli.networks.layers import zero_init
from diffusion_cli.networks.set_transformer import InducedAttention
from diffusion_cli.networks.token_layers import CrossAttention, SelfAttention
from diffusion_cli.networks.transformer import TransformerBlock

CONF = Path(__file__).parents[2] / "conf" / "model"
CPU = torch.device("cpu")
SMALL: dict = {
    "hidden_size": 24,
    "depth": 2,
    "num_heads": 4,
    "mlp_ratio": 2.0,
    "patch_size": 2,
    "dropout": 0.0,
    "class_conditional": False,
    "learn_variance": False,
    "gradient_checkpointing": False,
}


def option(name: str, **changes) -> dict:
    arguments = yaml.safe_load((CONF / f"{name}.yaml").read_text())
    return {key: value for key, value in arguments.items() if key != "_target_"} | changes


def randomised(module, std: float = 0.3):
    """Weights of a trained kind: nothing is zero any more."""
    torch.manual_seed(0)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=std)
    return module.double().eval()


def small(shape: tuple[int, ...] = (2, 8, 8), num_classes: int | None = None, **changes) -> DiT:
    return randomised(DiT(shape, num_classes, **(SMALL | changes)))


def noise(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def times(batch: int) -> Tensor:
    return torch.linspace(3, 700, batch, dtype=torch.float64)


def close(actual: Tensor, expected: Tensor, tolerance: float = 1e-10) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance)


# --- DiT: the published network ---------------


def test_equals_the_published_network(reference, agree):
    # tests/reference/README.md gives the source of the numbers; weights have the names of published checkpoints.
    arrays = reference("dit")
    weights = {name.removeprefix("weights/"): value for name, value in arrays.items() if "weights/" in name}
    options = SMALL | {"hidden_size": 32, "mlp_ratio": 4.0, "class_conditional": True, "learn_variance": True}
    network = DiT((4, 8, 8), 4, **options).eval()
    network.load_state_dict(weights)
    x, t, y = arrays["x"], arrays["t"].float(), arrays["y"]
    with torch.no_grad():
        agree("dit/F", network(x, t, y).double(), arrays["F"], 1e-5)
        agree("dit/F in float64", network.double()(x.double(), t, y), arrays["F"], 1e-5)
    agree("dit/pos_embed", position_embedding([4, 4], 32, CPU), arrays["pos_embed"][0], 1e-6)


def census(width: int, depth: int) -> int:
    """Parameters of a DiT on patches 2x2 of 4 channels with 1,000 classes and a variance, layer by layer."""
    embedders = (4 * 4 + 1) * width + (256 + 1) * width + (width + 1) * width + 1001 * width
    block = (
        (width + 1) * 4 * width + (width + 1) * 4 * width + (4 * width + 1) * width + (width + 1) * 6 * width
    )
    return embedders + depth * block + (width + 1) * 2 * width + (width + 1) * 2 * 4 * 4


@pytest.mark.parametrize(
    ("name", "millions", "layers"),  # Peebles & Xie 2023, Table 4
    [
        ("dit_s_2", 33, (384, 12)),
        ("dit_b_2", 130, (768, 12)),
        ("dit_l_2", 458, (1024, 24)),
        ("dit_xl_2", 675, (1152, 28)),
    ],
)
def test_published_parameter_counts(name, millions, layers):
    with torch.device("meta"):
        network = DiT((4, 32, 32), 1000, **option(name, class_conditional=True, learn_variance=True))
    parameters = sum(parameter.numel() for parameter in network.parameters())
    assert parameters == census(*layers)
    assert round(parameters / 1e6) == millions
    assert f" {millions}M parameters" in (CONF / f"{name}.yaml").read_text()
    shared = [p.numel() for part in network.modules() if isinstance(part, BLOCKS) for p in part.parameters()]
    assert sum(shared) > 0.9 * parameters  # shared out among the processes of FSDP block by block


def test_starts_as_published():
    torch.manual_seed(0)
    network = DiT((3, 16, 16), 10, **option("dit_tiny", class_conditional=True, learn_variance=True))
    block = network.blocks[0]
    assert isinstance(block, TransformerBlock)
    tokens, c = torch.randn(2, 5, 128), torch.randn(2, 128)
    assert torch.equal(block(tokens, c), tokens)
    x = torch.randn(2, 3, 16, 16)
    assert torch.equal(network(x, torch.rand(2), torch.tensor([3, 10])), torch.zeros(2, 6, 16, 16))
    stds = {
        "t_embedder.mlp.0.weight": 0.02,
        "t_embedder.mlp.2.weight": 0.02,
        "y_embedder.embedding_table.weight": 0.02,
        "x_embedder.proj.weight": (2 / (12 + 128)) ** 0.5,  # xavier's of the patch as one vector
        "blocks.1.attn.qkv.weight": (2 / (128 + 384)) ** 0.5,
        "blocks.1.mlp.fc1.weight": (2 / (128 + 512)) ** 0.5,
    }
    state = network.state_dict()
    for name, std in stds.items():
        assert state[name].std() == pytest.approx(std, rel=0.06), name
    biases = [name for name in state if name.endswith("bias") and "t_embedder" not in name]
    assert all(not state[name].any() for name in biases)


# --- DiT: its parts ---------------------------


@pytest.mark.parametrize("grid", [[9], [5, 7], [3, 4, 5]])
def test_products_of_positions_tell_the_distance_alone(grid):
    dim = 50  # divided by none of 2, 4 and 6 axes' halves
    features = position_embedding(grid, dim, CPU).view(*grid, dim)
    assert features.abs().max() <= 1
    for axis, side in enumerate(grid):
        inner = features.narrow(axis, 0, side - 1) * features.narrow(axis, 1, side - 1)
        products = inner.sum(-1)
        close(products, products.flatten()[0].expand_as(products))
        assert products.flatten()[0] < features.square().sum(-1).flatten()[0] - 0.1
    flat = features.flatten(0, -2)
    assert torch.cdist(flat, flat).add(torch.eye(len(flat))).min() > 0.05  # no two places are alike


@pytest.mark.parametrize("sizes", [(12,), (6, 10), (4, 6, 8), (11,), (7, 9), (3, 5, 4)])
@pytest.mark.parametrize("patch_size", [1, 2, 3])
def test_patches_come_back_where_they_were(sizes, patch_size):
    # Without its blocks a DiT works at each patch by itself.
    network = small((2, *sizes), patch_size=patch_size)
    for block in network.blocks:
        assert isinstance(block, TransformerBlock)
        zero_init(block.adaLN_modulation)
    x, c_noise = noise(1, 2, *sizes), times(1)
    changed = x.clone()
    place = tuple((size - 1) // 2 for size in sizes)
    changed[(0, 1, *place)] += 1
    moved = (network(changed, c_noise) - network(x, c_noise)).abs()[0].amax(0) > 1e-9
    patch = tuple(slice(p - p % patch_size, p - p % patch_size + patch_size) for p in place)
    expected = torch.zeros(sizes, dtype=torch.bool)
    expected[patch] = True
    # Past the end the last pixel is repeated: no other patch than its own sees it.
    assert torch.equal(moved, expected)


@pytest.mark.parametrize("sizes", [(7,), (7, 5), (3, 5, 7)])
def test_other_sizes_are_extended_and_cut(sizes):
    network, x = small((2, *sizes), learn_variance=True), noise(2, 2, *sizes)
    ends = [end for size in reversed(sizes) for end in (0, size % 2)]
    extended = network(pad(x, ends, mode="replicate"), times(2))
    close(network(x, times(2)), extended[(..., *(slice(size) for size in sizes))])


def test_one_network_serves_every_size():
    network = small((2, 8, 8))
    for sizes in [(8, 8), (4, 12), (17, 6)]:
        assert network(noise(1, 2, *sizes), times(1)).shape == (1, 2, *sizes)


def test_every_patch_sees_every_other():
    network, x = small(), noise(1, 2, 8, 8).requires_grad_()
    network(x, times(1))[0, 0, 0, 0].backward()
    assert x.grad is not None
    assert (x.grad.abs() > 1e-12).all()


def test_attention_equals_its_formula():
    layer, x = randomised(SelfAttention(8, 2)), noise(2, 5, 8)
    q, k, v = layer.qkv(x).chunk(3, dim=-1)
    heads = [
        torch.softmax(q[..., d] @ k[..., d].mT / 4**0.5, dim=-1) @ v[..., d] for d in (slice(4), slice(4, 8))
    ]
    close(layer(x), layer.proj(torch.cat(heads, dim=-1)))


# --- The transformer of sets ------------------


def small_set(num_classes: int | None = None, **changes) -> SetTransformer:
    options: dict = SMALL | {"inducing_points": 5} | changes
    del options["patch_size"]
    return randomised(SetTransformer((3, 7), num_classes, **options))


@pytest.mark.parametrize("inducing_points", [None, 5])
def test_order_of_points_has_no_meaning(inducing_points):
    network, x = small_set(inducing_points=inducing_points), noise(2, 3, 9)
    order = torch.randperm(9)
    F = network(x, times(2))
    close(network(x[:, :, order], times(2)), F[:, :, order], 1e-10)
    close(network.float()(x[:, :, order].float(), times(2).float()).double(), F[:, :, order], 1e-5)


@pytest.mark.parametrize("inducing_points", [None, 5])
def test_every_point_sees_every_other_and_any_number_of_them(inducing_points):
    network = small_set(inducing_points=inducing_points)
    for points in (1, 7, 40):
        x = noise(1, 3, points).requires_grad_()
        network(x, times(1))[0, 0, 0].backward()
        assert x.grad is not None
        assert (x.grad.abs().amax(1) > 1e-12).all()


@pytest.mark.parametrize("inducing_points", [None, 5])
def test_a_set_and_the_same_set_twice_are_told_alike(inducing_points):
    # Attention is a mean: each point counts by its share.
    network, x = small_set(inducing_points=inducing_points), noise(2, 3, 9)
    close(network(torch.cat([x, x], 2), times(2))[:, :, :9], network(x, times(2)))


def test_sets_start_at_zero():
    network = SetTransformer((3, 7), 4, **option("set_tiny", class_conditional=True, learn_variance=True))
    assert torch.equal(
        network(torch.randn(2, 3, 7), torch.rand(2), torch.tensor([0, 4])), torch.zeros(2, 6, 7)
    )


def test_induced_attention_equals_its_formula():
    layer, x = randomised(InducedAttention(8, 2, 3)), noise(2, 5, 8)

    def attention(part: CrossAttention, x: Tensor, others: Tensor) -> Tensor:
        q, (k, v) = part.q(x), part.kv(others).chunk(2, dim=-1)
        halves = (slice(4), slice(4, 8))
        heads = [torch.softmax(q[..., d] @ k[..., d].mT / 2, dim=-1) @ v[..., d] for d in halves]
        return part.proj(torch.cat(heads, dim=-1))

    inducing = layer.inducing.expand(2, -1, -1)
    summary = layer.norm(inducing + attention(layer.gather, inducing, x))
    close(layer(x), attention(layer.spread, x, summary))


# --- What all transformers do -----------------

KINDS = {"image": (small, (2, 8, 8)), "set": (small_set, (3, 7))}


@pytest.fixture(params=KINDS)
def kind(request):
    return KINDS[request.param]


def test_no_label_is_the_null_class(kind):
    build, shape = kind
    told, x, c_noise = build(num_classes=3, class_conditional=True), noise(2, *shape), times(2)
    assert torch.equal(told(x, c_noise), told(x, c_noise, torch.tensor([3, 3])))
    change = told(x, c_noise) - told(x, c_noise, torch.tensor([0, 1]))
    assert change.abs().flatten(1).amax(1).min() > 1e-3


def test_each_image_by_its_own_time_and_class(kind):
    build, shape = kind
    told, x, c_noise = build(num_classes=3, class_conditional=True), noise(3, *shape), times(3)
    y = torch.tensor([0, 3, 2])
    together = told(x, c_noise, y)
    for i in range(3):
        close(told(x[i : i + 1], c_noise[i : i + 1], y[i : i + 1])[0], together[i])
    assert (told(x, c_noise.flip(0), y) - together)[0].abs().max() > 1e-3


def test_unconditional_network_takes_no_notice_of_labels(kind):
    build, shape = kind
    network, x = build(num_classes=3), noise(1, *shape)
    assert network.num_classes is None
    assert torch.equal(network(x, times(1), torch.tensor([2])), network(x, times(1)))


def test_checkpointing_changes_no_gradient(kind):
    build, shape = kind
    x, gradients = noise(2, *shape), []
    for recompute in (False, True):
        network = build(gradient_checkpointing=recompute)
        network(x, times(2)).square().mean().backward()
        gradients.append([parameter.grad for parameter in network.parameters()])
    for plain, recomputed in zip(*gradients, strict=True):
        close(recomputed, plain, 1e-12)


def test_dropout_is_in_training_only():
    network, x = small(dropout=0.5), noise(1, 2, 8, 8)
    assert torch.equal(network(x, times(1)), network(x, times(1)))
    network.train()
    assert not torch.equal(network(x, times(1)), network(x, times(1)))


def test_time_reaches_the_blocks_unrounded_under_autocast():
    network, x = small().float(), noise(2, 2, 8, 8).float()
    seen = []
    network.t_embedder.register_forward_hook(lambda module, args, output: seen.append(output))
    plain = network(x, times(2).float())
    with torch.autocast("cpu", torch.bfloat16):
        rounded = network(x, times(2).float())
    assert torch.equal(seen[0], seen[1])
    assert rounded.dtype == torch.float32
    assert (rounded - plain).norm() < 0.05 * plain.norm()


def test_what_does_not_go_together_is_refused():
    with pytest.raises(ValueError, match="num_heads=5: does not divide hidden_size=24; use a divisor"):
        small(num_heads=5)
    with pytest.raises(ValueError, match="class_conditional=true: the dataset has no classes"):
        small(class_conditional=True)
    with pytest.raises(ValueError, match=r"needs point clouds, not data of shape \[1, 8, 8\]"):
        SetTransformer((1, 8, 8), None, **option("set_tiny"))
