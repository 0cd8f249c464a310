"""The Triton attention against the float64 reference: on a GPU where there is one, else in Triton's interpreter.

Errors are the RMS of the difference over the RMS of the truth, which is computed from the same rounded inputs. float32: 1e-5,
some hundred roundings of 2⁻²⁴ and, on a GPU, products of three TF32 ones. 16 bits: the weights, the slopes of the logits and the
results are rounded to 11 or 8 bits, up to 2⁻¹¹ or 2⁻⁸ each time. The bias' gradient is a difference of sums that nearly cancel,
one of them from the rounded output, so three times that.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sparsort.errors import SparsortError
from sparsort.kernels.blocksparse.layout import Layout
from sparsort.kernels.blocksparse.reference import attend_ref
from sparsort.kernels.blocksparse.selection import Selection, every_block, reverse

triton = pytest.importorskip("triton", reason="Triton is not installed")
CUDA = torch.cuda.is_available()
if not CUDA and triton.__version__.startswith("3.6") and np.lib.NumpyVersion(np.__version__) >= "2.4.0":
    pytest.skip("Triton 3.6's interpreter cannot loop to a loaded bound with NumPy 2.4", allow_module_level=True)
if not CUDA and os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("no CUDA device, and TRITON_INTERPRET=1 was not set before Triton loaded", allow_module_level=True)

from sparsort.kernels.blocksparse.triton import attend_backward  # noqa: E402
from sparsort.kernels.blocksparse.triton.attend import attend_forward_triton  # noqa: E402
from sparsort.kernels.blocksparse.triton.attend_backward import attend_backward_triton  # noqa: E402
from sparsort.kernels.blocksparse.triton.launch import choose_launch  # noqa: E402
from sparsort.kernels.blocksparse.triton.segments import key_blocks, longest_segment, segments  # noqa: E402
from sparsort.kernels.blocksparse.triton.unions import queries_of_tile, unions  # noqa: E402

# In the interpreter a masked row's −∞ − −∞ and the like warn in NumPy before they are put right.
pytestmark = [pytest.mark.gpu] if CUDA else [pytest.mark.filterwarnings("ignore::RuntimeWarning")]
DEVICE = "cuda" if CUDA else "cpu"
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
# Padding at the end of a row, blocks that are not full, and a sequence of one token.
PACKED = Layout.from_lengths([[19, 1, 11], [20]])


def choose_blocks(layout, groups, block_size, slots, generator, *, holes=0.3):
    """Random visible blocks in random slots; each slot is empty with probability `holes`."""
    own = torch.div(layout.position("cpu"), block_size, rounding_mode="floor")[:, None, :, None]
    blocks = max(layout.blocks(block_size), 1)
    draws = torch.rand(layout.batch, groups, layout.queries, max(blocks, slots), generator=generator)
    chosen = draws.argsort(-1)[..., :slots]
    empty = torch.rand(chosen.shape, generator=generator) < holes
    return Selection(blocks=chosen.masked_fill(empty | (chosen > own), -1).int(), block_size=block_size)


class Problem:
    """Random inputs over a layout, on the device, with NaN in all that is padding."""

    def __init__(self, layout, *, heads=2, groups=2, width=32, block_size=16, slots=3, dtype=torch.float32, bias=True):
        generator = torch.Generator().manual_seed(0)
        self.layout, self.dtype, self.scale = layout, dtype, width**-0.5
        self.selection = choose_blocks(layout, groups, block_size, slots, generator)
        B, T, S = layout.batch, layout.queries, layout.keys

        def normal(*shape):
            return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

        # In memory the heads of a token are next to each other, as transformers passes them.
        self.query, self.grad = (normal(B, T, heads * groups, width).transpose(1, 2) for _ in range(2))
        self.key, self.value = (normal(B, S, groups, width).transpose(1, 2) for _ in range(2))
        self.bias = normal(B, groups, T, slots).float() if bias else None
        self.poison()

    def poison(self):
        padding = self.layout.span_of_query("cpu") < 0
        unused = torch.ones(self.layout.batch, self.layout.keys, dtype=torch.bool)
        for span in self.layout.spans:
            unused[span.row, span.key_start : span.key_start + span.keys] = False
        for tensor in (self.query, self.grad):
            tensor.masked_fill_(padding[:, None, :, None], torch.nan)
        for tensor in (self.key, self.value):
            tensor.masked_fill_(unused[:, None, :, None], torch.nan)
        if self.bias is not None:
            self.bias.masked_fill_(self.selection.blocks < 0, torch.nan)

    def inputs(self):
        return [self.query, self.key, self.value] + ([] if self.bias is None else [self.bias])

    def truth(self):
        """Output, log-sum-exp and gradients in float64."""
        leaves = [tensor.detach().cpu().double().requires_grad_() for tensor in self.inputs()]
        bias = leaves[3] if len(leaves) > 3 else None
        output, lse = attend_ref(*leaves[:3], self.selection, self.layout, scale=self.scale, bias=bias)
        grad = self.grad.double().nan_to_num()
        return output.detach(), lse, torch.autograd.grad(output, leaves, grad)

    def run(self):
        q, k, v, grad = (tensor.to(DEVICE) for tensor in (self.query, self.key, self.value, self.grad))
        bias = None if self.bias is None else self.bias.to(DEVICE)
        selection = Selection(blocks=self.selection.blocks.to(DEVICE), block_size=self.selection.block_size)
        output, lse = attend_forward_triton(q, k, v, selection, self.layout, scale=self.scale, bias=bias)
        gradients = attend_backward_triton(
            grad, q, k, v, output, lse, selection, self.layout, scale=self.scale, bias=bias
        )
        return output, lse, [gradient for gradient in gradients if gradient is not None]

    def check(self):
        output, lse, gradients = self.run()
        wanted_output, wanted_lse, wanted = self.truth()
        tolerance = TOLERANCE[self.dtype]
        assert output.dtype == self.dtype
        assert lse.dtype == torch.float32
        assert_near(output, wanted_output, tolerance)
        seen = wanted_lse.isfinite()
        assert torch.equal(lse.cpu().isfinite(), seen)
        assert (lse.cpu()[~seen] == -torch.inf).all()
        assert (output.cpu()[~seen] == 0).all()
        torch.testing.assert_close(lse.cpu()[seen].double(), wanted_lse[seen], rtol=1e-5, atol=1e-5)
        assert len(gradients) == len(wanted)
        for ours, theirs, source, factor in zip(gradients, wanted, self.inputs(), (1, 1, 1, 3), strict=False):
            assert ours.dtype == source.dtype
            assert_near(ours, theirs, factor * tolerance)
        return output, lse, gradients


def assert_near(ours, wanted, tolerance):
    ours, wanted = ours.cpu().double(), wanted.double()
    assert ours.isfinite().all()
    assert ours.shape == wanted.shape
    assert (ours - wanted).square().mean().sqrt() <= tolerance * wanted.square().mean().sqrt()


@pytest.mark.parametrize(
    "shape",
    [
        {"heads": 1, "width": 32, "block_size": 16},
        # A group and a width that are no powers of two, and blocks that no tile divides.
        {"heads": 3, "width": 48, "block_size": 24, "bias": False},
        {"heads": 2, "width": 20, "block_size": 5, "slots": 6},
    ],
    ids=str,
)
def test_odd_shapes(shape):
    Problem(PACKED, **shape).check()


def test_more_heads_than_a_tile_has_rows():
    Problem(Layout.plain(1, 5), heads=70, groups=1, width=16, block_size=2, bias=False).check()


@pytest.mark.parametrize(
    ("dtype", "shape"),
    [
        (torch.bfloat16, {"heads": 8, "width": 64, "block_size": 64, "slots": 1, "bias": False}),
        (torch.float16, {"heads": 2, "width": 128, "block_size": 128, "slots": 2, "bias": False}),
        (torch.bfloat16, {"heads": 2, "width": 64, "block_size": 16, "slots": 3}),
    ],
    ids=str,
)
def test_sixteen_bits(dtype, shape):
    Problem(Layout.plain(1, 61 if shape["block_size"] < 128 else 150), groups=1, dtype=dtype, **shape).check()


def test_blocks_of_one_key():
    Problem(Layout.plain(1, 9), block_size=1, slots=4).check()


@pytest.mark.parametrize("queries", [1, 5])
def test_fewer_queries_than_keys(queries):
    """A cache longer than what is filled, padded on the left."""
    mask = torch.zeros(2, 45)
    mask[0, 3:], mask[1, 20:] = 1, 1
    layout = Layout.from_padding(mask, queries, keys=50)
    Problem(layout, heads=3, bias=queries == 1).check()


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_does_not_matter(side):
    """Either side gives bit for bit what no padding gives, whatever the padding holds."""
    bare = Problem(Layout.plain(1, 21))
    mask = torch.ones(1, 30)
    columns = slice(9, 30) if side == "left" else slice(0, 21)
    mask[:] = 0
    mask[:, columns] = 1
    padded = Problem(Layout.from_padding(mask, 30))
    for name in ("query", "key", "value", "grad", "bias"):
        getattr(padded, name)[:, :, columns] = getattr(bare, name)
    padded.selection.blocks.fill_(-1)
    padded.selection.blocks[:, :, columns] = bare.selection.blocks
    output, lse, gradients = padded.check()
    wanted_output, wanted_lse, wanted = bare.run()
    assert torch.equal(lse[..., columns], wanted_lse)
    for ours, theirs in zip([output, *gradients], [wanted_output, *wanted], strict=True):
        assert torch.equal(ours[:, :, columns], theirs)
        outside = ours.clone()
        outside[:, :, columns] = 0
        assert not outside.any()


def test_strides():
    """Slices, a reversed order of axes, a gradient and a selection that are one row expanded: read where they lie."""
    problem = Problem(Layout.plain(2, 19), slots=2)
    wide = torch.full((*problem.key.shape[:3], 65), torch.nan)
    wide[..., 1::2] = problem.key
    problem.key = wide[..., 1::2]
    problem.value = problem.value.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0)
    problem.grad = torch.ones(1, 1, 1, 1).expand(problem.grad.shape)
    problem.bias = problem.bias.transpose(2, 3).contiguous().transpose(2, 3)
    one = problem.selection.blocks[:, :1]
    problem.selection = Selection(blocks=one.expand(-1, 2, -1, -1), block_size=problem.selection.block_size)
    problem.bias.nan_to_num_(0.5)
    output, _, _ = problem.check()
    assert output.stride() == problem.query.stride()


def test_every_block_is_dense_attention():
    """Against torch's own attention, which knows no blocks."""
    problem = Problem(Layout.plain(1, 40), heads=4, groups=1, bias=False)
    problem.selection = every_block(problem.layout, 1, 16)
    output, _, gradients = problem.run()
    leaves = [tensor.double().requires_grad_() for tensor in (problem.query, problem.key, problem.value)]
    wanted = torch.nn.functional.scaled_dot_product_attention(*leaves, is_causal=True, enable_gqa=True)
    assert_near(output, wanted.detach(), 1e-5)
    for ours, theirs in zip(gradients, torch.autograd.grad(wanted, leaves, problem.grad.double()), strict=True):
        assert_near(ours, theirs, 1e-5)


