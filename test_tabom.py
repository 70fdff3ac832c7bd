# SPDX-License-Identifier: MIT
"""python -m pytest -q: each formula against a naive loop written from its equation; then the toy,
its checker and its figures against plain Python; then the demo from the command line; last, the
claims of the README against the figures in .results/.  No oracle shares code with what it checks.
"""
import dataclasses
import itertools
import json
import math
import os
import pathlib
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import tabom
import toy_data
sys.path.append(str(pathlib.Path(tabom.__file__).parent / ".results"))
import measure, ours                                               # noqa: E401, E402
from tabom import (LaggedCopy, Trajectories, decode, dinfer_loss, discrimination_curve,
                   from_decoding_order, nelbo_loss, pairwise_rank_loss, pick_tokens,
                   predictive_entropy, segment_masks, t3d_loss, tabom_loss, validate)

# ==== Shared: two stand-in models, random trajectories, and oracles in plain floats ===============
PROJECT = pathlib.Path(tabom.__file__).parent
L, N, V = 2, 6, 5           # prompt length, response length, vocabulary
MASK = V                    # [MASK] is an input only: there is no logit for it

class Scripted:
    """Context-free: answers with `table` (N, V) or (B, N, V) for the response, whatever it sees.
    `seen` keeps the tokens of every call.  As a leaf, `table.grad` tells what a loss supervises."""
    def __init__(self, table):
        self.table, self.seen = table, []
    def __call__(self, tokens):
        self.seen.append(tokens.clone())
        n_rows, (n, v) = len(tokens), self.table.shape[-2:]
        before = self.table.new_full((n_rows, tokens.shape[1] - n, v), 100.0)       # never read
        return torch.cat([before, self.table.expand(n_rows, n, v)], 1)

class TinyModel(nn.Module):
    """A small random network: every logit depends on every token and on every position."""
    def __init__(self, seed=0, vocabulary=V):
        super().__init__()
        token, place, out = torch.randn(3, 16, 8, generator=seeded(seed), dtype=torch.float32)
        self.token, self.place = nn.Parameter(token), nn.Parameter(place)
        self.out = nn.Parameter(out[:vocabulary].T.contiguous())
        self.seen = []
    def forward(self, tokens):
        self.seen.append(tokens.clone())
        x, place = self.token[tokens], self.place[:tokens.shape[1]]
        return torch.tanh(x + 0.5 * (x * place).sum(1, keepdim=True) + place) @ self.out

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
                        torch.randint(V, (n_rows, N), generator=generator), (decode_rank - given)
                        .clamp(min=-1), torch.rand(n_rows, N, generator=generator))

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

def naive_rank(h, margin):
    """Eq. 8 for one row, h in reveal order -> mean over pairs, and whether each is in order."""
    pairs = [(h[r], h[s]) for r in range(len(h)) for s in range(r + 1, len(h))]
    return mean(max(0.0, r - s + margin) for r, s in pairs), [r < s for r, s in pairs]

def look(model, trajectories, row, masked):
    """Show the model one row with the positions in `masked` hidden -> logits of its response."""
    prompt, response = trajectories.prompt[row].tolist(), trajectories.response[row].tolist()
    hidden = [MASK if position in masked else token for position, token in enumerate(response)]
    with torch.no_grad():
        return model(torch.tensor([prompt + hidden]))[0, L:]

def by_rank(trajectories, row):
    """The decoded positions of a row, in reveal order."""
    ranks = trajectories.decode_rank[row].tolist()
    return [position for rank, position in sorted(zip(ranks, range(N))) if rank >= 0]

def hidden_sets(model):
    """What the last call hid from the model: per row, the list of response positions."""
    return [row.nonzero()[:, 0].tolist() for row in model.seen[-1][:, L:] == MASK]

def drawn_cuts(model, trajectories):
    """The cuts that a loss has drawn, read off its tokens; each must be a state on the way."""
    cuts = []
    for row, hidden in enumerate(hidden_sets(model)):
        order = by_rank(trajectories, row)
        cuts.append(len(order) - len(hidden))
        assert sorted(order[cuts[-1]:]) == hidden                        # the last ranks, exactly
    return cuts

def fit(values, odds):
    """Whether values come as often as `odds` {value: odds} say: chi square at p = 1e-4."""
    values, total = list(values), sum(odds.values())
    due = {value: len(values) * share / total for value, share in odds.items()}
    chi_square = sum((values.count(value) - n) ** 2 / n for value, n in due.items())
    return set(values) <= set(odds) and chi_square < {
        2: 18.4, 3: 21.1, 4: 23.5, 5: 25.7, 9: 33.7}[len(odds) - 1]

def close(value, expected, tolerance=1e-5):
    value, expected = (torch.as_tensor(number).item() for number in (value, expected))
    return value == pytest.approx(expected, rel=tolerance, abs=tolerance)

def same(one, other):
    """All four fields of two Trajectories are equal."""
    return all(map(torch.equal, vars(one).values(), vars(other).values()))

# ==== Predictive entropy ==========================================================================
@pytest.mark.parametrize("logits, expected", [
    ([3.0] * 7, math.log(7)), ([math.log(0.9), math.log(0.1)], 0.3250830),
    ([-math.inf, 0.0, -math.inf], 0.0), ([1e4, 0.0, 0.0], 0.0),          # certain
    ([1e4, 1e4 - 1, 1e4 - 2], entropy_of([0, -1, -2])),
    ([3e38, -3e38, 0.0], 0.0),                 # their difference overflows float32
    ([1e30, 1e30, -math.inf], math.log(2)),
])
def test_entropy_by_hand(logits, expected):
    """Known values in nats; no logit is too large, and the gradient stays finite."""
    logits = torch.tensor(logits, requires_grad=True)
    entropy = predictive_entropy(logits)
    entropy.backward()
    assert close(entropy, expected) and logits.grad.isfinite().all()

# ==== The ranking loss (Eq. 8) ====================================================================
@pytest.mark.parametrize("margin", [0.0, 0.2, 3.0])
def test_rank_loss_is_eq_8(margin):
    """As the double loop; rows without a pair count 0, with no nan in the gradient."""
    for seed, largest in itertools.product(range(10), (0, 0.5, 1)):
        generator, losses, right = seeded(seed), [], []
        entropy = (torch.rand(5, 9, generator=generator) * 16).round().div(16).requires_grad_()
        decode_rank = torch.stack([torch.randperm(9, generator=generator) for _ in range(5)])
        window = torch.rand(5, 9, generator=generator) < largest * torch.arange(5)[:, None] / 4
        for h, rank, inside in zip(entropy.tolist(), decode_rank, window):
            loss, ordered = naive_rank([h[i] for i in rank.argsort() if inside[i]], margin)
            losses, right = losses + [loss], right + ordered
        loss, accuracy = pairwise_rank_loss(entropy, decode_rank, window, margin)
        assert close(loss, mean(losses)) and close(accuracy, mean(right))
        loss.backward()
        assert entropy.grad.isfinite().all() and (entropy.grad[~window] == 0).all()

def test_rank_loss_worked_example():
    """Entropies 0.5, 0.3, 0.9 in reveal order, at positions 2, 0, 1; position 3 is outside.  Pairs
    (1,2): 0.5 - 0.3 + 0.2 = 0.4; (1,3) and (2,3): 0; the mean is 0.4 / 3.  A descent step lowers
    the entropy of the first revealed (position 2) and raises that of the second (0)."""
    entropy = torch.tensor([[0.3, 0.9, 0.5, 7.0]], requires_grad=True)
    rank, window = torch.tensor([[1, 2, 0, 3]]), torch.tensor([[True, True, True, False]])
    loss, accuracy = pairwise_rank_loss(entropy, rank, window, margin=0.2)
    assert round(loss.item(), 4) == 0.1333 and close(accuracy, 2 / 3) and not accuracy.requires_grad
    loss.backward()
    torch.testing.assert_close(entropy.grad, torch.tensor([[-1 / 3, 0, 1 / 3, 0]]))
    for wrong in ((entropy[0], rank, window, 0), (entropy, rank[:, :3], window, 0),
                  (entropy, rank, window.repeat(2, 1), 0), (entropy[:0], rank[:0], window[:0], 0),
                  *((entropy, rank, window, margin) for margin in (-0.1, math.inf, math.nan))):
        with pytest.raises(ValueError, match="one shape|no rows|margin must be 0"):
            pairwise_rank_loss(*wrong)

# ==== States and trajectories =====================================================================
def test_segments_at_every_cut_and_window_size():
    """masked, window follow the ranks one by one; one cut for all rows or for each."""
    decode_rank = random_trajectories(6).decode_rank
    for cut, size in itertools.product(range(N + 1), (1, 2, 3, N, N + 1, sys.maxsize)):
        cuts = [(cut + row) % (N + 1) for row in range(6)]
        for cuts, n_visible in (([cut] * 6, cut), (cuts, torch.tensor(cuts))):
            masked, window = segment_masks(decode_rank, n_visible, size)
            for row, position in itertools.product(range(6), range(N)):
                rank, at = int(decode_rank[row, position]), (row, position)
                assert masked[at] == (rank >= max(0, cuts[row]))
                assert window[at] == (cuts[row] <= rank <= cuts[row] + size - 1)
    before = segment_masks(decode_rank, torch.full((6,), -5), 2)
    assert torch.equal(before[0], decode_rank >= 0)              # what was given stays visible
    for n_visible, size in ((-5, 2), (1.0, 2), (0, 0), (0, 2.0), (0, torch.ones(6))):
        with pytest.raises(ValueError, match="must be a whole number of at least"):
            segment_masks(decode_rank, n_visible, size)

def test_trajectories_are_indexed_joined_moved_thinned_and_stored(tmp_path):
    """All four fields follow; where positions are left out the others close ranks."""
    whole = random_trajectories(6)
    for index, rows in ((torch.arange(6) % 3 == 0, [0, 3]), (torch.tensor([4, 4, 0]), [4, 4, 0]),
                        (slice(1, 5, 2), [1, 3])):
        assert len(whole[index]) == len(rows)
        for name, field in vars(whole[index]).items():
            assert field.tolist() == [getattr(whole, name)[row].tolist() for row in rows]
    assert same(Trajectories.cat([whole[:2], whole[2:2], whole[2:]]), whole)
    assert {field.device.type for field in vars(whole.to("meta")).values()} == {"meta"}
    torch.save(vars(whole), tmp_path / "x.pt")
    assert same(Trajectories(**torch.load(tmp_path / "x.pt", weights_only=True)), whole)
    part = whole.only(keep := torch.rand(6, N, generator=seeded()) < 0.7)
    validate(part, MASK, V)                                              # ranks 0 .. n-1
    for row in range(6):
        assert by_rank(part, row) == [i for i in by_rank(whole, row) if keep[row, i]]
    assert torch.equal(part.entropy, whole.entropy * keep) and part.response is whole.response
    assert whole.n_decoded.tolist() == [6, 5, 3, 6, 5, 3]

def test_trajectories_of_a_wrong_form_cannot_be_made_or_joined():
    """Shapes and dtypes are checked where the data are made, at no cost for the losses."""
    fields, zeros = vars(random_trajectories()), torch.zeros
    for name, wrong in (("prompt", zeros(5, L).long()), ("response", zeros(6, N + 1).long()),
                        ("entropy", zeros(6)), ("response", zeros(6, N)), ("prompt", zeros(6, L)),
                        ("decode_rank", zeros(6, N).int()), ("entropy", zeros(6, N).long())):
        with pytest.raises(ValueError, match="prompt must be|must be int64, entropy fl"):
            Trajectories(**{**fields, name: wrong})
    whole, other = Trajectories(**fields), Trajectories(**{**fields, "prompt": zeros(6, 1).long()})
    shorter = Trajectories(whole.prompt, *(x[:, 1:] for x in list(fields.values())[1:]))
    for parts in ([], [whole, shorter], [whole, other]):
        with pytest.raises(ValueError, match="at least one part, and the same"):
            Trajectories.cat(parts)

def test_decoding_order_lists_become_trajectories():
    """Steps with or without gaps, -1 = never; ties by entropy if given, else by position."""
    prompt, response = prompts(2), torch.zeros(2, 4, dtype=torch.int64)
    steps, entropy = [[2, 0, 0, 100], [127, -1, 127, 0]], [[0.5, 9, 2, 0], [5, 0, 4, 9]]
    got = from_decoding_order(prompt, response, steps)
    assert got.decode_rank.tolist() == [[2, 0, 1, 3], [1, -1, 2, 0]] and (got.entropy == 0).all()
    for entropies in (entropy, torch.tensor(entropy, dtype=torch.float64)):
        narrow = torch.tensor(steps, dtype=torch.int8)
        got = from_decoding_order(prompt, response, narrow, entropies)
        assert got.decode_rank.tolist() == [[2, 1, 0, 3], [2, -1, 1, 0]]
        assert got.entropy.tolist() == entropy and got.entropy.dtype == torch.float32
    own = decode(TinyModel(), prompts(5), N, mask_id=MASK, tokens_per_step=2)
    steps = own.decode_rank // 2
    assert same(own, from_decoding_order(own.prompt, own.response, steps, own.entropy))
    for wrong in ([[0, 1, 2], [0, 1, 2]], [[0.0, 1.0, 2.0, 3.0]] * 2):
        with pytest.raises(ValueError, match="decoding_order must hold"):
            from_decoding_order(prompt, response, wrong)

