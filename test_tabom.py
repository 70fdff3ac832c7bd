# SPDX-License-Identifier: MIT
"""Exact tests: every formula of tabom.py against a naive loop written from its equation.

An oracle here is slow, plain Python over one row at a time, and shares nothing with the code that
it checks.  Two kinds of model stand in for a network.  `Scripted` answers with a fixed table of
logits, so orders, tokens and gradients are known by hand.  `TinyModel` is a small random network in
which every logit depends on every token, so a state that is wrong anywhere changes the result.

Run:  python -m pytest -q test_tabom.py
"""
import itertools
import json
import math
import pathlib
import re
import shutil
import statistics
import subprocess
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import tabom
import toy_data
from tabom import (LaggedCopy, Trajectories, decode, dinfer_loss, discrimination_curve, nelbo_loss,
                   pairwise_rank_loss, predictive_entropy, segment_masks, t3d_loss, tabom_loss,
                   trajectory_discrimination_score, trajectory_loss)

# ==================================================================================================
# Shared: the two stand-in models, random trajectories, and oracles in plain floats
# ==================================================================================================

L, N, V = 2, 6, 5           # prompt length, response length, vocabulary
MASK = V                    # [MASK] is an input only: there is no logit for it


class Scripted:
    """Context-free: answers with `table` (N, V) or (B, N, V) for the response, whatever it sees.

    `seen` keeps the tokens of every call.  As a leaf, `table.grad` tells what a loss supervises.
    """

    def __init__(self, table):
        self.table, self.seen = table, []

    def __call__(self, tokens):
        self.seen.append(tokens.clone())
        n_rows, (n, v) = len(tokens), self.table.shape[-2:]
        before = torch.full((n_rows, tokens.shape[1] - n, v), 100.0)    # prompt outputs: never read
        return torch.cat([before, self.table.expand(n_rows, n, v)], 1)


class TinyModel(nn.Module):
    """A small random network: every logit depends on every token and on every position."""

    def __init__(self, seed=0, vocabulary=V):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.token = nn.Parameter(torch.randn(V + 1, 8, generator=generator))
        self.place = nn.Parameter(torch.randn(L + N, 8, generator=generator))
        self.out = nn.Parameter(torch.randn(8, vocabulary, generator=generator))
        self.seen = []

    def forward(self, tokens):
        self.seen.append(tokens.clone())
        x = self.token[tokens]
        others = (x * self.place).sum(1, keepdim=True)
        return torch.tanh(x + 0.5 * others + self.place) @ self.out


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def prompts(n_rows):
    return torch.randint(2, (n_rows, L), generator=seeded())


def random_trajectories(n_rows=6, seed=0, n_given=(0, 1, 3)):
    """Random responses in random orders; the rows take turns in how many positions were given."""
    generator = seeded(seed)
    decode_rank = torch.stack([torch.randperm(N, generator=generator) for _ in range(n_rows)])
    given = torch.tensor([n_given[row % len(n_given)] for row in range(n_rows)])[:, None]
    return Trajectories(torch.randint(V, (n_rows, L), generator=generator),
                        torch.randint(V, (n_rows, N), generator=generator),
                        (decode_rank - given).clamp(min=-1), torch.zeros(n_rows, N))


def from_probabilities(rows):
    """Probabilities -> logits whose softmax is exactly these."""
    return torch.tensor(rows).log()


def log_p(logits):
    """One position, (V,) -> list of log probabilities in float64."""
    values = [float(value) for value in logits]
    log_z = max(values) + math.log(sum(math.exp(value - max(values)) for value in values))
    return [value - log_z for value in values]


def entropy_of(logits):
    return -sum(math.exp(value) * value for value in log_p(logits) if value > -math.inf)


def mean(values):
    values = list(values)
    return sum(values) / len(values) if values else 0.0


def look(model, trajectories, row, masked):
    """Show the model one row with the positions in `masked` hidden -> logits of its response."""
    prompt, response = trajectories.prompt[row].tolist(), trajectories.response[row].tolist()
    hidden = [MASK if position in masked else token for position, token in enumerate(response)]
    with torch.no_grad():
        return model(torch.tensor([prompt + hidden]))[0, L:]


def by_rank(trajectories, row):
    """[(rank, position), ...] of the decoded positions of a row, in reveal order."""
    ranks = trajectories.decode_rank[row].tolist()
    return sorted((rank, position) for position, rank in enumerate(ranks) if rank >= 0)


def chi_square(counts, expected):
    return sum((count - share) ** 2 / share for count, share in zip(counts, expected, strict=True))


def close(value, expected, tolerance=1e-5):
    value, expected = (float(torch.as_tensor(number).detach()) for number in (value, expected))
    return value == pytest.approx(expected, rel=tolerance, abs=tolerance)


# ==================================================================================================
# Predictive entropy
# ==================================================================================================

@pytest.mark.parametrize("v", [1, 2, 7, 1000])
def test_entropy_of_a_uniform_distribution_is_ln_v(v):
    """Total uncertainty over V tokens is ln V nats, whatever the common logit."""
    assert close(predictive_entropy(torch.full((v,), 3.0)), math.log(v))


@pytest.mark.parametrize("p", [0.5, 0.9, 0.001])
def test_entropy_of_two_tokens(p):
    """Two tokens give -p ln p - (1-p) ln (1-p)."""
    logits = from_probabilities([p, 1 - p])
    assert close(predictive_entropy(logits), -p * math.log(p) - (1 - p) * math.log(1 - p))


def test_entropy_of_a_certain_token_is_exactly_zero():
    """One-hot: nothing is left to be unsure of."""
    assert predictive_entropy(torch.tensor([-torch.inf, 0.0, -torch.inf])) == 0
    assert predictive_entropy(torch.tensor([1e4, 0.0, 0.0])) == 0


def test_entropy_agrees_with_torch_and_keeps_the_leading_shape():
    """(..., V) -> (...): the last dimension is the vocabulary, the others are left alone."""
    logits = 3 * torch.randn(2, 4, 3, 11, generator=seeded())
    expected = torch.distributions.Categorical(logits=logits).entropy()
    assert predictive_entropy(logits).shape == (2, 4, 3)
    torch.testing.assert_close(predictive_entropy(logits), expected)


@pytest.mark.parametrize("logits, expected", [
    ([1e4, 1e4 - 1, 1e4 - 2], entropy_of([0, -1, -2])),
    ([-1e4, -1e4 - 1, -1e4 - 2], entropy_of([0, -1, -2])),
    ([1e30, 1e30, 0.0], math.log(2)),
    ([1e30, 0.0, -1e30], 0.0),
    ([3e38, -3e38, 0.0], 0.0),                 # their difference overflows float32
    ([1e30, 1e30, -torch.inf], math.log(2)),
])
def test_entropy_survives_huge_logits(logits, expected):
    """No logit is too large: the value is right and the gradient finite."""
    logits = torch.tensor(logits, requires_grad=True)
    entropy = predictive_entropy(logits)
    entropy.backward()
    assert close(entropy, expected)
    assert logits.grad.isfinite().all()


def test_banned_tokens_count_nothing_in_value_and_gradient():
    """-inf is as good as no entry at all: same entropy, same gradient, and 0 for the entry."""
    allowed = torch.tensor([0, 2, 3])
    without = torch.randn(4, 3, generator=seeded()).requires_grad_()
    logits = torch.full((4, 5), -torch.inf).index_copy(1, allowed, without.detach())
    logits.requires_grad_()
    predictive_entropy(without).sum().backward()
    predictive_entropy(logits).sum().backward()
    torch.testing.assert_close(predictive_entropy(logits), predictive_entropy(without))
    torch.testing.assert_close(logits.grad[:, allowed], without.grad)
    assert without.grad.abs().min() > 0
    assert (logits.grad[:, [1, 4]] == 0).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_entropy_is_computed_in_float32(dtype):
    """Half-precision logits give a float32 entropy with no half-precision rounding in it."""
    logits = torch.randn(8, 300, generator=seeded()).to(dtype)
    entropy = predictive_entropy(logits)
    assert entropy.dtype == torch.float32
    expected = torch.tensor([entropy_of(row) for row in logits])
    torch.testing.assert_close(entropy, expected, rtol=1e-6, atol=1e-5)


# ==================================================================================================
# The ranking loss (Eq. 8)
# ==================================================================================================

def naive_rank_loss(entropy, decode_rank, window, margin):
    """Eq. 8 as a double loop -> the loss, and the share of all pairs in the right order."""
    losses, right = [], []
    for h, rank, inside in zip(entropy.tolist(), decode_rank.tolist(), window.tolist()):
        h = [h[i] for i in sorted(range(len(h)), key=lambda i: rank[i]) if inside[i]]
        w, total = len(h), 0.0
        for r in range(w):
            for s in range(r + 1, w):
                total += max(0.0, h[r] - h[s] + margin)
                right.append(h[r] < h[s])
        losses.append(2 / (w * (w - 1)) * total if w > 1 else 0.0)
    return mean(losses), mean(right)


@pytest.mark.parametrize("margin", [0.0, 0.2, 3.0])
def test_rank_loss_is_eq_8(margin):
    """The broadcast over (B, N, N) equals the double loop, windows of 0 and 1 included."""
    for seed in range(20):
        generator = seeded(seed)
        entropy = torch.rand(5, 9, generator=generator)
        decode_rank = torch.stack([torch.randperm(9, generator=generator) for _ in range(5)])
        window = torch.rand(5, 9, generator=generator) < torch.tensor([[0], [.2], [.5], [.8], [1]])
        loss, accuracy = pairwise_rank_loss(entropy, decode_rank, window, margin)
        expected_loss, expected_accuracy = naive_rank_loss(entropy, decode_rank, window, margin)
        assert close(loss, expected_loss) and close(accuracy, expected_accuracy)


def worked_example():
    """Entropies 0.5, 0.3, 0.9 in reveal order, written at positions 2, 0, 1; 3 is outside."""
    entropy = torch.tensor([[0.3, 0.9, 0.5, 7.0]], requires_grad=True)
    return entropy, torch.tensor([[1, 2, 0, 3]]), torch.tensor([[True, True, True, False]])


def test_rank_loss_worked_example():
    """Pairs (1,2): 0.5 - 0.3 + 0.2 = 0.4; (1,3) and (2,3): 0; the mean is 0.4 / 3."""
    loss, accuracy = pairwise_rank_loss(*worked_example(), margin=0.2)
    assert close(loss, 0.4 / 3) and round(loss.item(), 4) == 0.1333
    assert close(accuracy, 2 / 3)


def test_rank_loss_pulls_the_earlier_down_and_the_later_up():
    """Only the pair in the wrong order has a gradient, and it flows through both entropies."""
    entropy, decode_rank, window = worked_example()
    loss, accuracy = pairwise_rank_loss(entropy, decode_rank, window, margin=0.2)
    loss.backward()
    # A descent step lowers the entropy of the first revealed (position 2), raises the second's (0).
    torch.testing.assert_close(entropy.grad, torch.tensor([[-1 / 3, 0, 1 / 3, 0]]))
    assert not accuracy.requires_grad


@pytest.mark.parametrize("w", range(2, 9))
def test_rank_loss_counts_each_pair_once(w):
    """W(W-1)/2 pairs: equal entropies give the margin exactly, and the gradients add up to it."""
    decode_rank = torch.randperm(w, generator=seeded())[None] + 5    # a window later in a response
    entropy, window = torch.full((1, w), 1.5, requires_grad=True), decode_rank >= 0
    loss, accuracy = pairwise_rank_loss(entropy, decode_rank, window, 0.25)
    assert loss.item() == 0.25
    assert accuracy == 0                                                 # equal is not yet surer
    loss.backward()
    # Rank i is the earlier one of w-1-i pairs and the later one of i pairs.
    rank = decode_rank - 5
    torch.testing.assert_close(entropy.grad * (w * (w - 1) / 2), (w - 1 - 2 * rank).float())


def test_rank_loss_does_not_care_where_positions_stand():
    """Only ranks and entropies matter: a permutation of the positions changes nothing."""
    generator = seeded(3)
    entropy = torch.rand(4, 7, generator=generator)
    decode_rank = torch.stack([torch.randperm(7, generator=generator) for _ in range(4)])
    window = (decode_rank >= 2) & (decode_rank < 6)
    shuffle = torch.randperm(7, generator=generator)
    shuffled = (values[:, shuffle] for values in (entropy, decode_rank, window))
    before = pairwise_rank_loss(entropy, decode_rank, window, 0.2)
    after = pairwise_rank_loss(*shuffled, 0.2)
    torch.testing.assert_close(before, after)


def test_rank_loss_counts_rows_without_a_pair_as_zero():
    """Rows with no or one window position add 0 to the mean over rows, not nan."""
    entropy, decode_rank, window = (value.repeat(4, 1) for value in worked_example())
    window[1], window[2], window[3] = False, torch.tensor([True, False, False, False]), False
    loss, accuracy = pairwise_rank_loss(entropy, decode_rank, window, margin=0.2)
    assert close(loss, 0.4 / 3 / 4) and close(accuracy, 2 / 3)
    nothing, accuracy = pairwise_rank_loss(entropy, decode_rank, torch.zeros_like(window), 0.2)
    assert nothing == 0 and accuracy == 0
    nothing.backward()
    assert entropy.isfinite().all()


def test_rank_loss_refuses_other_shapes_and_negative_margins():
    """Silent broadcasting would compare positions of different rows."""
    entropy, decode_rank, window = worked_example()
    with pytest.raises(ValueError, match="one shape"):
        pairwise_rank_loss(entropy[0], decode_rank, window, 0.2)
    with pytest.raises(ValueError, match="one shape"):
        pairwise_rank_loss(entropy, decode_rank[:, :3], window, 0.2)
    with pytest.raises(ValueError, match="one shape"):
        pairwise_rank_loss(entropy, decode_rank, window.repeat(2, 1), 0.2)
    with pytest.raises(ValueError, match="margin"):
        pairwise_rank_loss(entropy, decode_rank, window, -0.1)


# ==================================================================================================
# States: visible, masked, window
# ==================================================================================================

def naive_segment(ranks, n_visible, window_size):
    """One row of ranks -> the three lists of booleans."""
    visible = [rank < n_visible for rank in ranks]
    window = [n_visible <= rank <= n_visible + window_size - 1 for rank in ranks]
    return visible, [not value for value in visible], window


def test_segments_at_every_cut_and_window_size():
    """visible, masked and window follow the ranks, position by position; given ones are visible."""
    decode_rank = random_trajectories(6).decode_rank
    assert (decode_rank == -1).any()
    for n_visible, window_size in itertools.product(range(N + 1), range(1, N + 2)):
        expected = [naive_segment(row, n_visible, window_size) for row in decode_rank.tolist()]
        for got, want in zip(segment_masks(decode_rank, n_visible, window_size), zip(*expected)):
            assert got.dtype == torch.bool and got.tolist() == list(want)


def test_segments_with_one_cut_and_window_per_row():
    """(B,) tensors give each row its own cut and its own window."""
    decode_rank = random_trajectories(6).decode_rank
    n_visible, window_size = torch.tensor([0, 1, 2, 3, 4, 0]), torch.tensor([6, 0, 1, 2, 5, 1])
    expected = [naive_segment(*row) for row in
                zip(decode_rank.tolist(), n_visible.tolist(), window_size.tolist())]
    for got, want in zip(segment_masks(decode_rank, n_visible, window_size), zip(*expected)):
        assert got.tolist() == list(want)


@pytest.mark.parametrize("window_size", [1, 2, 4, 6, 50])
def test_every_rank_falls_into_some_window(window_size):
    """Cuts 0 .. n-1 train every decoded position, the last one too; windows get shorter there."""
    decode_rank = random_trajectories(3).decode_rank
    for ranks in decode_rank:
        n = int((ranks >= 0).sum())
        windows = [segment_masks(ranks[None], cut, window_size)[2][0] for cut in range(n)]
        for cut, window in enumerate(windows):
            assert window.sum() == min(window_size, n - cut)
        assert torch.equal(torch.stack(windows).any(0), ranks >= 0)


# ==================================================================================================
# Trajectories
# ==================================================================================================

def test_trajectories_are_indexed_by_row():
    """A boolean mask, an index tensor and a slice pick the same rows of all four fields."""
    whole = random_trajectories(6)
    whole = Trajectories(whole.prompt, whole.response, whole.decode_rank, torch.rand(6, N))
    assert len(whole) == 6
    for index, rows in ((torch.tensor([True, False, False, True, False, True]), [0, 3, 5]),
                        (torch.tensor([4, 4, 0]), [4, 4, 0]), (slice(1, 5, 2), [1, 3])):
        part = whole[index]
        assert isinstance(part, Trajectories) and len(part) == len(rows)
        for name in ("prompt", "response", "decode_rank", "entropy"):
            expected = [getattr(whole, name)[row].tolist() for row in rows]
            assert getattr(part, name).tolist() == expected