def test_a_slot_that_the_bias_excludes():
    """−∞ in the bias takes the slot's keys away, and a query whose every slot is shut sees nothing."""
    problem = Problem(Layout.plain(1, 20), slots=2)
    problem.bias[:, :, ::3, 0] = -torch.inf
    problem.bias[:, :, 5] = -torch.inf
    output, lse, gradients = problem.run()
    assert (lse[:, :, 5] == -torch.inf).all()
    assert (output[:, :, 5] == 0).all()
    blocks = problem.selection.blocks.masked_fill(problem.bias == -torch.inf, -1)
    problem.selection = Selection(blocks=blocks, block_size=16)
    problem.bias = problem.bias.masked_fill(blocks < 0, 0.0)
    wanted_output, _, wanted = problem.truth()
    assert_near(output, wanted_output, 1e-5)
    for ours, theirs in zip(gradients, wanted, strict=True):
        assert_near(ours, theirs, 3e-5)


def test_twice_run_is_bitwise_the_same(monkeypatch):
    """Also into memory that held something else, and with the queries of every block cut into many segments."""
    problem = Problem(Layout.from_lengths([[11, 1, 7], [9]]), heads=3, block_size=4)
    whole = problem.run()
    monkeypatch.setattr(attend_backward, "longest_segment", lambda *_: 4)
    first = problem.check()
    empty, empty_like = torch.empty, torch.empty_like

    def poisoned(make):
        def made(*args, **options):
            tensor = make(*args, **options)
            return tensor.fill_(torch.nan if tensor.is_floating_point() else 99)

        return made

    monkeypatch.setattr(torch, "empty", poisoned(empty))
    monkeypatch.setattr(torch, "empty_like", poisoned(empty_like))
    second = problem.run()
    for one, other in zip([*first[:2], *first[2]], [*second[:2], *second[2]], strict=True):
        assert torch.equal(one, other)
    # Cutting touches the gradients of keys and values only, and those by rounding.
    for place, (one, other) in enumerate(zip(whole[2], first[2], strict=True)):
        assert torch.equal(one, other) or place in (1, 2)