@pytest.mark.parametrize("name, place, values, message", [
    ("decode_rank", (0, 2), [7, -1, -2, 0], "decode_rank must hold"),
    ("decode_rank", (1, 2), [-2, 4], "decode_rank must hold"),
    ("prompt", (3, 0), [MASK], "the prompt contains mask_id"),
    ("response", (0, 1), [MASK], "the response contains mask_id"),
    *(("response", place, [-1, V, V + 3], "the response contains a token outside of 0 .. 4")
      for place in ((0, 1), (1, 2))),
    ("prompt", (0, 1), [-1, V, V + 3], "the prompt contains a token outside of 0 .. 4"),
    ("entropy", (0, 1), [math.nan, math.inf, -0.5], "an entropy is"),
])
def test_validate_finds_every_wrong_value(name, place, values, message):
    """Each field, each kind of mistake; [MASK] is right where nothing is ranked: row 1, place 2."""
    data, keep = random_trajectories(n_given=(0,)), torch.ones(6, N, dtype=torch.bool)
    keep[1, 2] = False
    data, mask_id = data.only(keep), V + 1 if "outside" in message else MASK
    data.response[~keep] = mask_id
    for right in (data, data[:0]):
        validate(right, mask_id, V)
    for getattr(data, name)[place] in values:
        with pytest.raises(ValueError, match=message):
            validate(data, mask_id, V)

# ==== The decoder (Eq. 2, Def. 1) =================================================================
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

@pytest.mark.parametrize("order", ["entropy", "confidence", "margin", (3, 1, 4, 1, 5, 9)])
@pytest.mark.parametrize("tokens_per_step", [1, 2, 4, 9])
def test_decode_equals_a_naive_decoder_row_by_row(order, tokens_per_step):
    """A batch of unequally filled rows is its rows, one by one; none waits for another one."""
    prompt, given = prompts(4), torch.randint(V, (4, N), generator=seeded(1))
    given[0, :3] = given[1, 3:] = given[3, [0, 2, 3, 5]] = MASK
    for block_length in (None, 1, 2, 4, 99):
        model, passes = TinyModel(), []
        got = decode(model, prompt, N, mask_id=MASK, tokens_per_step=tokens_per_step, given=given,
                     order=order if isinstance(order, str) else torch.tensor(order),
                     block_length=block_length)
        for row in range(4):
            response, ranks, entropies = naive_decode(
                alone := TinyModel(), prompt[row].tolist(), given[row].tolist(), order,
                tokens_per_step, block_length)
            assert got.response[row].tolist() == response
            assert got.decode_rank[row].tolist() == ranks
            assert got.entropy[row].tolist() == pytest.approx(entropies, abs=1e-5)
            passes.append(len(alone.seen))
        assert len(model.seen) == max(passes)

# Entropies 1.18, 0.69, 0.77, top probabilities .55, .50, .60, gaps to the second .40, .00, .22:
DISAGREE = torch.tensor([[.15, .55, .15, .15], [.5, .0, .0, .5], [.01, .01, .6, .38]]).log()
BIG = 2 ** 60                # a float cannot tell 2^60 from 2^60 + 1

@pytest.mark.parametrize("order, ranks", [
    ("entropy", [2, 0, 1]), ("confidence", [1, 2, 0]), ("margin", [0, 2, 1]),
    (torch.tensor([0.5, -3.0, 9.0]), [1, 0, 2]),
    (torch.tensor([7, 7, 2]), [1, 2, 0]),        # whole numbers will do; a tie: leftmost first
    (torch.tensor([BIG + 2, BIG, BIG + 1]), [2, 0, 1]),
    (lambda logits, tokens: torch.tensor([[3, 1, 2], [1, 1, 0]]), [[2, 0, 1], [1, 2, 0]]),
])
def test_each_order_by_hand(order, ranks):
    """Measures, tensors and functions sort the same table differently, as worked out by hand."""
    got = decode(Scripted(DISAGREE), prompts(2), 3, mask_id=4, order=order)
    assert got.decode_rank.tolist() == (ranks if isinstance(ranks[0], list) else [ranks, ranks])
    assert got.response.tolist() == [[1, 0, 2], [1, 0, 2]]
    torch.testing.assert_close(got.entropy[0], torch.tensor([entropy_of(row) for row in DISAGREE]))
    assert got.entropy.dtype == torch.float32 and got.decode_rank.dtype == torch.int64

@pytest.mark.parametrize("settings", [{}, {"tokens_per_step": 2, "block_length": 3}])
@pytest.mark.parametrize("name, measure", [("entropy", lambda p: -torch.xlogy(p, p).sum(-1)),
                                           ("confidence", lambda p: -p.amax(-1))])
def test_an_order_function_gets_what_the_built_in_orders_get(name, measure, settings):
    """The tokens just seen, and logits in which [MASK] is impossible: the same trajectories."""
    model = TinyModel(vocabulary=V + 1)
    def order(logits, tokens):
        assert torch.equal(tokens, model.seen[-1]) and logits.shape == (8, N, V + 1)
        assert (logits[..., MASK] == -torch.inf).all()
        return measure(logits.softmax(-1))
    assert same(*(decode(model, prompts(8), N, mask_id=MASK, order=by, **settings)
                  for by in (order, name)))

def draws(**settings):
    """6000 rows of three positions -> the order in which each was written, by default one a step"""
    ranks = decode(Scripted(DISAGREE), prompts(6000), 3, mask_id=4, generator=seeded(), **settings)
    return list(map(tuple, ranks.decode_rank.argsort(1).tolist()))

@pytest.mark.parametrize("tau", [0.2, 1.0])
def test_order_temperature_draws_positions_by_their_odds(tau):
    """Odds exp(-difficulty / tau), then the same among the rest, in one step or in two."""
    odds = [math.exp(-entropy_of(row) / tau) for row in DISAGREE]
    p = {(i, j, k): odds[i] / sum(odds) * odds[j] / (odds[j] + odds[k])
         for i, j, k in itertools.permutations(range(3))}
    last = {k: sum(p[order] for order in p if order[2] == k) for k in range(3)}
    one_by_one = draws(order_temperature=tau)
    assert fit((order[0] for order in one_by_one), dict(enumerate(odds))) and fit(one_by_one, p)
    assert fit((order[2] for order in draws(order_temperature=tau, tokens_per_step=2)), last)
    measure = lambda logits, tokens: predictive_entropy(logits)  # noqa: E731
    for order in (measure, torch.tensor([entropy_of(row) for row in DISAGREE])):
        assert fit(draws(order_temperature=tau, order=order), p)
    assert fit(draws(order="random"), alike := dict.fromkeys(p, 1)) and not fit(one_by_one, alike)

def test_equal_scores_are_decoded_leftmost_first():
    for order, k in itertools.product(("entropy", "confidence", "margin", torch.zeros(40)), (1, 3)):
        got = decode(Scripted(torch.zeros(40, 3)), prompts(2), 40, mask_id=3, order=order,
                     tokens_per_step=k)
        assert got.decode_rank.tolist() == [list(range(40))] * 2

@pytest.mark.parametrize("temperature, dtype", [(0.5, torch.float32), (2.0, torch.float32),
                                                (1.0, torch.bfloat16)])
def test_sampled_tokens_follow_the_softmax(temperature, dtype):
    """softmax(logits / temperature), in float32; order and entropies are the greedy ones."""
    table = torch.tensor([[0.0, 1.0, -1.0, 0.5], [2.0, 0.0, 1.0, 1.5]], dtype=dtype)
    got, greedy = (decode(Scripted(table), prompts(8000), 2, mask_id=4, temperature=t,
                          generator=seeded()) for t in (temperature, 0))
    for position in range(2):
        shares = map(math.exp, log_p(table[position].float() / temperature))
        assert fit(got.response[:, position].tolist(), dict(enumerate(shares)))
    assert same(got, Trajectories(got.prompt, got.response, greedy.decode_rank, greedy.entropy))
    many = torch.randn(500, V, generator=seeded()).to(dtype)
    assert torch.equal(pick_tokens(many, 0.7, seeded()), pick_tokens(many.float(), 0.7, seeded()))

@pytest.mark.parametrize("setting", [{"temperature": 1.0}, {"order": "random"},
                                     {"order_temperature": 1.0}])
def test_decode_is_reproducible(setting):
    """The generator is the only source of chance; at and close to temperature 0 there is none."""
    before, given, generator = torch.get_rng_state(), torch.full((8, N), MASK), seeded(3)
    given[:, 5] = 1
    settings = {"mask_id": MASK, "given": given, "tokens_per_step": 2}
    one, again, other = (decode(TinyModel(), prompts(8), N, generator=seeded(seed), **settings,
                                **setting) for seed in (1, 1, 2))
    assert same(one, again) and not same(one, other)
    validate(one, MASK, V)
    assert torch.equal(one.decode_rank >= 0, given == MASK)
    assert len(decode(TinyModel(), prompts(0), N, mask_id=MASK)) == 0
    plain, zero, low = (decode(TinyModel(), prompts(8), N, generator=generator, **settings, **{
        name: degree for name in setting if name != "order"}) for degree in (0, 0.0, 1e-6))
    assert same(plain, zero) and same(plain, low) and not same(plain, one)
    decode(TinyModel(), prompts(8), N, generator=(unused := seeded(3)), **settings)
    assert torch.equal(unused.get_state(), seeded(3).get_state())
    assert torch.equal(torch.get_rng_state(), before)

@pytest.mark.parametrize("order", ["entropy", "confidence", "margin"])
def test_mask_is_never_written(order):
    """An entry for [MASK] is neither picked nor counted, even when favoured, however hot."""
    table, settings = torch.randn(N, 5, generator=seeded()), {"order": order, "generator": seeded()}
    table[:, 2] = 20.0
    greedy, cold, hot = (decode(Scripted(table), prompts(200), N, mask_id=2, temperature=degree,
                                **settings) for degree in (0, 1e-40, 1e30))
    without = decode(Scripted(table[:, [0, 1, 3, 4]]), prompts(200), N, mask_id=4, order=order)
    assert torch.equal(greedy.decode_rank, without.decode_rank) and same(greedy, cold)
    torch.testing.assert_close(greedy.entropy, without.entropy)
    assert torch.equal(greedy.response, without.response + (without.response >= 2))
    assert all(set(column.tolist()) == {0, 1, 3, 4} for column in hot.response.T)

def test_only_what_is_masked_and_decodable_is_written():
    """All else stays, with rank -1 and entropy 0, costs no pass; no argument is changed."""
    model, prompt, given = TinyModel(), prompts(3), torch.full((3, N), MASK)
    given[:, 5] = 1
    decodable = torch.tensor([[True] * 4 + [False] * 2, [False] + [True] * 5, [False] * 6])
    write, before = decodable & (given == MASK), (prompt.clone(), given.clone())
    got = decode(model, prompt, N, mask_id=MASK, given=given, decodable=decodable)
    assert torch.equal(prompt, before[0]) and torch.equal(given, before[1])
    assert all(torch.equal(tokens[:, :L], prompt) for tokens in (*model.seen, got.prompt))
    assert len(model.seen) == 4 and torch.equal(got.response[~write], given[~write])
    assert not (got.response[write] == MASK).any() and (got.entropy[~write] == 0).all()
    assert torch.equal(got.decode_rank >= 0, write)
    again = decode(model, prompt, N, mask_id=MASK, given=got.response, decodable=decodable)
    assert torch.equal(again.response, got.response) and len(model.seen) == 4    # nothing to do
    assert again.response.data_ptr() != got.response.data_ptr()