def test_trajectories_move_and_count():
    """`to` moves all four fields; n_decoded counts the ranks of a row that are not -1."""
    whole = random_trajectories(6)
    there = whole.to("meta")
    assert {getattr(there, name).device.type
            for name in ("prompt", "response", "decode_rank", "entropy")} == {"meta"}
    assert torch.equal(whole.to("cpu").response, whole.response)
    assert whole.n_decoded.tolist() == [6, 5, 3, 6, 5, 3]


# ==================================================================================================
# The decoder (Eq. 2, Def. 1)
# ==================================================================================================

def naive_decode(model, prompt, given, order="entropy", tokens_per_step=1, block_length=None):
    """Eq. 2 for one row of plain lists, greedy -> response, ranks, entropies at reveal."""
    response, ranks, entropies = list(given), [-1] * len(given), [0.0] * len(given)
    block_length, n_visible = block_length or len(given), 0
    while MASK in response:
        with torch.no_grad():
            logits = model(torch.tensor([prompt + response]))[0, len(prompt):]
        hidden = [i for i in range(len(given)) if response[i] == MASK]
        hidden = [i for i in hidden if i // block_length == hidden[0] // block_length]
        p = {i: sorted(map(math.exp, log_p(logits[i])), reverse=True) for i in hidden}
        h = {i: entropy_of(logits[i]) for i in hidden}
        score = {"entropy": h, "confidence": {i: -p[i][0] for i in hidden},
                 "margin": {i: p[i][1] - p[i][0] for i in hidden}}.get(order, order)
        step = sorted(hidden, key=lambda i: (score[i], i))[:tokens_per_step]
        for i in sorted(step, key=lambda i: (h[i], i)):
            response[i] = max(range(V), key=lambda token: logits[i][token])
            ranks[i], entropies[i], n_visible = n_visible, h[i], n_visible + 1
    return response, ranks, entropies


@pytest.mark.parametrize("block_length", [None, 1, 2, 4, 6])
@pytest.mark.parametrize("tokens_per_step", [1, 2, 4, 9])
@pytest.mark.parametrize("order", ["entropy", "confidence", "margin", (3, 1, 4, 1, 5, 9)])
def test_decode_equals_a_naive_decoder_row_by_row(order, tokens_per_step, block_length):
    """Tokens, ranks and entropies: a batch of unequally filled rows is its rows, one by one."""
    model, prompt = TinyModel(), prompts(4)
    given = torch.randint(V, (4, N), generator=seeded(1))
    for row, n_hidden in enumerate([6, 3, 0, 5]):
        hidden = torch.randperm(N, generator=seeded(row))[:n_hidden]
        given[row, hidden] = MASK
    got = decode(model, prompt, N, mask_id=MASK, tokens_per_step=tokens_per_step, given=given,
                 order=order if isinstance(order, str) else torch.tensor(order),
                 block_length=block_length)
    for row in range(4):
        response, ranks, entropies = naive_decode(model, prompt[row].tolist(), given[row].tolist(),
                                                  order, tokens_per_step, block_length)
        assert got.response[row].tolist() == response
        assert got.decode_rank[row].tolist() == ranks
        assert got.entropy[row].tolist() == pytest.approx(entropies, abs=1e-5)


# Three positions on which the three measures of "easy" disagree completely:
#              entropy  top probability  gap to the second
#   position 0    1.18        0.55            0.40
#   position 1    0.69        0.50            0.00
#   position 2    0.77        0.60            0.22
DISAGREE = from_probabilities([[.15, .55, .15, .15], [.5, .0, .0, .5], [.01, .01, .6, .38]])


@pytest.mark.parametrize("order, ranks", [
    ("entropy", [2, 0, 1]),
    ("confidence", [1, 2, 0]),
    ("margin", [0, 2, 1]),
    (torch.tensor([0.5, -3.0, 9.0]), [1, 0, 2]),
    (torch.tensor([7, 7, 2]), [1, 2, 0]),        # whole numbers will do; a tie: leftmost first
])
def test_each_order_by_hand(order, ranks):
    """The four measures of easiness sort the same table differently, as worked out by hand."""
    got = decode(Scripted(DISAGREE), prompts(2), 3, mask_id=4, order=order)
    assert got.decode_rank.tolist() == [ranks, ranks]
    assert got.response.tolist() == [[1, 0, 2], [1, 0, 2]]
    torch.testing.assert_close(got.entropy[0], torch.tensor([entropy_of(row) for row in DISAGREE]))
    assert got.entropy.dtype == torch.float32 and got.decode_rank.dtype == torch.int64


def test_random_order_is_uniform_over_permutations():
    """order="random": all 3! orders come equally often, whatever the logits say."""
    ranks = decode(Scripted(DISAGREE), prompts(6000), 3, mask_id=4, order="random",
                   generator=seeded()).decode_rank.tolist()
    counts = [ranks.count(list(order)) for order in itertools.permutations(range(3))]
    assert sum(counts) == 6000
    assert chi_square(counts, [1000] * 6) < 25.7                         # p = 1e-4 at 5 df


@pytest.mark.parametrize("order", tabom.ORDERS)
@pytest.mark.parametrize("tokens_per_step", [1, 2, 4])
def test_decode_rank_is_a_permutation(order, tokens_per_step):
    """The decoded positions of a row have the ranks 0 .. n-1, once each; given ones have -1."""
    model, prompt, mask = TinyModel(), prompts(20), torch.rand(20, N, generator=seeded(5)) < 0.7
    given = torch.randint(V, (20, N), generator=seeded(6)).masked_fill(mask, MASK)
    got = decode(model, prompt, N, mask_id=MASK, order=order, tokens_per_step=tokens_per_step,
                 given=given, generator=seeded())
    for ranks, decoded in zip(got.decode_rank, mask):
        assert sorted(ranks[decoded].tolist()) == list(range(int(decoded.sum())))
        assert (ranks[~decoded] == -1).all()


def test_ranks_within_a_step_go_by_entropy_then_position():
    """Whatever the order picks, one pass is ranked by entropy, ties leftmost first."""
    sure, less_sure, unsure = [.98, .01, .01], [.8, .1, .1], [.4, .3, .3]
    table = from_probabilities([sure, unsure, unsure, sure, less_sure])
    right_to_left = torch.tensor([4, 3, 2, 1, 0])                        # steps {4, 3}, {2, 1}, {0}
    got = decode(Scripted(table), prompts(1), 5, mask_id=3, order=right_to_left, tokens_per_step=2)
    assert got.decode_rank.tolist() == [[4, 2, 3, 0, 1]]


def rising_certainty(n):
    """A table in which the rightmost position is the surest."""
    return from_probabilities([[0.5 + 0.4 * i / n, 0.5 - 0.4 * i / n] for i in range(n)])


@pytest.mark.parametrize("tokens_per_step, n_passes", [(1, 5), (2, 3), (3, 3)])
def test_blocks_are_finished_one_after_the_other(tokens_per_step, n_passes):
    """Blocks of 2 over 5 positions: {0,1}, {2,3}, {4}; a pass never reaches into the next block."""
    model = Scripted(rising_certainty(5))
    got = decode(model, prompts(1), 5, mask_id=2, block_length=2, tokens_per_step=tokens_per_step)
    assert got.decode_rank.tolist() == [[1, 0, 3, 2, 4]]
    assert len(model.seen) == n_passes


@pytest.mark.parametrize("order", tabom.ORDERS)
def test_blocks_of_one_read_left_to_right(order):
    """block_length=1 is autoregressive; in one whole block the surest, here the last, is first."""
    model = Scripted(rising_certainty(5))
    got = decode(model, prompts(2), 5, mask_id=2, block_length=1, order=order, generator=seeded())
    assert got.decode_rank.tolist() == [[0, 1, 2, 3, 4]] * 2
    for whole in (None, 5, 99):
        got = decode(model, prompts(2), 5, mask_id=2, block_length=whole)
        assert got.decode_rank.tolist() == [[4, 3, 2, 1, 0]] * 2


@pytest.mark.parametrize("order", ["entropy", "confidence", "margin", torch.zeros(40)])
@pytest.mark.parametrize("tokens_per_step", [1, 3])
def test_equal_scores_are_decoded_leftmost_first(order, tokens_per_step):
    """A tie is no accident of the sorting algorithm: left to right."""
    got = decode(Scripted(torch.zeros(40, 3)), prompts(2), 40, mask_id=3, order=order,
                 tokens_per_step=tokens_per_step)
    assert got.decode_rank.tolist() == [list(range(40))] * 2


@pytest.mark.parametrize("tokens_per_step", [1, 2, 4])
def test_entropy_is_that_just_before_the_reveal(tokens_per_step):
    """Replaying the states by rank gives back each recorded entropy and, greedy, each token."""
    model, prompt = TinyModel(), prompts(3)
    got = decode(model, prompt, N, mask_id=MASK, tokens_per_step=tokens_per_step)
    for row in range(3):
        for rank, position in by_rank(got, row):
            start = rank // tokens_per_step * tokens_per_step        # the first rank of its pass
            logits = look(model, got, row, [p for r, p in by_rank(got, row) if r >= start])
            assert close(got.entropy[row, position], entropy_of(logits[position]))
            assert got.response[row, position] == logits[position].argmax()
    everything_hidden = look(model, got, 0, range(N))        # and the context did matter
    assert not torch.allclose(got.entropy[0], predictive_entropy(everything_hidden), atol=1e-3)


def test_temperature_changes_tokens_but_not_the_order():
    """What is easy is judged at temperature 1 always; the temperature only picks the token."""
    model, prompt = Scripted(torch.randn(N, V, generator=seeded())), prompts(50)
    greedy, sampled, hot = (decode(model, prompt, N, mask_id=MASK, temperature=temperature,
                                   generator=seeded()) for temperature in (0.0, 1.0, 10.0))
    for other in (sampled, hot):
        assert torch.equal(greedy.decode_rank, other.decode_rank)
        assert torch.equal(greedy.entropy, other.entropy)
        assert not torch.equal(greedy.response, other.response)
    assert torch.equal(greedy.response, model.table.argmax(-1).expand(50, N))


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_sampled_tokens_follow_the_softmax(temperature):
    """Tokens are drawn from softmax(logits / temperature): a chi-square test at each position."""
    table = torch.tensor([[0.0, 1.0, -1.0, 0.5], [2.0, 0.0, 1.0, 1.5]])
    response = decode(Scripted(table), prompts(8000), 2, mask_id=4, temperature=temperature,
                      generator=seeded()).response
    for position in range(2):
        counts = [int((response[:, position] == token).sum()) for token in range(4)]
        expected = [8000 * math.exp(value) for value in log_p(table[position] / temperature)]
        assert chi_square(counts, expected) < 21.1                       # p = 1e-4 at 3 df


@pytest.mark.parametrize("setting", [{"temperature": 1.0}, {"order": "random"}])
def test_decode_is_reproducible(setting):
    """The generator is the only source of chance: same seed, same result; no global one is used."""
    model, prompt, before = TinyModel(), prompts(8), torch.get_rng_state()
    one, same, other = (decode(model, prompt, N, mask_id=MASK, generator=seeded(seed), **setting)
                        for seed in (1, 1, 2))
    assert torch.equal(one.response, same.response)
    assert torch.equal(one.decode_rank, same.decode_rank)
    assert not (torch.equal(one.response, other.response)
                and torch.equal(one.decode_rank, other.decode_rank))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_mask_is_never_written(temperature):
    """An entry for [MASK] in the vocabulary is neither picked nor counted, even when favoured."""
    table = torch.randn(N, 5, generator=seeded())
    table[:, 2] = 20.0
    without = table[:, [0, 1, 3, 4]]
    prompt = torch.ones(20, L, dtype=torch.int64)
    got = decode(Scripted(table), prompt, N, mask_id=2, temperature=temperature, generator=seeded())
    assert not (got.response == 2).any()
    torch.testing.assert_close(got.entropy[0], torch.tensor([entropy_of(row) for row in without]))
    easiest_first = sorted(range(N), key=lambda i: entropy_of(without[i]))
    assert got.decode_rank[0].argsort().tolist() == easiest_first


def test_prompt_and_given_tokens_stay():
    """Only masked positions are written; neither the prompt nor the tensor `given` is changed."""
    model, prompt = TinyModel(), prompts(5)
    given = torch.randint(V, (5, N), generator=seeded(1))
    given[:, [0, 2, 5]] = MASK
    prompt_before, given_before = prompt.clone(), given.clone()
    got = decode(model, prompt, N, mask_id=MASK, temperature=2.0, generator=seeded(), given=given)
    assert torch.equal(prompt, prompt_before) and torch.equal(got.prompt, prompt_before)
    assert torch.equal(given, given_before)
    assert torch.equal(got.response[:, [1, 3, 4]], given[:, [1, 3, 4]])
    assert (got.decode_rank[:, [1, 3, 4]] == -1).all() and (got.entropy[:, [1, 3, 4]] == 0).all()
    assert not (got.response == MASK).any()
    assert all(torch.equal(tokens[:, :L], prompt_before) for tokens in model.seen)


@pytest.mark.parametrize("tokens_per_step", [1, 2, 3, 4, 6, 7])
def test_number_of_forward_passes(tokens_per_step):
    """ceil(n / k) passes for the row with most to do, none once nothing is masked."""
    model = TinyModel()
    decode(model, prompts(3), N, mask_id=MASK, tokens_per_step=tokens_per_step)
    hidden = [int((tokens == MASK).sum(1)[0]) for tokens in model.seen]
    assert hidden == [N - i * tokens_per_step for i in range(math.ceil(N / tokens_per_step))]

    model, given = TinyModel(), torch.zeros(2, N, dtype=torch.int64)
    given[0, :4], given[1, :1] = MASK, MASK
    decode(model, prompts(2), N, mask_id=MASK, tokens_per_step=tokens_per_step, given=given)
    assert len(model.seen) == math.ceil(4 / tokens_per_step)

    model = TinyModel()
    decode(model, prompts(2), N, mask_id=MASK, tokens_per_step=tokens_per_step,
           given=torch.zeros(2, N, dtype=torch.int64))
    assert model.seen == []


def test_rows_do_not_wait_for_each_other():
    """Each row works on its own first unfinished block, 0 for one and 1 for the other."""
    model, given = TinyModel(), torch.zeros(2, N, dtype=torch.int64)
    given[0, :3], given[1, 3:] = MASK, MASK
    decode(model, prompts(2), N, mask_id=MASK, block_length=3, given=given)
    assert len(model.seen) == 3


@pytest.mark.parametrize("setting, message", [
    ({"order": "easiest"}, "order must be one of"),
    ({"order": None}, "order must be one of"),
    ({"order": torch.tensor([0.0, 1.0])}, "order tensor"),
    ({"order": torch.tensor([0.0, torch.inf, 1.0, 2.0, 3.0, 4.0])}, "order tensor"),
    ({"response_length": 0}, "response_length must be a whole number of at least 1"),
    ({"tokens_per_step": 0}, "tokens_per_step must be a whole number of at least 1"),
    ({"block_length": 0}, "block_length must be a whole number of at least 1"),
    ({"block_length": -2}, "block_length must be a whole number of at least 1"),
    ({"tokens_per_step": 1.5}, "tokens_per_step must be a whole number of at least 1"),
    ({"block_length": 2.0}, "block_length must be a whole number of at least 1"),
    ({"mask_id": 4.5}, "mask_id must be a whole number of at least 0"),
    ({"mask_id": -1}, "mask_id must be a whole number of at least 0"),
    ({"temperature": -0.5}, "temperature must be 0"),
    ({"temperature": math.inf}, "temperature must be 0"),
    ({"temperature": math.nan}, "temperature must be 0"),
    ({"prompt": torch.zeros(1, L)}, "the prompt must be"),
    ({"prompt": torch.zeros(1, L, dtype=torch.int32)}, "the prompt must be"),
    ({"order": "easiest", "block_length": 2}, "order must be one of"),
    ({"prompt": torch.zeros(L, dtype=torch.int64)}, "the prompt must be"),
    ({"valid": torch.ones(1, N)}, "valid must have the shape"),
    ({"prompt": torch.tensor([[0, MASK]])}, "the prompt contains mask_id"),
    ({"given": torch.full((1, N + 1), MASK)}, "given must have the shape"),
    ({"given": torch.full((2, N), MASK)}, "given must have the shape"),
])
def test_decode_refuses_settings_out_of_range(setting, message):
    """A wrong setting is named at once, before the model is asked anything."""
    model = TinyModel()
    arguments = {"prompt": prompts(1), "response_length": N, "mask_id": MASK, **setting}
    with pytest.raises(ValueError, match=message):
        decode(model, **arguments)
    assert model.seen == []


@pytest.mark.parametrize("order", tabom.ORDERS)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_decode_refuses_logits_that_are_nan(bad, order):
    """A diverged model stops the decoder instead of writing rubbish or never ending."""
    table = torch.zeros(N, V)
    table[3, 1] = bad
    with pytest.raises(ValueError, match="nan"):
        decode(Scripted(table), prompts(2), N, mask_id=MASK, order=order, generator=seeded())


# ==================================================================================================
# The losses: one call for all, and each against a loop
# ==================================================================================================

LOSSES = {
    "nelbo": (nelbo_loss, {}),
    "trajectory": (trajectory_loss, {"window_size": 3}),
    "dinfer": (dinfer_loss, {}),
    "t3d": (t3d_loss, {"reference": TinyModel(seed=9)}),
    "tabom": (tabom_loss, {"window_size": 3, "margin": 0.2, "rank_weight": 1.0}),
}
every_loss = pytest.mark.parametrize("loss_fn, own", LOSSES.values(), ids=LOSSES.keys())


@every_loss
def test_losses_share_one_form(loss_fn, own):
    """Scalar loss with a gradient for every weight, and a dict of detached scalar metrics."""
    model = TinyModel()
    loss, metrics = loss_fn(model, random_trajectories(), mask_id=MASK, generator=seeded(), **own)
    assert loss.shape == () and loss.dtype == torch.float32 and loss.isfinite()
    assert metrics
    assert all(not value.requires_grad and value.shape == () for value in metrics.values())
    loss.backward()
    for weight in model.parameters():
        assert weight.grad.isfinite().all() and weight.grad.abs().max() > 0
    assert len(model.seen) == 1                                          # one forward pass, no more


@every_loss
def test_losses_are_reproducible(loss_fn, own):
    """Same seed, same loss; another seed, another loss; the global generator is left alone."""
    model, trajectories, before = TinyModel(), random_trajectories(16), torch.get_rng_state()
    one, same, other = (loss_fn(model, trajectories, mask_id=MASK, generator=seeded(seed), **own)[0]
                        for seed in (1, 1, 2))
    assert one == same != other
    assert torch.equal(torch.get_rng_state(), before)


@every_loss
def test_losses_show_the_model_response_or_mask(loss_fn, own):
    """Prompt and given tokens are always shown; the rest is its own token or [MASK]."""
    model, trajectories = TinyModel(), random_trajectories(60)
    loss_fn(model, trajectories, mask_id=MASK, generator=seeded(), **own)
    tokens, = model.seen
    shown, given = tokens[:, L:], trajectories.decode_rank == -1
    assert torch.equal(tokens[:, :L], trajectories.prompt)
    assert torch.equal(shown[given], trajectories.response[given])
    assert ((shown == trajectories.response) | (shown == MASK)).all()
    assert ((shown == MASK).any(1)).all()        # there is always something to learn


@every_loss
def test_losses_ignore_a_logit_for_mask(loss_fn, own):
    """With an entry for [MASK] in the vocabulary, no loss depends on its logit."""
    model, wider = TinyModel(), TinyModel(vocabulary=V + 1)
    with torch.no_grad():
        wider.out[:, :V], wider.out[:, V] = model.out, 5.0
    own = {**own, "reference": wider} if "reference" in own else own
    plain = {**own, "reference": model} if "reference" in own else own
    trajectories = random_trajectories()
    expected, _ = loss_fn(model, trajectories, mask_id=MASK, generator=seeded(), **plain)
    loss, _ = loss_fn(wider, trajectories, mask_id=MASK, generator=seeded(), **own)
    assert close(loss, expected)
    loss.backward()
    assert wider.out.grad.isfinite().all() and (wider.out.grad[:, V] == 0).all()


def test_losses_do_not_read_visible_positions():
    """A model need not predict what it sees: not even an impossible visible token counts."""
    trajectories, table = random_trajectories(1, n_given=(2,)), torch.zeros(1, N, V)
    visible = trajectories.decode_rank == -1
    table[visible] = -torch.inf
    table[visible, (trajectories.response[visible] + 1) % V] = 0.0     # -log p of the token is inf
    for loss_fn, own in ((nelbo_loss, {"mask_ratio": 1.0}),
                         (t3d_loss, {"reference": Scripted(torch.zeros(N, V))}),
                         (tabom_loss, {"window_size": N, "margin": 0.2, "rank_weight": 1.0})):
        model = Scripted(table.clone().requires_grad_())
        loss, _ = loss_fn(model, trajectories, mask_id=MASK, generator=seeded(), **own)
        loss.backward()
        assert loss.isfinite() and model.table.grad.isfinite().all()
        assert (model.table.grad[visible] == 0).all()


@pytest.mark.parametrize("name", ["nelbo", "trajectory", "dinfer", "t3d", "tabom"])
def test_rows_with_nothing_to_decode_count_zero(name):
    """A response that was given entirely teaches nothing: a constant loss, no gradient, no nan."""
    loss_fn, own = LOSSES[name]
    model, row = TinyModel(), random_trajectories(1)
    nothing = Trajectories(row.prompt, row.response, torch.full((1, N), -1), row.entropy)
    loss, _ = loss_fn(model, nothing, mask_id=MASK, generator=seeded(), **own)
    loss.backward()
    assert close(loss, 1.5 * math.log(2) if name == "t3d" else 0)
    assert (model.out.grad == 0).all()


def hidden_sets(model):
    """What the last call hid from the model: per row, the list of response positions."""
    shown = model.seen[-1][:, L:].tolist()
    return [[i for i, token in enumerate(row) if token == MASK] for row in shown]


def drawn_cuts(model, trajectories):
    """The cuts that a loss has drawn, read off its tokens; each must be a state on the way."""
    cuts = []
    for row, hidden in enumerate(hidden_sets(model)):
        order = [position for _, position in by_rank(trajectories, row)]
        cuts.append(len(order) - len(hidden))
        assert sorted(order[cuts[-1]:]) == hidden                        # the last ranks, exactly
    return cuts


# ---- Eq. 1 ---------------------------------------------------------------------------------------

def naive_nelbo(model, trajectories, hidden):
    """Eq. 1: the mean of -log p over the hidden positions of a row, then over rows."""
    rows = []
    for row, positions in enumerate(hidden):
        logits = look(model, trajectories, row, positions)
        rows.append(mean(-log_p(logits[i])[trajectories.response[row, i]] for i in positions))
    return mean(rows)


@pytest.mark.parametrize("mask_ratio", [None, 0.0, 0.3, 1.0])
def test_nelbo_is_eq_1(mask_ratio):
    """The loss is the mean over masked positions, then rows, of the states that were shown."""
    for seed in range(5):
        model, trajectories = TinyModel(), random_trajectories(9, seed)
        loss, metrics = nelbo_loss(model, trajectories, mask_id=MASK, generator=seeded(seed),
                                   mask_ratio=mask_ratio)
        expected = naive_nelbo(model, trajectories, hidden_sets(model))
        assert close(loss, expected) and close(metrics["nll"], expected)


def test_nelbo_mask_ratio():
    """1 masks all decoded positions, 0 exactly one, r a share r; a given position never."""
    trajectories = random_trajectories(3000)
    decoded = trajectories.decode_rank >= 0
    for ratio in (0.0, 0.5, 1.0):
        model = Scripted(torch.zeros(N, V))
        nelbo_loss(model, trajectories, mask_id=MASK, generator=seeded(), mask_ratio=ratio)
        masked = model.seen[0][:, L:] == MASK
        assert not (masked & ~decoded).any()
        if ratio == 0:
            assert (masked.sum(1) == 1).all()
        elif ratio == 1:
            assert torch.equal(masked, decoded)
        else:       # of 6 positions, half; a 64th of the rows gets its one position by force
            assert close(masked[::3].float().mean(), 0.5 + 1 / 64 / 6, 0.02)


def test_nelbo_draws_its_ratio_uniformly():
    """A uniform ratio makes every *number* of masked positions equally likely; 0 is raised to 1."""
    trajectories = random_trajectories(7000, n_given=(0,))
    model = Scripted(torch.zeros(N, V))
    nelbo_loss(model, trajectories, mask_id=MASK, generator=seeded())
    masked = model.seen[0][:, L:] == MASK
    counts = [int((masked.sum(1) == k).sum()) for k in range(1, N + 1)]
    assert sum(counts) == 7000
    assert chi_square(counts, [2000] + [1000] * (N - 1)) < 25.7          # p = 1e-4 at 5 df
    singles = masked[masked.sum(1) == 1].sum(0).tolist()    # and no position is favoured
    assert chi_square(singles, [sum(singles) / N] * N) < 25.7


# ---- Eq. 9 ---------------------------------------------------------------------------------------

def naive_tabom(model, trajectories, cuts, sizes, margin, rank_weight):
    """Eq. 9 row by row -> loss, mean nll, mean ranking loss, share of pairs in the right order."""
    nlls, rank_losses, right = [], [], []
    for row, (cut, size) in enumerate(zip(cuts, sizes)):
        order = [position for _, position in by_rank(trajectories, row)]
        logits = look(model, trajectories, row, order[cut:])
        window = order[cut:cut + size]
        nlls.append(mean(-log_p(logits[i])[trajectories.response[row, i]] for i in window))
        h = [entropy_of(logits[i]) for i in window]
        rank_losses.append(mean(max(0, r - s + margin) for r, s in itertools.combinations(h, 2)))
        right += [r < s for r, s in itertools.combinations(h, 2)]
    nll, rank_loss = mean(nlls), mean(rank_losses)
    return nll + rank_weight * rank_loss, nll, rank_loss, mean(right)


@pytest.mark.parametrize("window_size", [1, 2, 4, 50])
@pytest.mark.parametrize("margin, rank_weight", [(0.0, 1.0), (0.2, 0.5), (3.0, 2.0)])
def test_tabom_is_eq_9(window_size, margin, rank_weight):
    """With given cuts: what the window should say plus rank_weight times in which order."""
    model, trajectories = TinyModel(), random_trajectories(6)
    for cuts in ([0] * 6, [0, 1, 2, 3, 4, 1], [5, 4, 2, 5, 4, 2]):
        loss, metrics = tabom_loss(model, trajectories, mask_id=MASK, n_visible=torch.tensor(cuts),
                                   window_size=window_size, margin=margin, rank_weight=rank_weight)
        assert drawn_cuts(model, trajectories) == cuts
        expected = naive_tabom(model, trajectories, cuts, [window_size] * 6, margin, rank_weight)
        for got, want in zip((loss, metrics["nll"], metrics["rank_loss"], metrics["pair_accuracy"]),
                             expected, strict=True):
            assert close(got, want)


def test_tabom_gradient_is_that_of_eq_9():
    """The gradient too: the ranking term reaches the logits through their entropies."""
    table = torch.randn(1, N, V, generator=seeded(), dtype=torch.float32)
    trajectories = random_trajectories(1, n_given=(1,))
    settings = {"window_size": 3, "margin": 0.5, "rank_weight": 2.0, "n_visible": torch.tensor([1])}
    leaf = table.clone().requires_grad_()
    tabom_loss(Scripted(leaf), trajectories, mask_id=MASK, **settings)[0].backward()
    window = segment_masks(trajectories.decode_rank, 1, 3)[2]
    assert torch.equal(leaf.grad.abs().sum(-1) > 0, window)
    for i, v in itertools.product(range(N), range(V)):          # finite differences of the loop
        difference = 0.0
        for sign in (1, -1):
            moved = table.double().clone()
            moved[0, i, v] += sign * 1e-4
            value, *_ = naive_tabom(Scripted(moved), trajectories, [1], [3], 0.5, 2.0)
            difference += sign * value / 2e-4
        assert close(leaf.grad[0, i, v], difference, 1e-3)


def test_tabom_draws_every_cut_equally_often():
    """By default the cut is uniform on 0 .. n-1, n being the decoded positions of that row."""
    trajectories = random_trajectories(6000, n_given=(0, 2))
    model = Scripted(torch.zeros(N, V))
    tabom_loss(model, trajectories, mask_id=MASK, generator=seeded(), window_size=2, margin=0.2,
               rank_weight=1.0)
    cuts = drawn_cuts(model, trajectories)
    for first, n in ((0, 6), (1, 4)):
        counts = [cuts[first::2].count(cut) for cut in range(n)]
        assert sum(counts) == 3000
        assert chi_square(counts, [3000 / n] * n) < 25.7


def test_tabom_with_drawn_cuts_is_eq_9_too():
    """The drawn cut is used for the state and for the window alike."""
    for seed in range(10):
        model, trajectories = TinyModel(), random_trajectories(6, seed)
        loss, _ = tabom_loss(model, trajectories, mask_id=MASK, generator=seeded(seed),
                             window_size=3, margin=0.2, rank_weight=1.5)
        cuts = drawn_cuts(model, trajectories)
        assert close(loss, naive_tabom(model, trajectories, cuts, [3] * 6, 0.2, 1.5)[0])


def test_trajectory_masking_is_tabom_without_ranking():
    """lambda = 0: the loss is the cross-entropy of the window alone, at the same drawn cuts."""
    model, trajectories = TinyModel(), random_trajectories(12)
    loss, metrics = trajectory_loss(model, trajectories, mask_id=MASK, generator=seeded(4),
                                    window_size=3)
    cuts = drawn_cuts(model, trajectories)
    same, _ = tabom_loss(model, trajectories, mask_id=MASK, generator=seeded(4), window_size=3,
                         margin=0.2, rank_weight=0.0)
    assert loss == same == metrics["nll"]
    assert close(loss, naive_tabom(model, trajectories, cuts, [3] * 12, 0.0, 0.0)[1])
    cuts = torch.tensor([0, 1, 2] * 4)
    loss, _ = trajectory_loss(model, trajectories, mask_id=MASK, window_size=2, n_visible=cuts)
    assert close(loss, naive_tabom(model, trajectories, cuts.tolist(), [2] * 12, 0.0, 0.0)[1])


# ---- dInfer --------------------------------------------------------------------------------------

def test_dinfer_supervises_what_lies_between_two_times():
    """Show the earlier state; supervise exactly the tokens revealed until the later one."""
    model, trajectories = TinyModel(), random_trajectories(6)
    start, end = [0, 1, 2, 3, 0, 1], [6, 2, 3, 5, 5, 3]
    loss, metrics = dinfer_loss(model, trajectories, mask_id=MASK,
                                times=(torch.tensor(start), torch.tensor(end)))
    assert drawn_cuts(model, trajectories) == start
    sizes = [later - earlier for earlier, later in zip(start, end)]
    expected = naive_tabom(model, trajectories, start, sizes, 0.0, 0.0)[1]
    assert close(loss, expected) and close(metrics["nll"], expected)


def test_dinfer_from_start_to_end_is_plain_cross_entropy():
    """times = (0, N): predict the whole response from the prompt alone."""
    model, trajectories = TinyModel(), random_trajectories(6, n_given=(0,))
    times = torch.zeros(6, dtype=torch.int64), torch.full((6,), N)
    loss, _ = dinfer_loss(model, trajectories, mask_id=MASK, times=times)
    assert close(loss, naive_nelbo(model, trajectories, [range(N)] * 6))


def test_dinfer_draws_every_pair_of_times_equally_often():
    """Two different numbers from 0 .. n: all n(n+1)/2 pairs, full jumps and the last token too."""
    trajectories = random_trajectories(6000, n_given=(2,))               # n = 4: ten pairs
    model = Scripted(torch.zeros(6000, N, V, requires_grad=True))
    dinfer_loss(model, trajectories, mask_id=MASK, generator=seeded())[0].backward()
    supervised = model.table.grad.abs().sum(-1) > 0
    drawn = []
    for row, start in enumerate(drawn_cuts(model, trajectories)):
        ranks = sorted(trajectories.decode_rank[row][supervised[row]].tolist())
        assert ranks == list(range(start, start + len(ranks)))           # from the start, no gaps
        drawn.append((start, start + len(ranks)))
    counts = [drawn.count(pair) for pair in itertools.combinations(range(5), 2)]
    assert sum(counts) == 6000
    assert chi_square(counts, [600] * 10) < 33.7                         # p = 1e-4 at 9 df


# ---- T3D -----------------------------------------------------------------------------------------

def naive_t3d(model, reference, trajectories, cuts, a, b, c):
    """The formula of `t3d_loss` row by row -> loss, mean preference term, mean path term."""
    preferences, paths = [], []
    for row, cut in enumerate(cuts):
        order = [position for _, position in by_rank(trajectories, row)]
        hidden, n_masked = order[cut:], len(order) - cut
        ours, theirs = (look(m, trajectories, row, hidden) for m in (model, reference))
        written = {i: int(trajectories.response[row, i]) for i in hidden}
        other = {i: int(theirs[i].argmax()) for i in hidden}

        def l(logits, y):
            return mean(log_p(logits[i])[y[i]] for i in hidden)

        better = 1 / (1 + math.exp(-b * (l(ours, written) - l(theirs, written))))
        worse = 1 / (1 + math.exp(-b * (l(ours, other) - l(theirs, other))))
        preferences.append(-math.log(better) - a * math.log(1 - worse))
        paths.append(sum((n_masked - k) / n_masked * -log_p(ours[i])[written[i]]
                         for k, i in enumerate(hidden)))
    return mean(preferences) + c * mean(paths), mean(preferences), mean(paths)


@pytest.mark.parametrize("own", [{}, {"a": 2.0, "b": 1.5, "c": 0.7}, {"a": 0.0, "c": 0.0}])
def test_t3d_is_its_formula(own):
    """Preference and path terms against a loop, at the drawn cuts; the default a, b, c too."""
    for seed in range(5):
        model, reference, trajectories = TinyModel(), TinyModel(9), random_trajectories(6, seed)
        loss, metrics = t3d_loss(model, trajectories, mask_id=MASK, generator=seeded(seed),
                                 reference=reference, **own)
        assert torch.equal(model.seen[0], reference.seen[0])             # both see the same state
        cuts = drawn_cuts(model, trajectories)
        constants = {"a": 0.5, "b": 0.1, "c": 0.2, **own}
        expected = naive_t3d(model, reference, trajectories, cuts, **constants)
        for got, want in zip((loss, metrics["preference"], metrics["path"]), expected, strict=True):
            assert close(got, want)


def test_t3d_starts_at_one_and_a_half_log_two():
    """At reference = model both ratios are 0, so the first two terms are (1 + a) log 2."""
    model, trajectories = TinyModel(), random_trajectories()
    for a in (0.5, 2.0):
        loss, metrics = t3d_loss(model, trajectories, mask_id=MASK, generator=seeded(),
                                 reference=model, a=a, c=0.2)
        assert close(metrics["preference"], (1 + a) * math.log(2))
        assert close(loss, (1 + a) * math.log(2) + 0.2 * metrics["path"])


def test_t3d_path_weights_fall_linearly():
    """The weights are 1, (n-1)/n, ..., 1/n in reveal order: equal -log p makes each one visible."""
    trajectories = random_trajectories(60, n_given=(0,))
    model = Scripted(torch.zeros(60, N, V, requires_grad=True))
    loss, metrics = t3d_loss(model, trajectories, mask_id=MASK, generator=seeded(),
                             reference=Scripted(torch.zeros(N, V)), c=1.0, a=0.0, b=0.0)
    loss.backward()
    cuts = drawn_cuts(model, trajectories)
    assert close(metrics["path"], mean((N - cut + 1) / 2 * math.log(V) for cut in cuts))
    for row, cut in enumerate(cuts):
        for rank, position in by_rank(trajectories, row):
            token = trajectories.response[row, position]
            weight = max(0, N - rank) / (N - cut) if rank >= cut else 0
            assert close(model.table.grad[row, position, token], -weight * (1 - 1 / V) / 60)


def test_t3d_does_not_train_its_reference():
    """The reference is frozen: no gradient ever reaches it."""
    model, reference = TinyModel(), TinyModel(9)
    t3d_loss(model, random_trajectories(), mask_id=MASK, generator=seeded(),
             reference=reference)[0].backward()
    assert all(weight.grad is None for weight in reference.parameters())
    assert all(weight.grad is not None for weight in model.parameters())


def test_t3d_draws_every_cut_equally_often():
    """The cut is uniform on 0 .. n-1, as for TABOM."""
    trajectories = random_trajectories(6000, n_given=(0,))
    model = Scripted(torch.zeros(N, V))
    t3d_loss(model, trajectories, mask_id=MASK, generator=seeded(), reference=model)
    counts = [drawn_cuts(model, trajectories).count(cut) for cut in range(N)]
    assert sum(counts) == 6000 and chi_square(counts, [1000] * N) < 25.7


@pytest.mark.parametrize("every", [1, 3, 4])
def test_lagged_copy_follows_every_n_calls(every):
    """Call 0, n, 2n, ... bring the copy up to date; in between it stays behind, frozen."""
    model = nn.Linear(1, 1, bias=False)
    lagged = LaggedCopy(model, every=every)
    outputs = []
    for step in range(8):
        with torch.no_grad():
            model.weight.fill_(float(step))
        output = lagged(torch.ones(1, 1))
        assert not output.requires_grad
        outputs.append(output.item())
    assert outputs == [step // every * every for step in range(8)]
    assert model.weight.requires_grad and model.weight.item() == 7      # the model is left alone
    assert LaggedCopy(model).every == 10


# ==================================================================================================
# Trajectory discrimination score (Eq. 10-11)
# ==================================================================================================

def test_discrimination_score_by_hand():
    """Population variance over the masked positions: entropies 1 and 3 give 1, in nats squared."""
    entropy = torch.tensor([[1.0, 3.0, 50.0], [1.0, 2.0, 6.0], [4.0, 4.0, 4.0], [9.0, 1.0, 1.0],
                            [9.0, 1.0, 1.0]])
    masked = torch.tensor([[1, 1, 0], [1, 1, 1], [1, 1, 1], [1, 0, 0], [0, 0, 0]], dtype=torch.bool)
    score = trajectory_discrimination_score(entropy, masked)
    torch.testing.assert_close(score, torch.tensor([1.0, 14 / 3, 0.0, 0.0, 0.0]))


def test_discrimination_score_is_not_moved_by_what_is_visible():
    """Visible positions may hold anything, even nan, and a common shift changes nothing."""
    entropy = torch.rand(4, 9, generator=seeded())
    masked = torch.rand(4, 9, generator=seeded(1)) < 0.6
    expected = torch.stack([row[inside].var(correction=0) for row, inside in zip(entropy, masked)])
    torch.testing.assert_close(trajectory_discrimination_score(entropy, masked), expected)
    torch.testing.assert_close(trajectory_discrimination_score(entropy + 5, masked), expected)
    hidden = entropy.masked_fill(~masked, torch.nan)
    torch.testing.assert_close(trajectory_discrimination_score(hidden, masked), expected)


@pytest.mark.parametrize("eos_id", [None, 0])
def test_discrimination_curve_replays_the_trajectory(eos_id):
    """Column k is the score of the state with k tokens revealed, recomputed here row by row."""
    model, trajectories = TinyModel(), random_trajectories(9)
    scores, counted = discrimination_curve(model, trajectories, mask_id=MASK, eos_id=eos_id)
    assert scores.shape == counted.shape == (9, N + 1) and not scores.requires_grad
    excluded = 0
    for row, k in itertools.product(range(9), range(N + 1)):
        hidden = [position for rank, position in by_rank(trajectories, row) if rank >= k]
        logits = look(model, trajectories, row, hidden)
        response = trajectories.response[row].tolist()
        ends = [i for i in range(N) if i not in hidden and response[i] == eos_id]
        kept = [i for i in hidden if not ends or i < ends[0]]
        excluded += len(hidden) - len(kept)
        h = [entropy_of(logits[i]) for i in kept]
        assert close(scores[row, k], mean((value - mean(h)) ** 2 for value in h))
        assert counted[row, k] == (len(kept) >= 2)
    assert (excluded > 0) == (eos_id is not None)                        # the case does occur


def test_discrimination_curve_stops_at_the_first_revealed_end():
    """By hand: the end token at position 2 hides 3 and 4 once revealed, and not a step earlier."""
    table = from_probabilities([[.9, .1], [.5, .5], [.8, .2], [.7, .3], [.6, .4]])
    h = [entropy_of(row) for row in table]
    trajectories = Trajectories(prompts(1), torch.tensor([[0, 0, 1, 1, 1]]),
                                torch.tensor([[2, 3, 0, 1, 4]]), torch.zeros(1, 5))
    scores, counted = discrimination_curve(Scripted(table), trajectories, mask_id=2, eos_id=1)

    def variance(*positions):
        values = [h[i] for i in positions]
        return mean((value - mean(values)) ** 2 for value in values)

    expected = [variance(0, 1, 2, 3, 4), variance(0, 1), variance(0, 1), 0, 0, 0]
    torch.testing.assert_close(scores, torch.tensor([expected]))
    assert counted.tolist() == [[True, True, True, False, False, False]]


# ==================================================================================================
# toy_data: four domains of arithmetic
# ==================================================================================================

HANDS = ("own", "other")


def solved(domain, hand="own"):
    """All problems of a domain with their solutions; in blank, every pair of factors."""
    problems = toy_data.all_problems("mul" if domain == "blank" else domain)
    first, second = problems.unbind(1)
    prompt, response, given = toy_data.write_solutions(domain, first, second, hand)
    return SimpleNamespace(first=first, second=second, prompt=prompt, response=response,
                           given=given)


def line(domain, x, y, hand="own"):
    """The oracle: the line of one problem, as Python's own arithmetic and formatting write it."""
    (tens_x, units_x), (tens_y, units_y) = divmod(x, 10), divmod(y, 10)
    if domain == "add":
        return f"{x}+{y}={x + y:04d}{units_x + units_y:03d}{tens_x + tens_y:03d}"
    if domain == "sub":
        borrowed = 1 if units_x < units_y else 0
        units = 10 * borrowed + units_x - units_y
        return f"{x}-{y}={x - y:04d}{borrowed}{units:02d}{tens_x - tens_y:03d}"
    if hand == "own":
        return f"{x}×{y}={x * y:04d}{x * units_y:03d}{x * tens_y:03d}"
    return f"{x}×{y}={x * y:04d}{y * units_x:03d}{y * tens_x:03d}"


@pytest.mark.parametrize("hand", HANDS)
@pytest.mark.parametrize("domain", toy_data.DOMAINS)
def test_every_solution_is_written_and_checked_right(domain, hand):
    """All problems, both hands: the line is what Python computes and the checker accepts it."""
    s = solved(domain, hand)
    assert len(s.first) == (4095 if domain == "sub" else 8100)
    written = torch.cat([s.prompt, s.response], 1)
    assert written.shape[1] == toy_data.PROMPT_LENGTH + toy_data.RESPONSE_LENGTH == 16
    for x, y, tokens in zip(s.first.tolist(), s.second.tolist(), written.tolist()):
        assert toy_data.to_text(tokens) == line(domain, x, y, hand)
    assert toy_data.is_correct(domain, s.prompt, s.response).all()


@pytest.mark.parametrize("hand", HANDS)
@pytest.mark.parametrize("domain", toy_data.DOMAINS)
def test_the_working_leads_to_the_answer(domain, hand):
    """units + 10 × tens is the answer, in every domain and hand; a borrowed ten is paid back."""
    s = solved(domain, hand)
    answer, units, tens = (toy_data.read_number(s.response[:, place]) for place in
                           (toy_data.ANSWER, toy_data.UNITS_ROW, toy_data.TENS_ROW))
    if domain == "sub":
        borrowed, units = units // 100, units % 100
        tens = tens - borrowed
    assert torch.equal(units + 10 * tens, answer)


@pytest.mark.parametrize("domain", toy_data.DOMAINS)
def test_given_positions(domain):
    """The second number and "=" are given, except in blank, where the factor is to be chosen."""
    expected = [domain != "blank"] * 2 + [True] + [False] * 10
    assert (solved(domain).given == torch.tensor(expected)).all()


def test_lines_of_the_docstring():
    """What the module promises at its top is what it writes."""
    x, y = torch.tensor([47]), torch.tensor([85])
    for domain, first, second, text in (("mul", x, y, "47×85=3995235376"),
                                        ("add", x, y, "47+85=0132012012"),
                                        ("sub", y, x, "85-47=0038108004")):
        prompt, response, _ = toy_data.write_solutions(domain, first, second)
        assert toy_data.to_text([*prompt[0], *response[0]]) == text
        assert text in toy_data.__doc__
    prompt, response, given = toy_data.write_solutions("blank", x, y)
    shown = torch.cat([prompt, response.masked_fill(~given, toy_data.MASK_ID)], 1)[0]
    assert toy_data.to_text(shown) == "47×__=__________"
    assert "47×__=__________" in toy_data.__doc__
    _, response, _ = toy_data.write_solutions("mul", x, y, hand="other")
    assert toy_data.to_text(response[0]) == "85=3995595340"              # 85 × 7, then 85 × 4


@pytest.mark.parametrize("domain", toy_data.DOMAINS)
def test_the_checker_rejects_every_changed_digit(domain):
    """No answer with one digit changed passes, at any place, in any problem."""
    s = solved(domain)
    for position, change in itertools.product(range(3, 7), range(1, 10)):
        wrong = s.response.clone()
        wrong[:, position] = (wrong[:, position] + change) % 10
        assert not toy_data.is_correct(domain, s.prompt, wrong).any()


@pytest.mark.parametrize("domain", toy_data.DOMAINS)
def test_the_checker_rejects_what_is_not_a_digit(domain):
    """Any other token in the second number or the answer, [MASK] too, is wrong."""
    s = solved(domain)
    for position, token in itertools.product((0, 1, 3, 4, 5, 6), range(10, toy_data.MASK_ID + 1)):
        wrong = s.response.clone()
        wrong[:, position] = token
        assert not toy_data.is_correct(domain, s.prompt, wrong).any()


def test_the_checker_wants_a_factor_of_two_digits():
    """47×05=0235 is right arithmetic and a way out of the task: numbers below 10 do not count."""
    first, second = torch.cartesian_prod(torch.arange(10, 100), torch.arange(10)).unbind(1)
    for domain in toy_data.DOMAINS:
        prompt, response, _ = toy_data.write_solutions(domain, first, second)
        assert not toy_data.is_correct(domain, prompt, response).any()


def test_the_checker_reads_the_answer_and_not_the_working():
    """A wrong working does not matter; a second number that does not fit the answer does."""
    for domain in toy_data.DOMAINS:
        s = solved(domain)
        s.response[:, 7:] = toy_data.EQUALS_ID
        assert toy_data.is_correct(domain, s.prompt, s.response).all()
        s.response[:, 1] = (s.response[:, 1] + 1) % 10
        assert not toy_data.is_correct(domain, s.prompt, s.response).any()


def test_text_and_tokens_are_inverse():
    """encode and to_text undo each other on every character, "_" being [MASK]."""
    text = toy_data.VOCABULARY + "_"
    assert toy_data.encode(text) == list(range(len(text))) and toy_data.MASK_ID == len(text) - 1
    assert toy_data.to_text(toy_data.encode(text)) == text
    text = "47×__=__________"
    assert toy_data.to_text(torch.tensor(toy_data.encode(text))) == text
    assert toy_data.VOCABULARY[toy_data.EQUALS_ID] == "="
    assert toy_data.encode("0123456789") == list(range(10))      # a digit is its own token id


def test_numbers_and_digits_are_inverse():
    """digits pads with leading zeros; read_number gives -1 where a token is not a digit."""
    numbers = torch.tensor([0, 7, 42, 305, 999])
    expected = [[int(digit) for digit in f"{number:03d}"] for number in numbers.tolist()]
    assert toy_data.digits(numbers, 3).tolist() == expected
    assert torch.equal(toy_data.read_number(toy_data.digits(numbers, 4)), numbers)
    assert toy_data.read_number(torch.tensor([[1, 10], [15, 0], [1, 0]])).tolist() == [-1, -1, 10]


@pytest.mark.parametrize("new_domain", toy_data.SPLIT_SIZES)
def test_splits_are_disjoint_and_complete(new_domain):
    """Every problem is in exactly one of the four parts, and the parts have the promised sizes."""
    for seed in range(4):
        splits = toy_data.split_problems(new_domain, seed)
        assert set(splits) == set(toy_data.CORPUS_SHARES[new_domain])
        for domain, parts in splits.items():
            assert list(parts) == ["corpus", "query", "validation", "test"]
            assert tuple(map(len, parts.values()))[:3] == toy_data.SPLIT_SIZES[new_domain][domain]
            assert len(parts["test"]) >= 25
            everything = [tuple(problem) for part in parts.values() for problem in part.tolist()]
            assert len(everything) == len(set(everything))
            assert set(everything) == set(map(tuple, toy_data.all_problems(domain).tolist()))


def test_all_problems():
    """Two-digit numbers; sub never goes below zero; a problem of blank is its first factor."""
    pairs = list(itertools.product(range(10, 100), repeat=2))
    for domain, expected in (("add", pairs), ("mul", pairs),
                             ("sub", [(x, y) for x, y in pairs if x >= y]),
                             ("blank", [(x, 0) for x in range(10, 100)])):
        assert list(map(tuple, toy_data.all_problems(domain).tolist())) == expected


@pytest.mark.parametrize("new_domain", toy_data.SPLIT_SIZES)
def test_splits_follow_the_seed(new_domain):
    """The same seed gives the same split, another seed another one, in every domain."""
    one, same, other = (toy_data.split_problems(new_domain, seed) for seed in (1, 1, 2))
    for domain in one:
        assert torch.equal(one[domain]["corpus"], same[domain]["corpus"])
        assert torch.equal(one[domain]["test"], same[domain]["test"])
        assert not torch.equal(one[domain]["corpus"].sort(0)[0], other[domain]["corpus"].sort(0)[0])


@pytest.mark.parametrize("new_domain", toy_data.SPLIT_SIZES)
def test_corpus_has_its_shares_and_only_corpus_problems(new_domain):
    """Weights sum to the share of each domain; every line is right and none is of another part."""
    splits = toy_data.split_problems(new_domain, 0)
    prompt, response, given, weight = toy_data.pretraining_corpus(new_domain, splits)
    assert len(prompt) == len(response) == len(given) == len(weight)
    first = toy_data.read_number(prompt[:, :2])
    second = toy_data.read_number(response[:, toy_data.FACTOR])
    found = 0
    for domain, share in toy_data.CORPUS_SHARES[new_domain].items():
        operator = toy_data.VOCABULARY.index(toy_data.OPERATOR[domain])
        rows = (prompt[:, 2] == operator) & (given[:, 0] == (domain != "blank"))
        found += int(rows.sum())
        assert close(weight[rows].sum(), share)
        assert weight[rows].min() == weight[rows].max() > 0
        assert toy_data.is_correct(domain, prompt[rows], response[rows]).all()
        lines = sorted(zip(first[rows].tolist(), second[rows].tolist()))
        corpus = splits[domain]["corpus"].tolist()
        expected = set(map(tuple, corpus))
        if domain == "blank":                                  # multiplications of the corpus only
            prompts_ = {x for x, _ in corpus}
            expected = {(x, y) for x, y in splits["mul"]["corpus"].tolist() if x in prompts_}
        assert lines == sorted(expected)
    assert found == len(prompt) and close(weight.sum(), 1)


def test_best_order_is_factor_working_answer():
    """A permutation of the response that never writes a digit before those it is computed from."""
    order = toy_data.BEST_ORDER.argsort().tolist()              # turn of each position -> positions
    assert sorted(order) == list(range(toy_data.RESPONSE_LENGTH))
    working = {*range(7, 13)}
    assert set(order[:3]) == {0, 1, 2} and set(order[3:9]) == working
    for row in (toy_data.ANSWER, toy_data.UNITS_ROW, toy_data.TENS_ROW):    # the last digit first
        places = list(range(toy_data.RESPONSE_LENGTH))[row]
        assert [place for place in order if place in places] == places[::-1]


@pytest.mark.parametrize("order", [toy_data.BEST_ORDER, toy_data.LEFT_TO_RIGHT])
def test_fixed_orders_are_what_decode_expects(order):
    """The two orders give the turn of each position: decoded by them, the ranks are these turns."""
    model = Scripted(torch.zeros(toy_data.RESPONSE_LENGTH, len(toy_data.VOCABULARY)))
    got = decode(model, prompts(1), toy_data.RESPONSE_LENGTH, mask_id=toy_data.MASK_ID, order=order)
    assert torch.equal(got.decode_rank[0], order)


def one_answer(text):
    """A line of 16 characters -> its prompt and its response."""
    tokens = torch.tensor(toy_data.encode(text))
    return tokens[:3], tokens[3:]


def test_in_words_gives_the_verdict_of_the_checker():
    """The sentence says "right" exactly where is_correct does, and when the factor came."""
    given, chosen = torch.full((13,), -1), torch.tensor([4, 0, -1, *range(1, 4), *range(5, 12)])
    for text, domain in (("47×85=3995235376", "mul"), ("47×85=3985235376", "mul"),
                         ("47×05=0235235000", "mul"), ("47+85=0132012012", "add"),
                         ("47+85=013=012012", "add"), ("85-47=0038108004", "sub")):
        prompt, response = one_answer(text)
        said = toy_data.in_words(prompt, response, given)
        right = toy_data.is_correct(domain, prompt[None], response[None]).item()
        assert ("right" in said, "wrong" in said) == (right, not right)
        assert "steps" not in said
        assert "steps 5 and 1" in toy_data.in_words(prompt, response, chosen)


def test_draw_state_writes_marks_and_shades():
    """Revealed tokens are written, the newest is marked, and masked ones are shaded."""
    prompt, response = one_answer("47×85=3995235376")
    decode_rank = torch.tensor([-1, -1, -1, 9, 8, 7, 6, 0, 1, 2, 3, 4, 5])
    entropy = torch.linspace(2.4, 0, 13)
    for n_visible in range(11):
        text = toy_data.draw_state(prompt, response, decode_rank, entropy, n_visible, styled=False)
        assert text.startswith("47×")
        newest = [str(int(token)) for token, rank in zip(response, decode_rank)
                  if rank == n_visible - 1 and rank >= 0]
        assert re.findall(r"\[(.)\]", text) == newest        # none before the first step
        revealed = toy_data.to_text(response[decode_rank < n_visible])
        assert re.sub(r"[^0-9=]", "", text[3:]) == revealed
    sure, unsure = (toy_data.draw_state(prompt, response, decode_rank, torch.full((13,), nats), 0,
                                        styled=False) for nats in (0.0, 9.0))
    assert sure.count("#") == 0 and unsure.count("#") == 10
    styled = toy_data.draw_state(prompt, response, decode_rank, entropy, 1, styled=True)
    assert "\033[7m2\033[0m" in styled


def test_toy_data_names_what_it_does_not_know():
    """A misspelt domain or hand is an error, not another domain."""
    number = torch.tensor([12])
    with pytest.raises(ValueError, match="unknown domain 'div'"):
        toy_data.write_solutions("div", number, number)
    with pytest.raises(ValueError, match="'own' or 'other'"):
        toy_data.write_solutions("mul", number, number, hand="left")
    with pytest.raises(ValueError, match="new_domain"):
        toy_data.split_problems("add", 0)


# ==================================================================================================
# The core in other people's projects: foreign models, padding, stored data, half precision
# ==================================================================================================

def run_all(model, trajectories, mask_id=MASK):
    """Every loss with the same draws -> list of losses, detached."""
    losses = []
    for loss_fn, own in LOSSES.values():
        own = {**own, "reference": model} if "reference" in own else own
        loss, _ = loss_fn(model, trajectories, mask_id=mask_id, generator=seeded(), **own)
        losses.append(float(loss.detach()))
    return losses


def test_the_core_is_one_block_that_works_alone():
    """Cut out between its two marks and pasted into an empty file, it decodes and trains a foreign
    model; it imports torch and the standard library only."""
    source = pathlib.Path(tabom.__file__).read_text(encoding="utf-8")
    begin, end = (source.index(f"# ==== The method {word} here") for word in ("begins", "ends"))
    block, core = source[begin:end], {"__name__": "core"}
    imported = re.findall(r"^\s*(?:import|from) (\w+)", block, re.MULTILINE)
    assert set(imported) <= {"copy", "dataclasses", "torch"}
    exec(compile(block, "core", "exec"), core)

    class Foreign(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.mix = nn.Embedding(12, 16), nn.GRU(16, 8, bidirectional=True)
            self.out = nn.Linear(16, 12)

        def forward(self, tokens):
            return self.out(self.mix(self.embed(tokens).transpose(0, 1))[0].transpose(0, 1))
    torch.manual_seed(0)
    model = Foreign()
    decoded = core["decode"](model, prompts(3), 7, mask_id=11, tokens_per_step=2, block_length=4)
    core["validate"](decoded, 11, 12)
    optimizer, losses = torch.optim.SGD(model.parameters(), lr=0.1), []
    for _ in range(2):
        loss, _ = core["tabom_loss"](model, decoded, mask_id=11, window_size=7, margin=0.2,
                                     rank_weight=1.0, n_visible=torch.tensor([0, 2, 4]))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[1] < losses[0]


def test_models_of_both_conventions_give_the_same():
    """LLaDA: output i predicts token i, inside an object.  Dream: it predicts token i+1; shift by
    one.  One line each, and the losses and the trajectory are the same."""
    network = TinyModel()

    def llada_network(tokens):
        return SimpleNamespace(logits=network(tokens))

    def dream_network(tokens):
        logits = network(tokens)
        return SimpleNamespace(logits=torch.cat([logits[:, 1:], torch.randn(len(tokens), 1, V)], 1))

    def llada(tokens):
        return llada_network(tokens).logits

    def dream(tokens):
        return dream_network(tokens).logits.roll(1, 1)       # the first output is never read

    trajectories = random_trajectories()
    assert run_all(llada, trajectories) == run_all(dream, trajectories)
    one, other = (decode(model, prompts(4), N, mask_id=MASK) for model in (llada, dream))
    assert all(torch.equal(a, b) for a, b in zip(vars(one).values(), vars(other).values()))
    assert run_all(lambda tokens: dream_network(tokens).logits, trajectories) != run_all(
        llada, trajectories)                                 # without the shift it is another model


@pytest.mark.parametrize("banned", [-math.inf, -1e9, torch.finfo(torch.float32).min])
def test_special_tokens_are_banned_by_infinity_or_a_large_negative(banned):
    """Ids that no answer contains, set to -inf or very low: the same finite losses and gradients
    as a model without them."""
    plain, wider, trajectories = TinyModel(), TinyModel(vocabulary=V + 3), random_trajectories()
    with torch.no_grad():
        wider.out[:, :V] = plain.out

    def model(tokens):
        return torch.cat([(x := wider(tokens))[..., :V], torch.full_like(x[..., V:], banned)], -1)
    settings = dict(mask_id=MASK, window_size=4, margin=0.2, rank_weight=1.0)
    cuts = torch.tensor([0, 1, 2, 0, 1, 2])
    expected, _ = tabom_loss(plain, trajectories, n_visible=cuts, **settings)
    loss, _ = tabom_loss(model, trajectories, n_visible=cuts, **settings)
    expected.backward()
    loss.backward()
    assert close(loss, expected)
    torch.testing.assert_close(wider.out.grad[:, :V], plain.out.grad)
    assert run_all(model, trajectories) == pytest.approx(run_all(plain, trajectories), rel=1e-5)


class Padded(nn.Module):
    """One layer of attention with position ids, both counted from the first token that is no pad:
    what a closure around a Hugging Face model does with `attention_mask` and `position_ids`."""

    def __init__(self, pad_id):
        super().__init__()
        torch.manual_seed(0)
        self.pad_id = pad_id
        self.token, self.place = nn.Embedding(V + 2, 8), nn.Embedding(20, 8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.out = nn.Linear(8, V)

    def forward(self, tokens):
        real = tokens != self.pad_id
        x = self.token(tokens) + self.place((real.cumsum(1) - 1).clamp(min=0))
        mixed, _ = self.attention(x, x, x, key_padding_mask=~real)
        return self.out(torch.tanh(x + mixed))


def test_left_padded_prompts_decode_and_train_like_their_rows_alone():
    """Prompts of 1, 3 and 4 tokens in one batch: same tokens, ranks, entropies, and same loss."""
    pad = V + 1
    model, lengths = Padded(pad).double().eval(), (1, 3, 4)
    alone = [torch.randint(V, (1, length), generator=seeded(length)) for length in lengths]
    batch = torch.cat([nn.functional.pad(prompt, (4 - prompt.shape[1], 0), value=pad)
                       for prompt in alone])
    together = decode(model, batch, N, mask_id=MASK)
    single = [decode(model, prompt, N, mask_id=MASK) for prompt in alone]
    for name in ("response", "decode_rank", "entropy"):
        rows = torch.cat([getattr(one, name) for one in single])
        torch.testing.assert_close(getattr(together, name), rows)
    settings = dict(mask_id=MASK, window_size=3, margin=0.2, rank_weight=1.0)
    cuts = torch.tensor([0, 2, 5])
    loss, _ = tabom_loss(model, together, n_visible=cuts, **settings)
    apart = [tabom_loss(model, one, n_visible=cut[None], **settings)[0]
             for one, cut in zip(single, cuts)]
    assert close(loss, mean(float(one.detach()) for one in apart))


def test_left_out_positions_close_ranks():
    """only(valid): the others are ranked 0 .. n-1 in their old order, and a window counts them."""
    whole = Trajectories(prompts(1), torch.arange(6)[None] % V,
                         torch.tensor([[5, 0, 3, 1, 4, 2]]), torch.ones(1, N))
    valid = torch.tensor([[True, False, True, True, True, False]])
    part = whole.only(valid)
    assert part.decode_rank.tolist() == [[3, -1, 1, 0, 2, -1]]
    assert part.entropy.tolist() == [[1, 0, 1, 1, 1, 0]]
    assert torch.equal(part.response, whole.response) and part.n_decoded.tolist() == [4]
    assert segment_masks(part.decode_rank, 1, 2)[2].tolist() == [[False, False, True, False, True,
                                                                  False]]
    again = part.only(torch.tensor([[True] * 3 + [False] * 3]))
    assert again.decode_rank.tolist() == [[1, -1, 0, -1, -1, -1]]


@every_loss
@pytest.mark.parametrize("shown", [0, MASK])
def test_left_out_positions_are_neither_shown_otherwise_nor_learned(loss_fn, own, shown):
    """Padding behind the answer: it shows what the response holds (a token, or [MASK] to hide its
    length), gets no gradient, and its token changes no loss but through what the model sees."""
    table = torch.randn(4, N, V, generator=seeded())
    own = {**own, "reference": Scripted(torch.zeros(N, V))} if "reference" in own else own
    whole = random_trajectories(4, n_given=(0,))
    valid = torch.ones(4, N, dtype=torch.bool)
    valid[:, 4:] = False
    response = whole.response.masked_fill(~valid, shown)
    part = Trajectories(whole.prompt, response, whole.decode_rank, whole.entropy).only(valid)
    model = Scripted(table.clone().requires_grad_())
    loss, _ = loss_fn(model, part, mask_id=MASK, generator=seeded(), **own)
    loss.backward()
    assert (model.table.grad[:, 4:] == 0).all() and model.table.grad[:, :4].abs().sum() > 0
    assert all((tokens[:, L + 4:] == shown).all() for tokens in model.seen)
    other = Trajectories(part.prompt, part.response.masked_fill(~valid, 1), part.decode_rank,
                         part.entropy)
    assert loss_fn(Scripted(table), other, mask_id=MASK, generator=seeded(), **own)[0] == loss


def test_decode_leaves_out_what_is_not_valid():
    """Positions outside `valid` keep [MASK] or the given token, have rank -1, and no pass is spent
    on them; the curve of scores does not count them."""
    model = TinyModel()
    valid = torch.tensor([[True] * 4 + [False] * 2, [False] + [True] * 5, [False] * 6])
    got = decode(model, prompts(3), N, mask_id=MASK, valid=valid)
    assert len(model.seen) == 5 and (got.response[~valid] == MASK).all()
    assert (got.response[valid] != MASK).all() and torch.equal(got.decode_rank >= 0, valid)
    assert [sorted(row) for row in got.decode_rank.tolist()] == [
        [-1, -1, 0, 1, 2, 3], [-1, 0, 1, 2, 3, 4], [-1] * 6]
    given = torch.full((3, N), MASK)
    given[:, 5] = 1
    padded = decode(TinyModel(), prompts(3), N, mask_id=MASK, valid=valid, given=given)
    assert padded.response[:, 5].tolist() == [1, 1, 1] and (padded.decode_rank[:, 5] == -1).all()
    _, counted = discrimination_curve(TinyModel(), got, mask_id=MASK)
    assert counted.sum(1).tolist() == [3, 4, 0]


def test_trajectories_are_stored_as_one_file(tmp_path):
    """The two lines of the docstring: what torch.save wrote comes back, weights_only."""
    whole = decode(TinyModel(), prompts(4), N, mask_id=MASK)
    torch.save(vars(whole), tmp_path / "x.pt")
    again = Trajectories(**torch.load(tmp_path / "x.pt", weights_only=True))
    assert all(torch.equal(a, b) for a, b in zip(vars(whole).values(), vars(again).values()))


def test_decoding_order_lists_become_trajectories():
    """Steps count up, -1 was never decoded; equal steps go by entropy if given, else by position;
    from the steps of our own decoder come its own ranks."""
    prompt, response = prompts(2), torch.zeros(2, 4, dtype=torch.int64)
    steps = [[2, 0, 0, 5], [1, -1, 1, 0]]
    by_position = tabom.from_decoding_order(prompt, response, steps)
    assert by_position.decode_rank.tolist() == [[2, 0, 1, 3], [1, -1, 2, 0]]
    entropy = torch.tensor([[0.1, 0.9, 0.2, 0.0], [0.5, 0.0, 0.4, 0.9]])
    by_entropy = tabom.from_decoding_order(prompt, response, steps, entropy)
    assert by_entropy.decode_rank.tolist() == [[2, 1, 0, 3], [2, -1, 1, 0]]
    assert torch.equal(by_entropy.entropy, entropy)
    own = decode(TinyModel(), prompts(5), N, mask_id=MASK, tokens_per_step=2)
    again = tabom.from_decoding_order(own.prompt, own.response, own.decode_rank // 2, own.entropy)
    assert torch.equal(again.decode_rank, own.decode_rank)
    narrow = tabom.from_decoding_order(prompt, response, torch.tensor(steps, dtype=torch.int32),
                                       entropy.tolist())
    assert torch.equal(narrow.decode_rank, by_entropy.decode_rank)
    for wrong in ([[0, 1, 2], [0, 1, 2]], [[0.0, 1.0, 2.0, 3.0]] * 2):
        with pytest.raises(ValueError, match="decoding_order must hold"):
            tabom.from_decoding_order(prompt, response, wrong)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_logits_lose_nothing_more(dtype):
    """bf16 or fp16 logits: entropies and losses are those of the same numbers in float32."""
    table = torch.randn(6, N, V, generator=seeded()).to(dtype) * 8
    trajectories = random_trajectories()
    table.requires_grad_()

    def half(tokens):
        return torch.cat([torch.zeros(6, L, V, dtype=dtype), table], 1)

    def full(tokens):
        return half(tokens).float()
    assert run_all(half, trajectories) == run_all(full, trajectories)
    loss, _ = tabom_loss(half, trajectories, mask_id=MASK, window_size=N, margin=0.2,
                         rank_weight=1.0, generator=seeded())
    loss.backward()
    assert loss.dtype == torch.float32 and table.grad.dtype == dtype
    one, other = (decode(model, prompts(6), N, mask_id=MASK) for model in (half, full))
    assert torch.equal(one.entropy, other.entropy) and torch.equal(one.response, other.response)


def test_bfloat16_samples_follow_their_softmax():
    """Sampling from bf16 logits is exact too: a chi-square test against their own softmax."""
    row = torch.tensor([0.0, 1.0, -1.0, 0.5, 3.0], dtype=torch.bfloat16)
    model = lambda tokens: row.expand(len(tokens), tokens.shape[1], 5)  # noqa: E731
    response = decode(model, prompts(20000), 1, mask_id=5, temperature=1.0,
                      generator=seeded()).response
    expected = [20000 * math.exp(value) for value in log_p(row.float())]
    assert chi_square(response.flatten().bincount(minlength=5).tolist(), expected) < 23.5  # 1e-4


def test_autocast_checkpointing_and_adapters_work():
    """Under autocast, with gradient checkpointing, and with a frozen base and a low-rank adapter,
    the loss is the plain one (to bf16) and only what may learn gets a gradient."""
    from torch.utils.checkpoint import checkpoint
    trajectories, cuts = random_trajectories(), torch.tensor([0, 1, 2, 0, 1, 2])
    settings = dict(mask_id=MASK, window_size=3, margin=0.2, rank_weight=1.0, n_visible=cuts)
    plain = TinyModel()
    expected, _ = tabom_loss(plain, trajectories, **settings)
    expected.backward()
    recomputed = TinyModel()
    loss, _ = tabom_loss(lambda tokens: checkpoint(recomputed, tokens, use_reentrant=False),
                         trajectories, **settings)
    loss.backward()
    assert loss == expected and torch.equal(recomputed.out.grad, plain.out.grad)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss, _ = tabom_loss(plain, trajectories, **settings)
    assert loss.dtype == torch.float32 and close(loss, expected, 0.05)
    frozen, down, up = TinyModel().requires_grad_(False), torch.randn(V, 2), torch.zeros(2, V)
    up.requires_grad_()
    loss, _ = tabom_loss(lambda tokens: frozen(tokens) + frozen(tokens) @ down @ up, trajectories,
                         **settings)
    loss.backward()
    assert loss == expected and up.grad.abs().sum() > 0 and frozen.out.grad is None


def released_loss(logits, step, response, cut, window_size, margin):
    """The authors' loss as a slow loop: softmax, p log(p + 1e-10), pairs by increasing step, the
    mean over pairs and then over rows; cross-entropy over the window's steps, mean over tokens."""
    rank_losses, nll = [], []
    for row in range(len(logits)):
        p = logits[row].double().softmax(-1)
        entropy = [-sum(float(q) * math.log(float(q) + 1e-10) for q in p[i]) for i in range(N)]
        inside = [i for i in range(N) if cut[row] <= step[row, i] < cut[row] + window_size]
        pairs = [max(0.0, entropy[r] - entropy[s] + margin)
                 for r in inside for s in inside if step[row, r] < step[row, s]]
        rank_losses.append(mean(pairs))
        nll += [-math.log(float(p[i, response[row, i]])) for i in inside]
    return mean(nll), mean(rank_losses)


@pytest.mark.parametrize("window_size", [2, 3, 4])
def test_one_token_per_step_and_full_windows_agree_with_the_release(window_size):
    """There, and only there, ours and the authors' loss are the same numbers, to 1e-4."""
    table = 3 * torch.randn(6, N, V, generator=seeded())
    data = random_trajectories(n_given=(0,))
    cuts = torch.tensor([0, 1, 2, 0, 1, 2]).clamp(max=N - window_size)
    _, metrics = tabom_loss(Scripted(table), data, mask_id=MASK, window_size=window_size,
                            margin=0.2, rank_weight=1.0, n_visible=cuts)
    nll, rank_loss = released_loss(table, data.decode_rank, data.response, cuts, window_size, 0.2)
    assert abs(float(metrics["nll"]) - nll) < 1e-4
    assert abs(float(metrics["rank_loss"]) - rank_loss) < 1e-4


class Sizes(TorchDispatchMode):
    """Notes (operation, shape, dtype) of everything that torch computes, views not counted."""

    def __init__(self):
        super().__init__()
        self.made = []

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        result = function(*arguments, **(keywords or {}))
        if isinstance(result, torch.Tensor) and not function.is_view:
            self.made.append((str(function), tuple(result.shape), result.dtype))
        return result


def test_the_loss_touches_the_window_only():
    """Beside the logits' own gradient nothing is as large as the response times the vocabulary, in
    float32 or otherwise, and no tensor is (B, N, N)."""
    b, n, v, w = 2, 40, 60, 4
    logits = torch.randn(b, n + 1, v, generator=seeded()).bfloat16().requires_grad_()
    rank = torch.stack([torch.randperm(n, generator=seeded(row)) for row in range(b)])
    data = Trajectories(torch.zeros(b, 1, dtype=torch.int64),
                        torch.randint(v - 1, (b, n), generator=seeded()), rank, torch.zeros(b, n))
    with Sizes() as forward:
        loss, _ = tabom_loss(lambda tokens: logits, data, mask_id=v - 1, window_size=w, margin=0.2,
                             rank_weight=1.0, generator=seeded())
    with Sizes() as backward:
        loss.backward()
    assert max(math.prod(shape) for _, shape, _ in forward.made) == b * w * v
    large = [made for made in backward.made if math.prod(made[1]) > b * w * v]
    assert large and all(dtype == torch.bfloat16 for _, _, dtype in large)
    assert len(large) <= 2                       # zeros, then the window's rows added into them


def test_decoding_never_copies_the_logits():
    """The sampler reads (B, N, V) a few positions at a time: nothing that it makes is as large."""
    b, n, v = 2, 4, 2 ** 19
    logits = torch.randn(b, n + 1, v, generator=seeded())
    with Sizes() as whole:
        decode(lambda tokens: logits, torch.zeros(b, 1, dtype=torch.int64), n, mask_id=v - 1,
               tokens_per_step=2, temperature=1.0, generator=seeded())
    assert max(math.prod(shape) for _, shape, _ in whole.made) == 2 ** 21 < b * n * v


@every_loss
def test_losses_never_wait_for_the_device(loss_fn, own):
    """On the meta device there are no values to look at: a loss that asks for one would fail."""
    data = random_trajectories().to("meta")
    model = lambda tokens: torch.empty(*tokens.shape, V + 1, device="meta")  # noqa: E731
    own = {**own, "reference": model} if "reference" in own else own
    loss, metrics = loss_fn(model, data, mask_id=MASK, **own)
    assert loss.device.type == "meta" and loss.shape == ()


@pytest.mark.parametrize("fields, message", [
    ({"prompt": torch.zeros(6, dtype=torch.int64)}, "prompt must be"),
    ({"prompt": torch.zeros(5, L, dtype=torch.int64)}, "prompt must be"),
    ({"response": torch.zeros(6, N + 1, dtype=torch.int64)}, "prompt must be"),
    ({"entropy": torch.zeros(6)}, "prompt must be"),
    ({"response": torch.zeros(6, N)}, "must be int64"),
    ({"decode_rank": torch.zeros(6, N, dtype=torch.int32)}, "must be int64"),
    ({"entropy": torch.zeros(6, N, dtype=torch.int64)}, "entropy floating-point"),
    ({"entropy": torch.zeros(6, N + 1)}, "prompt must be"),
    ({"prompt": torch.zeros(6, L)}, "must be int64"),
])
def test_trajectories_of_a_wrong_form_cannot_be_made(fields, message):
    """Shapes and dtypes are checked where the data are made, at no cost for the losses."""
    with pytest.raises(ValueError, match=message):
        Trajectories(**{**vars(random_trajectories()), **fields})


@pytest.mark.parametrize("name, place, value, message", [
    ("decode_rank", (0, 2), 7, "decode_rank must hold"),
    ("decode_rank", (1, 0), -1, "decode_rank must hold"),
    ("decode_rank", (0, 0), -2, "decode_rank must hold"),
    ("prompt", (3, 0), MASK, "the prompt contains mask_id"),
    ("response", (0, 1), MASK, "the response contains mask_id"),
    ("response", (0, 1), -1, "the response contains a token outside of 0 .. 4"),
    ("prompt", (0, 1), V + 3, "the prompt contains a token outside of 0 .. 4"),
    ("response", (1, 0), V + 3, "the response contains a token outside of 0 .. 4"),
    ("entropy", (0, 1), math.nan, "entropy"),
    ("entropy", (0, 1), -0.5, "entropy"),
])
def test_validate_finds_every_wrong_value(name, place, value, message):
    """The expensive check, to be called once per data set: each field, each kind of mistake."""
    data = random_trajectories(n_given=(0,))
    tabom.validate(data, MASK, V)
    tabom.validate(random_trajectories(), MASK, V)
    tabom.validate(data[:0], MASK, V)
    getattr(data, name)[place] = value
    with pytest.raises(ValueError, match=message):
        tabom.validate(data, MASK, V)


@pytest.mark.parametrize("name, setting", [
    ("tabom", {"window_size": 0}), ("tabom", {"window_size": 2.5}),
    ("tabom", {"n_visible": torch.zeros(5, dtype=torch.int64)}),
    ("tabom", {"n_visible": torch.zeros(6, 1, dtype=torch.int64)}), ("tabom", {"margin": -0.1}),
    ("tabom", {"rank_weight": -1.0}),
    ("trajectory", {"window_size": -3}), ("nelbo", {"mask_ratio": 1.5}),
    ("nelbo", {"mask_ratio": -0.1}), ("t3d", {"a": -1.0}), ("t3d", {"b": -1.0}),
])
def test_losses_refuse_settings_before_the_model_runs(name, setting):
    """One clear sentence, and no forward pass is wasted."""
    loss_fn, own = LOSSES[name]
    model = TinyModel()
    with pytest.raises(ValueError, match=f"{next(iter(setting))}"):
        loss_fn(model, random_trajectories(), mask_id=MASK, **{**own, **setting})
    assert model.seen == []


@pytest.mark.parametrize("output", [torch.zeros(6, L + N), torch.zeros(6, N, V),
                                    torch.zeros(1, L + N, V),
                                    SimpleNamespace(logits=torch.zeros(6, L + N, V))])
def test_a_model_of_another_form_is_named(output):
    """Logits of the response only, without a vocabulary, or in an object: one sentence says so."""
    with pytest.raises(ValueError, match="the model must return a tensor of logits"):
        nelbo_loss(lambda tokens: output, random_trajectories(), mask_id=MASK)


@every_loss
def test_no_rows_are_an_error_of_their_own(loss_fn, own):
    """A checker that kept nothing: one sentence, where a mean over nothing would be nan."""
    with pytest.raises(ValueError, match="no rows"):
        loss_fn(TinyModel(), random_trajectories()[:0], mask_id=MASK, **own)
    assert len(decode(TinyModel(), prompts(0), N, mask_id=MASK)) == 0


def test_windows_without_limit_and_cuts_before_the_first_reveal():
    """A window as long as an integer goes is the rest of the response; what was given stays
    visible whatever the cut."""
    ranks = torch.tensor([[-1, 2, 0, 1]])
    _, masked, window = segment_masks(ranks, torch.tensor([1]), sys.maxsize)
    assert masked.tolist() == window.tolist() == [[False, True, False, True]]
    assert segment_masks(ranks, torch.tensor([-5]), 2)[0].tolist() == [[True, False, False, False]]
    for n_visible, window_size in ((-5, 2), (0, 0), (0, 2.0), (torch.zeros(2), 2)):
        with pytest.raises(ValueError, match="must be a whole number of at least"):
            segment_masks(ranks, n_visible, window_size)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_the_default_dtype_changes_nothing(dtype):
    """torch.set_default_dtype, common where large models are loaded, moves no order and no draw."""
    table, trajectories = torch.randn(N, V, generator=seeded()), random_trajectories()

    def everything():
        got = decode(Scripted(table), prompts(4), N, mask_id=MASK, order="random", temperature=1.0,
                     generator=seeded())
        return [field.tolist() for field in vars(got).values()], [
            loss_fn(lambda tokens: torch.cat([torch.zeros(6, L, V, dtype=torch.float32),
                                              table.expand(6, N, V)], 1), trajectories,
                    mask_id=MASK, generator=seeded(), **own)[0].item()
            for name, (loss_fn, own) in LOSSES.items() if name != "t3d"]
    expected = everything()
    torch.set_default_dtype(dtype)
    try:
        got = everything()
    finally:
        torch.set_default_dtype(torch.float32)
    assert got == expected


@pytest.mark.parametrize("temperature, spread", [(1e-40, 1), (1e30, 4)])
def test_extreme_temperatures_are_the_two_limits(temperature, spread):
    """Towards 0 always the likeliest token, towards infinity all alike, never a banned one."""
    table = torch.tensor([[5.0, 1.0, 2.0, 3.0, 4.0]])
    got = decode(Scripted(table), torch.ones(300, L, dtype=torch.int64), 1, mask_id=0,
                 temperature=temperature, generator=seeded()).response
    assert len(got.unique()) == spread and not (got == 0).any()
    assert spread > 1 or (got == 4).all()


@pytest.mark.parametrize("order", ["entropy", "confidence", "margin"])
def test_large_logits_are_measured_in_parts_that_fit_together(order):
    """Whatever the size of a part, down to less than one position, the result is the same; bf16
    logits are measured in float32."""
    logits = torch.randn(3, N, V + 1, generator=seeded())
    whole = tabom.entropy_and_difficulty(logits, MASK, order)
    for size in (1, 18, 36, 72, 90):
        parts = tabom.entropy_and_difficulty(logits, MASK, order, part_size=size)
        assert all(map(torch.equal, parts, whole))
    half = 8 * logits.bfloat16()
    assert all(map(torch.equal, tabom.entropy_and_difficulty(half, MASK, order),
                   tabom.entropy_and_difficulty(half.float(), MASK, order)))


def test_sampling_is_done_in_float32():
    """bf16 logits give the tokens that the same numbers give in float32."""
    logits = torch.randn(500, V, generator=seeded()).bfloat16()
    assert torch.equal(tabom.pick_tokens(logits, 0.7, seeded()),
                       tabom.pick_tokens(logits.float(), 0.7, seeded()))


def test_the_window_comes_in_reveal_order():
    """window_at_cut: ranks cut, cut + 1, .. in the columns 0, 1, .."""
    rank = torch.stack([torch.randperm(64, generator=seeded(row)) for row in range(4)])
    tokens = torch.zeros(4, 64, dtype=torch.int64)
    data = Trajectories(prompts(4), tokens, rank, tokens.float())
    _, _, got, window = tabom.window_at_cut(lambda x: torch.zeros(*x.shape, V), data, 3, 20, MASK)
    assert torch.equal(got, torch.arange(3, 23).expand(4, -1)) and window.all()


def test_decoding_orders_may_have_gaps_and_any_integer_type():
    """Step numbers need not be dense, int8 does not overflow, whole-number entropies are read."""
    prompt, response = prompts(1), torch.zeros(1, 4, dtype=torch.int64)
    for steps in ([[100, -1, 7, 0]], torch.tensor([[100, -1, 7, 0]], dtype=torch.int8)):
        assert tabom.from_decoding_order(prompt, response, steps).decode_rank.tolist() == [
            [2, -1, 1, 0]]
    got = tabom.from_decoding_order(prompt, response, [[0, 0, 1, 1]], [[2, 1, 1, 0]])
    assert got.decode_rank.tolist() == [[1, 0, 3, 2]]


def test_decode_returns_its_own_tensors_and_takes_numpy_integers():
    """Nothing to decode: a copy of what was given.  A numpy integer is a whole number."""
    given = torch.zeros(2, N, dtype=torch.int64)
    got = decode(TinyModel(), prompts(2), N, mask_id=MASK, given=given).response
    assert torch.equal(got, given) and got.data_ptr() != given.data_ptr()
    decode(TinyModel(), prompts(2), N, mask_id=MASK, tokens_per_step=np.int64(2))


def test_padding_may_hold_any_token_of_the_vocabulary_or_mask():
    """validate: [MASK] is right where nothing is ranked, an id beyond the vocabulary never is."""
    data = random_trajectories()
    data.response[data.decode_rank < 0] = MASK
    tabom.validate(data, MASK, V)
    for wrong, mask_id in ((V + 3, MASK), (V, V + 1)):
        data.response[1, data.decode_rank[1].argmin()] = wrong
        with pytest.raises(ValueError, match="outside"):
            tabom.validate(data, mask_id, V)
    data = random_trajectories()
    data.entropy[0, 1] = math.inf
    with pytest.raises(ValueError, match="entropy"):
        tabom.validate(data, MASK, V)


def test_the_reference_of_t3d_is_in_evaluation_mode():
    """A frozen reference drops nothing out, whatever the model that trains does."""
    assert not LaggedCopy(nn.Dropout().train()).frozen.training


def test_arms_differ_by_their_loss():
    """Each arm gets its own loss function with the settings of the configuration."""
    config = SimpleNamespace(window_size=7, margin=0.3, rank_weight=1.5)
    loss = {arm: tabom.arm_loss(arm, nn.Linear(1, 1), config) for arm in tabom.ARMS}
    assert loss["SFT-GT"] is loss["SFT-SD"] is nelbo_loss and loss["dInfer"] is dinfer_loss
    assert loss["T3D"].func is t3d_loss
    assert isinstance(loss["T3D"].keywords["reference"], LaggedCopy)
    assert loss["trajectory"].func is trajectory_loss
    assert loss["trajectory"].keywords == {"window_size": 7}
    assert loss["TABOM"].func is tabom_loss
    assert loss["TABOM"].keywords == {"window_size": 7, "margin": 0.3, "rank_weight": 1.5}


# ==================================================================================================
# The lower half: denoiser, training loop, demo and command line
# ==================================================================================================

TINY = ("pretrain_updates=6", "pretrain_batch=8", "queries=24", "rollout_filter=none", "updates=3",
        "batch_size=8", "test_problems=4", "samples=2", "width=16", "heads=2", "layers=1")


def run(*arguments, settings=TINY):
    """The command line with tiny settings -> its exit code."""
    overrides = [part for setting in settings for part in ("--set", setting)]
    return tabom.main([*arguments, *overrides])


def figures(path):
    """What a run reports, but for the time it took."""
    report = json.loads(path.read_text())
    for one in report["runs"].values():
        del one["seconds"]
    return report


@pytest.mark.parametrize("new_domain", ["blank", "mul"])
def test_the_whole_demo_runs_and_repeats_itself(new_domain, tmp_path, capsys):
    """Every arm end to end, both toys; the same seed gives the same figures and the same text."""
    texts = []
    for name in ("one.json", "two.json"):
        settings = (*TINY, f"new_domain={new_domain}")
        assert run("--demo", "--json", str(tmp_path / name), settings=settings) == 0
        texts.append(re.sub(r"\[ *\d+ s\]|[\d.]+ minutes on CPU", "", capsys.readouterr().out))
    assert texts[0] == texts[1]
    report = figures(tmp_path / "one.json")
    assert report == figures(tmp_path / "two.json")
    arms = ["No-SFT", *tabom.ARMS, toy_data.CONTROL]
    assert list(report["runs"]["0"]["arms"]) == arms
    assert report["config"]["new_domain"] == new_domain and report["seeds"] == [0]
    for arm in arms:
        row = report["runs"]["0"]["arms"][arm]
        assert all(math.isfinite(value) for value in row.values() if isinstance(value, float))
        assert f"\n    {arm}" in texts[0]
    for claim, figure, held in report["runs"]["0"]["claims"]:
        assert f"{'held        ' if held else 'did NOT hold'}  {claim}: {figure}" in texts[0]


def test_seeds_arms_base_and_save(tmp_path, capsys):
    """Several seeds are summarised; a stored base gives what pretraining gave; so does --save."""
    base, saved = str(tmp_path / "base.pt"), str(tmp_path / "tuned.pt")
    reports = [tmp_path / name for name in ("first.json", "again.json", "more.json")]
    arms = ("--arms", "TABOM", "SFT-SD")
    assert run("--demo", *arms, "--base", base, "--save", saved, "--json", str(reports[0])) == 0
    assert run("--demo", *arms, "--base", base, "--json", str(reports[1])) == 0
    assert "in the base file" in capsys.readouterr().out
    assert figures(reports[0]) == figures(reports[1])
    assert run("--demo", *arms, "--base", base, "--seeds", "0", "3", "--json", str(reports[2])) == 0
    text, more = capsys.readouterr().out, figures(reports[2])
    assert more["runs"]["0"] == figures(reports[0])["runs"]["0"]           # seeds do not interfere
    assert more["runs"]["3"] != more["runs"]["0"]
    assert list(more["runs"]["0"]["arms"]) == ["No-SFT", "TABOM", "SFT-SD"]
    assert "TABOM - SFT-SD" in text and "of 2 seeds" in text
    assert run("--demo", *arms, "--base", saved) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "again.json", "base.pt", "first.json", "more.json", "tuned.pt"]


def test_an_arm_with_its_own_settings_is_the_arm_of_a_run_with_these_settings(tmp_path):
    """NAME:SETTING=VALUE gives what --set gives; other arms of the run do not notice it."""
    names = ("TABOM:window_size=2,updates=5", "TABOM:ranks=reversed", "SFT-GT:reference_hand=own",
             "No-SFT:temperature=0.5", "SFT-SD:tuned_share=0.5,learning_rate=0.01", "TABOM")
    path = tmp_path / "x.json"
    assert run("--demo", "--arms", *names, "--json", str(path)) == 0
    together = figures(path)["runs"]["0"]["arms"]
    assert list(together) == ["No-SFT", *names]
    for name in names:
        arm, _, settings = name.partition(":")
        overrides = settings.split(",") if settings else []
        assert run("--demo", "--arms", arm, "--json", str(path), settings=(*TINY, *overrides)) == 0
        alone = figures(path)["runs"]["0"]["arms"][arm]
        assert {**alone, "change": None} == {**together[name], "change": None}
    assert len({row["TDS"] for row in together.values()}) == len(together)


def test_every_eighth_problem_is_kept_out_of_training(monkeypatch):
    """No arm sees an answer to it, under whatever settings; the evaluation sees no other."""
    splits = toy_data.split_problems("blank", 0)
    every_eighth = toy_data.write_solutions("blank", *splits["blank"]["query"][::8].unbind(1))[0]
    seen = {"train": [], "evaluate": []}

    def is_held_out(data):
        return (data.prompt[:, None] == every_eighth).all(2).any(1)

    def spy(name, position):
        real = getattr(tabom, name)

        def wrapper(*arguments, **settings):
            seen[name].append(arguments[position])
            return real(*arguments, **settings)
        monkeypatch.setattr(tabom, name, wrapper)
    spy("train", 1)
    spy("evaluate", 2)
    assert run("--demo", "--arms", "SFT-GT", "SFT-SD", "TABOM:common_factors=5") == 0
    assert len(seen["train"]) == 1 + 3 and len(seen["evaluate"]) == 1 + 3
    assert not any(is_held_out(data).any() for data in seen["train"][1:])          # 0: pretraining
    assert all(is_held_out(data).all() and len(data) for data in seen["evaluate"])


def test_the_turn_of_the_factor(tmp_path, monkeypatch):
    """Mean turn of the two digits of the factor, counted from 1; 0 in mul, where they are given."""
    path = tmp_path / "x.json"
    monkeypatch.setitem(toy_data.MUL, "collect_order", "random")
    for domain, lowest, highest in (("blank", 1.5, 11.5), ("mul", 0, 0)):
        assert run("--demo", "--arms", "SFT-SD", "--json", str(path),
                   settings=(*TINY, f"new_domain={domain}")) == 0
        turn = figures(path)["runs"]["0"]["arms"]["SFT-SD"]["turn"]
        assert lowest <= turn <= highest


def test_tuned_share_leads_from_the_base_to_the_tuned_model(tmp_path):
    """Almost none of the way is the base, all of it is what training gave."""
    rows = {}
    for share in ("1e-9", "1.0"):
        path = tmp_path / f"{share}.json"
        assert run("--demo", "--arms", "TABOM", "--json", str(path),
                   settings=(*TINY, f"tuned_share={share}")) == 0
        rows[share] = figures(path)["runs"]["0"]["arms"]
    start, end = (abs(row["TABOM"]["TDS"] - row["No-SFT"]["TDS"]) for row in rows.values())
    assert start < 1e-6 * rows["1.0"]["No-SFT"]["TDS"] < end


def test_summary_is_mean_spread_and_paired_difference():
    """By hand: TABOM 12 and 20, SFT-SD 10 and 12, so the paired difference is 5 ± 4.24; each is
    compared with No-SFT too, and nothing with itself."""
    names = ("new", "old", "2 tok", "TDS", "pairs", "gap", "turn", "factors", "effective")
    runs = [{arm: dict.fromkeys(names, float(value)) for arm, value in values.items()}
            for values in ({"No-SFT": 2, "SFT-SD": 10, "TABOM": 12},
                           {"No-SFT": 2, "SFT-SD": 12, "TABOM": 20})]
    rows = {line.strip().split("  ")[0]: line for line in toy_data.summary_table(runs).splitlines()}
    assert "11.00 ± 1.41" in rows["SFT-SD"] and "16.00 ± 5.66" in rows["TABOM"]
    assert "+5.00 [-33.13, +43.13]" in rows["TABOM - SFT-SD"]            # 12.71 * 4.24 / sqrt(2)
    assert "+9.00 [-3.71, +21.71]" in rows["SFT-SD - No-SFT"] and "+14.00" in rows["TABOM - No-SFT"]
    assert len(rows) == 1 + 3 + 2 + 1


def test_interval_over_seeds_is_students_t():
    """Four differences 1, 2, 3, 4: 2.5 ± 3.18 * 1.291 / 2; the table ends at 20 seeds."""
    mean_, low, high = toy_data.seed_interval(torch.tensor([1.0, 2.0, 3.0, 4.0]))
    assert close(mean_, 2.5) and close(low, 2.5 - 2.0527, 1e-3) and close(high, 4.5527, 1e-3)
    assert len(toy_data.T_975) == 19 and list(toy_data.T_975) == sorted(toy_data.T_975)[::-1]
    assert close(toy_data.seed_interval(torch.arange(40.0))[2] - 19.5, 2.09 * 11.6905 / 40 ** 0.5,
                 1e-3)


def test_claims_are_counted_over_seeds():
    """Held in two of three seeds is printed as that."""
    runs = [[("C1 this", "0.1", True), ("C2 that", "3", held)] for held in (True, False, True)]
    assert toy_data.claims_table(runs).splitlines() == ["    held in 3 of 3  C1 this",
                                                        "    held in 2 of 3  C2 that"]


def test_pass_at_k_is_the_chance_that_one_of_k_tries_is_right():
    """Against all subsets of the tries; k goes as far as there are tries."""
    solved = torch.zeros(3, 9, dtype=torch.bool)
    solved[0, :1], solved[1, [2, 4, 7]] = True, True
    got = toy_data.pass_at(solved)
    assert list(got) == [1, 8]
    assert list(toy_data.pass_at(solved[:, :8])) == [1, 8]
    assert close(toy_data.pass_at(solved[:, :8])[8], 200 / 3)            # at k = n: solved at all
    for k, value in got.items():
        tries = list(itertools.combinations(range(9), k))
        assert close(value, 100 * mean(mean(float(row[list(some)].any()) for some in tries)
                                       for row in solved))


def test_boundary_counts_what_the_base_never_solved():
    """Two problems at 0 for the base, of which the tuned model solves one, in half of its tries."""
    base = {"per problem": [0.0, 0.0, 50.0], "pass@k": {1: 16.7}}
    tuned = {"per problem": [50.0, 0.0, 100.0], "pass@k": {1: 50.0}}
    text = toy_data.boundary(base, tuned)
    assert "of 3 problems the base never solved 2" in text
    assert "solves 1 of these, in 25.0 % of its tries" in text
    none = toy_data.boundary({"per problem": [50.0], "pass@k": {1: 50.0}},
                             {"per problem": [100.0], "pass@k": {1: 100.0}})
    assert "of 1 problems the base never solved 0" in none


def test_controls_change_the_order_and_nothing_else():
    """Reversed and shuffled ranks are permutations of the valid positions; recorded ones stay."""
    data = random_trajectories(200)
    for how in ("recorded", "reversed", "shuffled"):
        got = tabom.reorder(data, how, seeded())
        tabom.validate(got, MASK, V)
        assert torch.equal(got.response, data.response)
        assert torch.equal(got.decode_rank < 0, data.decode_rank < 0)
        if how == "recorded":
            assert torch.equal(got.decode_rank, data.decode_rank)
        if how == "reversed":
            expected = data.n_decoded[:, None] - 1 - data.decode_rank
            assert torch.equal(got.decode_rank[data.decode_rank >= 0],
                               expected[data.decode_rank >= 0])
    assert all(len(got.decode_rank[:, i].unique()) > 2 for i in range(N))
    first = data.decode_rank[::3][got.decode_rank[::3] == 0]             # shuffled: any old rank
    assert len(first) == 67 and first.unique().tolist() == list(range(N))


def test_filters_keep_what_they_say():
    """Right answer and working; right answer; anything; wrong answers only."""
    prompt = torch.tensor([toy_data.encode("47×")] * 3)
    response = torch.tensor([toy_data.encode(text) for text in (
        "85=3995235376", "85=3995235375", "85=3994235376")])
    for name, expected in (("working", [True, False, False]), ("answer", [True, True, False]),
                           ("none", [True, True, True]), ("wrong", [False, False, True])):
        config = toy_data.Config(rollout_filter=name)
        assert toy_data.is_valid(config, prompt, response).tolist() == expected


def test_common_factors():
    """The commonest stay, of equal ones the smaller; 100 keeps all, what is no number too."""
    text = ["85=3995235376"] * 3 + ["12=0564094047"] * 2 + ["47=0000000000", "9=85=39952353"]
    response = torch.tensor([toy_data.encode(line) for line in text])
    for count, expected in ((1, [1] * 3 + [0] * 4), (2, [1] * 5 + [0] * 2), (100, [1] * 7)):
        assert toy_data.has_common_factor(response, count).tolist() == [bool(x) for x in expected]


def test_first_of_each_problem():
    """Row i answers problem i % n: against a loop, also where the last round is not complete."""
    generator = torch.Generator().manual_seed(0)
    for rows, n_problems, count in ((13, 5, 1), (12, 4, 2), (3, 5, 1), (20, 1, 7), (9, 3, 48000)):
        kept = torch.rand(rows, generator=generator) < 0.6
        seen, expected = [0] * n_problems, []
        for row, keep in enumerate(kept.tolist()):
            seen[row % n_problems] += keep
            expected.append(keep and seen[row % n_problems] <= count)
        assert toy_data.first_of_each(kept, n_problems, count).tolist() == expected


def test_one_answer_per_problem_reaches_the_training_data():
    """self_distil keeps the first right answer to each problem, and as many problems as before."""
    problems = toy_data.split_problems("mul", 0)["mul"]["query"][:40]
    config = toy_data.Config(new_domain="mul", queries=100, rollout_filter="none")
    torch.manual_seed(0)
    base = tabom.Denoiser(len(toy_data.VOCABULARY), 16, 1, 8, 1).eval()
    every, _ = tabom.self_distil(base, problems, config, 0)
    first, asked = tabom.self_distil(
        base, problems, toy_data.replace(config, answers_per_problem=1), 0)
    assert len(every) == 100 and torch.equal(asked, problems)
    assert torch.equal(first.response, every.response[:40])


def test_claims_follow_the_figures():
    """A claim is judged by the figures: turn them round and every judgement turns."""
    def judged(new, old, tds, two, low, own, other, solved=(0.0, 3.0)):
        names = ("No-SFT", "SFT-GT", "SFT-SD", "trajectory", "TABOM")
        results = {arm: dict(zip(("new", "old", "TDS", "2 tok"), row))
                   for arm, *row in zip(names, new, old, tds, two)}
        leads = {arm: (low + 1, low, low + 2) for arm in names[:-1]}
        results["No-SFT"]["per problem"], results["TABOM"]["per problem"] = (0.0, 0.0), solved
        return toy_data.judge(results, leads, own, other)
    good = judged((5, 0, 10, 10, 50), (98, 60, 97, 97, 97), (0.2, 0.2, 0.2, 0.2, 0.3),
                  (5, 0, 5, 5, 40), 5.0, [0.1] * 9, [0.3] * 9)
    bad = judged((5, 0, 10, 10, 12), (98, 90, 97, 97, 95), (0.2, 0.2, 0.2, 0.2, 0.1),
                 (5, 0, 5, 5, 9), -0.1, [0.1] * 8 + [0.4], [0.3] * 9, (0.0, 0.0))
    assert [claim for claim, *_ in good] == [claim for claim, *_ in bad]
    assert [claim.split()[0] for claim, *_ in good] == [
        "C1", "C2", "C3", "C4", "C4", "C4", "C5", "C5", "C6", "C7", "C7", "C8", "C12"]
    assert all(held for *_, held in good) and not any(held for *_, held in bad)
    edge = judged((0, 0, 5, 5, 10), (98, 83, 97, 97, 96), (0.2, 0.2, 0.2, 0.2, 0.2),
                  (5, 0, 5, 5, 10), 0.0, [0.1] * 9, [0.3] * 9)            # exactly at each limit
    assert [claim.split()[0] for claim, _, held in edge if held] == ["C1", "C2", "C5", "C8", "C12"]


def test_claims_about_variants_follow_the_figures():
    """C9: the best window is inside of the sweep; C10: all gain; C11: without the order less than
    half of the gain is left; C6: a gain that costs as much in the old domains is none."""
    def judged(**new):
        results = {arm: {"new": value, "old": 90.0, "TDS": 0.0, "2 tok": 0.0, "per problem": [1.0]}
                   for arm, value in new.items()}
        results["trajectory"]["old"] = new["trajectory"] + 90
        leads = {arm: (5.0, 4.0, 6.0) for arm in results if arm != "TABOM"}
        claims = toy_data.judge(results, leads, [0.1] * 9, [0.3] * 9)
        return {tag: held for claim, _, held in claims
                if (tag := claim.split()[0]) in ("C6", "C9", "C10", "C11")}

    def windows(*new):
        return dict(zip((f"TABOM:window_size={size}" for size in (2, 4, 13)), new))
    base = {"No-SFT": 10, "trajectory": 3.9, "TABOM": 50}
    grid = {"TABOM:margin=0.1": 11, "TABOM:rank_weight=1,margin=0.1": 12}
    control = {"TABOM:ranks=shuffled": 29}
    assert judged(**base, **windows(20, 40, 30), **grid, **control) == {
        "C6": True, "C9": True, "C10": True, "C11": True}
    bad = {"No-SFT": 10, "trajectory": 4.1, "TABOM": 50, "TABOM:ranks=shuffled": 31}
    for new in ((20, 40, 50), (40, 20, 30)):
        assert judged(**bad, **windows(*new), **{**grid, "TABOM:margin=0.1": 9}) == {
            "C6": False, "C9": False, "C10": False, "C11": False}


def test_compare_is_paired():
    """The mean difference, with an interval that is a point when every problem differs alike."""
    one, other = {"per problem": [10.0, 50.0, 90.0]}, {"per problem": [5.0, 45.0, 85.0]}
    assert toy_data.compare(one, other) == (5.0, 5.0, 5.0)
    mean_, low, high = toy_data.compare(one, {"per problem": [90.0, 50.0, 10.0]})
    assert mean_ == 0 and low < 0 < high


@pytest.mark.parametrize("arguments, says", [
    (["--demo", "--set", "colour=red"], "no setting 'colour'"),
    (["--demo", "--set", "updates"], "'' is no int"),
    (["--demo", "--set", "updates=many"], "'many' is no int"),
    (["--demo", "--set", "updates=0"], "updates must be positive"),
    (["--demo", "--set", "margin=-1"], "margin must be"),
    (["--demo", "--set", "margin=nan"], "margin must be"),
    (["--demo", "--set", "ranks=sideways"], "ranks must be one of recorded"),
    (["--demo", "--set", "new_domain=div"], "new_domain must be one of blank, mul"),
    (["--demo", "--set", "width=95"], "multiple of heads"),
    (["--demo", "--set", "queries=64", "--set", "rollout_filter=working"], "rollouts are valid"),
    (["--demo", "--arms", "SFT-SD", "--save", "{}/x.pt"], "--save"),
    (["--demo", "--arms", "SFT-XX"], "no arm 'SFT-XX', only No-SFT, SFT-GT"),
    (["--demo", "--arms", "TABOM", "SFT-XX:margin=1"], "no arm 'SFT-XX'"),
    (["--demo", "--arms", "TABOM:colour=red"], "no setting 'colour'"),
    (["--demo", "--arms", "TABOM:margin=-1"], "margin must be"),
    (["--demo", "--arms", "TABOM:margin"], "margin: '' is no float"),
    (["--demo", "--arms", "TABOM:queries=7"], "queries is the same for all, use --set"),
    (["--demo", "--json", "{}/missing/x.json"], "cannot be written"),
    (["--demo", "--base", "{}"], "cannot be written"),
    (["--demo", "--base", "{}/x.pt", "--save", "{}/x.pt"], "name two files"),
    (["--demo", "--base", "{}/x.pt", "--json", "{}/./x.pt"], "name two files"),
    (["--demo", "--seeds", "1", "1"], "different numbers"),
    (["--demo", "--seeds", "-1"], "different numbers"),
    (["--demo", "--set", "margin=inf"], "margin must be"),
    (["--demo", "--base", "{}/foreign.txt"], "no base file"),
    (["--demo", "--base", "{}/foreign.pt"], "no base file"),
    (["--demo", "--base", "{}/other.pt"], "other bases"),
    (["--demo", "--device", "cuda"], "no CUDA device"),
])
def test_a_mistake_is_one_sentence_and_exit_code_2(arguments, says, tmp_path, capsys, monkeypatch):
    """Unknown names, values out of range, files that do not fit: one sentence, nothing written."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    (tmp_path / "foreign.txt").write_text("not a model")
    torch.save({"weights": torch.ones(2)}, tmp_path / "foreign.pt")
    torch.save({"kind": {"width": 7}, "weights": {}}, tmp_path / "other.pt")
    before = sorted(tmp_path.iterdir())
    tiny = [part for setting in TINY for part in ("--set", setting)]
    rest = [text.format(tmp_path) for text in arguments[1:]]
    assert tabom.main([arguments[0], *tiny, *rest]) == 2
    error = capsys.readouterr().err
    assert says in error and error.startswith("tabom.py: ") and error.count("\n") == 1
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize("arguments", [["--arms"], ["--device", "tpu"], ["--seeds", "x"]])
def test_argparse_refuses_the_rest(arguments, capsys):
    """No arm, an unknown device or seed also ends with exit code 2 and names what is allowed."""
    with pytest.raises(SystemExit) as stop:
        tabom.main(["--demo", *arguments])
    assert stop.value.code == 2 and "error: argument " + arguments[0] in capsys.readouterr().err


def test_without_a_flag_there_is_help(capsys):
    """No flag: the options, and the one line to start with."""
    assert tabom.main([]) == 0
    assert "Start with: python tabom.py --demo" in capsys.readouterr().out


def test_ctrl_c_is_a_clean_line(capsys, monkeypatch, tmp_path):
    """Stopped in the middle: one line, exit code 130, and no file half-written."""
    def interrupted(*_, **__):
        raise KeyboardInterrupt
    monkeypatch.setattr(tabom, "self_distil", interrupted)
    assert run("--demo", "--json", str(tmp_path / "x.json")) == 130
    assert capsys.readouterr().err.strip() == "tabom.py: stopped; no file is left half-written."
    assert not list(tmp_path.iterdir())


def test_a_failed_write_leaves_the_old_file(tmp_path):
    """write_whole: the old content stays until the new one is complete, and no debris is left."""
    path = tmp_path / "file"
    path.write_text("old")

    def fails(file):
        file.write(b"half")
        raise RuntimeError("disk full")
    with pytest.raises(RuntimeError):
        toy_data.write_whole(str(path), fails)
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_the_orders_to_collect_in_are_those_of_decode():
    """toy_data.py cannot import tabom.py, so the names stand twice; they must stay the same."""
    assert toy_data.CHOICES["collect_order"] == tabom.ORDERS


def test_the_file_stands_alone(tmp_path):
    """tabom.py copied without toy_data.py can be imported and used."""
    shutil.copy(tabom.__file__, tmp_path)
    code = "import tabom; print(tabom.predictive_entropy(tabom.torch.zeros(2)).item())"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True,
                          text=True)
    assert done.returncode == 0 and float(done.stdout) == pytest.approx(math.log(2))
    done = subprocess.run([sys.executable, "tabom.py", "--demo"], cwd=tmp_path,
                          capture_output=True, text=True)
    assert done.returncode == 2 and not done.stdout
    assert done.stderr == "tabom.py: toy_data.py is missing; it belongs beside tabom.py.\n"


def test_the_denoiser_sees_both_sides_and_cannot_write_a_mask():
    """Bidirectional: the first output depends on the last token.  [MASK] has no output."""
    torch.manual_seed(0)
    model = tabom.Denoiser(5, 6, layers=1, width=8, heads=2).eval()
    tokens = torch.tensor([[0, 1, 2, 3, 4, 5]])
    changed = tokens.clone()
    changed[0, -1] = 0
    assert model(tokens).shape == (1, 6, 5)
    assert not torch.allclose(model(tokens)[0, 0], model(changed)[0, 0])


def test_arms_see_the_same_rows_and_learn():
    """Two arms with one seed draw the same batches in the same order; training lowers the loss."""
    data = random_trajectories(40)
    seen = []

    def spy(model, batch, **settings):
        seen.append(batch.response)
        return nelbo_loss(model, batch, **settings)
    tabom.toy_data = SimpleNamespace(MASK_ID=MASK)
    try:
        models = [TinyModel(), TinyModel()]
        settings = dict(updates=30, batch_size=8, learning_rate=0.05, warmup=3, seed=5, label="")
        tabom.train(models[0], data, spy, **settings)
        tabom.train(models[1], data, lambda model, batch, **kw: spy(model, batch, **kw), **settings)
    finally:
        tabom.toy_data = toy_data
    assert all(torch.equal(a, b) for a, b in zip(seen[:30], seen[30:]))
    before, after = (nelbo_loss(model, data, mask_id=MASK, mask_ratio=1.0)[0] for model in
                     (TinyModel(), models[0]))
    assert after < before - 0.1


# ==================================================================================================
# README.md
# ==================================================================================================

README = pathlib.Path(tabom.__file__).with_name("README.md").read_text(encoding="utf-8")


def test_the_python_blocks_of_the_readme_run():
    """What the README tells a copier to paste works as it stands, in at most 25 lines each."""
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(blocks) >= 2
    for block in blocks:
        assert len(block.splitlines()) <= 25
        exec(compile(block, "README.md", "exec"), {})


def test_the_section_table_of_the_readme_is_true():
    """Every section of tabom.py is in the table, with the line on which it begins."""
    source = pathlib.Path(tabom.__file__).read_text(encoding="utf-8").splitlines()
    begins = {int(found[1]): number for number, text in enumerate(source, 1)
              if (found := re.match(r"# == (\d+)\. ", text))}
    rows = re.findall(r"(\d+)\. [^\[\]]*\[(\d+)\]\(tabom\.py#L(\d+)\)", README)
    assert {int(section): int(line_) for section, line_, _ in rows} == begins
    assert all(shown == linked for _, shown, linked in rows) and len(begins) >= 15


def test_the_settings_and_flags_of_the_readme_exist():
    """No command in the README names a flag or a setting that the program does not have."""
    for command in re.findall(r"python tabom\.py[^`\n|&]*", README):
        options = toy_data.parse_arguments(command.split()[2:], tabom.ARMS, "")
        config = toy_data.make_config(options.set, options.quick)
        for name in options.arms:
            toy_data.read_arm(name, config, tabom.ARMS)


# ==================================================================================================
# A benchmark, no test: python test_tabom.py --benchmark
# ==================================================================================================

def straightforward_loss(logits, data, cuts, window_size):
    """The loss as one would write it down: softmax and log of the whole response, row by row."""
    logits = logits.float()
    p = logits.softmax(-1)
    entropy = -(p * torch.log(p + 1e-10)).sum(-1)
    nll = nn.functional.cross_entropy(logits.flatten(0, 1), data.response.flatten(),
                                      reduction="none").view(data.response.shape)
    losses = []
    for row, cut in enumerate(cuts):
        inside = data.decode_rank[row].argsort()[cut:cut + window_size]
        h = entropy[row, inside]
        excess = (h[:, None] - h[None, :] + 0.2).relu()
        pairs = torch.ones_like(excess).triu(1)
        losses.append(nll[row, inside].mean() + (excess * pairs).sum() / pairs.sum())
    return torch.stack(losses).mean()


def straightforward_step(logits, response, mask_id):
    """One step of decoding, row by row with a float64 softmax over the vocabulary."""
    response = response.clone()
    for row in range(len(logits)):
        p = logits[row].double().softmax(-1)
        entropy = -(p * torch.log(p + 1e-10)).sum(-1)
        entropy[response[row] != mask_id] = math.inf
        position = entropy.argmin()
        response[row, position] = logits[row, position].argmax()
    return response


def benchmark_case(case, device):
    """One case in a process of its own -> seconds (median of 7), megabytes (the first call's peak
    beyond what was there before)."""
    torch.manual_seed(0)
    cuda = device == "cuda"
    sampler = case.endswith("step")
    b, n, v = (64, 256, 32000) if sampler else (8, 256, 152064) if cuda else (4, 256, 32000)
    logits = torch.randn(b, n, v, device=device, dtype=torch.bfloat16 if cuda else torch.float32)
    rank = torch.rand(b, n, device=device).argsort(1)
    prompt = torch.zeros(b, 0, dtype=torch.int64, device=device)
    data = Trajectories(prompt, torch.randint(v - 1, (b, n), device=device), rank,
                        torch.zeros(b, n, device=device))
    cuts = torch.linspace(0, n - 33, b, device=device).long()
    given = data.response.masked_fill(rank == 0, v)                      # one position is masked
    settings = dict(mask_id=v, n_visible=cuts, window_size=32)
    logits.requires_grad_(not sampler)

    def run():
        logits.grad = None
        if case == "our step":
            return decode(lambda tokens: logits, prompt, n, mask_id=v, given=given)
        if case == "straightforward step":
            return straightforward_step(logits, given, v)
        if case == "straightforward loss":
            loss = straightforward_loss(logits, data, cuts.tolist(), 32)
        elif case == "our loss":
            loss, _ = tabom_loss(lambda tokens: logits, data, margin=0.2, rank_weight=1.0,
                                 **settings)
        elif case == "trajectory masking":
            loss, _ = trajectory_loss(lambda tokens: logits, data, **settings)
        else:                                                            # "cross-entropy alone"
            logits_, tokens, _, window = tabom.window_at_cut(lambda tokens: logits, data, cuts, 32,
                                                             v)
            loss = tabom.row_mean(tabom.token_nll(logits_, tokens), window).mean()
        loss.backward()

    def peak():
        import resource
        return (torch.cuda.max_memory_allocated() if cuda
                else 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
    before, seconds, peaks = peak(), [], []
    for _ in range(8):
        started = time.perf_counter()
        run()
        if cuda:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
        peaks.append(peak())
    return statistics.median(seconds[1:]), (peaks[0] - before) / 2 ** 20


def benchmark(device):
    """Every case in a fresh process, one after the other; prints one table."""
    results = {}
    for case in ("our loss", "straightforward loss", "trajectory masking", "cross-entropy alone",
                 "our step", "straightforward step"):
        done = subprocess.run([sys.executable, __file__, "--benchmark", device, case],
                              capture_output=True, text=True, check=True)
        results[case] = json.loads(done.stdout)
    print(f"{'':52}{'ours':>9}{'other':>9}{'ratio':>7}{'ours':>9}{'other':>9}{'ratio':>7}")
    where = "8 x 256 x 152,064 bfloat16" if device == "cuda" else "4 x 256 x 32,000 float32"
    for name, ours, other in (
            (f"loss {where}, straightforward", "our loss", "straightforward loss"),
            ("the same, trajectory masking (lambda = 0)", "our loss", "trajectory masking"),
            ("the same, cross-entropy of the window alone", "our loss", "cross-entropy alone"),
            ("step 64 x 256 x 32,000, straightforward", "our step", "straightforward step")):
        (s, m), (other_s, other_m) = results[ours], results[other]
        print(f"{name:52}{1000 * s:6.0f} ms{1000 * other_s:6.0f} ms{other_s / s:7.2f}"
              f"{m:6.0f} MB{other_m:6.0f} MB{m / max(other_m, 1):7.2f}")
    print("time: other / ours; memory beyond the logits, their gradient included: ours / other; "
          f"{device}, {torch.get_num_threads()} threads, PyTorch {torch.__version__}")


if __name__ == "__main__":
    if sys.argv[1:] == ["--benchmark"]:
        benchmark("cuda" if torch.cuda.is_available() else "cpu")
    elif sys.argv[1:2] == ["--benchmark"] and len(sys.argv) == 4:
        print(json.dumps(benchmark_case(sys.argv[3], sys.argv[2])))
    else:
        sys.exit("Tests: python -m pytest -q; benchmark: python test_tabom.py --benchmark")