@pytest.mark.parametrize(
    ("layout", "slots"),
    [
        (Layout.plain(2, 0, 0), 2),
        (Layout.from_padding(torch.zeros(2, 6), 6), 2),
        (Layout.plain(1, 6), 0),
    ],
    ids=["no tokens", "all padding", "no slots"],
)
def test_nothing_to_see(layout, slots):
    output, lse, gradients = Problem(layout, slots=slots).run()
    assert not output.any()
    assert (lse == -torch.inf).all()
    assert [gradient.shape for gradient in gradients] == [
        tensor.shape for tensor in Problem(layout, slots=slots).inputs()
    ]
    assert not any(gradient.any() for gradient in gradients)


def test_arguments_that_the_kernels_do_not_support_are_refused():
    for dtype, width in ((torch.float64, 32), (torch.float32, 257)):
        problem = Problem(Layout.plain(1, 2), width=width)
        problem.query = problem.query.to(dtype)
        with pytest.raises(SparsortError, match="SPARSORT_BLOCKSPARSE=torch"):
            problem.run()


@pytest.mark.skipif(not CUDA, reason="too large for the interpreter")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(
    "shape",
    [
        {"heads": 8, "width": 128, "block_size": 128, "slots": 4},
        {"heads": 1, "width": 256, "block_size": 64, "slots": 8},
        {"heads": 7, "width": 96, "block_size": 128, "slots": 3},
        {"heads": 16, "width": 64, "block_size": 32, "slots": 16, "groups": 1},
    ],
    ids=str,
)
def test_sizes_of_models(shape, dtype):
    problem = Problem(Layout.from_lengths([[700, 323], [900]]), dtype=dtype, **shape)
    first = problem.check()
    second = problem.run()
    for one, other in zip([*first[:2], *first[2]], [*second[:2], *second[2]], strict=True):
        assert torch.equal(one, other)