@pytest.mark.parametrize("name, values, message", [
    ("order", ["easiest", None], "order must be one of"),
    ("order", [torch.zeros(2), torch.tensor([math.inf] + [0] * 5)], "order tensor must hold 6"),
    *((name, [-2, 0, 1.5], f"{name} must be a whole number of at least 1")
      for name in ("response_length", "tokens_per_step", "block_length")),
    ("mask_id", [4.5, -1], "mask_id must be a whole number of at least 0"),
    *((name, [-0.5, math.inf, math.nan], f"^{name} must be 0 or more")
      for name in ("temperature", "order_temperature")),
    ("prompt", [torch.zeros(1, L), torch.zeros(1, L).int(), torch.zeros(L).long()], "be \\(B, L"),
    ("prompt", [torch.tensor([[0, MASK]])], "the prompt contains mask_id"),
    ("given", [torch.full((2, N), MASK), torch.full((1, N), 1.0)], "given must have the shape"),
    ("decodable", [torch.ones(1, N), torch.ones(1, N + 1).bool()], "decodable must have the shape"),
])
def test_decode_refuses_settings_out_of_range(name, values, message):
    """A wrong setting is named at once, before the model is asked anything."""
    model, right = TinyModel(), {"prompt": prompts(1), "response_length": N, "mask_id": MASK}
    decode(TinyModel(), **right, tokens_per_step=np.int64(2))    # a whole number too
    for value in values:
        with pytest.raises(ValueError, match=message):
            decode(model, **{**right, name: value})
    assert model.seen == []

@pytest.mark.parametrize("order", tabom.ORDERS)
def test_decode_refuses_logits_that_are_nan(order):
    """A diverged model, or an order function, stops the decoder: no rubbish, no endless loop."""
    table, settings = torch.zeros(N, V), {"mask_id": MASK, "generator": seeded()}
    for table[3, 1] in (torch.nan, torch.inf):
        with pytest.raises(ValueError, match="the logits were nan|were the logits nan"):
            decode(Scripted(table), prompts(2), N, order=order, **settings)
    if order == "margin":
        with pytest.raises(ValueError, match="two tokens or more"):
            decode(Scripted(torch.zeros(N, 1)), prompts(2), N, order=order, mask_id=MASK)
    for wrong in (torch.full((2, N), math.nan), torch.full((2, N), math.inf), torch.zeros(N)):
        with pytest.raises(ValueError, match="the order must give finite numbers"):
            decode(TinyModel(), prompts(2), N, tokens_per_step=N, **settings,
                   order=lambda logits, tokens: wrong)

# ==== The losses: one call for all ================================================================
LOSSES = {"nelbo": (nelbo_loss, {}), "dinfer": (dinfer_loss, {}),
          "t3d": (t3d_loss, {"reference": TinyModel(seed=9)}),
          "tabom": (tabom_loss, {"window_size": 3, "margin": 0.2, "rank_weight": 1.0})}
every_loss = pytest.mark.parametrize("name", LOSSES)

def call(name, model, trajectories, seed=0, **settings):
    """Any of the losses, by name, with its usual settings -> loss, metrics."""
    loss_fn, usual = LOSSES[name]
    return loss_fn(model, trajectories, **{"mask_id": MASK, "generator": seeded(seed), **usual,
                                           **settings})

@every_loss
def test_losses_share_one_form(name):
    """One pass, a gradient for every weight, seeded draws; no look at values (meta device)."""
    model, trajectories, before = TinyModel(), random_trajectories(60), torch.get_rng_state()
    loss, metrics = call(name, model, trajectories)
    assert loss.shape == () and loss.dtype == torch.float32 and metrics
    assert all(not value.requires_grad and value.shape == () for value in metrics.values())
    loss.backward()
    assert all(weight.grad.isfinite().all() and weight.grad.any() for weight in model.parameters())
    tokens, = model.seen                                                 # one forward pass, no more
    shown, given = tokens[:, L:], trajectories.decode_rank == -1
    assert torch.equal(tokens[:, :L], trajectories.prompt)
    assert torch.equal(shown[given], trajectories.response[given])
    assert ((shown == trajectories.response) | (shown == MASK)).all()
    assert ((shown == MASK).any(1)).all()        # there is always something to learn
    assert call(name, model, trajectories)[0] == loss != call(name, model, trajectories, seed=1)[0]
    assert torch.equal(torch.get_rng_state(), before)
    meta = lambda tokens: torch.empty(*tokens.shape, V + 1, device="meta")  # noqa: E731
    settings = {"generator": None, **({"reference": meta} if name == "t3d" else {})}
    assert call(name, meta, trajectories.to("meta"), **settings)[0].device.type == "meta"

@every_loss
@pytest.mark.parametrize("banned", [-math.inf, -1e9, torch.finfo(torch.float32).min])
def test_losses_ignore_mask_and_banned_tokens(name, banned):
    """A logit for [MASK], and ids set to -inf or very low, are as good as no entry at all."""
    plain, wider = TinyModel(), TinyModel(vocabulary=V + 1)
    with torch.no_grad():
        wider.out[:, :V], wider.out[:, V] = plain.out, 5.0
    ours = lambda tokens: nn.functional.pad(wider(tokens), (0, 2), value=banned)  # noqa: E731
    expected, loss = (call(name, m, random_trajectories())[0] for m in (plain, ours))
    assert close(loss, expected)
    expected.backward()
    loss.backward()
    torch.testing.assert_close(wider.out.grad[:, :V], plain.out.grad)
    assert (wider.out.grad[:, V] == 0).all()

@every_loss
@pytest.mark.parametrize("shown", [0, MASK])
def test_left_out_positions_are_neither_shown_otherwise_nor_learned(name, shown):
    """Padding shows what the response holds, and counts nothing, however impossible."""
    table = torch.randn(4, N, V, generator=seeded())
    table[:2, 4:, 0], table[2:, 4:] = -torch.inf, torch.nan              # -log p is inf, or nan
    settings = {"t3d": {"reference": Scripted(torch.zeros(N, V))},
                "tabom": {"window_size": N}}.get(name, {})
    whole, keep = random_trajectories(4, n_given=(0,)), (torch.arange(N) < 4).expand(4, N)
    part, other = (Trajectories(whole.prompt, whole.response.masked_fill(~keep, x),
                                whole.decode_rank, whole.entropy).only(keep) for x in (shown, 1))
    model = Scripted(table.clone().requires_grad_())
    loss, _ = call(name, model, part, **settings)
    loss.backward()
    assert loss.isfinite() and (model.table.grad[:, 4:] == 0).all()
    assert model.table.grad.isfinite().all() and model.table.grad[:, :4].abs().sum() > 0
    assert all((tokens[:, L + 4:] == shown).all() for tokens in model.seen)
    assert call(name, Scripted(table), other, **settings)[0] == loss
    # A row that is left out entirely: a constant loss, no gradient, no nan.  No rows: an error.
    loss, _ = call(name, model := TinyModel(), whole[:1].only(keep[:1] & False))
    loss.backward()
    assert close(loss, 1.5 * math.log(2) if name == "t3d" else 0) and (model.out.grad == 0).all()
    with pytest.raises(ValueError, match="no rows"):
        call(name, model, whole[:0])

@pytest.mark.parametrize("name, setting, values", [
    ("tabom", "window_size", [0, 2.5, -3]),
    ("tabom", "n_visible", [torch.zeros(5).long(), torch.zeros(6, 1).long()]),
    *(("tabom", setting, [-0.1, math.inf, math.nan]) for setting in ("margin", "rank_weight")),
    ("nelbo", "mask_ratio", [-0.1, 1.5]), *(("t3d", setting, [-1.0]) for setting in "abc"),
])
def test_losses_refuse_wrong_settings_and_models(name, setting, values):
    """No forward pass is wasted; logits of the response only, without V, in an object are named."""
    model = TinyModel()
    for value in values:
        with pytest.raises(ValueError, match=f"{setting}.* must"):
            call(name, model, random_trajectories(), **{setting: value})
    assert model.seen == []
    for output in (torch.zeros(6, L + N), torch.zeros(6, N, V), torch.zeros(1, L + N, V), (0, 1)):
        with pytest.raises(ValueError, match="the model must return a tensor of logits"):
            call(name, lambda tokens: output, random_trajectories())

# ==== The losses: each against its equation =======================================================
@pytest.mark.parametrize("mask_ratio", [None, 0.0, 0.3, 1.0])
def test_nelbo_is_eq_1(mask_ratio):
    """The mean of -log p over the positions hidden from a row, then over rows."""
    for seed in range(5):
        model, trajectories, rows = TinyModel(), random_trajectories(9, seed), []
        loss, metrics = call("nelbo", model, trajectories, seed, mask_ratio=mask_ratio)
        for row, hidden in enumerate(hidden_sets(model)):
            logits = look(model, trajectories, row, hidden)
            rows.append(mean(-log_p(logits[i])[trajectories.response[row, i]] for i in hidden))
        assert close(loss, mean(rows)) and close(metrics["nll"], loss)

def test_nelbo_masks_by_its_ratio():
    """1 masks all, 0 exactly one, r a share r; by default the *number* masked is uniform."""
    trajectories, model, masked = random_trajectories(6000), Scripted(torch.zeros(N, V)), {}
    for ratio in (0.0, 0.5, 1.0, None):
        call("nelbo", model, trajectories, mask_ratio=ratio)
        masked[ratio] = model.seen[-1][:, L:] == MASK
        assert not (masked[ratio] & (trajectories.decode_rank < 0)).any()
    assert (masked[0.0].sum(1) == 1).all()
    assert torch.equal(masked[1.0], trajectories.decode_rank >= 0)
    zero, half, _, default = (mask[::3] for mask in masked.values())     # rows with all 6 decoded
    # Half of 6 positions; a 64th of the rows gets its one position by force.
    assert close(half.float().mean(), 0.5 + 1 / 64 / 6, 0.02)
    assert fit(default.sum(1).tolist(), {1: 2, 2: 1, 3: 1, 4: 1, 5: 1, 6: 1})
    assert fit(zero.int().argmax(1).tolist(), dict.fromkeys(range(N), 1))

def naive_tabom(model, trajectories, cuts, sizes, margin, rank_weight):
    """Eq. 9 row by row -> loss, mean nll, mean ranking loss, share of pairs in the right order."""
    nlls, rank_losses, right = [], [], []
    for row, (cut, size) in enumerate(zip(cuts, sizes)):
        order = by_rank(trajectories, row)
        logits, window = look(model, trajectories, row, order[cut:]), order[cut:cut + size]
        nlls.append(mean(-log_p(logits[i])[trajectories.response[row, i]] for i in window))
        rank_loss, ordered = naive_rank([entropy_of(logits[i]) for i in window], margin)
        rank_losses, right = rank_losses + [rank_loss], right + ordered
    nll, rank_loss = mean(nlls), mean(rank_losses)
    return nll + rank_weight * rank_loss, nll, rank_loss, mean(right)

@pytest.mark.parametrize("size", [1, 2, 4, 50])
@pytest.mark.parametrize("margin, rank_weight", [(0.0, 1.0), (0.2, 0.5), (3.0, 2.0)])
def test_tabom_is_eq_9(size, margin, rank_weight):
    """At given and at drawn cuts; trajectory masking is its first term alone."""
    for cuts in ([0] * 6, [0, 1, 2, 3, 4, 1], [5, 4, 2, 5, 4, 2], None):
        model, trajectories = TinyModel(), random_trajectories(6)
        given = {"window_size": size, "n_visible": None if cuts is None else torch.tensor(cuts)}
        loss, metrics = call("tabom", model, trajectories, margin=margin, rank_weight=rank_weight,
                             **given)
        drawn = drawn_cuts(model, trajectories)
        assert cuts is None or drawn == cuts
        expected = naive_tabom(model, trajectories, drawn, [size] * 6, margin, rank_weight)
        assert all(map(close, (loss, *metrics.values()), expected)) and "rank_loss" in metrics
        first_term, _ = call("tabom", model, trajectories, margin=0.0, rank_weight=0.0, **given)
        assert first_term == metrics["nll"]

def test_dinfer_supervises_what_lies_between_two_times():
    """Show the earlier state; supervise exactly the tokens revealed until the later one."""
    trajectories = random_trajectories(6000, n_given=(2,))               # n = 4: ten pairs
    model = Scripted(torch.randn(6000, N, V, generator=seeded()).requires_grad_())
    loss, metrics = call("dinfer", model, trajectories)
    loss.backward()
    nlls, drawn, supervised = [], [], model.table.grad.abs().sum(-1) > 0
    for row, start in enumerate(drawn_cuts(model, trajectories)):
        ranks = sorted(trajectories.decode_rank[row][supervised[row]].tolist())
        assert ranks == list(range(start, start + len(ranks)))           # from the start, no gaps
        drawn.append((start, start + len(ranks)))
        nlls.append(mean(-log_p(model.table[row, i].detach())[trajectories.response[row, i]]
                         for i in supervised[row].nonzero()[:, 0]))
    assert fit(drawn, dict.fromkeys(itertools.combinations(range(5), 2), 1))
    assert close(loss, mean(nlls), 1e-4) and close(metrics["nll"], loss)

def test_ours_raises_what_is_held_back_and_keeps_the_rest():
    """`hold_back_loss` of .results/ours.py, row by row; ranking moves nothing but what is late."""
    model, base, data, parts = TinyModel(), TinyModel(1), random_trajectories(30), []
    late = torch.rand(30, N, generator=seeded()) < 0.5
    table = torch.randn(30, N, V, generator=seeded()).requires_grad_()
    def call_ours(model, rank_weight):
        return ours.hold_back_loss(model, data, mask_id=MASK, base=base, generator=seeded(),
                                   late=lambda prompt: late, margin=0.5, rank_weight=rank_weight,
                                   anchor=3.0, unsure=1)
    loss, metrics = call_ours(model, 2.0)
    for row, cut in enumerate(drawn_cuts(model, data)):
        hidden = by_rank(data, row)[cut:]
        mine, theirs = ([log_p(logits) for logits in look(one, data, row, hidden)]
                        for one in (model, base))
        held = [i for i in hidden if late[row, i] and entropy_of(theirs[i]) > 1]
        parts.append((mean(-mine[i][data.response[row, i]] for i in hidden), mean(
            max(0.0, entropy_of(mine[r]) - entropy_of(mine[s]) + 0.5) if s in held else 0.0
            for r, s in itertools.combinations(hidden, 2)), mean(
            sum(math.exp(q) * (q - p) for p, q in zip(mine[i], theirs[i]))
            for i in hidden if i not in held)))
    expected = list(map(mean, zip(*parts)))
    assert all(map(close, metrics.values(), expected)) and min(expected) > 0
    assert close(loss, expected[0] + 2 * expected[1] + 3 * expected[2])
    one, other = (torch.autograd.grad(call_ours(Scripted(table), weight)[0], table)[0]
                  for weight in (0.0, 9.0))
    assert (moved := (one != other).any(-1)).any() and late[moved].all()

@pytest.mark.parametrize("name", ["tabom", "t3d"])
def test_every_cut_is_drawn_equally_often(name):
    """By default the cut is uniform on 0 .. n-1, n being the decoded positions of that row."""
    trajectories, model = random_trajectories(6000, n_given=(0, 2)), Scripted(torch.zeros(N, V))
    call(name, model, trajectories)
    for first, n in ((0, 6), (1, 4)):
        assert fit(drawn_cuts(model, trajectories)[first::2], dict.fromkeys(range(n), 1))

def naive_t3d(model, reference, trajectories, cuts, a, b, c):
    """The formula of `t3d_loss` row by row -> loss, mean preference term, mean path term."""
    preferences, paths = [], []
    for row, cut in enumerate(cuts):
        hidden = by_rank(trajectories, row)[cut:]
        ours, theirs = (look(m, trajectories, row, hidden) for m in (model, reference))
        written = {i: int(trajectories.response[row, i]) for i in hidden}
        other = {i: int(theirs[i].argmax()) for i in hidden}
        def l(logits, y):
            return mean(log_p(logits[i])[y[i]] for i in hidden)
        better = 1 / (1 + math.exp(-b * (l(ours, written) - l(theirs, written))))
        worse = 1 / (1 + math.exp(-b * (l(ours, other) - l(theirs, other))))
        preferences.append(-math.log(better) - a * math.log(1 - worse))
        paths.append(sum((len(hidden) - k) / len(hidden) * -log_p(ours[i])[written[i]]
                         for k, i in enumerate(hidden)))
    return mean(preferences) + c * mean(paths), mean(preferences), mean(paths)

@pytest.mark.parametrize("own", [{}, {"a": 2.0, "b": 1.5, "c": 0.7}, {"a": 0.0, "c": 0.0}])
def test_t3d_is_its_formula(own):
    """Both terms, at the drawn cuts; the reference sees the same state and is not trained."""
    for seed in range(5):
        model, reference, trajectories = TinyModel(), TinyModel(9), random_trajectories(6, seed)
        loss, metrics = call("t3d", model, trajectories, seed, reference=reference, **own)
        assert torch.equal(model.seen[0], reference.seen[0])
        loss.backward()
        assert all(weight.grad is None for weight in reference.parameters())
        constants, cuts = {"a": 0.5, "b": 0.1, "c": 0.2, **own}, drawn_cuts(model, trajectories)
        expected = naive_t3d(model, reference, trajectories, cuts, **constants)
        assert all(map(close, (loss, *metrics.values()), expected))

@pytest.mark.parametrize("name", ["tabom", "t3d"])
def test_gradients_are_those_of_the_equations(name):
    """Finite differences of the loops: no term is cut off from the logits."""
    table, reference = torch.randn(1, N, V, generator=seeded()), TinyModel(9)
    leaf, data = Scripted(table.clone().requires_grad_()), random_trajectories(1, n_given=(1,))
    settings, loop = {
        "tabom": (dict(n_visible=torch.tensor([1]), margin=0.5, rank_weight=2.0),
                  lambda model: naive_tabom(model, data, [1], [3], 0.5, 2.0)[0]),
        "t3d": (dict(reference=reference, a=2.0, b=1.5, c=0.7),
                lambda model: naive_t3d(model, reference, data, cuts, 2.0, 1.5, 0.7)[0])}[name]
    call(name, leaf, data, **settings)[0].backward()
    cuts = drawn_cuts(leaf, data)
    for i, v in itertools.product(range(N), range(V)):
        step = torch.zeros(1, N, V, dtype=torch.float64)
        step[0, i, v] = 1e-4
        difference = loop(Scripted(table + step)) - loop(Scripted(table - step))
        assert close(leaf.table.grad[0, i, v], difference / 2e-4, 1e-3)

def test_lagged_copy_follows_every_n_calls():
    """Call 0, n, 2n, ... bring the copy up to date; in between it stays behind, frozen."""
    model, outputs = nn.Linear(1, 1, bias=False), []
    lagged = LaggedCopy(model, every=3)
    for step in range(8):
        model.weight.data.fill_(float(step))
        outputs.append(lagged(torch.ones(1, 1)))
    assert outputs == [0, 0, 0, 3, 3, 3, 6, 6] and not any(x.requires_grad for x in outputs)
    assert model.weight.item() == 7 and model.weight.requires_grad      # the model is left alone
    assert model.training and not lagged.frozen.training and LaggedCopy(model).every == 10

def released_loss(logits, step, response, cut, window_size, margin):
    """The authors' loss as a slow loop: p log(p + 1e-10), pairs by step, nll over all tokens."""
    rank_losses, nll = [], []
    for row in range(len(logits)):
        p = logits[row].double().softmax(-1)
        entropy = [-sum(float(q) * math.log(float(q) + 1e-10) for q in p[i]) for i in range(N)]
        inside = [i for i in range(N) if cut[row] <= step[row, i] < cut[row] + window_size]
        rank_losses.append(mean(max(0.0, entropy[r] - entropy[s] + margin) for r in inside
                                for s in inside if step[row, r] < step[row, s]))
        nll += [-math.log(p[i, response[row, i]]) for i in inside]
    return mean(nll), mean(rank_losses)

def test_the_released_loss_is_the_same_for_one_token_per_step_and_full_windows():
    table, data = 3 * torch.randn(6, N, V, generator=seeded()), random_trajectories(n_given=(0,))
    for size in (2, 3, 4):
        cuts = torch.tensor([0, 1, 2, 0, 1, 2]).clamp(max=N - size)
        _, metrics = call("tabom", Scripted(table), data, window_size=size, n_visible=cuts)
        expected = released_loss(table, data.decode_rank, data.response, cuts, size, 0.2)
        assert all(close(metrics[name], x, 1e-4) for name, x in zip(("nll", "rank_loss"), expected))

# ==== Trajectory discrimination score (Eq. 10-11) =================================================
@pytest.mark.parametrize("eos_id", [None, 0])
def test_discrimination_curve_replays_the_trajectory(eos_id):
    """Column k has k revealed; left out is what stands behind the first revealed end token."""
    model, trajectories, excluded = TinyModel(), random_trajectories(9), 0
    scores, counted = discrimination_curve(model, trajectories, mask_id=MASK, eos_id=eos_id)
    assert scores.shape == counted.shape == (9, N + 1) and not scores.requires_grad
    for row, k in itertools.product(range(9), range(N + 1)):
        logits = look(model, trajectories, row, hidden := by_rank(trajectories, row)[k:])
        ends = [i for i in range(N) if i not in hidden and trajectories.response[row, i] == eos_id]
        kept = [i for i in hidden if not ends or i < ends[0]]
        excluded += len(hidden) - len(kept)
        h = [entropy_of(logits[i]) for i in kept]
        assert close(scores[row, k], mean((value - mean(h)) ** 2 for value in h))
        assert counted[row, k] == (len(kept) >= 2)
    assert (excluded > 0) == (eos_id is not None)                        # the case does occur

# ==== In other people's projects: foreign models, padding, half precision, memory =================
def test_the_core_is_one_block_that_works_alone():
    """Cut out between its marks and pasted into an empty file; short; torch and dataclasses."""
    source = (PROJECT / "tabom.py").read_text(encoding="utf-8")
    begin, end = (source.index(f"# ==== The method {word} here") for word in ("begins", "ends"))
    block, core = source[begin:end], {"__name__": "core"}
    assert block.count("\n") - 1 <= 390         # the lines below the first mark
    imported = re.findall(r"^\s*(?:import|from) (\w+)", block, re.MULTILINE)
    assert set(imported) <= {"dataclasses", "torch"}
    exec(compile(block, "core", "exec"), core)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(12, 16), nn.TransformerEncoderLayer(
        16, 2, 16, dropout=0.0, batch_first=True), nn.Linear(16, 12))
    decoded = core["decode"](model, prompts(3), 7, mask_id=11, tokens_per_step=2, block_length=4)
    core["validate"](decoded, 11, 12)
    loss, _ = core["tabom_loss"](model, decoded, mask_id=11, window_size=7, margin=0.2,
                                 rank_weight=1.0)
    loss.backward()
    assert loss.isfinite() and all(weight.grad.any() for weight in model.parameters())

def test_left_padded_prompts_decode_and_train_like_their_rows_alone():
    """Prompts of 1, 3 and 4 tokens in one batch; pad is the end token, which responses contain, so
    that an attention mask of tokens != pad would hide it there, too."""
    network, pad, cuts = TinyModel(), 1, torch.tensor([2, 4, 5])
    def attending(real_of):
        def model(tokens):
            logits = torch.zeros(*tokens.shape, V)
            for row, real in enumerate(real_of(tokens)):
                logits[row, real] = network(tokens[row, real][None])[0]
            return logits
        return model
    right = attending(lambda tokens: (tokens != pad).cumsum(1) > 0)
    wrong = attending(lambda tokens: tokens != pad)
    alone = [torch.tensor([prompt]) for prompt in ([2], [3, 0, 2], [4, 4, 0, 3])]
    batch = torch.cat([nn.functional.pad(x, (4 - x.shape[1], 0), value=pad) for x in alone])
    together = decode(right, batch, N, mask_id=MASK)
    single = [decode(network, prompt, N, mask_id=MASK) for prompt in alone]
    assert same(Trajectories.cat([Trajectories(batch[i:i + 1], *list(vars(one).values())[1:])
                                  for i, one in enumerate(single)]), together)
    apart = mean(call("tabom", network, x, n_visible=cut[None])[0].item()
                 for x, cut in zip(single, cuts))
    assert (together.response == pad).any()
    assert close(call("tabom", right, together, n_visible=cuts)[0], apart)
    assert not close(call("tabom", wrong, together, n_visible=cuts)[0], apart, 0.01)

def test_a_data_loader_and_accumulation_give_the_whole_batch():
    """Micro-batches weighted by their rows: the loss and every gradient of the batch of 10."""
    whole, parts, cuts = TinyModel(), TinyModel(), torch.arange(10) % 3
    data = random_trajectories(10)
    (loss := call("tabom", whole, data, n_visible=cuts)[0]).backward()
    total, rows = 0.0, torch.utils.data.TensorDataset(*vars(data).values(), cuts)
    for *fields, n_visible in torch.utils.data.DataLoader(rows, batch_size=4):
        micro = Trajectories(*fields)
        share = call("tabom", parts, micro, n_visible=n_visible)[0] * len(micro) / len(data)
        share.backward()
        total += share.item()
    assert close(total, loss)
    for one, other in zip(whole.parameters(), parts.parameters()):
        torch.testing.assert_close(one.grad, other.grad)

@pytest.mark.parametrize("k", [2, 3])
def test_cuts_at_multiples_of_k_are_the_states_that_k_tokens_per_step_visit(k):
    model, cutting = TinyModel(), TinyModel()
    data = decode(model, prompts(5), N, mask_id=MASK, tokens_per_step=k)
    for n_visible in range(N):
        call("tabom", cutting, data, n_visible=torch.full((5,), n_visible))
        visited = any(torch.equal(cutting.seen[-1], tokens) for tokens in model.seen)
        assert visited == (n_visible % k == 0)