@pytest.mark.skipif(not CUDA, reason="needs 18 GiB of GPU memory")
def test_offsets_beyond_32_bits():
    """Tokens that lie past 2³¹ elements of their tensors, and columns that lie as far apart."""
    if torch.cuda.mem_get_info()[0] < 20 * 2**30:
        pytest.skip("needs 20 GiB of free GPU memory")
    problem = Problem(Layout.plain(1, 40), heads=2, groups=1, dtype=torch.bfloat16)
    wanted = problem.run()
    far = torch.zeros(2**32 + 2**20, dtype=torch.bfloat16, device=DEVICE)
    key = far.as_strided((1, 1, 40, 32), (0, 0, 2**26, 1))
    value = far.as_strided((1, 1, 40, 32), (0, 0, 1, 2**27), 64)
    problem.key, problem.value = key.copy_(problem.key), value.copy_(problem.value)
    output, lse = attend_forward_triton(
        problem.query.to(DEVICE),
        problem.key,
        problem.value,
        Selection(blocks=problem.selection.blocks.to(DEVICE), block_size=16),
        problem.layout,
        scale=problem.scale,
        bias=problem.bias.to(DEVICE),
    )
    assert_near(output, wanted[0].cpu(), 1e-2)
    torch.testing.assert_close(lse, wanted[1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("heads", "rows"), [(1, 16), (3, 16), (8, 64), (20, 16)])
def test_unions_list_what_the_queries_chose(heads, rows):
    """Against sets, query by query. A block number above the query's own block is ignored."""
    generator = torch.Generator().manual_seed(1)
    selection = choose_blocks(PACKED, 2, 3, 4, generator)
    selection.blocks[0, 0, 0, 0] = 7
    on_device = Selection(blocks=selection.blocks.to(DEVICE), block_size=3)
    found = unions(on_device, PACKED, heads=heads, rows=rows, slots=True)
    span_of_query = PACKED.span_of_query("cpu")
    position = PACKED.position("cpu")
    seen = []
    for tile, (row, column, at, key_start, head, count) in enumerate(found.tiles.tolist()):
        queries = (head + count - 1) // heads + 1
        span = PACKED.spans[span_of_query[row, column]]
        assert (at, key_start) == (position[row, column], span.key_start)
        assert queries <= queries_of_tile(rows, heads)
        assert column + queries <= span.query_start + span.queries
        seen += [(row, column + (head + i) // heads, (head + i) % heads) for i in range(count)]
        for group in range(2):
            wanted = {}
            for query in range(queries):
                for slot, block in enumerate(selection.blocks[row, group, column + query].tolist()):
                    if 0 <= block <= (at + query) // 3:
                        wanted.setdefault(block, {})[query] = slot
            length = int(found.length[tile, group])
            assert found.block[tile, group, :length].tolist() == sorted(wanted)
            for entry, block in enumerate(sorted(wanted)):
                members = int(found.members[tile, group, entry])
                assert {query for query in range(64) if members >> query & 1} == set(wanted[block])
                for query, slot in wanted[block].items():
                    assert found.slot[tile, group, entry, query] == slot
    rows_of_layout = [(row, column, head) for row, column in position.ge(0).nonzero().tolist() for head in range(heads)]
    assert sorted(seen) == rows_of_layout


@given(st.integers(1, 30), st.integers(0, 2**31))
def test_segments_hold_every_choice_once(longest, seed):
    selection = choose_blocks(PACKED, 2, 4, 3, torch.Generator().manual_seed(seed))
    chosen = reverse(selection, PACKED)
    work = segments(chosen, longest)
    covered, partials = [], {}
    for block, start, end, partial in work.segments.tolist():
        assert chosen.start[block] <= start < end <= chosen.start[block + 1]
        assert end - start <= longest
        covered += range(start, end)
        if partial >= 0:
            partials.setdefault(block, []).append(partial)
    assert covered == list(range(len(chosen.query)))
    assert [partial for found in partials.values() for partial in found] == list(range(work.partials))
    assert all(len(found) > 1 for found in partials.values())
    for block, (first, count) in enumerate(work.cut.tolist()):
        assert partials.get(block, []) == list(range(first, first + count))


def test_key_blocks_are_numbered_as_the_reverse_numbers_them():
    layout = Layout.from_lengths([[37, 1, 20], [9]])
    chosen = reverse(choose_blocks(layout, 1, 8, 3, torch.Generator().manual_seed(0)), layout)
    table = key_blocks(layout, chosen.first_block, chosen.blocks, 8, torch.device("cpu"))
    wanted = [[0, 8, 0], [8, 8, 8], [16, 8, 16], [24, 8, 24], [32, 5, 32], [37, 1, 0], [38, 8, 0], [46, 8, 8]]
    wanted += [[54, 4, 16], [0, 8, 0], [8, 1, 8]]
    assert table[: len(wanted)].tolist() == wanted
    assert not table[len(wanted) :].any()


def test_longest_segments_are_worth_a_program():
    assert longest_segment(10, 8, 132) == 256
    assert longest_segment(10, 3, 132) == 683
    assert longest_segment(2**21, 8, 132) == 1986


@pytest.mark.parametrize("shared", [99 * 1024, 163 * 1024, 227 * 1024], ids=["sm_86", "sm_80", "sm_90"])
@pytest.mark.parametrize("which", ["forward", "query", "key"])
def test_launches_keep_within_bounds(which, shared):
    for element in (2, 4):
        for width in (16, 32, 48, 64, 96, 128, 192, 256):
            for heads in (1, 2, 3, 8, 64):
                for block_size in (1, 16, 24, 64, 128):
                    for queries in (1, 1000):
                        chosen = choose_launch(
                            which,
                            width=width,
                            element=element,
                            rows_of_longest=queries * heads,
                            heads=heads,
                            block_size=block_size,
                            shared=shared,
                        )
                        tile = (chosen.rows + chosen.keys) * max(width, 16) * element
                        assert min(chosen.rows, chosen.keys) >= 16
                        assert chosen.rows & (chosen.rows - 1) == chosen.keys & (chosen.keys - 1) == 0
                        assert tile <= shared
                        assert which == "key" or queries_of_tile(chosen.rows, heads) <= 64


_COMPILE = """
import sys
import torch, triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction
from sparsort.kernels.blocksparse.triton import attend_backward
from sparsort.kernels.blocksparse.triton.attend import attend_forward_triton
from sparsort.kernels.blocksparse.triton.attend_backward import attend_backward_triton
from sparsort.kernels.blocksparse.layout import Layout
from sparsort.kernels.blocksparse.selection import Selection

class NoDevice:
    get_current_target = lambda self: GPUTarget("cuda", int(sys.argv[1]), 32)
    get_current_device = get_current_stream = lambda self, *_: 0
    get_active_torch_device = lambda self: torch.device("cpu")

def compiled(self, *args, grid, warmup, **options):
    kernel = run(self, *args, grid=grid, warmup=True, **options)
    print(self.__name__, kernel.metadata.shared, len(kernel.asm["cubin"]))

driver.set_active(NoDevice())
run, JITFunction.run = JITFunction.run, compiled
attend_backward.longest_segment = lambda *_: 4
layout = Layout.plain(1, 40)
query, key = (torch.zeros(1, heads, 40, 32, dtype=torch.bfloat16) for heads in (4, 2))
selection = Selection(blocks=torch.zeros(1, 2, 40, 2, dtype=torch.int32), block_size=32)
bias = torch.zeros(1, 2, 40, 2) if sys.argv[2] == "bias" else None
output, lse = attend_forward_triton(query, key, key, selection, layout, scale=1.0, bias=bias)
attend_backward_triton(output, query, key, key, output, lse, selection, layout, scale=1.0, bias=bias)
"""


@pytest.mark.skipif(CUDA, reason="the other tests compile the kernels for the GPU that is here")
@pytest.mark.parametrize(("capability", "bias"), [(80, "bias"), (90, "none")])
def test_the_kernels_compile_for_gpus_that_are_not_here(capability, bias, tmp_path):
    """To machine code, by the ptxas that Triton brings; it stops at what the interpreter lets pass."""
    import triton.backends.nvidia

    if not any(Path(triton.backends.nvidia.__file__).parent.glob("bin/ptxas*")):
        pytest.skip("this Triton brings no ptxas")
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path), "TRITON_INTERPRET": "0"}
    done = subprocess.run(
        [sys.executable, "-P", "-c", _COMPILE, str(capability), bias],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = [line.split() for line in done.stdout.splitlines()]
    wanted = ["_unions_kernel", "_forward_kernel", "_unions_kernel", "_query_kernel", "_key_kernel", "_partials_kernel"]
    assert [name for name, _, _ in found] == wanted
    assert all(int(shared) <= 99 * 1024 and int(size) > 0 for _, shared, size in found)