@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_autocast_and_checkpointing(dtype):
    """Half-precision logits: what the same numbers give in float32.  The gradient is unharmed."""
    table = (8 * torch.randn(6, N, V, generator=seeded())).to(dtype).requires_grad_()
    half, full, data = Scripted(table), Scripted(table.float()), random_trajectories()
    assert all(call(name, half, data)[0] == call(name, full, data)[0] for name in LOSSES)
    loss, _ = call("tabom", half, data)
    loss.backward()
    assert loss.dtype == torch.float32 and table.grad.dtype == dtype
    assert same(*(decode(model, prompts(6), N, mask_id=MASK) for model in (half, full)))
    plain, again = TinyModel(), TinyModel()
    recomputed = lambda tokens: checkpoint(again, tokens, use_reentrant=False)  # noqa: E731
    (expected, _), (loss, _) = call("tabom", plain, data), call("tabom", recomputed, data)
    (expected + loss).backward()
    assert loss == expected and torch.equal(again.out.grad, plain.out.grad)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss, _ = call("tabom", plain, data)
    assert loss.dtype == torch.float32 and close(loss, expected, 0.05)

def half_of_the_batch(rank, engine, data, cuts, folder):
    torch.distributed.init_process_group("gloo", f"file://{folder}/meet", rank=rank, world_size=2)
    model = engine(TinyModel())
    call("tabom", model, data[4 * rank:][:4], n_visible=cuts[4 * rank:][:4])[0].backward()
    gradients = [getattr(one.grad, "full_tensor", lambda: one.grad)() for one in model.parameters()]
    torch.save(gradients, folder / f"{rank}.pt")
    torch.distributed.barrier()
    os._exit(0)                                  # gloo's threads can abort an ordinary exit

@pytest.mark.parametrize("engine", [nn.parallel.DistributedDataParallel, fully_shard])
def test_two_processes_get_the_gradient_of_the_whole_batch(engine, tmp_path):
    data, model, cuts = random_trajectories(8), TinyModel(), torch.arange(8) % 3
    call("tabom", model, data, n_visible=cuts)[0].backward()
    torch.multiprocessing.spawn(half_of_the_batch, (engine, data, cuts, tmp_path), nprocs=2)
    for rank in range(2):
        for one, other in zip(model.parameters(), torch.load(tmp_path / f"{rank}.pt")):
            torch.testing.assert_close(one.grad, other)

class Sizes(TorchDispatchMode):
    """Notes (number of entries, dtype) of every tensor that torch computes, views not counted."""
    made = ()
    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        result = function(*arguments, **(keywords or {}))
        if isinstance(result, torch.Tensor) and not function.is_view:
            self.made += (result.numel(), result.dtype),
        return result

def test_the_loss_touches_the_window_only():
    """Nothing is as large as response times vocabulary, or (B, N, N), but the gradient."""
    b, n, v, w = 2, 40, 60, 4
    logits = torch.randn(b, n + 1, v, generator=seeded()).bfloat16().requires_grad_()
    rank = torch.stack([torch.randperm(n, generator=seeded(row)) for row in range(b)])
    data = Trajectories(rank[:, :1], rank, rank, torch.zeros(b, n))
    with Sizes() as forward:
        loss, _ = call("tabom", lambda tokens: logits, data, mask_id=v - 1, window_size=w)
    with Sizes() as backward:
        loss.backward()
    assert max(size for size, _ in forward.made) == b * w * v
    large = [dtype for size, dtype in backward.made if size > b * w * v]
    # Zeros, the window's rows added into them, and then the zeros of the prompt in front.
    assert set(large) == {torch.bfloat16} and len(large) <= 2

# ==== The toy: problems, solutions, the checker ===================================================
def rows(*texts):
    """"47×58a 3995 85 235376" -> tokens (n, 18); "_" is [MASK]."""
    characters = toy_data.VOCABULARY + "_"
    return torch.tensor([[characters.index(one) for one in text if one != " "] for text in texts])

SOLVED = ("47×58a 3995 85 235 376", "47×..a 3995 85 235 376", "47+..a 0132 85 012 012",
          "85-..a 0038 47 108 004", "47×58b 235 376 85 3995", "47×58c 376 3995 85 235")

def naive_check(row):
    """The checker in plain Python -> is the answer right, is the working right too?"""
    text = "".join((toy_data.VOCABULARY + "_")[one] for one in row)
    first, operator, low, high, layout, response = (
        int(text[:2]), text[2], text[3], text[4], text[5], text[6:])
    order = {"a": "pppp bb uuu ttt", "b": "uuu ttt bb pppp", "c": "ttt pppp bb uuu"}[layout].split()
    field, at = {}, 0
    for name in order:
        field[name[0]] = response[at:at + len(name)]
        at += len(name)
    if not (field["b"].isdigit() and field["p"].isdigit()):
        return False, False
    second = int(field["b"])
    right = {"+": first + second, "-": first - second, "×": first * second}[operator]
    allowed = low == "." or all(low <= digit <= high for digit in field["b"])
    correct = allowed and int(field["p"]) == right
    if operator == "+":
        working = {(f"{first % 10 + second % 10:03}", f"{first // 10 + second // 10:03}")}
    elif operator == "-":
        borrowed = first % 10 < second % 10
        working = {(f"{borrowed:d}{(first - second) % 10:02}", f"{first // 10 - second // 10:03}")}
    else:
        working = {(f"{x * (y % 10):03}", f"{x * (y // 10):03}")
                   for x, y in ((first, second), (second, first))}
    return correct, correct and (field["u"], field["t"]) in working

def test_the_lines_of_the_docstring_are_solutions():
    tokens = rows(*SOLVED)
    first = toy_data.solve(tokens[:, :6], toy_data.read_factor(tokens))
    assert first.tolist() == tokens.tolist() and toy_data.working_is_right(tokens).all()
    assert toy_data.to_text(toy_data.hide(tokens)[0]) == "47×58a____________"
    assert toy_data.to_text(toy_data.hide(tokens)[2]) == "47+..a____85______"
    other = toy_data.solve(tokens[:1, :6], torch.tensor([85]), "other")
    assert other.tolist() == rows("47×58a 3995 85 595 340").tolist()
    for line in (line for text in SOLVED[:4] for line in text.split()[1:]):
        assert line in toy_data.__doc__

def test_the_checker_agrees_with_plain_python_on_right_and_spoiled_rows():
    corpus, _, _ = toy_data.split_problems(3, layouts=3)
    generator = torch.Generator().manual_seed(0)
    tokens = corpus[torch.randperm(len(corpus), generator=generator)[:3000]]
    tokens[1000:2000] = toy_data.solve(tokens[1000:2000, :6],
                                       toy_data.read_factor(tokens[1000:2000]), "other")
    spoiled = tokens.clone()
    at = torch.randint(6, 18, (len(tokens), 1), generator=generator)
    spoiled.scatter_(1, at, torch.randint(0, 18, at.shape, generator=generator))
    pick = tokens[toy_data.n_choices(tokens) > 0][:500, :6]              # and any factor for pick
    outside = toy_data.solve(pick, torch.randint(0, 100, (len(pick),), generator=generator))
    for some in (tokens, spoiled, outside):
        correct, working = zip(*map(naive_check, some.tolist()))
        assert toy_data.is_correct(some).tolist() == list(correct)
        all_right = toy_data.is_correct(some) & toy_data.working_is_right(some)
        assert all_right.tolist() == list(working)
    assert toy_data.is_correct(tokens).all() and not toy_data.is_correct(outside).all()
    assert not toy_data.is_correct(rows("47×89a 0000 ×+ 000 000")).any()       # no number at all

def test_layouts_are_permutations_of_the_same_solution():
    tokens = rows(SOLVED[0])
    for layout, text in enumerate((SOLVED[0], SOLVED[4], SOLVED[5])):
        moved = toy_data.in_layout(tokens, layout)
        assert moved.tolist() == rows(text).tolist()
        assert toy_data.read_factor(moved).tolist() == [85]
        assert moved[0, 6:][toy_data.is_factor(moved)[0]].tolist() == [8, 5]
    both = toy_data.in_layout(tokens.repeat(2, 1), torch.tensor([2, 1]))
    assert both.tolist() == rows(SOLVED[5], SOLVED[4]).tolist()

def test_the_best_order_writes_factor_then_working_then_answer_from_the_last_digit():
    for text, names in ((SOLVED[0], "ppppffuuuttt"), (SOLVED[4], "uuutttffpppp"),
                        (SOLVED[5], "tttppppffuuu")):
        turn = toy_data.best_order(None, rows(text))[0]
        assert "".join(names[at] for at in turn.argsort().tolist()) == "ffuuutttpppp"
        for name in "utp":
            at = [place for place, one in enumerate(names) if one == name]
            assert turn[at].tolist() == sorted(turn[at].tolist(), reverse=True)

@pytest.mark.parametrize("layouts", [1, 3])
def test_problems_are_split_without_overlap_and_weighed_equally(layouts):
    corpus, odds, problems = toy_data.split_problems(7, layouts)
    assert toy_data.working_is_right(corpus).all()
    c, first, factor = toy_data.n_choices(corpus), corpus[:, :2], toy_data.read_factor(corpus)
    prompts = {part: {tuple(row[:5]) for row in tokens.tolist()}
               for part, tokens in problems["pick"].items()}
    prompts["corpus"] = {tuple(row[:5]) for row in corpus[c > 0].tolist()}
    for one, other in itertools.combinations(prompts.values(), 2):
        assert not one & other
    assert len(set().union(*prompts.values())) > 2600                   # of 90 * 30
    held_out = torch.cat([problems["mul"]["validation"], problems["mul"]["test"]])
    known = {(*a, b) for a, b in zip(held_out[:, :2].tolist(),
                                     toy_data.read_factor(held_out).tolist())}
    times = corpus[:, 2] == toy_data.token("×")
    assert not known & {(*a, b) for a, b in zip(first[times].tolist(), factor[times].tolist())}
    for one in toy_data.CHOICES:                                         # every c weighs the same
        assert odds[c == one].sum() == pytest.approx(toy_data.CORPUS_SHARES["pick"] / 5, rel=1e-3)
    for domain in ("add", "sub", "mul"):
        here = (c == 0) & (corpus[:, 2] == toy_data.token(toy_data.OPERATOR[domain]))
        assert odds[here].sum() == pytest.approx(toy_data.CORPUS_SHARES[domain], rel=1e-3)
        assert odds[here].std() < 1e-9 and len(problems[domain]["test"]) == 1000
        every = {"add": 8100, "sub": 4095, "mul": 8100}[domain]          # sub: first >= second
        assert here.sum() == layouts * (every - 1400)
    _, prompt = corpus[c == 5][:, :6].unique(dim=0, return_inverse=True)
    weight = prompt.bincount(odds[c == 5])                               # and so does every prompt
    assert weight.max() < 1.001 * weight.min()
    assert corpus[:, 5].unique().tolist() == [toy_data.token("a") + i for i in range(layouts)]
    test = problems["pick"]["test"]
    assert len(test) == len(prompts["test"]) == 540 and (test[:, 6:] == toy_data.MASK_ID).all()
    assert len(problems["pick"]["query"]) == layouts * len(prompts["query"])
    assert test[:, 5].bincount().max() - test[:, 5].bincount()[-layouts:].min() <= 5
    again, other = toy_data.split_problems(7, layouts), toy_data.split_problems(8, layouts)
    assert again[0].equal(corpus) and not other[2]["pick"]["test"].equal(test)

def test_references_use_every_factor_that_the_prompt_allows():
    prompt = rows("47×58a 0000 00 000 000")[:, :6].repeat(2000, 1)
    tokens = toy_data.references(prompt, "other", torch.Generator().manual_seed(0))
    assert toy_data.is_correct(tokens).all() and toy_data.working_is_right(tokens).all()
    counts = [n for n in toy_data.read_factor(tokens).bincount().tolist() if n]
    assert len(counts) == 16 and 80 < min(counts) and max(counts) < 180          # 125 of each
    own = toy_data.references(prompt, "own", torch.Generator().manual_seed(0))
    assert toy_data.read_factor(own).equal(toy_data.read_factor(tokens)) and not own.equal(tokens)

# ==== The figures of answers ======================================================================
def picks(*choices):
    return rows(*(f"47×2{1 + c}a 0000 22 000 000" for c in choices))

def test_means_over_choices_leave_out_c_1_and_weigh_the_others_equally():
    tokens = picks(1, 2, 2, 2, 3, 4, 5)
    right = torch.tensor([True, True, True, False, False, True, False])
    means = toy_data.by_choices(tokens, right)
    assert means == pytest.approx({"all": (200 / 3 + 0 + 100 + 0) / 4, "1": 100, "2": 200 / 3,
                                   "3": 0, "4": 100, "5": 0})
    assert toy_data.by_choices(tokens, right.float())["4"] == 1          # numbers stay as they are

def test_the_entropy_gap_is_surest_factor_digit_minus_surest_other_position():
    entropy = torch.tensor([[3, .5, 2, 2, 1.5, 1.2, 2, 2, 2, 2, 2, 2.0]])
    assert toy_data.entropy_gap(rows(SOLVED[0]), entropy).item() == pytest.approx(0.7)
    assert toy_data.entropy_gap(rows(SOLVED[4]), entropy).item() == pytest.approx(1.5)

def naive_effective(factors, correct, choices, samples):
    chances = {}
    for start in range(0, len(factors), samples):
        mine = [factors[i] for i in range(start, start + samples) if correct[i]]
        pairs = [one == other for one, other in itertools.combinations(mine, 2)]
        if pairs and choices[start] > 1:
            chances.setdefault(choices[start], []).append(sum(pairs) / len(pairs))
    means = [sum(values) / len(values) for values in chances.values()]
    return len(means) / sum(means)

def test_effective_factors_count_pairs_of_right_answers_with_the_same_factor():
    generator, samples = torch.Generator().manual_seed(1), 6
    tokens = picks(2, 2, 3, 4, 5, 5, 1).repeat_interleave(samples, 0)    # c = 1 does not count
    tokens[:, 10:12] = torch.randint(2, 4, (len(tokens), 2), generator=generator)
    correct = torch.rand(len(tokens), generator=generator) < 0.7
    correct[:samples] = torch.tensor([True] + [False] * (samples - 1))   # one right: no pair
    correct[samples:2 * samples] = torch.arange(samples) < 2             # two right: one pair
    expected = naive_effective(toy_data.read_factor(tokens).tolist(), correct.tolist(),
                               toy_data.n_choices(tokens).tolist(), samples)
    assert toy_data.effective_factors(tokens, correct, samples) == pytest.approx(expected)
    assert math.isnan(toy_data.effective_factors(tokens, correct & False, samples))

def test_factor_figures_leave_out_prompts_without_a_choice():
    tokens = rows("47×22a 0000 22 000 000", "47×25a 0000 33 000 000", "47×25b 000 000 34 0000")
    rank = torch.stack([torch.arange(12), torch.arange(12), torch.arange(12)])
    figures = toy_data.factor_figures(tokens, rank)
    assert figures == pytest.approx({"equal digits": 50, "factor turn": (5 + 6 + 7 + 8) / 4})

def test_interval_over_seeds_is_students_t():
    mean, low, high = toy_data.mean_and_interval([1.0, 2.0, 3.0, 4.0])
    half = 3.18 * 1.29099 / 2
    assert (mean, low, high) == pytest.approx((2.5, 2.5 - half, 2.5 + half), rel=1e-4)

# ==== What is shown ===============================================================================
def figures(greedy, **changed):
    return {"greedy": greedy, "2 tokens": 10.0, "sampled": 20.0, "best order": 90.0,
            "old": {"add": 99.0, "sub": 98.0, "mul": 97.0}, "effective factors": 4.25,
            "equal digits": 50.0, "factor turn": 6.5, "TDS": 0.2226, "pair accuracy": 60.0,
            "by c": {"all": greedy, **{str(c): greedy - c for c in toy_data.CHOICES}}, **changed}

def test_report_shows_means_spread_and_paired_differences():
    gap = {"all": 0.5, **{str(c): c / 10 for c in toy_data.CHOICES}}
    runs = [{"entropy gap": gap, "arms": {"No-SFT": figures(40.0), "TABOM": figures(60.0)}},
            {"entropy gap": gap, "arms": {"No-SFT": figures(50.0), "TABOM": figures(62.0),
                                          "SFT-SD": figures(51.0)}}]
    lines = [line.split() for line in tabom.report(runs).splitlines()]
    dots = "".join("1" if column in (20, 25) else "·" for column in range(51))
    assert ["No-SFT", "2", "45.0", "7.1", dots] in lines
    assert lines[[line[:1] for line in lines].index(["SFT-SD"])][:3] == ["SFT-SD", "1", "51.0"]
    assert "No-SFT 10.0 20.0 90.0 99.0 98.0 97.0".split() in lines
    assert "TABOM 4.25 50.0 6.5 0.223 60.0".split() in lines
    assert "TABOM 60.0 59.0 58.0 57.0 56.0".split() in lines
    assert "entropy gap, nats 0.10 0.20 0.30 0.40 0.50".split() in lines
    half = 12.71 * 32 ** 0.5 / 2 ** 0.5                                  # differences 20 and 12
    assert f"TABOM - No-SFT 2 +16.0 [{16 - half:+.1f}, {16 + half:+.1f}]".split() in lines
    assert not any(line[:3] == ["TABOM", "-", "SFT-SD"] for line in lines)     # one seed: no spread
    assert "paired" not in tabom.report(runs[:1])

def test_a_trajectory_is_drawn_state_by_state(monkeypatch):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: False, raising=False)
    rank = torch.tensor([11, 10, 9, 8, 0, 1, 2, 3, 4, 5, 6, 7])
    entropies = [torch.full((12,), 1.6)] * 12 + [torch.zeros(12)]
    right, wrong = ((rows(text)[0], rank, entropies) for text in (SOLVED[0],
                                                                  "47×58a 3994 85 235 376"))
    lines = toy_data.draw_trajectories(["one", "two"], [right, wrong]).splitlines()
    assert lines[0].split() == ["47×58a", "one", "|", "two"]
    assert lines[1].split() == [*"ppppffuuuttt", "|", *"ppppffuuuttt"]
    assert lines[2].split() == ["step", "0", *"++++++++++++", "|", *"++++++++++++"]
    assert lines[4].endswith("   +  +  +  +  8 [5] +  +  +  +  +  + ")
    assert lines[14].split()[:14] == ["step", "12", "[3]", *"99585235376"]
    assert lines[15].split() == ["right", "|", "wrong"] and len(lines) == 16

# ==== The demo: training, collecting, evaluating ==================================================
class Solver(nn.Module):
    """Knows every solution.  Writes the lowest allowed factor, or what stands there, surest first
    from the left; is wrong in the answer of add, and where the two digits of a factor differ."""
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.calls = []

    def forward(self, tokens):
        self.calls.append(len(tokens))
        factor = toy_data.read_factor(tokens)
        lowest = torch.where(toy_data.n_choices(tokens) > 0, 11 * tokens[:, 3], 10)
        factor = torch.where((factor < 0) | (factor > 99), lowest, factor)
        solved = toy_data.solve(tokens[:, :6], factor)
        add = solved[:, 2] == toy_data.token("+")
        solved[add, 6:] = 0
        logits = nn.functional.one_hot(solved, len(toy_data.VOCABULARY)) * 30.0
        return logits - torch.arange(18.0)[None, :, None] * logits / 30 + self.weight

def tiny_bench(seed=0, n=3):
    problems = toy_data.split_problems(seed, 3)[2]
    tests = {domain: toy_data.first_of_each(parts["test"], n) for domain, parts in problems.items()}
    model = Solver()
    query, validation = (problems["pick"][part] for part in ("query", "validation"))
    held_out = tabom.self_distil(model, validation, tabom.Config(queries=25), seed)[-1]
    return tabom.Bench(seed, model, query, validation, tests, held_out, {})

def test_every_figure_of_a_model_that_is_known_by_heart(monkeypatch):
    bench, asked, answer = tiny_bench(), [], tabom.answer
    monkeypatch.setattr(tabom, "answer", lambda *x, **own: asked.append(own) or answer(*x, **own))
    (calls := bench.base.calls).clear()
    found = tabom.evaluate(bench.base, bench, tabom.Config(samples=4, window_size=12))
    assert found["greedy"] == found["best order"] == found["2 tokens"] == 100
    assert found["old"] == {"add": 0.0, "sub": 100.0, "mul": 100.0}
    assert found["by c"] == {"all": 100, "1": 100, "2": 100, "3": 100, "4": 100, "5": 100}
    assert found["effective factors"] == 1 and found["equal digits"] == 100
    layouts = bench.tests["pick"][3:, 5] - toy_data.token("a")           # c > 1; factor at 4, 6, 7
    turn = sum({0: 5.5, 1: 7.5, 2: 8.5}[layout] for layout in layouts.tolist()) / len(layouts)
    assert found["factor turn"] == pytest.approx(turn) and found["pair accuracy"] == 100
    assert calls.count(15) == 12 + 12 + 6 + 13       # greedy, best order, 2 tokens, TDS; 15 prompts
    assert calls.count(12 * 4) == 12 and calls.count(3) == 3 * 10        # sampled; three domains
    own = {"order": "entropy"}
    assert all((one.pop("generator", None) is not None) == ("temperature" in one) for one in asked)
    for settings, times in ((own, 4), ({**own, "temperature": 1.0}, 1),
                            ({**own, "tokens_per_step": 2}, 1),
                            ({"order": toy_data.best_order, "temperature": 1.0}, 1)):
        assert asked.count(settings) == times
    pick = bench.tests["pick"]
    entropy = predictive_entropy(bench.base(pick)[:, 6:]).detach()
    gap = toy_data.by_choices(pick, toy_data.entropy_gap(pick, entropy))
    scores, counted = discrimination_curve(bench.base, answer(bench.base, pick)[0],
                                           mask_id=toy_data.MASK_ID)
    assert found["TDS"] == pytest.approx(scores[counted].mean().item()) and not counted.all()
    before = tabom.why_order_matters(bench.base, pick, 0)
    assert before["entropy gap"] == pytest.approx(gap) and before["orders"]["best"] == 100

def test_the_orders_that_are_shown_are_what_they_are_called(monkeypatch):
    """A fixed order is read off the ranks that it gives."""
    asked = []
    monkeypatch.setattr(tabom, "percent_right", lambda *_, generator, **settings: (
        asked.append(settings) or {"all": 0}))
    names = tabom.why_order_matters(Solver(), picks(1, 2, 3, 4, 5), 0)["orders"]
    ranks = {name: decode(Scripted(torch.zeros(12, 3)), torch.zeros(1, 2, dtype=torch.int64), 12,
                          mask_id=3, **settings).decode_rank[0].tolist()
             for name, settings in zip(names, asked) if "best" not in name}
    assert ranks["left to right"] == list(range(12)) and asked[3] == {"block_length": 1}
    assert ranks["right to left"] == list(range(12))[::-1]
    for n in (2, 3, 4, 6):
        assert asked[list(names).index(f"blocks of {n}")] == {"block_length": n}
    assert asked[0] == {} and [one["order"] for one in asked[1:3]] == ["confidence", "margin"]
    assert asked[-2] == {"order": toy_data.best_order} and asked[-1]["temperature"] == 1

def test_collecting_asks_as_often_for_each_c_and_keeps_by_filter():
    bench = tiny_bench()
    def collect(**own):
        return tabom.self_distil(bench.base, bench.queries, tabom.Config(queries=48, **own), 0)
    with pytest.raises(ValueError, match="only 0 of 50 rollouts are kept"):
        collect(rollout_filter="wrong")
    rollouts, correct, chosen = collect()
    assert len(chosen) == 50 and correct.all()
    assert toy_data.n_choices(rollouts.prompt).bincount().tolist() == [0, 10, 10, 10, 10, 10]
    few = collect(kept_each=4)[-1]
    assert tabom.rows_of(few).equal(tabom.rows_of(rollouts)[torch.arange(50) % 10 < 4])
    assert len(rollouts.prompt[:, 5].unique()) == 3                      # every layout is asked

def test_filters_tell_answer_and_working_apart(monkeypatch):
    texts = (SOLVED[0], "47×58a 3995 85 235 377", "47×58a 3994 85 235 376") * 20
    rollouts = tabom.solved(rows(*texts))
    monkeypatch.setattr(tabom, "answer", lambda *_, **__: (
        rollouts, toy_data.is_correct(tabom.rows_of(rollouts))))
    queries = toy_data.split_problems(0, 1)[2]["pick"]["query"]
    for name, expected in (("working", {0}), ("answer", {0, 1}), ("wrong", {2}),
                           ("none", {0, 1, 2})):
        kept = tabom.self_distil(None, queries, tabom.Config(rollout_filter=name), 0)[-1]
        assert {tuple(row) for row in tabom.rows_of(kept).tolist()} == {
            tuple(rows(texts[i])[0].tolist()) for i in expected} and len(kept) == 20 * len(expected)

def test_controls_change_the_ranks_and_nothing_else():
    generator = torch.Generator().manual_seed(0)
    corpus = toy_data.split_problems(0, 3)[0]
    pick = corpus[toy_data.n_choices(corpus) > 0][::97]
    rank = torch.rand(len(pick), 12, generator=generator).argsort(1)
    kept = dataclasses.replace(tabom.solved(pick), decode_rank=rank)
    data = {how: tabom.training_data("TABOM", kept, tabom.Config(ranks=how), 1).decode_rank
            for how in tabom.ALLOWED["ranks"]}
    assert data["recorded"].equal(rank) and data["reversed"].equal(11 - rank)
    for how, ranks in data.items():
        assert ranks.sort(1).values.equal(torch.arange(12).expand(len(pick), 12))
        assert how == "recorded" or (ranks == rank).float().mean() < 0.2
    as_rows = {how: list(map(tuple, ranks.tolist())) for how, ranks in data.items()}
    assert sorted(as_rows["swapped"]) == sorted(as_rows["alike"]) == sorted(as_rows["recorded"])
    kind = {row: kept.prompt[i, 3:6].tolist() for i, row in enumerate(as_rows["recorded"])}
    same = [kind[row][1] - kind[row][0] == hi - lo and kind[row][2] == layout
            for row, (lo, hi, layout) in zip(as_rows["alike"], kept.prompt[:, 3:6].tolist())]
    assert len(same) - sum(same) <= 15
    reference = tabom.training_data("SFT-GT", kept, tabom.Config(style="own"), 1)
    assert reference.prompt.equal(kept.prompt)
    assert toy_data.working_is_right(tabom.rows_of(reference)).all()

def test_arms_have_settings_and_losses_of_their_own():
    arm, config = tabom.read_arm("TABOM-paper:rounds=2", ["margin=0.7", "rounds=3", "updates=5"])
    assert (arm, config.margin, config.rounds, config.updates) == ("TABOM-paper", 0.2, 2, 5)
    config, model = tabom.Config(window_size=4, margin=0.3, rank_weight=1.5), nn.Linear(1, 1)
    loss = {arm: tabom.loss_of(arm, model, config) for arm in tabom.ARMS if arm != "No-SFT"}
    assert loss["SFT-GT"] is loss["SFT-SD"] is nelbo_loss and loss["dInfer"] is dinfer_loss
    assert loss["T3D"].func is t3d_loss and loss["T3D"].keywords["reference"].model is model
    for arm, weight in (("trajectory", 0), ("TABOM-paper", 1), ("TABOM", 2)):
        assert loss[arm].func is tabom_loss and tabom.read_arm(arm, [])[1].rank_weight == weight
        assert loss[arm].keywords == {"window_size": 4, "margin": 0.3, "rank_weight": 1.5}

def test_the_prior_is_the_mean_rank_in_a_layout_its_weight_the_best_on_validation(monkeypatch):
    bench, asked, logits = tiny_bench(), [], torch.randn(3, 12, 5)
    three = toy_data.in_layout(rows(*[SOLVED[0]] * 3), torch.arange(3))  # layouts a, b, c
    data = tabom.solved(toy_data.in_layout(rows(*[SOLVED[0]] * 8), torch.arange(8) % 2))   # a, b
    data = dataclasses.replace(data, decode_rank=torch.stack([torch.arange(12).roll(i)
                                                              for i in range(8)]))
    correct = torch.tensor([True] * 4 + [False] * 4)
    def answer(model, problems, order):
        asked.append((order(logits, three) - predictive_entropy(logits), problems is
                      bench.validation))
        return None, torch.full((len(problems),), len(asked) == 4)
    monkeypatch.setattr(tabom, "answer", answer)
    for kind in ("kept", "contrast"):
        asked.clear()
        rank = data.decode_rank.float().view(2, 2, 2, 12).mean(1)        # kept or wrong, layout
        rank = torch.cat([rank[0] - (rank[1] if kind == "contrast" else 0), torch.zeros(1, 12)])
        order, weight = tabom.prior_order(bench, data, correct, data[correct], kind)
        assert weight == tabom.PRIOR_WEIGHTS[3] and all(validation for _, validation in asked)
        for (added, _), one in zip(asked, tabom.PRIOR_WEIGHTS):
            assert torch.allclose(added, one * rank, atol=1e-5)
        assert torch.allclose(order(logits, three), predictive_entropy(logits) + weight * rank)

def test_training_draws_by_odds_and_prints_metrics(capsys):
    data = tabom.solved(rows(*[SOLVED[0]] * 3))
    data = dataclasses.replace(data, response=data.response + torch.tensor([[0], [1], [2]]))
    seen = []
    def loss_fn(model, batch, *, mask_id, generator):
        seen.append(batch.response[:, 0].tolist())
        return model.weight.sum(), {"some_name": torch.tensor(float(len(seen)))}
    odds = torch.tensor([0.0, 1.0, 3.0])
    for _ in range(2):
        model = nn.Linear(1, 1)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        tabom.train(model, data, loss_fn, [optimizer], updates=4, batch_size=1000, warmup=1, seed=5,
                    label="here", odds=odds)
    assert seen[:4] == seen[4:] and seen[0] != seen[1]                   # paired by the seed
    drawn = [one for batch in seen for one in batch]
    assert 3 not in drawn and drawn.count(5) / len(drawn) == pytest.approx(0.75, abs=0.03)
    printed = capsys.readouterr().out
    assert "here, update 3: some_name 3.000\n    here, update 4: some_name 4.000" in printed

def test_training_follows_its_schedule_and_clips():
    data, rates, norms = tabom.solved(rows(SOLVED[0])), [], []
    class Watch(torch.optim.SGD):
        def step(self):
            rates.append(self.param_groups[0]["lr"])
            norms.append(self.param_groups[0]["params"][0].grad.norm().item())
    model = nn.Linear(1, 1, bias=False)
    def loss_fn(model, batch, **_):
        loss = (50 * model.weight).sum()
        return loss, {"nll": loss.detach()}
    tabom.train(model, data, loss_fn, [Watch(model.parameters(), lr=1.0)], updates=8, batch_size=2,
                warmup=4, seed=0, label="")
    cosine = [0.5 + 0.5 * math.cos(math.pi * update / 8) for update in range(8)]
    assert rates == pytest.approx([min((update + 1) / 4, cosine[update]) for update in range(8)])
    assert norms == pytest.approx([1.0] * 8, rel=1e-4) and not model.training

# ==== The command line and its folder =============================================================
TINY = ["width=8", "layers=1", "pretrain_updates=2", "updates=2", "queries=20", "test_problems=2",
        "samples=2", "rollout_filter=none"]

def run(*arguments, tiny=TINY):
    return tabom.main(["--demo", *arguments, "--set", *tiny])

def read(folder, seed=0):
    return json.loads((folder / f"seed-{seed}.json").read_text())

def test_the_whole_demo_with_every_arm(tmp_path, capsys):
    assert run("--out", str(tmp_path)) == 0
    found, text = read(tmp_path), capsys.readouterr().out
    assert list(found["arms"]) == list(tabom.DEFAULT_ARMS)
    assert {"left to right", "blocks of 6", "best", "best, sampled"} <= found["orders"].keys()
    assert found["settings"]["width"] == 8 and "width" not in found["arms"]["TABOM"]["settings"]
    paper = found["arms"]["TABOM-paper"]["settings"]
    assert (paper["margin"], paper["rank_weight"], paper["learning_rate"]) == (0.2, 1, 5e-4)
    assert found["arms"]["No-SFT:prior=kept"]["prior weight"] in tabom.PRIOR_WEIGHTS
    assert text.count("step 12") == 1 and "rank_loss" in text and "pair_accuracy" in text
    assert sorted(path.name for path in tmp_path.iterdir()) == ["seed-0.json", "seed-0.pt"]
    base = found["arms"]["No-SFT"]
    assert base["greedy"] == found["orders"]["entropy"] == base["rounds"][0]["greedy"]
    weights = torch.load(tmp_path / "seed-0.pt")
    assert weights.keys() == {"settings", "base", "TABOM"}
    assert not all(map(torch.equal, weights["base"].values(), weights["TABOM"].values()))

def test_a_run_goes_on_where_it_was(tmp_path, capsys):
    """A stored base and a fresh one give the same figures; what is finished is not done again."""
    one, other = tmp_path / "one", tmp_path / "two" / "deep"
    assert run("--arms", "SFT-SD", "--out", str(one)) == 0
    assert run("--arms", "SFT-SD", "TABOM", "--out", str(one)) == 0
    text = capsys.readouterr().out
    assert "the base is there" in text and "SFT-SD: not again" in text
    assert run("--arms", "SFT-SD", "TABOM", "--out", str(other)) == 0
    assert {**read(one), "made by": 0} == {**read(other), "made by": 0}
    capsys.readouterr()
    assert run("--seeds", "0", "3", "--arms", "SFT-SD", "TABOM", "--out", str(one)) == 0
    end = capsys.readouterr().out
    assert tabom.main(["--report", str(one)]) == 0
    assert capsys.readouterr().out.strip() in end and "paired by seed" in end
    (one / "seed-0.pt").unlink()                                         # its figures stay
    assert run("--out", str(one)) == 2 and "is gone" in capsys.readouterr().err

def test_the_film_shows_a_prompt_that_only_tabom_gets_right(monkeypatch):
    """Of four, it brings the factor forward by 0 to 3 turns; the base has the last one right."""
    tokens = toy_data.solve(picks(2, 3, 4, 5)[:, :6], torch.full((4,), 22))
    def answer(model, problems):
        rank = (torch.arange(12) - torch.arange(4)[:, None] * (model == "TABOM")) % 12
        return dataclasses.replace(tabom.solved(tokens), decode_rank=rank), torch.tensor(
            [model == "TABOM"] * 3 + [True])
    monkeypatch.setattr(tabom, "answer", answer)
    monkeypatch.setattr(tabom, "replay", lambda *_, **__: [(0, 0, torch.zeros(1, 12))] * 13)
    assert tabom.film(tokens, "base", "TABOM").split()[:4] == ["47×25a", "base", "|", "TABOM"]

@pytest.mark.parametrize("arguments, says", [
    (["--arms", "TABOM:margin=0.5"], "TABOM:margin=0.5 was made with margin=0.25, not 0.5"),
    (["--seeds", "3"], "the base was made with width=16, not 8"), ])
def test_other_settings_in_one_folder_are_refused(arguments, says, tmp_path, capsys):
    assert run("--arms", "TABOM:margin=0.5", "--out", str(tmp_path)) == 0
    found = (tmp_path / "seed-0.json").read_text()
    found = found.replace('"margin": 0.5', '"margin": 0.25') if "0.5" in says else found.replace(
        '"width": 8', '"width": 16')
    (tmp_path / "seed-0.json").write_text(found)
    assert run(*arguments, "--out", str(tmp_path)) == 2
    assert says in capsys.readouterr().err and (tmp_path / "seed-0.json").read_text() == found

def test_rounds_collect_with_the_tuned_model(tmp_path, monkeypatch):
    asked, original = [], tabom.self_distil
    def self_distil(model, queries, config, seed):
        asked.append((seed, model.token.weight.detach().clone()))
        return original(model, queries, config, seed)
    monkeypatch.setattr(tabom, "self_distil", self_distil)
    monkeypatch.setattr(tabom, "run_arm", ours.run_ours)
    monkeypatch.setitem(tabom.ARMS, "ours", ours.SETTINGS)
    assert run("--arms", "SFT-SD", "TABOM:rounds=3", "ours", "--out", str(tmp_path)) == 0
    for name, rounds in (("TABOM:rounds=3", 3), ("ours", 2)):
        found = read(tmp_path)["arms"][name]
        assert len(found["rounds"]) == rounds and found["rounds"][-1]["greedy"] == found["greedy"]
    seeds, weights = zip(*asked[1:4])                                    # the first: held out
    assert len(asked) == 5 and asked[4][0] == seeds[1]       # the second round of the two is alike
    draws = [torch.rand(9, generator=tabom.random_stream(seed, "masks")).tolist() for seed in seeds]
    assert draws[0] != draws[1] != draws[2] and not weights[1].equal(weights[0])
    assert not weights[2].equal(weights[1])

@pytest.mark.parametrize("arguments, says", [
    (["--set", "depth=3"], "there is no setting 'depth' here"),
    (["--set", "layers=two"], "layers cannot be 'two'"),
    (["--set", "margin=nan"], "margin must be from 0.0"),
    (["--set", "queries=" + 21 * "9"], "queries must be from 1"),
    (["--set", "layouts=2"], "layouts must be one of 1, 3, not 2"),
    (["--set", "width=10"], "width must be a multiple of 4"),
    (["--seeds", "-1"], "a seed must be"), (["--set", "width=100000"], "layers * width ** 2"),
    (["--arms", "TABOM:width=8"], "there is no setting 'width' here, only queries"),
    (["--arms", "TABOM", "TABOM"], "named twice"), (["--seeds", "1", "1"], "named twice"),
    (["--arms", "DPO"], "there is no arm 'DPO'"), (["--arms", "TABOM:prior=kept"], "only No-SFT"),
    (["--seeds", "1000000"], "a seed must be"), (["--device", "tpu9"], "no such device"),
    (["--arms", "TABOM:learning_rate=1e6,margin=1e6,rank_weight=1e6", "--set", "updates=30"],
     "lower its learning_rate"), (["--set", "layers=0"], "layers must be from 1"),
    (["--set", "rollout_filter=working"], "rollouts are kept, too few to train on"), ])
def test_a_mistake_is_one_sentence_and_exit_code_2(arguments, says, capsys):
    given = [one for one in TINY if not any(one.split("=")[0] == new.split("=")[0]
                                            for new in arguments)]
    assert run(*arguments, tiny=given) == 2
    error = capsys.readouterr().err
    assert says in error and error.startswith("tabom.py: ") and error.count("\n") == 1

@pytest.mark.parametrize("make, says", [
    (lambda path: path.write_text("mine"), "exists"),
    (lambda path: (path.mkdir(), (path / "seed-0.json").write_text("[]")), "not written by this"),
    (lambda path: (path.mkdir(), (path / "seed-0.pt").write_text("x")), "not written by this"), ])
def test_folders_that_cannot_be_used_are_named_before_any_work(make, says, tmp_path, capsys,
                                                               monkeypatch):
    make(tmp_path / "out")
    monkeypatch.setattr(tabom, "run_seed", None)
    assert run("--out", str(tmp_path / "out")) == 2
    assert says in capsys.readouterr().err.lower()

@pytest.mark.parametrize("arguments", [["--quick"], ["--out", "x"], ["--arms", "TABOM"], ["--arms"],
                                       ["--demo", "--report", "x"], ["--seeds", "x"],
                                       ["--report", "x", "--seeds", "1"]])
def test_flags_that_make_no_sense_together_are_refused(arguments):
    with pytest.raises(SystemExit, match="2"):
        tabom.main(arguments)

def test_an_empty_folder_has_no_report(tmp_path, capsys):
    assert tabom.main(["--report", str(tmp_path)]) == 2
    assert "there is no seed-N.json" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="0"):
        tabom.main([])
    assert "--demo" in capsys.readouterr().out

def test_ctrl_c_and_a_full_disk_leave_no_half_written_file(tmp_path, capsys, monkeypatch):
    for error, code in ((KeyboardInterrupt(), 130), (OSError(28, "No space left on device"), 2)):
        def write(*_):
            raise error
        monkeypatch.setattr(torch, "save", write)
        assert run("--arms", "No-SFT", "--out", str(tmp_path)) == code
        assert list(tmp_path.iterdir()) == []
    assert "No space left on device" in capsys.readouterr().err

def test_a_closed_pipe_ends_the_demo_quietly():
    command = f"{sys.executable} tabom.py --demo --set {' '.join(TINY)} --arms No-SFT | head -n 1"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, cwd=PROJECT)
    assert done.stderr == "" and done.stdout.startswith("TABOM on synthetic arithmetic")

def test_the_examples_of_the_readme_run_and_print_what_it_says(tmp_path, capsys):
    readme = (PROJECT / "README.md").read_text()
    assert run("--arms", "TABOM", "--out", str(tmp_path)) == 0
    for old, tiny in (("FOLDER/", f"{tmp_path}/"), ("layers=3, width=96", "layers=1, width=8")):
        readme = readme.replace(old, tiny)
    examples = re.findall(r"```python\n(.*?)```", readme, re.DOTALL)
    assert len(examples) == 3
    for example in examples:
        exec(example, {})
        printed = capsys.readouterr().out
        assert all(line in printed for line in re.findall(r"^# prints (.*)", example, re.MULTILINE))

def test_the_files_stay_small():
    """Minimal is part of the mission: a file that grows past its ceiling loses its readers."""
    for name, ceiling in (("tabom.py", 1021), ("toy_data.py", 360), ("test_tabom.py", 1600)):
        lines = (PROJECT / name).read_text().splitlines()
        assert len(lines) <= ceiling and max(map(len, lines)) <= 100, name

# ==== Claims: the sentences of the README, judged by the figures in .results/ =====================
# A part is shown if the 95 % interval of its mean over the seeds (Student, paired) lies inside its
# limits, refuted if outside, else not shown.  All parts must be shown, and one refuted refutes.
RIVALS = ("SFT-GT", "SFT-GT:style=own", "SFT-SD", "dInfer", "T3D", "trajectory",
          "SFT-SD:learning_rate=5e-5", "trajectory:learning_rate=5e-5")
FEW = "kept_each=250"               # as many right answers for each c, for every control

def stored(name):
    """The figures of every seed in a folder of .results/."""
    paths = sorted((PROJECT / ".results" / name).glob("seed-*.json"))
    assert len(paths) == 10, f".results/{name} must hold ten seeds, not {len(paths)}"
    return [json.loads(path.read_text()) for path in paths]

def gain(arm, over="No-SFT", figure="greedy"):
    """The difference of two arms in one figure, an array over the seeds."""
    def value(row):
        return {**row, **row["by c"], "others": mean(row["old"].values())}[figure]
    return np.array([value(run["arms"][arm]) - value(run["arms"][over]) for run in stored("ten")])

def judge(values, low, high=math.inf, digits=1):
    middle, start, end = toy_data.mean_and_interval(list(values))
    verdict = ("shown" if low < start and end < high else
               "refuted" if end < low or start > high else "not shown")
    return verdict, f"{middle:+.{digits}f} [{start:+.{digits}f}, {end:+.{digits}f}]"

def claim(number, parts):
    """The README's table must say this verdict and these figures; else its line is printed."""
    verdicts, figures = zip(*parts.values())
    verdict = min(verdicts, key=("not testable here", "refuted", "not shown", "shown").index)
    sentence = globals()[f"test_claim_{number}"].__doc__
    figures = "; ".join(f"{name} {one}" for name, one in zip(parts, figures))
    line = f"| {number} | {sentence} | {figures} | {verdict} |"
    assert line in (PROJECT / "README.md").read_text(), f"the README must say:\n{line}"

def test_claim_1():
    """Check: solutions in another style are less likely to the base than its own answers."""
    ratios = zip(*(run["likelihood gap"] for run in stored("ten/measure")))
    claim(1, {f"{i}0 % hidden": judge(gap, 0, digits=2) for i, gap in enumerate(ratios, 1)})

def test_claim_2():
    """SFT-GT forgets the other domains if it learns another style (10 points), not its own (1)."""
    claim(2, {"other style": judge(gain("SFT-GT", figure="others"), -math.inf, -10),
              "own style": judge(gain("SFT-GT:style=own", figure="others"), -1)})

def test_claim_3():
    """TABOM gains more than twice what SFT-SD gains."""
    claim(3, {"gain - 2 x its gain": judge(gain("TABOM") - 2 * gain("SFT-SD"), 0)})

def test_claim_4():
    """TABOM is ahead of No-SFT and of every trained rival by 10 points."""
    claim(4, {f"over {rival}": judge(gain("TABOM", rival), 10) for rival in ("No-SFT", *RIVALS)})

def test_claim_5():
    """TABOM keeps the other domains (within 1 point) and the skill (best order, within 3)."""
    claim(5, {"other domains": judge(gain("TABOM", figure="others"), -1, 1),
              "skill": judge(gain("TABOM", figure="best order"), -3, 3)})

def test_claim_6():
    """It is the recorded order (ahead of other ranks), and no narrower choice (90 % as wide)."""
    wide = [100 * run["arms"]["TABOM"]["effective factors"]
            / run["arms"]["No-SFT"]["effective factors"] for run in stored("ten")]
    claim(6, {**{f"over {ranks} ranks": judge(gain("TABOM", f"TABOM:ranks={ranks}"), 0)
                 for ranks in ("shuffled", "swapped")}, "factors, % of base": judge(wide, 90)})

def test_claim_7():
    """Check: TABOM raises TDS over SFT-SD."""
    claim(7, {"TDS": judge(gain("TABOM", "SFT-SD", "TDS"), 0, digits=3)})

def test_claim_8():
    """With two tokens per step TABOM is ahead of every trained rival."""
    claim(8, {f"over {rival}": judge(gain("TABOM", rival, "2 tokens"), 0) for rival in RIVALS})

def test_claim_9():
    """The window chosen on validation is ahead of 2 tokens and of the whole response."""
    claim(9, {f"over W = {w}": judge(gain("TABOM", f"TABOM:window_size={w}"), 0) for w in (2, 12)})

def test_claim_10():
    """On the paper's range of gamma and lambda it is flat (within 3 points)."""
    high, low, two = (f"TABOM-paper:{own}" for own in ("margin=0.3", "margin=0.1", "rank_weight=2"))
    claim(10, {"gamma 0.3 over 0.1": judge(gain(high, low), -3, 3),
               "lambda 2 over 1": judge(gain(two, "TABOM-paper"), -3, 3)})

def test_claim_11():
    """Controls keep at most a quarter of the gain: no checker, wrong answers, reversed ranks."""
    quarter = gain(f"TABOM:{FEW}") / 4
    claim(11, {control: judge(gain(f"TABOM:{FEW},{control}") - quarter, -math.inf, 0) for control
               in ("rollout_filter=none", "rollout_filter=wrong", "ranks=reversed")})

def test_claim_12():
    """The dial: ranking adds nothing to masking at c = 1 (within 1), something at every c >= 2."""
    added = {c: gain(f"TABOM:{FEW}", f"trajectory:{FEW}", str(c)) for c in range(1, 6)}
    claim(12, {"c = 1": judge(added.pop(1), -1, 1),
               **{f"c = {c}": judge(values, 0) for c, values in added.items()}})

def test_claim_13():
    """Margin, not weight: gamma 1 over 0.2; lambda 10 gives less than half; gamma 2 adds little."""
    two, ten = "TABOM-paper:rank_weight=2", "TABOM:rank_weight=10,margin=0.2,learning_rate=1e-4"
    claim(13, {"gamma 1 over 0.2": judge(gain("TABOM", two), 0),
               "lambda 10 - half": judge(gain(ten) - gain("TABOM") / 2, -math.inf, 0),
               "gamma 2 over 1": judge(gain("TABOM:margin=2", "TABOM"), -3, 3)})

def test_claim_14():
    """Order, not tokens: TABOM's order with the base's tokens gains more than the reverse."""
    claim(14, {"points": judge([run["orders"]["TABOM's order, base's tokens"]
                                - run["orders"]["base's order, TABOM's tokens"]
                                for run in stored("ten/measure")], 0)})

def test_claim_15():
    """TABOM is ahead of the untrained base with a prior per position from the same rollouts."""
    claim(15, {"points": judge(gain("TABOM", "No-SFT:prior=kept"), 0)})

def test_claim_16():
    """Three layouts: TABOM ahead by 8 points, and swapped ranks keep a quarter of it at most."""
    swapped = gain("TABOM:ranks=swapped") - gain("TABOM") / 4
    ahead = {f"over {one}": judge(gain("TABOM", one), 8) for one in ("No-SFT", *RIVALS)}
    claim(16, {**ahead, "swapped - a quarter": judge(swapped, -math.inf, 0)})

def test_claim_17():
    """Rounds, at 4 effective factors: TABOM is ahead of trajectory masking by 8 points."""
    two, masking = ([ours.greedy_at(4, run, f"{arm}:rounds=2") for run in stored("ten")]
                    for arm in ("TABOM", "trajectory"))
    some = [a - b for a, b in zip(two, masking) if not math.isnan(a - b)]
    verdict = judge(some, 8) if len(some) == 10 else ("not testable here", "seeds")
    claim(17, {f"both pass through 4 in {len(some)} of 10": verdict})

def test_the_tables_of_the_readme_are_what_the_reports_print():
    printed = {one: tabom.report(measure.read(PROJECT / ".results" / one))
               for one in ("ten", "gpu", "rates", "removals")}
    printed |= {"measure": measure.report(), "rounds": ours.report(stored("ten"))}
    for name, text in printed.items():
        assert (PROJECT / ".results" / f"{name}.txt").read_text() == text + "\n", name
    blocks = re.findall(r"```text\n\$ python (?:tabom.py --report )?\.results/(\w+).*\n([^`]*)```",
                        (PROJECT / "README.md").read_text())
    assert len(blocks) >= 2
    for name, block in blocks:
        lines = map(str.strip, printed[name].splitlines())
        assert all(line.strip() in lines for line in block.splitlines() if line), block
